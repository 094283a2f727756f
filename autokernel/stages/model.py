"""Stage 5: the whole model with the bundle: equivalent, its metric intact, no scenario slower. What fails is dropped."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autokernel.config import LoadedExperiment
from autokernel.errors import WorkerError
from autokernel.evaluate.end_to_end import BUNDLE, ScenarioTiming, TimeScenario, against_stock, scenario_result
from autokernel.evaluate.outputs import ScenarioCheck, verdict_of
from autokernel.evaluate.whole_model import ModelJob, model_job
from autokernel.events import EvalResult, ModelValidated, ScenarioResult
from autokernel.export.bundle import Bundle, Entry
from autokernel.records import Check, Record, Verdict
from autokernel.stages.ablation import without_useless
from autokernel.stages.context import RunContext
from autokernel.stages.whole_model import run_on_model

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800


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
        reasons = [f"{c.name} is {c.value:.4g}, limit {c.limit:.4g}" for c in self.verdict.failures]
        reasons += [f"{e.metric} is worse by {e.worse_by_high:.4g}, limit {e.limit:.4g}" for e in self.evals if not e.passed]
        return "; ".join(reasons)


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

        with model_job(self.device, self.threads):
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
    if context.state is not None and "validate" in context.state.stages_done and context.state.validated is not None:
        validated = context.state.validated
        options = {} if _OPTIONS in validated.dropped else bundle.graph_options
        return validated, replace(_without(bundle, validated.dropped), graph_options=options)
    gone = dict(dropped)
    with context.stage("validate", total=len(context.experiment.scenarios) + 1):
        if context.experiment.validation.ablation:
            bundle = without_useless(context, bundle, gone)
        quality, timings = _examine(context, bundle)
        if not quality.passed:
            bundle, quality = _drop_harmful(context, bundle, quality, gone)
            timings = []
        scenarios, bundle, changed = _time_until_never_slower(context, bundle, gone, timings)
        if changed and not bundle.stock:
            quality = check(context, bundle)  # what is exported is what was judged
        validated = ModelValidated(verdict=quality.verdict, evals=quality.evals, scenarios=scenarios, dropped=gone)
        context.emit(validated)
    return validated, bundle


_OPTIONS = "graph options"


def _examine(context: RunContext, bundle: Bundle) -> tuple[Quality, list[ScenarioTiming]]:
    """A bundle's quality; on a GPU also its times, by the jobs that compile it anyway. A crash leaves that to `check`."""
    if context.device != "cuda":
        return check(context, bundle), []
    try:
        timings = _time_jobs(context, bundle, tuple(context.experiment.scenarios), checked=True)
    except WorkerError as error:
        log.warning("the model did not run to its end with the bundle: %s", error)
        return check(context, bundle), []
    if any(timing.check is None for timing in timings):  # it did not compile somewhere
        return check(context, bundle), []
    checks = [timing.check for timing in timings if timing.check is not None]
    return _quality(context, checks, _metric_on_gpu(context, bundle)), timings


def _quality(context: RunContext, checks: Sequence[ScenarioCheck], evals: tuple[EvalResult, ...]) -> Quality:
    return Quality(verdict=verdict_of(checks, context.experiment.validation.min_top1_agreement), evals=evals)


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


def _metric_on_gpu(context: RunContext, bundle: Bundle) -> tuple[EvalResult, ...]:
    if context.experiment.validation.eval is None:
        return ()
    return tuple(result for result in _check_jobs(context, bundle, [""]) if isinstance(result, EvalResult))


def check(context: RunContext, bundle: Bundle) -> Quality:
    """One bundle's quality; a model that crashes with it is a failed check, not a failed run."""
    if context.device == "cuda":
        try:
            found = _check_jobs(context, bundle, tuple(context.experiment.scenarios))
            checks = [result for result in found if isinstance(result, ScenarioCheck)]
            return _quality(context, checks, _metric_on_gpu(context, bundle))
        except WorkerError as error:
            return _crashed(bundle, error)
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
    failed = Check(name="runs", value=1, limit=0, passed=False, note=str(error))
    return Quality(verdict=Verdict(checks=(failed,)))


