"""Part of stage 5: every scenario's times, and what is left out where the bundle is slower than the best stock mode."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from autokernel.errors import WorkerError
from autokernel.evaluate.end_to_end import BUNDLE, ScenarioTiming, TimeScenario, against_stock, result_with
from autokernel.events import ScenarioResult, ScenarioTimed
from autokernel.export.bundle import Bundle
from autokernel.stages.context import RunContext
from autokernel.stages.whole_model import run_on_model

OPTIONS = "graph options"  # their name among what was dropped

_TIMEOUT_S = 1800


def time_until_never_slower(
    context: RunContext, bundle: Bundle, gone: dict[str, str], timings: Sequence[ScenarioTiming]
) -> tuple[list[ScenarioTiming], Bundle, bool]:
    """Scenario times with a bundle that makes none of them slower; that bundle; and whether what is compiled has changed.

    Args:
        context: the run.
        bundle: to start from.
        gone: takes why each entry was dropped; and the options, under `OPTIONS` and `options_of(scenario)`.
        timings: of this very bundle, if it was timed already.

    Raises:
        WorkerError: the model does not run with the bundle.
    """
    names = tuple(context.experiment.scenarios)
    latest = {timing.scenario: timing for timing in timings or time_scenarios(context, bundle, names)}
    _require_bundle(latest.values())
    gone |= _unused(bundle, list(latest.values()))
    for part in bundle.scenario_options:
        if latest[part.scenario].products != part.products:
            gone[options_of(part.scenario)] = "the whole model's graph has other products than the one that was measured"
    bundle = without(bundle, gone)
    slower = _slower(latest, bundle)
    changed = bool(slower)
    while slower:
        found = _next_to_go(bundle, slower, latest)
        if not found:
            break
        gone |= found
        changing = (
            set(names)
            if OPTIONS in found
            else {name for name, timing in latest.items() if set(found) & {options_of(name), *_hit(timing)}}
        )
        changing |= {entry.scenario for entry in bundle.entries if entry.key in found}
        bundle = without(bundle, gone)
        again = time_scenarios(context, bundle, tuple(name for name in names if name in changing))
        _require_bundle(again)
        latest |= {timing.scenario: timing for timing in again}
        slower = _slower(latest, bundle)
    return [latest[name] for name in names], bundle, changed


def time_scenarios(context: RunContext, bundle: Bundle, scenarios: Sequence[str]) -> list[ScenarioTiming]:
    """All modes of the scenarios against each other; on a GPU the bundle's outputs are checked with the code that is timed.

    What a run that was killed had timed already is taken from its journal.

    Raises:
        WorkerError: no stock mode runs.
    """
    validation = context.experiment.validation
    digest = bundle.applied_digest
    known = context.state.timed if context.state is not None else ()
    found = {t.scenario: ScenarioTiming.from_json(t.timing) for t in known if t.applied_digest == digest}
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
                check=context.device == "cuda",
            ),
        )
        for name in scenarios
        if name not in found
    ]

    def arrived(timing: ScenarioTiming) -> None:
        result = result_with(bundle, timing) if BUNDLE in timing.speedups else None
        context.emit(ScenarioTimed(scenario=timing.scenario, applied_digest=digest, result=result, timing=timing.to_json()))

    if jobs and context.beside.running:
        context.progress("validate", 0, len(jobs), "rehearsals")
    context.beside.finish()
    new = run_on_model(context, "validate", jobs, _TIMEOUT_S, bundle=bundle, arrived=arrived) if jobs else []
    found |= {timing.scenario: timing for timing in new}
    return [found[name] for name in scenarios]


def without(bundle: Bundle, gone: Mapping[str, str]) -> Bundle:
    """The bundle without the entries and options of these keys."""
    entries = tuple(entry for entry in bundle.entries if entry.key not in gone)
    parts = tuple(part for part in bundle.scenario_options if options_of(part.scenario) not in gone and OPTIONS not in gone)
    return replace(
        bundle, entries=entries, scenario_options=parts, graph_options={} if OPTIONS in gone else bundle.graph_options
    )


def options_of(scenario: str) -> str:
    """The name of a scenario's own options among what was dropped."""
    return f"{OPTIONS} of {scenario}"


def _own_options(bundle: Bundle, scenario: str) -> list[str]:
    return [options_of(scenario) for part in bundle.scenario_options if part.scenario == scenario]


def _own_entries(bundle: Bundle, scenario: str) -> list[str]:
    """Shapes differ between scenarios, so a scenario's own entries are what can slow it down."""
    return [entry.key for entry in bundle.entries if entry.scenario == scenario]


def _next_to_go(bundle: Bundle, slower: Sequence[ScenarioResult], timings: Mapping[str, ScenarioTiming]) -> dict[str, str]:
    """What slows these scenarios down, with the reason: options of all first, own ones, own entries, then those of others."""
    if bundle.graph_options:
        return {OPTIONS: _why(slower[0])}

    def of_others(name: str) -> list[str]:
        return [entry.key for entry in bundle.entries if entry.key in _hit(timings[name])]

    for suspects in (functools.partial(_own_options, bundle), functools.partial(_own_entries, bundle), of_others):
        found = {key: _why(result) for result in slower for key in suspects(result.scenario)}
        if found:
            return found
    return {}


def _hit(timing: ScenarioTiming) -> set[str]:
    """Keys of the entries that are in a scenario's code."""
    return {key for key, count in timing.hits.get(BUNDLE, {}).items() if count}


def _slower(timings: Mapping[str, ScenarioTiming], bundle: Bundle) -> list[ScenarioResult]:
    results = [result_with(bundle, timing) for timing in timings.values()]
    return [result for result in results if not result.passed]


def _why(result: ScenarioResult) -> str:
    return f"{result.scenario} took {1 / result.speedup.ratio:.3f} times as long as stock ({result.best_stock})"


def _require_bundle(timings: Iterable[ScenarioTiming]) -> None:
    for timing in timings:
        if BUNDLE in timing.failures:
            raise WorkerError(f"scenario {timing.scenario} does not run with the bundle: {timing.failures[BUNDLE]}")


def _unused(bundle: Bundle, timings: Sequence[ScenarioTiming]) -> dict[str, str]:
    """Entries that nothing in their scenario was built from, with the reason."""
    hits: dict[str, int] = {}
    timed = {timing.scenario for timing in timings}
    for timing in timings:
        for key, count in timing.hits.get(BUNDLE, {}).items():
            hits[key] = hits.get(key, 0) + count
    # e.g. coordinate descent lowers products of one row as reductions, and freezing merges on its own
    own = [name for part in bundle.scenario_options for name in part.options]
    names = ", ".join(dict.fromkeys([*bundle.graph_options, *own]))
    options = f", or the graph options ({names}) turn them into something else" if names else ""
    said = {key: why for timing in timings for key, why in timing.reasons.items()}
    otherwise = f"its GEMMs are merged with others, or spelled differently{options}"
    return {
        entry.key: f"nothing in the compiled model is built from it: {said.get(entry.key, otherwise)}"
        for entry in bundle.entries
        if entry.scenario in timed and not hits.get(entry.key)
    }
