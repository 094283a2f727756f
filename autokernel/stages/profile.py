"""Stage 1: what the model spends its time on, and what this machine could do at best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autokernel.config import LoadedExperiment
from autokernel.evaluate.modes import load_scenario
from autokernel.evaluate.roofline import EIGHT_BIT_DTYPES, MeasureCeilings
from autokernel.evaluate.whole_model import JobTurns, ModelJob, free_memory, model_job
from autokernel.events import Profiled
from autokernel.stages.context import RunContext
from autokernel.stages.whole_model import run_on_model, with_layers

if TYPE_CHECKING:
    from autokernel.profiling.capture import CapturedScenario

log = logging.getLogger(__name__)

_TIMEOUT_S = 900


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileScenario(ModelJob):
    """Job: capture one scenario's graph and time its kernels; of a part of the model's layers, if `layers` says how many."""

    loaded: LoadedExperiment
    scenario: str
    device: str
    threads: int
    seed: int
    layers: int | None = None

    def __call__(self) -> CapturedScenario | None:
        """What was captured; None where layers differ in kind, so that a part of them does not tell of the rest."""
        from autokernel.profiling.extrapolation import depths_of, extrapolated, period_of

        with model_job(self.device, self.threads) as turns:
            kinds = _kinds_of(self.loaded) if self.layers is not None else []
            whole, period = len(kinds), period_of(kinds)
            if self.layers is None or whole <= self.layers:
                return self._capture(None, turns)
            depths = depths_of(self.layers, whole, period) if period is not None else None
            if depths is None or (period != 1 and _kinds_of(with_layers(self.loaded, depths[1])) != kinds[: depths[1]]):
                return None
            fewer = self._capture(depths[0], turns)
            with turns.alone():
                free_memory()
            more = self._capture(depths[1], turns)
        return extrapolated(fewer, more, depths, whole, period or 1)

    def _capture(self, layers: int | None, turns: JobTurns) -> CapturedScenario:
        import torch

        from autokernel.profiling.capture import capture

        on_gpu = self.device == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        _, program = load_scenario(with_layers(self.loaded, layers), self.scenario, turns, self.seed)
        captured = capture(program, self.device, turns=turns)
        return replace(captured, peak_bytes=torch.cuda.max_memory_reserved()) if on_gpu else captured


def _kinds_of(loaded: LoadedExperiment) -> list[tuple[Any, ...]]:
    """For each layer of the whole model what its config says of that layer alone; none where there is no telling their number.

    The first few may all be of the same kind where later ones are not: captures of those alone would not show it.
    """
    from autokernel.profiling.workload import model_config

    if not loaded.experiment.model.by_auto_class:
        return [()] * (loaded.experiment.model.depth or 0)
    config = model_config(loaded).get_text_config()
    whole = int(getattr(config, "num_hidden_layers", 0))
    facts = [getattr(config, name) for name in dir(config) if "layer" in name]
    lists = [fact for fact in facts if isinstance(fact, list) and len(fact) == whole]
    return [tuple(kinds[number] for kinds in lists) for number in range(whole)]


def _captures(context: RunContext, scenarios: Sequence[str], layers: int | None) -> list[tuple[str, str, Callable[[], Any]]]:
    return [
        (
            f"scenario {name}",
            name,
            ProfileScenario(
                loaded=context.loaded,
                scenario=name,
                device=context.device,
                threads=context.threads,
                seed=context.seed,
                layers=layers,
            ),
        )
        for name in scenarios
    ]


def _complete(context: RunContext, found: dict[str, CapturedScenario | None]) -> list[CapturedScenario]:
    """All scenarios in order; those of which a part did not tell enough are captured as a whole."""
    missing = [name for name, captured in found.items() if captured is None]
    if missing:
        log.warning("%s: layers differ in kind, so all are captured", ", ".join(missing))
        whole = run_on_model(context, "profile", _captures(context, missing, None), _TIMEOUT_S)
        found |= dict(zip(missing, whole, strict=True))
    return [captured for captured in found.values() if captured is not None]


def profile(context: RunContext) -> Profiled:
    """The hotspots of all scenarios, from the journal if an earlier process found them."""
    known = context.state.profiled if context.state is not None else None
    profiled = known if known is not None else _profile(context)
    context.peak_bytes = profiled.peak_bytes
    return profiled


def _profile(context: RunContext) -> Profiled:
    from autokernel.profiling.hotspots import rank

    experiment = context.experiment
    with context.stage("profile", total=len(experiment.scenarios) + 1):
        eight_bit = EIGHT_BIT_DTYPES if context.device == "cuda" else ()  # a CPU may take seconds for one such product
        dtypes = tuple(dict.fromkeys(("float32", experiment.model.dtype, *eight_bit)))
        layers = experiment.profile.layers
        names = tuple(experiment.scenarios)
        jobs = _captures(context, names, layers)
        jobs.append(("ceilings", "", MeasureCeilings(device=context.device, threads=context.threads, dtypes=dtypes)))
        *found, ceilings = run_on_model(context, "profile", jobs, _TIMEOUT_S, layers=layers)
        captured = _complete(context, dict(zip(names, found, strict=True)))
        profiled = Profiled(
            hotspots=rank(captured, ceilings),
            scenario_us={c.scenario: c.step_us for c in captured},
            read_gb_per_s=ceilings.read_gb_per_s,
            peak_tflops=dict(ceilings.tflops),
            ceilings=ceilings.to_json(),
            layers=layers if any(scenario.num_calls for scenario in captured) else None,
            peak_bytes={c.scenario: c.peak_bytes for c in captured if c.peak_bytes},
        )
        context.emit(profiled)
    return profiled