def _drop_harmful(context: RunContext, bundle: Bundle, quality: Quality, gone: dict[str, str]) -> tuple[Bundle, Quality]:
    """Remove what makes the model fail: graph options first, then entries by bisection."""
    why = quality.why_not
    if bundle.graph_options:
        gone[_OPTIONS] = why
        bundle = replace(bundle, graph_options={})
        quality = check(context, bundle)
        if quality.passed:
            return bundle, quality
        del gone[_OPTIONS]  # they were not the reason; but without them the entries are easier to tell apart
        gone[_OPTIONS] = "left out while the entries were bisected"
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
    bundle = replace(bundle, entries=tuple(kept))
    return bundle, check(context, bundle)


def _time_until_never_slower(
    context: RunContext, bundle: Bundle, gone: dict[str, str], timings: Sequence[ScenarioTiming]
) -> tuple[tuple[ScenarioResult, ...], Bundle, bool]:
    """Scenario times with a bundle that makes none of them slower; and whether that changed what is compiled.

    `timings` are those of this very bundle, if they were taken already.
    """
    scenarios = tuple(context.experiment.scenarios)
    results, unused = _results(bundle, timings) if timings else _time(context, bundle, scenarios)
    gone |= unused
    bundle = _without(bundle, gone)
    slower = [result for result in results.values() if not result.passed]
    changed = bool(slower)
    if slower and bundle.graph_options:
        gone[_OPTIONS] = f"{slower[0].scenario} took {1 / slower[0].speedup.ratio:.3f} times as long as stock"
        bundle = replace(bundle, graph_options={})
        results, _ = _time(context, bundle, scenarios)
        slower = [result for result in results.values() if not result.passed]
    for result in slower:
        # shapes differ between scenarios, so a scenario's own entries are what can slow it down
        for entry in bundle.entries:
            if entry.scenario == result.scenario:
                gone[entry.key] = f"{result.scenario} took {1 / result.speedup.ratio:.3f} times as long as stock"
    if slower:
        bundle = _without(bundle, gone)
        results |= _time(context, bundle, tuple(result.scenario for result in slower))[0]
    return tuple(results.values()), bundle, changed


def _without(bundle: Bundle, gone: Mapping[str, str]) -> Bundle:
    return replace(bundle, entries=tuple(entry for entry in bundle.entries if entry.key not in gone))


def _time(context: RunContext, bundle: Bundle, scenarios: Sequence[str]) -> tuple[dict[str, ScenarioResult], dict[str, str]]:
    """Results by scenario; and entries that nothing in their scenario was built from, with the reason."""
    return _results(bundle, _time_jobs(context, bundle, scenarios))


def _time_jobs(context: RunContext, bundle: Bundle, scenarios: Sequence[str], *, checked: bool = False) -> list[ScenarioTiming]:
    validation = context.experiment.validation
    jobs = [
        (
            f"end to end: {name}",
            name,
            TimeScenario(
                loaded=context.loaded,
                scenario=name,
                device=context.device,
                threads=context.threads,
                contenders=against_stock(bundle, validation.baselines),
                baselines=validation.baselines,
                rounds=validation.end_to_end_rounds,
                seed=context.seed + 3,
                check=checked,
            ),
        )
        for name in scenarios
    ]
    return run_on_model(context, "validate", jobs, _TIMEOUT_S, bundle=bundle)


def _results(bundle: Bundle, timings: Sequence[ScenarioTiming]) -> tuple[dict[str, ScenarioResult], dict[str, str]]:
    for timing in timings:
        if BUNDLE in timing.failures:
            raise WorkerError(f"scenario {timing.scenario} does not run with the bundle: {timing.failures[BUNDLE]}")
    hits: dict[str, int] = {}
    timed = {timing.scenario for timing in timings}
    for timing in timings:
        for key, count in timing.hits.get(BUNDLE, {}).items():
            hits[key] = hits.get(key, 0) + count
    # e.g. coordinate descent lowers products of one row as reductions, and freezing merges on its own
    names = ", ".join(bundle.graph_options)
    options = f", or the graph options ({names}) turn them into something else" if names else ""
    unused = {
        entry.key: f"nothing in the compiled model is built from it: its GEMMs are merged with others, or "
        f"spelled differently{options}"
        for entry in bundle.entries
        if entry.scenario in timed and not hits.get(entry.key)
    }
    return {timing.scenario: scenario_result(timing, bundle.stock) for timing in timings}, unused
