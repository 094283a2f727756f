"""Whole-model jobs: each scenario timed in every mode, interleaved in one process. Run in a worker's child."""

from __future__ import annotations

import logging
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autokernel.config import LoadedExperiment
from autokernel.evaluate.timing import compare, pin_threads
from autokernel.events import ModeTiming, ScenarioResult
from autokernel.export.bundle import Bundle
from autokernel.records import Record, Speedup
from autokernel.workers.device_lock import device_lock

if TYPE_CHECKING:
    import torch

    from autokernel.profiling.workload import ScenarioProgram

log = logging.getLogger(__name__)

STOCK_MODES = ("eager", "default", "max-autotune")
BUNDLE = "bundle"
_SCREEN_ROUNDS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to run the model: a stock mode by name, or a bundle under a name of its own."""

    name: str
    bundle: Bundle | None = None


def against_stock(bundle: Bundle) -> tuple[Contender, ...]:
    """Every stock mode, and the bundle under the name `BUNDLE`."""
    return (*(Contender(name=mode) for mode in STOCK_MODES), Contender(name=BUNDLE, bundle=bundle))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioTiming(Record):
    """Times of one scenario. Speed-ups are those of the baseline's time over each contender's."""

    scenario: str
    baseline: str
    modes: tuple[ModeTiming, ...]
    speedups: Mapping[str, Speedup]
    hits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # contender -> problem key -> sites
    failures: Mapping[str, str] = field(default_factory=dict)  # contender -> why it could not run
    num_benchmarks: int = 0  # kernels that Inductor timed while it compiled the bundles: must be 0


def scenario_result(timing: ScenarioTiming, stock: bool = False) -> ScenarioResult:
    """The line of a results table: the bundle against the best stock mode.

    It passes unless it is clearly slower. A stock bundle changes nothing, and passes. Where eager PyTorch beats all that
    is compiled, a bundle passes if it is no slower than Inductor's default, which it replaces.
    """
    speedup = timing.speedups[BUNDLE]
    medians = {mode.mode: mode.median_us for mode in timing.modes}
    replaces_slower = timing.baseline == "eager" and medians[BUNDLE] <= medians.get("default", 0.0)
    return ScenarioResult(
        scenario=timing.scenario,
        modes=timing.modes,
        best_stock=timing.baseline,
        speedup=speedup,
        passed=stock or speedup.high >= 1 or replaces_slower,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeScenario:
    """Job: time one scenario of an experiment in several modes.

    The baseline is the fastest of `baselines` in rounds of their own, so that picking it does not bias the result.
    """

    loaded: LoadedExperiment
    scenario: str
    device: str
    threads: int
    contenders: tuple[Contender, ...]
    baselines: tuple[str, ...]
    rounds: int
    seed: int = 0

    def __call__(self) -> ScenarioTiming:
        from autokernel.profiling.workload import load_model

        pin_threads(self.threads)
        model = load_model(self.loaded, self.device)
        calls: dict[str, Callable[[], object]] = {}
        compile_s: dict[str, float] = {}
        hits: dict[str, Mapping[str, int]] = {}
        failures: dict[str, str] = {}
        num_benchmarks = 0
        for contender in self.contenders:
            program = build_program(self.loaded, model, self.scenario, self.device, self.seed)
            try:
                with device_lock(self.device, exclusive=False):
                    prepared = prepare(contender, program)
            except compile_errors() as error:
                failures[contender.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
                log.warning("%s: mode %s does not run: %s", self.scenario, contender.name, failures[contender.name])
                continue
            calls[contender.name] = prepared.call
            compile_s[contender.name] = prepared.compile_s
            if contender.bundle is not None:
                hits[contender.name] = prepared.hits
                num_benchmarks += prepared.num_benchmarks
        return self._time(calls, compile_s, hits, failures, num_benchmarks)

    def _time(
        self,
        calls: dict[str, Callable[[], object]],
        compile_s: dict[str, float],
        hits: dict[str, Mapping[str, int]],
        failures: dict[str, str],
        num_benchmarks: int,
    ) -> ScenarioTiming:
        stock = [name for name in self.baselines if name in calls]
        if not stock:
            raise RuntimeError(f"scenario {self.scenario}: none of {self.baselines} runs: {failures}")
        with device_lock(self.device, exclusive=True):
            baseline = stock[0]
            if len(stock) > 1:
                screen = compare({n: calls[n] for n in stock}, stock[0], _SCREEN_ROUNDS, device=self.device, seed=self.seed)
                baseline = min(screen.medians_us, key=screen.medians_us.__getitem__)
            result = compare(calls, baseline, self.rounds, device=self.device, seed=self.seed + 1, min_sample_us=2000)
        modes = tuple(
            ModeTiming(
                mode=name,
                median_us=result.medians_us[name],
                spread_us=result.spreads_us[name],
                compile_s=round(compile_s[name], 2),
            )
            for name in calls
        )
        return ScenarioTiming(
            scenario=self.scenario,
            baseline=baseline,
            modes=modes,
            speedups=result.speedups,
            hits=hits,
            failures=failures,
            num_benchmarks=num_benchmarks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A contender that has been compiled and run once."""

    call: Callable[[], Any]
    forward: Callable[..., Any]
    compile_s: float
    hits: Mapping[str, int]
    reasons: Mapping[str, str]
    num_benchmarks: int


