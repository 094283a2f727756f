"""Stage 5: the whole model with the bundle: equivalent, its metric intact, no scenario slower. What fails is dropped."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autokernel.config import LoadedExperiment
from autokernel.errors import WorkerError
from autokernel.evaluate.end_to_end import ScenarioTiming, result_with
from autokernel.evaluate.outputs import ScenarioCheck, verdict_of
from autokernel.evaluate.whole_model import ModelJob, model_job
from autokernel.events import EvalResult, ModelValidated
from autokernel.export.bundle import Bundle, Entry
from autokernel.records import Check, Record, Verdict
from autokernel.stages.ablation import without_useless
from autokernel.stages.context import RunContext
from autokernel.stages.never_slower import OPTIONS, time_scenarios, time_until_never_slower, without
from autokernel.stages.whole_model import run_on_model

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800
_RUNS = "runs"  # name of the check that a model which crashes has failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality(Record):
    """Equivalence on every scenario, and the metric if the experiment has one."""

    verdict: Verdict
    evals: tuple[EvalResult, ...] = ()

    @property
    def passed(self) -> bool:
        return self.verdict.passed and all(result.passed for result in self.evals)

    @property
    def why_not(self) -> str:
        failures = self.verdict.failures
        reasons = [c.note if c.name == _RUNS else f"{c.name} is {c.value:.4g}, limit {c.limit:.4g}" for c in failures]
        reasons += [_worsening(result) for result in self.evals if not result.passed]
        return "; ".join(reasons)


def _worsening(result: EvalResult) -> str:
    if math.isfinite(result.worse_by_high):
        return f"{result.metric} is worse by {result.worse_by_high:.4g}, limit {result.limit:.4g}"
    return (
        f"{result.metric} is {result.bundle:.4g} with the bundle and {result.stock:.4g} with stock code: at the bad end of the "
        f"interval infinitely worse, limit {result.limit:.4g}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckModel(ModelJob):
    """Job: the model with a bundle against stock, by the error budget and by its own metric."""

    loaded: LoadedExperiment
    bundle: Bundle
    device: str
    threads: int
    seed: int

    def __call__(self) -> Quality:
        from autokernel.evaluate.quality import check_model

        with model_job(self.device, self.threads) as turns, turns.alone():
            verdict, evals = check_model(self.loaded, self.bundle, self.device, self.seed)
        return Quality(verdict=verdict, evals=evals)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckScenario(ModelJob):
    """Job: the same on a GPU, for one scenario; scenario "" is the metric."""

    loaded: LoadedExperiment
    bundle: Bundle
    scenario: str
    device: str
    threads: int
    seed: int

    def __call__(self) -> ScenarioCheck | EvalResult:
        from autokernel.evaluate.quality import check_metric, check_scenario

        with model_job(self.device, self.threads) as turns:
            if not self.scenario:
                return check_metric(self.loaded, self.bundle, turns, self.seed)
            return check_scenario(self.loaded, self.bundle, self.scenario, turns, self.seed)


def validate(context: RunContext, bundle: Bundle, dropped: Mapping[str, str]) -> tuple[ModelValidated, Bundle]:
    """The verdict on the whole model, and the bundle that passes it: possibly smaller, at worst stock."""
    known = context.state.validated if context.state is not None and "validate" in context.state.stages_done else None
    if known is not None:
        left = without(bundle, known.dropped)
        if left.applied_digest == known.applied_digest:
            return known, left
    gone = dict(dropped)
    with context.stage("validate", total=len(context.experiment.scenarios) + 1):
        if context.experiment.validation.ablation:
            bundle = without_useless(context, bundle, gone)
        bundle, quality, timed = _until_all_hold(context, bundle, gone)
        scenarios = tuple(result_with(bundle, timing) for timing in timed)
        validated = ModelValidated(
            verdict=quality.verdict,
            evals=quality.evals,
            scenarios=scenarios,
            dropped=gone,
            applied_digest=bundle.applied_digest,
        )
        context.emit(validated)
    return validated, bundle


def _until_all_hold(context: RunContext, bundle: Bundle, gone: dict[str, str]) -> tuple[Bundle, Quality, list[ScenarioTiming]]:
    """A bundle that passes and slows nothing down; its quality, its times. What is left of one is judged again by both."""
    quality, timings = _examine(context, bundle)
    while True:
        while not quality.passed and not bundle.stock:
            bundle, quality = _drop_harmful(context, bundle, quality, gone)
            timings = []
        timed, bundle, changed = time_until_never_slower(context, bundle, gone, timings)
        if not changed or bundle.stock:
            return bundle, quality, timed
        checks = [timing.check for timing in timed if timing.check is not None]
        quality = _with_metric(context, bundle, checks) if len(checks) == len(timed) else check(context, bundle)
        if quality.passed:  # what is exported is what was judged
            return bundle, quality, timed


def _examine(context: RunContext, bundle: Bundle) -> tuple[Quality, list[ScenarioTiming]]:
    """A bundle's quality; on a GPU also its times, by the jobs that compile it anyway. A crash leaves that to `check`."""
    if context.device != "cuda":
        return check(context, bundle), []
    try:
        timings = time_scenarios(context, bundle, tuple(context.experiment.scenarios))
    except WorkerError as error:
        log.warning("the model did not run to its end with the bundle: %s", error)
        return check(context, bundle), []
    if any(timing.check is None for timing in timings):  # it did not compile somewhere
        return check(context, bundle), []
    checks = [timing.check for timing in timings if timing.check is not None]
    return _with_metric(context, bundle, checks), timings


