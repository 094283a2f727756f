"""Stage 4: graph-level options on top of the winners, judged end to end, every set against the bundle without options."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from autokernel.errors import WorkerError
from autokernel.evaluate.end_to_end import Contender, ScenarioTiming, TimeScenario
from autokernel.events import GraphTrial
from autokernel.export.bundle import Bundle
from autokernel.records import Speedup
from autokernel.search.graph_options import Options, load_graph_options, merged, spelled
from autokernel.stages.context import RunContext
from autokernel.stages.whole_model import run_on_model, with_layers

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800
_PLAIN = "no options"
# Measured for the record: a bundle that is fast because it tunes again in each new process is not what bundles are for.
_TUNES_IN_PRODUCTION = ("coordinate_descent_tuning", "max_autotune_pointwise", "max_autotune", "triton.multi_kernel")
_SETS_PER_JOB = 2
_NUM_PAIRS = 2


def search_graph_options(context: RunContext, bundle: Bundle) -> Options:
    """The options to export: every set that helped by itself, together, if together they help as well.

    A bundle that ends up with neither entries nor options is a stock bundle, so options are searched even if no kernel won.
    """
    settings = context.experiment.graph
    if not settings.enabled:
        return {}
    if context.state is not None and "graph" in context.state.stages_done:
        accepted = [dict(t.options) for t in context.state.graph_trials if t.accepted]
        return accepted[-1] if accepted else {}
    spaces = context.experiment.search.spaces
    sets = load_graph_options(context.device, context.loaded.resolve(spaces) if spaces is not None else None)
    sets = sets[: settings.trials]
    with context.stage("graph", total=len(sets), note=f"{len(sets)} option sets"):
        trials = _try(context, bundle, sets)
        good = [trial for trial in trials if trial.accepted]
        for trial in trials:
            # which ones are exported is decided by the last accepted event
            context.emit(replace(trial, accepted=False) if trial.accepted and len(good) > 1 else trial)
        if not good:
            return {}
        if len(good) == 1:
            return dict(good[0].options)
        good.sort(key=lambda trial: -trial.score)
        unions = _try(context, bundle, _unions(good))
        chosen = max([trial for trial in unions if trial.accepted], key=lambda trial: trial.score, default=good[0])
        if chosen.score < good[0].score:
            chosen = good[0]
        for trial in unions:
            if trial is not chosen:
                why = trial.reason or f"no better together than {spelled(dict(chosen.options))}"
                context.emit(replace(trial, accepted=False, reason=why))
        context.emit(chosen)
        return dict(chosen.options)


def _unions(good: Sequence[GraphTrial]) -> list[Options]:
    """What helped, the best first, all of it together, and the best with each of the next ones: some spoil each other."""
    sets = [merged([dict(t.options) for t in good])]
    sets += [merged([dict(good[0].options), dict(other.options)]) for other in good[1 : 1 + _NUM_PAIRS] if len(good) > 2]
    return sets


def _try(context: RunContext, bundle: Bundle, sets: Sequence[Options]) -> list[GraphTrial]:
    """Time the option sets on every scenario that is asked for, one job per scenario."""
    settings = context.experiment.graph
    on_gpu = context.device == "cuda"
    loaded = with_layers(context.loaded, settings.layers)
    plain = Contender(name=_PLAIN, bundle=bundle)
    contenders = [Contender(name=spelled(options), bundle=replace(bundle, graph_options=options)) for options in sets]
    # on a GPU several jobs compile at once, each with a baseline of its own
    size = _SETS_PER_JOB if on_gpu else max(1, len(sets))
    parts = [contenders[i : i + size] for i in range(0, len(contenders), size)]
    jobs = [
        (
            name,
            name,
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
            ),
        )
        for part in parts
        for name in settings.scenarios or context.experiment.scenarios
    ]
    largest = replace(bundle, graph_options={"freezing": "all"})
    try:
        timings = run_on_model(context, "graph", jobs, _TIMEOUT_S, layers=settings.layers, bundle=largest)
    except WorkerError as error:  # validation will see what is wrong with the bundle
        log.warning("no graph options were tried: %s", error)
        return []
    return [_judge(options, timings) for options in sets]


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
    tuning = [option for option in options if option in _TUNES_IN_PRODUCTION and options[option]]
    accepted = low > 1 and not slower and not tuning
    reason = "" if accepted else f"slower on {', '.join(slower)}" if slower else f"lower bound {low:.3f} is not above 1"
    if tuning and not slower:
        reason = f"{tuning[0]} has production time kernels in its first steps, and compile for as long as max-autotune"
    return GraphTrial(options=options, speedups=speedups, score=score, accepted=accepted, reason=reason)


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))
