"""Stage 1: what the model spends its time on, and what this machine could do at best."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.config import LoadedExperiment
from autokernel.evaluate.modes import Contender, compile_errors, failure_of, load_scenario, prepare
from autokernel.evaluate.roofline import EIGHT_BIT_DTYPES, MeasureCeilings
from autokernel.evaluate.whole_model import JobTurns, ModelJob, model_job
from autokernel.events import Profiled
from autokernel.stages.context import RunContext
from autokernel.stages.whole_model import run_on_model, with_layers

if TYPE_CHECKING:
    from autokernel.profiling.capture import CapturedScenario

log = logging.getLogger(__name__)

_TIMEOUT_S = 900
_REHEARSED = "max-autotune"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileScenario(ModelJob):
    """Job: capture one scenario's graph and time its kernels."""

    loaded: LoadedExperiment
    scenario: str
    device: str
    threads: int
    seed: int

    def __call__(self) -> CapturedScenario:
        with model_job(self.device, self.threads) as turns:
            return self._capture(turns)

    def _capture(self, turns: JobTurns) -> CapturedScenario:
        from autokernel.profiling.capture import capture

        _, program = load_scenario(self.loaded, self.scenario, turns, self.seed)
        return capture(program, self.device, turns=turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearse(ModelJob):
    """Job: have Inductor autotune one scenario on a few layers, for the sake of its caches on disk.

    Layers are alike, and so are their kernels, down to their names: when the whole model is compiled with max-autotune for
    validation, most of its choices are found in Inductor's own caches. They were made as always, alone on the device; but
    meanwhile other scenarios compile, on cores that profiling leaves idle.
    """

    loaded: LoadedExperiment
    scenario: str
    device: str
    threads: int
    seed: int

    def __call__(self) -> float:
        """Seconds that it took."""
        start = time.monotonic()
        with model_job(self.device, self.threads) as turns:
            self._compile(turns)
        return time.monotonic() - start

    def _compile(self, turns: JobTurns) -> None:
        _, program = load_scenario(self.loaded, self.scenario, turns, self.seed)
        try:
            with turns.building():
                prepare(Contender(name=_REHEARSED), program, turns)
        except compile_errors() as error:  # validation will say so
            log.warning("%s: %s does not run on a few layers: %s", self.scenario, _REHEARSED, failure_of(error))


def _rehearsals(context: RunContext) -> list[tuple[str, str, Callable[[], Any]]]:
    """One for each scenario, if validation compares with max-autotune on a GPU."""
    validation = context.experiment.validation
    loaded = with_layers(context.loaded, validation.ablation_layers)
    if context.device != "cuda" or _REHEARSED not in validation.baselines or loaded is context.loaded:
        return []
    return [
        (
            f"rehearsal {name}",
            name,
            Rehearse(loaded=loaded, scenario=name, device=context.device, threads=context.threads, seed=context.seed),
        )
        for name in context.experiment.scenarios
    ]


def profile(context: RunContext) -> Profiled:
    """The hotspots of all scenarios, from the journal if an earlier process found them."""
    if context.state is not None and context.state.profiled is not None:
        return context.state.profiled
    from autokernel.profiling.hotspots import rank

    experiment = context.experiment
    with context.stage("profile", total=len(experiment.scenarios) + 1):
        eight_bit = EIGHT_BIT_DTYPES if context.device == "cuda" else ()  # a CPU may take seconds for one such product
        dtypes = tuple(dict.fromkeys(("float32", experiment.model.dtype, *eight_bit)))
        jobs: list[tuple[str, str, Callable[[], Any]]] = [
            (
                f"scenario {name}",
                name,
                ProfileScenario(
                    loaded=context.loaded, scenario=name, device=context.device, threads=context.threads, seed=context.seed
                ),
            )
            for name in experiment.scenarios
        ]
        jobs.append(("ceilings", "", MeasureCeilings(device=context.device, threads=context.threads, dtypes=dtypes)))
        layers = context.experiment.validation.ablation_layers
        *captured, ceilings = run_on_model(
            context, "profile", jobs, _TIMEOUT_S, beside=_rehearsals(context), beside_layers=layers
        )
        profiled = Profiled(
            hotspots=rank(captured, ceilings),
            scenario_us={c.scenario: c.step_us for c in captured},
            read_gb_per_s=ceilings.read_gb_per_s,
            peak_tflops=dict(ceilings.tflops),
            ceilings=ceilings.to_json(),
        )
        context.emit(profiled)
    return profiled
