"""Whole-model jobs: each scenario timed in every mode, interleaved in one process. Run in a worker's child.

On a GPU every contender runs from a CUDA graph that is captured by hand, so that nothing of the host's part counts. They
share the weights, one KV cache (each step writes the same slot of it) and the memory of their graphs; what fails to be
captured is no contender, and the result says why. What captures its own graphs (reduce-overhead) is called as it is, its copies
of inputs and outputs included; where it falls back to launches one by one it is no contender either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autokernel.config import LoadedExperiment
from autokernel.errors import WorkerError
from autokernel.evaluate.modes import (
    BUNDLE,
    CAPTURES_ITSELF,
    STOCK_MODES,
    Contender,
    Prepared,
    against_stock,
    build_program,
    compile_errors,
    failure_of,
    load_scenario,
    own_code,
    prepare,
)
from autokernel.evaluate.outputs import ScenarioCheck
from autokernel.evaluate.quality import check_program
from autokernel.evaluate.timing import Comparison, compare
from autokernel.evaluate.whole_model import JobTurns, ModelJob, free_memory, model_job
from autokernel.events import ModeTiming, ScenarioResult
from autokernel.records import Record, Speedup

if TYPE_CHECKING:
    import torch

    from autokernel.export.bundle import Bundle
    from autokernel.profiling.workload import ScenarioProgram

log = logging.getLogger(__name__)

_SCREEN_ROUNDS = 7
_MIN_SAMPLE_US = 2000
_ROUNDS_S = 10.0  # steps of hundreds of milliseconds get fewer rounds than asked for, if these do not fit in, ...
_LEAST_ROUNDS = 11  # ... but no fewer than these
_AGAIN = "the baseline again"
_MOST_NOISE = 0.1  # on a machine so busy that the same code differs by more from itself, anything could pass as equal


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioTiming(Record):
    """Times of one scenario. Speed-ups are those of the baseline's time over each contender's."""

    scenario: str
    baseline: str
    modes: tuple[ModeTiming, ...]
    speedups: Mapping[str, Speedup]
    hits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # contender -> problem key -> sites
    reasons: Mapping[str, str] = field(default_factory=dict)  # problem key -> why the bundle's entry did not apply somewhere
    failures: Mapping[str, str] = field(default_factory=dict)  # contender -> why it could not run
    benchmarks: Mapping[str, int] = field(default_factory=dict)  # bundle -> kernels Inductor timed to build it: must be 0
    check: ScenarioCheck | None = None  # of the bundle, if it was asked for
    products: tuple[str, ...] = ()  # of the graph, as `ScenarioOptions` has them
    spread: float = 0.0  # how far the baseline was from itself, timed as two contenders: the far end of the interval
    peak_bytes: int = 0  # of GPU memory that the job had reserved
    seconds: Mapping[str, float] = field(default_factory=dict)  # of the job on a GPU: in all, waiting for it, having it


def scenario_result(timing: ScenarioTiming, stock: bool = False) -> ScenarioResult:
    """The line of a results table: the bundle against the best stock mode.

    It passes unless it is clearly slower: the interval is below 1, and by more than the same code differs from itself (a
    tenth at most). Stock code changes nothing, and passes. Where eager PyTorch beats all that is compiled, a
    bundle passes if it is no slower than Inductor's default, which it replaces.
    """
    speedup = timing.speedups[BUNDLE]
    medians = {mode.mode: mode.median_us for mode in timing.modes}
    replaces_slower = timing.baseline == "eager" and medians[BUNDLE] <= medians.get("default", 0.0)
    return ScenarioResult(
        scenario=timing.scenario,
        modes=timing.modes,
        best_stock=timing.baseline,
        speedup=speedup,
        passed=stock or speedup.high >= 1 or 1 - speedup.ratio <= min(timing.spread, _MOST_NOISE) or replaces_slower,
    )


def result_with(bundle: Bundle, timing: ScenarioTiming) -> ScenarioResult:
    """`scenario_result` of a scenario timed with this bundle: where nothing of it is in the code, that is stock code."""
    own = any(part.scenario == timing.scenario for part in bundle.scenario_options)
    hits = timing.hits.get(BUNDLE)
    untouched = hits is not None and not any(hits.values()) and not own and not bundle.graph_options
    return scenario_result(timing, stock=bundle.stock or untouched)


@dataclass(slots=True, kw_only=True)
class _Found:
    """What a job has learned so far, by contender."""

    calls: dict[str, Callable[[], object]] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    hits: dict[str, Mapping[str, int]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    speedups: dict[str, Speedup] = field(default_factory=dict)
    benchmarks: dict[str, int] = field(default_factory=dict)
    check: ScenarioCheck | None = None
    spread: float = 0.0
    products: tuple[str, ...] = ()

    def add(self, contender: Contender, prepared: Prepared) -> None:
        self.compile_s[contender.name] = prepared.compile_s
        if contender.bundle is not None:
            self.hits[contender.name] = prepared.hits
            if contender.name == BUNDLE:
                self.reasons = prepared.reasons
            self.benchmarks[contender.name] = prepared.num_benchmarks
            self.products = prepared.products

    def fail(self, scenario: str, contender: Contender, reason: str) -> None:
        self.failures[contender.name] = reason
        log.warning("%s: %s does not run: %s", scenario, contender.name, reason)

    def judge(self, result: Comparison) -> None:
        self.medians |= result.medians_us
        self.spreads |= result.spreads_us
        self.speedups |= result.speedups
        again = self.speedups.pop(_AGAIN, None)
        if again is not None:
            del self.medians[_AGAIN], self.spreads[_AGAIN]
            self.spread = max(1 - again.low, again.high - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeScenario(ModelJob):
    """Job: time one scenario of an experiment in several modes.

    The baseline is the fastest of `baselines` in rounds of their own, so that picking it does not bias the result.

    `in_turn`: contenders are compiled and compared with the first of them, a baseline, one by one, and let go of, so that many
    bundles fit into a GPU; those that `budget_s` does not suffice for are recorded as failures. `check` (GPU only): the
    bundle's outputs are checked as well, with the code that is timed.
    """

    loaded: LoadedExperiment
    scenario: str
    device: str
    threads: int
    contenders: tuple[Contender, ...]
    baselines: tuple[str, ...]
    rounds: int
    seed: int = 0
    in_turn: bool = False
    budget_s: float = float("inf")
    check: bool = False

    def __call__(self) -> ScenarioTiming:
        """Do it.

        Raises:
            WorkerError: no baseline runs.
        """
        start = time.monotonic()
        with model_job(self.device, self.threads) as turns:
            if self.device != "cuda":
                return self._on_cpu(turns)
            timing = self._on_gpu(turns)
        seconds = {"all": time.monotonic() - start, "waiting": turns.waited_s, "on the device": turns.held_s}
        return replace(timing, seconds={name: round(value, 1) for name, value in seconds.items()})

    def _on_cpu(self, turns: JobTurns) -> ScenarioTiming:
        from autokernel.profiling.workload import load_model

        model = load_model(self.loaded, self.device)
        found = _Found()
        for contender in self.contenders:
            # a program of its own for each: a static cache is state
            program = build_program(self.loaded, model, self.scenario, self.device, self.seed)
            try:
                with turns.building():
                    prepared = prepare(contender, program, turns)
            except compile_errors() as error:
                found.fail(self.scenario, contender, failure_of(error))
                continue
            found.calls[contender.name] = prepared.call
            found.add(contender, prepared)
        baseline = self._compare_all(found, turns)
        return self._result(found, baseline)

    def _on_gpu(self, turns: JobTurns) -> ScenarioTiming:
        from autokernel.evaluate.cuda_graphs import Capturer

        model, program = load_scenario(self.loaded, self.scenario, turns, self.seed)
        capturer = Capturer()
        found = _Found()
        start = time.monotonic() - turns.waited_s
        baseline = ""
        for contender in self.contenders:
            # what others kept it waiting for is not its own time
            if self.in_turn and found.calls and time.monotonic() - start - turns.waited_s > self.budget_s:
                found.failures[contender.name] = f"not tried: the {self.budget_s:g} s were used up"
                continue
            try:
                self._prepare_on_gpu(contender, program, model, capturer, turns, found)
            except compile_errors() as error:
                found.fail(self.scenario, contender, failure_of(error))
                continue
            if self.in_turn:
                baseline = baseline or self._first_baseline(contender)
                if contender.name != baseline:
                    self._compare(found, turns, baseline, [baseline, contender.name], self.rounds)
                    replay = found.calls.pop(contender.name)
                    if isinstance(replay, _Replay):
                        replay.prepared.compiled.clear()
                    del replay
                    with turns.alone():
                        free_memory(everything=False)
        if not self.in_turn:
            baseline = self._compare_all(found, turns, capturer)
        return self._result(found, baseline)

    def _prepare_on_gpu(
        self,
        contender: Contender,
        program: ScenarioProgram,
        model: torch.nn.Module,
        capturer: Any,
        turns: JobTurns,
        found: _Found,
    ) -> None:
        """Compile, check if asked to, and capture one contender."""
        if contender.name == "eager" or contender.name in CAPTURES_ITSELF:
            with turns.alone():  # no telling where their device work begins
                prepared = prepare(contender, program, turns)
        else:
            with turns.building():
                prepared = prepare(contender, program, turns)
        with turns.alone():
            if self.check and contender.bundle is not None:
                found.check = check_program(self.loaded, self.scenario, program, model, prepared.forward, self.seed)
                program.reset()
            if contender.name in CAPTURES_ITSELF:
                found.calls[contender.name] = prepared.call
            else:
                found.calls[contender.name] = _Replay(capturer.capture(prepared.call), prepared)
        found.add(contender, prepared)

    def _first_baseline(self, contender: Contender) -> str:
        if contender.name not in self.baselines:
            raise ValueError(
                f"in turn, the first contender must be one of the baselines {self.baselines}, not {contender.name}"
            )
        return contender.name

    def _compare_all(self, found: _Found, turns: JobTurns, capturer: Any = None) -> str:
        """All contenders against the best of the baselines, which runs twice; returns which that was."""
        stock = [name for name in self.baselines if name in found.calls]
        if not stock:
            raise WorkerError(f"scenario {self.scenario}: none of {self.baselines} runs: {found.failures}")
        baseline = stock[0]
        rounds = self.rounds
        with turns.alone():
            if len(stock) > 1:
                candidates = {name: found.calls[name] for name in stock}
                screen = compare(candidates, baseline, _SCREEN_ROUNDS, device=self.device, seed=self.seed)
                baseline = min(screen.medians_us, key=screen.medians_us.__getitem__)
                round_s = sum(max(us, _MIN_SAMPLE_US) for us in screen.medians_us.values()) / 1e6
                rounds = min(rounds, max(_LEAST_ROUNDS, int(_ROUNDS_S / round_s)))
            again = found.calls[baseline]
            if isinstance(again, _Replay):  # a graph of its own: what it computes with lies elsewhere
                again = _Replay(capturer.capture(again.prepared.call), again.prepared)
            found.calls[_AGAIN] = again
            self._compare(found, turns, baseline, list(found.calls), rounds)
        return baseline

    def _compare(self, found: _Found, turns: JobTurns, baseline: str, names: list[str], rounds: int) -> None:
        calls = {name: found.calls[name] for name in names}
        with turns.alone():
            found.judge(compare(calls, baseline, rounds, device=self.device, seed=self.seed + 1, min_sample_us=_MIN_SAMPLE_US))

    def _result(self, found: _Found, baseline: str) -> ScenarioTiming:
        if not baseline:
            raise WorkerError(f"scenario {self.scenario}: none of {self.baselines} runs: {found.failures}")
        modes = tuple(
            ModeTiming(
                mode=name,
                median_us=found.medians[name],
                spread_us=found.spreads[name],
                compile_s=round(found.compile_s[name], 2),
            )
            for name in found.medians
        )
        return ScenarioTiming(
            scenario=self.scenario,
            baseline=baseline,
            modes=modes,
            speedups=found.speedups,
            hits=found.hits,
            reasons=found.reasons,
            failures=found.failures,
            benchmarks=found.benchmarks,
            check=found.check,
            products=found.products,
            spread=found.spread,
            peak_bytes=_peak_bytes() if self.device == "cuda" else 0,
        )


def _peak_bytes() -> int:
    import torch

    return torch.cuda.max_memory_reserved()


@dataclass(frozen=True, slots=True)
class _Replay:
    """One step as a graph; holds on to everything that the graph reads."""

    captured: tuple[torch.cuda.CUDAGraph, Any]
    prepared: Prepared

    def __call__(self) -> None:
        self.captured[0].replay()


__all__ = [
    "BUNDLE",
    "STOCK_MODES",
    "Contender",
    "Prepared",
    "ScenarioCheck",
    "ScenarioTiming",
    "TimeScenario",
    "against_stock",
    "build_program",
    "compile_errors",
    "own_code",
    "prepare",
    "result_with",
    "scenario_result",
]