def _check_jobs(context: RunContext, bundle: Bundle, scenarios: Sequence[str]) -> list[ScenarioCheck | EvalResult]:
    jobs = [
        (
            f"equivalence: {name}" if name else "metric",
            name or next(iter(context.experiment.scenarios)),
            CheckScenario(
                loaded=context.loaded,
                bundle=bundle,
                scenario=name,
                device=context.device,
                threads=context.threads,
                seed=context.seed + 3,
            ),
        )
        for name in scenarios
    ]
    return run_on_model(context, "validate", jobs, _TIMEOUT_S, bundle=bundle)


def _with_metric(context: RunContext, bundle: Bundle, checks: Sequence[ScenarioCheck]) -> Quality:
    """On a GPU: what checks of all scenarios say together, and the metric, which is a job of its own."""
    evals: tuple[EvalResult, ...] = ()
    if context.experiment.validation.eval is not None:
        try:
            evals = tuple(result for result in _check_jobs(context, bundle, [""]) if isinstance(result, EvalResult))
        except WorkerError as error:
            return _crashed(bundle, error)
    return Quality(verdict=verdict_of(checks, context.experiment.validation.min_top1_agreement), evals=evals)


def check(context: RunContext, bundle: Bundle) -> Quality:
    """One bundle's quality; a model that crashes with it is a failed check, not a failed run."""
    if context.device == "cuda":
        try:
            found = _check_jobs(context, bundle, tuple(context.experiment.scenarios))
        except WorkerError as error:
            return _crashed(bundle, error)
        return _with_metric(context, bundle, [result for result in found if isinstance(result, ScenarioCheck)])
    job = CheckModel(
        loaded=context.loaded, bundle=bundle, device=context.device, threads=context.threads, seed=context.seed + 3
    )
    try:
        return context.run_all("validate", [("equivalence and metric", job)], _TIMEOUT_S)[0]
    except WorkerError as error:
        return _crashed(bundle, error)


def _crashed(bundle: Bundle, error: WorkerError) -> Quality:
    if bundle.stock:
        raise error
    failed = Check(name=_RUNS, value=1, limit=0, passed=False, note=str(error))
    return Quality(verdict=Verdict(checks=(failed,)))


def _drop_harmful(context: RunContext, bundle: Bundle, quality: Quality, gone: dict[str, str]) -> tuple[Bundle, Quality]:
    """Remove what makes the model fail: graph options first, then entries by bisection."""
    why = quality.why_not
    if bundle.has_options:
        gone[OPTIONS] = why
        bundle = without(bundle, gone)
        quality = check(context, bundle)
        if quality.passed:
            return bundle, quality
        # they were not the reason; but without them the entries are easier to tell apart
        gone[OPTIONS] = "left out while the entries were bisected"
    kept: list[Entry] = []

    def passes(entries: Sequence[Entry]) -> Quality:
        return check(context, replace(bundle, entries=tuple(entries)))

    def sift(entries: Sequence[Entry]) -> None:
        """Keep the entries that pass together with those already kept; halve those that do not."""
        verdict = passes([*kept, *entries])
        if verdict.passed:
            kept.extend(entries)
        elif len(entries) == 1:
            gone[entries[0].key] = verdict.why_not
            log.warning("dropped %s: with it, %s", entries[0].key, verdict.why_not)
        else:
            middle = len(entries) // 2
            sift(entries[:middle])
            sift(entries[middle:])

    if len(bundle.entries) > 1:
        middle = len(bundle.entries) // 2
        sift(bundle.entries[:middle])
        sift(bundle.entries[middle:])
    elif bundle.entries:
        gone[bundle.entries[0].key] = quality.why_not
    left = replace(bundle, entries=tuple(kept))
    quality = check(context, left)
    if not quality.passed and kept and len(kept) == len(bundle.entries):
        # it just passed: where checks of the same bundle differ, none of its entries can be told to be harmless
        gone |= {entry.key: quality.why_not for entry in kept}
        left = replace(bundle, entries=())
        quality = check(context, left)
    return left, quality
