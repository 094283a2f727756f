"""Stage 4: graph-level options on top of the winners, judged end to end, every set against the bundle without options."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from autokernel.errors import WorkerError
from autokernel.evaluate.end_to_end import Contender, ScenarioTiming, TimeScenario
from autokernel.events import GraphTrial
from autokernel.export.bundle import Bundle, ScenarioOptions
from autokernel.records import ConfigValue, Speedup
from autokernel.search.graph_options import Options, load_graph_options, merged, spelled
from autokernel.stages.contenders import known, tell
from autokernel.stages.context import RunContext
from autokernel.stages.rehearsal import rehearse_beside
from autokernel.stages.whole_model import run_on_model, with_layers

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800
_PLAIN = "no options"
# Measured for the record: a bundle that is fast because it tunes again in each new process is not what bundles are for.
_TUNES_IN_PRODUCTION = ("coordinate_descent_tuning", "max_autotune_pointwise", "max_autotune", "triton.multi_kernel")
_SETS_PER_JOB = 3
_NUM_PAIRS = 2
_LEAST_GAIN = 1.001  # lower bound of what single scenarios get options for


def search_graph_options(context: RunContext, bundle: Bundle) -> tuple[Options, tuple[ScenarioOptions, ...]]:
    """The options to export, for every graph and for those of single scenarios.

    For every graph: all the sets that helped by themselves and hurt nowhere, together, if together they help as well. Where
    there is no such set, each scenario gets the one that helps it most. A bundle that ends up with neither entries nor
    options is a stock bundle, so options are searched even if no kernel won.
    """
    settings = context.experiment.graph
    if not settings.enabled:
        return {}, ()
    if context.state is not None and "graph" in context.state.stages_done:
        return _decided(context.state.graph_trials)
    sets = _sets(context)
    with context.stage("graph", total=len(sets), note=f"{len(sets)} option sets"):
        rehearse_beside(context)
        trials = _try(context, bundle, sets)
        good = [trial for trial in trials if trial.accepted]
        if len(good) > 1:
            # which ones are exported is decided by the last accepted event
            trials = [replace(trial, accepted=False) for trial in trials] + _together(context, bundle, good)
        elif not good:
            trials = _for_single_scenarios(trials)
        for trial in trials:
            context.emit(trial)
        return _decided(trials)


def jobs_ahead(context: RunContext, bundle: Bundle, undecided: Collection[str]) -> list[tuple[str, str, TimeScenario]]:
    """What the stage will ask for, (label, scenario, job), of scenarios whose entries are decided before the others' are.

    Their values are for `keep_ahead`. None if they would load another model than those that time plans.
    """
    settings = context.experiment.graph
    if not settings.enabled or settings.layers != context.experiment.plan.layers:
        return []
    names = [name for name in settings.scenarios or context.experiment.scenarios if name not in undecided]
    jobs = [job for job in _jobs(context, bundle, _sets(context), names) if known(context, job) is None]
    return [(f"graph options: {job.scenario}", job.scenario, job) for job in jobs]


def _sets(context: RunContext) -> list[Options]:
    """The option sets to try."""
    spaces = context.experiment.search.spaces
    folder = context.loaded.resolve(spaces) if spaces is not None else None
    sets = load_graph_options(context.device, folder, context.environment.torch)
    return list(sets[: context.experiment.graph.trials])


def _decided(trials: Sequence[GraphTrial]) -> tuple[Options, tuple[ScenarioOptions, ...]]:
    """What the trials say is to be exported."""
    accepted = [dict(trial.options) for trial in trials if trial.accepted]
    parts = [
        ScenarioOptions(scenario=name, products=trial.products[name], options=dict(trial.options))
        for trial in trials
        for name in trial.accepted_for
    ]
    return accepted[-1] if accepted else {}, tuple(parts)


def _together(context: RunContext, bundle: Bundle, good: Sequence[GraphTrial]) -> list[GraphTrial]:
    """What helped, tried together; the best, or the best single set, is the last of them and accepted."""
    good = sorted(good, key=lambda trial: -trial.score)
    unions = _try(context, bundle, _unions(good))
    chosen = max([trial for trial in unions if trial.accepted], key=lambda trial: trial.score, default=good[0])
    if chosen.score < good[0].score:
        chosen = good[0]
    why = f"no better together than {spelled(dict(chosen.options))}"
    others = [replace(t, accepted=False, reason=t.reason or why) for t in unions if t is not chosen]
    return [*others, chosen]


def _for_single_scenarios(trials: Sequence[GraphTrial]) -> list[GraphTrial]:
    """The trials with `accepted_for`: each scenario gets the set that helped it most, by more than luck gives."""
    best: dict[str, GraphTrial] = {}
    for trial in trials:
        for name, speedup in trial.speedups.items():
            helps = speedup.low > _LEAST_GAIN and bool(trial.products.get(name)) and not _tuning(trial.options)
            if helps and (name not in best or speedup.ratio > best[name].speedups[name].ratio):
                best[name] = trial
    found = [tuple(name for name, one in best.items() if one is trial) for trial in trials]
    return [
        replace(trial, accepted_for=names, reason=f"{trial.reason}; kept for {', '.join(names)}") if names else trial
        for trial, names in zip(trials, found, strict=True)
    ]


def _tuning(options: Mapping[str, ConfigValue]) -> list[str]:
    return [option for option in options if option in _TUNES_IN_PRODUCTION and options[option]]


def _unions(good: Sequence[GraphTrial]) -> list[Options]:
    """What helped, the best first, all of it together, and the best with each of the next ones: some spoil each other."""
    sets = [merged([dict(t.options) for t in good])]
    sets += [merged([dict(good[0].options), dict(other.options)]) for other in good[1 : 1 + _NUM_PAIRS] if len(good) > 2]
    return sets


def _try(context: RunContext, bundle: Bundle, sets: Sequence[Options]) -> list[GraphTrial]:
    """Time the option sets on every scenario that is asked for, but for what was timed before."""
    settings = context.experiment.graph
    jobs = _jobs(context, bundle, sets, settings.scenarios or list(context.experiment.scenarios))
    found = [(job, known(context, job)) for job in jobs]
    timings = [timing for _, timing in found if timing is not None]
    left = [(job.scenario, job.scenario, job) for job, timing in found if timing is None]
    try:
        timings += run_on_model(
            context,
            "graph",
            left,
            _TIMEOUT_S,
            layers=settings.layers,
            bundle=largest(bundle),
            arrived=lambda timing: tell(context, jobs, timing),
        )
    except WorkerError as error:  # validation will see what is wrong with the bundle
        log.warning("no graph options were tried: %s", error)
        return []
    return [_judge(options, timings) for options in sets]


def largest(bundle: Bundle) -> Bundle:
    """The bundle with the options that take most memory."""
    return replace(bundle, graph_options={"freezing": "all"})


def _jobs(context: RunContext, bundle: Bundle, sets: Sequence[Options], scenarios: Sequence[str]) -> list[TimeScenario]:
    """One job for each scenario, or several, if there are many option sets."""
    settings = context.experiment.graph
    on_gpu = context.device == "cuda"
    loaded = with_layers(context.loaded, settings.layers)
    plain = Contender(name=_PLAIN, bundle=bundle)
    contenders = [Contender(name=spelled(options), bundle=replace(bundle, graph_options=options)) for options in sets]
    # on a GPU several jobs compile at once, each with a baseline of its own
    size = _SETS_PER_JOB if on_gpu else max(1, len(sets))
    parts = [contenders[i : i + size] for i in range(0, len(contenders), size)]
    return [
        TimeScenario(
            loaded=loaded,
            scenario=name,
            device=context.device,
            threads=context.threads,
            contenders=(plain, *part),
            baselines=(_PLAIN,),
            rounds=max(11, context.experiment.validation.end_to_end_rounds // 2),
            seed=context.seed + 2,
            in_turn=on_gpu,
            budget_s=settings.seconds,
        )
        for part in parts
        for name in scenarios
    ]


def _judge(options: Options, timings: Sequence[ScenarioTiming]) -> GraphTrial:
    """Accepted if it helps by the geometric mean of the lower bounds, and clearly hurts nowhere."""
    name = spelled(options)
    timings = [timing for timing in timings if name in timing.speedups or name in timing.failures]
    failures = [f"{t.scenario}: {t.failures[name]}" for t in timings if name in t.failures]
    if failures:
        return GraphTrial(options=options, speedups={}, score=0.0, accepted=False, reason="; ".join(failures))
    if not timings:
        return GraphTrial(options=options, speedups={}, score=0.0, accepted=False, reason="it was not tried")
    speedups: dict[str, Speedup] = {t.scenario: t.speedups[name] for t in timings}
    score, low = (_geomean([getattr(s, part) for s in speedups.values()]) for part in ("ratio", "low"))
    slower = [scenario for scenario, s in speedups.items() if s.high < 1]
    tuning = _tuning(options)
    accepted = low > 1 and not slower and not tuning
    reason = "" if accepted else f"slower on {', '.join(slower)}" if slower else f"lower bound {low:.3f} is not above 1"
    if tuning and not slower:
        reason = f"{tuning[0]} has production time kernels in its first steps, and compile for as long as max-autotune"
    products = {t.scenario: t.products for t in timings}
    return GraphTrial(options=options, speedups=speedups, score=score, accepted=accepted, reason=reason, products=products)


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))