def compile_errors() -> tuple[type[BaseException], ...]:
    """What a mode that does not compile or run raises: the model's fault or the compiler's, never ours."""
    import torch

    return (RuntimeError, AssertionError, TypeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException)


def build_program(loaded: LoadedExperiment, model: torch.nn.Module, scenario: str, device: str, seed: int) -> ScenarioProgram:
    """A program of its own for each contender: a static cache is state, and must not be shared."""
    from autokernel.profiling.workload import build_scenario

    return build_scenario(
        model, loaded.experiment.scenarios[scenario], scenario, seed, device, loaded.experiment.model.dtype, loaded=loaded
    )


def prepare(contender: Contender, program: ScenarioProgram) -> Prepared:
    """Compile a contender for a program and run it twice.

    Raises:
        any of `compile_errors()`: it does not compile or run.
    """
    import torch
    from torch._dynamo.utils import counters

    from autokernel.export.apply import BundleBackend

    forward: Callable[..., Any] = own_code(program.module)
    backend: BundleBackend | None = None
    if contender.bundle is not None:
        backend = BundleBackend(contender.bundle)
        forward = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)
    elif contender.name == "max-autotune":
        forward = torch.compile(forward, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    elif contender.name == "default":
        forward = torch.compile(forward, fullgraph=True, dynamic=False)
    elif contender.name != "eager":
        raise ValueError(f"unknown mode {contender.name!r}; stock modes: {', '.join(STOCK_MODES)}")
    inputs = program.inputs
    benchmarks_before = counters["inductor"]["select_algorithm_autotune"]

    def call() -> Any:
        with torch.no_grad():
            return forward(*inputs)

    program.reset()
    start = time.perf_counter()
    call()
    compile_s = time.perf_counter() - start
    program.reset()
    call()
    usage = backend.usage() if backend is not None else {}
    return Prepared(
        call=call,
        forward=forward,
        compile_s=compile_s,
        hits={key: item.hits for key, item in usage.items()},
        reasons={key: "; ".join(item.reasons) for key, item in usage.items() if item.reasons},
        num_benchmarks=counters["inductor"]["select_algorithm_autotune"] - benchmarks_before,
    )


def own_code(module: torch.nn.Module) -> Callable[..., Any]:
    """A function that calls the module and has a code object of its own.

    Dynamo keeps compiled code per code object and walks through all of it at each call: contenders that shared one would
    pay for those compiled before them.
    """

    def call(*inputs: Any) -> Any:
        return module(*inputs)

    # a new line table is enough to make the copy a different object, equal in everything else
    code = call.__code__.replace(co_name=f"call_{id(module)}")
    return types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)
