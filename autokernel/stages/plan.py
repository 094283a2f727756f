"""Part of stage 3's end: which winners go together where fusions exclude each other, judged end to end.

Of a scenario's plans those that should save most are timed in the model, against each other and interleaved; then what Optuna
proposes from that (`search/plan_study.py`). Where nothing excludes anything there is nothing to decide, and nothing is timed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from autokernel.errors import WorkerError
from autokernel.evaluate.end_to_end import Contender, ScenarioTiming, TimeScenario
from autokernel.events import PlanTrial, Profiled
from autokernel.ops import FUSIONS
from autokernel.records import Winner
from autokernel.search.plan_study import PlanStudy
from autokernel.search.plans import Part, Plan, rivals_of
from autokernel.stages.confirm import entry_of
from autokernel.stages.context import RunContext
from autokernel.stages.production import make_bundle
from autokernel.stages.whole_model import run_on_model, with_layers

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800
_STAGE = "plan"


def choose_plans(context: RunContext, profiled: Profiled, winners: Sequence[Winner]) -> tuple[list[Winner], dict[str, str]]:
    """Winners that go together, and why others are left out."""
    settings = context.experiment.plan
    by_scenario = {name: parts for name in context.experiment.scenarios if (parts := parts_of(name, winners))}
    if not by_scenario or not settings.enabled:
        return list(winners), {}
    if context.state is not None and _STAGE in context.state.stages_done:
        return _decided(winners, by_scenario, context.state.plan_trials)
    trials: list[PlanTrial] = []
    with context.stage(_STAGE, total=len(by_scenario), note=", ".join(by_scenario)):
        for done, (scenario, parts) in enumerate(by_scenario.items()):
            context.progress(_STAGE, done, len(by_scenario), scenario)
            study = PlanStudy(parts, profiled.scenario_us[scenario], settings.trials, context.seed)
            trials += _search(context, scenario, study, winners)
        context.progress(_STAGE, len(by_scenario), len(by_scenario))
        for trial in trials:
            context.emit(trial)
    return _decided(winners, by_scenario, trials)


def parts_of(scenario: str, winners: Sequence[Winner]) -> list[Part]:
    """The scenario's winners that exclude others or are excluded; empty where all go together.

    GEMMs that share an input are no rivals here: whether they are merged is decided by their own times (`confirm.compatible`).
    """
    own = {winner.hotspot.problem.key: winner for winner in winners if winner.hotspot.scenario == scenario}
    rivals = {
        key: frozenset(
            other for other in winner.hotspot.rivals if other in own and (_is_fusion(winner) or _is_fusion(own[other]))
        )
        for key, winner in own.items()
    }
    return [
        Part(key=key, saved_us=(winner.baseline_us - winner.winner_us) * winner.hotspot.num_calls, rivals=rivals[key])
        for key, winner in own.items()
        if rivals[key] or any(key in others for others in rivals.values())
    ]


def _is_fusion(winner: Winner) -> bool:
    return winner.hotspot.problem.op in FUSIONS


def _search(context: RunContext, scenario: str, study: PlanStudy, winners: Sequence[Winner]) -> list[PlanTrial]:
    """Two rounds: what should save most, and what Optuna makes of it. The last event that is accepted decides."""
    first = study.first()
    if len(first) < 2:
        return [_trial(scenario, plan, None, accepted=True, reason="no other plan") for plan in first]
    best, trials = first[0], []
    for plans in (first, None):
        challengers = [plan for plan in (study.next() if plans is None else plans) if plan is not best]
        if not challengers:
            break
        timing = _time(context, scenario, best, challengers, winners)
        if timing is None:
            trials.append(_trial(scenario, best, None, accepted=True, reason="the model does not run with the others"))
            break
        for plan in challengers:
            speedup = timing.speedups.get(_named(plan))
            if speedup is not None:  # what it saves beyond the plan that it was timed against
                study.tell(plan, best.saved_us + timing.modes[0].median_us * (1 - 1 / speedup.ratio))
        best, judged = judge(scenario, best, challengers, timing)
        trials += judged
    return trials


def judge(scenario: str, best: Plan, challengers: Sequence[Plan], timing: ScenarioTiming) -> tuple[Plan, list[PlanTrial]]:
    """The plan to keep, the one event of which is accepted and the last: a challenger has to be clearly faster."""
    clear = [plan for plan in challengers if _named(plan) in timing.speedups and timing.speedups[_named(plan)].low > 1]
    chosen = max(clear, key=lambda plan: timing.speedups[_named(plan)].ratio, default=best)
    trials = []
    for plan in (*(plan for plan in (best, *challengers) if plan is not chosen), chosen):
        speedup = timing.speedups.get(_named(plan))
        reason = timing.failures.get(_named(plan), "")
        if not reason and speedup is not None:
            reason = (
                f"{speedup.ratio:.3f} times as fast as the plan that should save most [{speedup.low:.3f}, {speedup.high:.3f}]"
            )
        trials.append(_trial(scenario, plan, timing, accepted=plan is chosen, reason=reason))
    return chosen, trials


def _trial(scenario: str, plan: Plan, timing: ScenarioTiming | None, *, accepted: bool, reason: str) -> PlanTrial:
    speedup = timing.speedups.get(_named(plan)) if timing is not None else None
    return PlanTrial(
        scenario=scenario, keys=plan.keys, saved_us=plan.saved_us, speedup=speedup, accepted=accepted, reason=reason
    )


def _named(plan: Plan) -> str:
    return " + ".join(plan.keys)


def _time(
    context: RunContext, scenario: str, best: Plan, challengers: Sequence[Plan], winners: Sequence[Winner]
) -> ScenarioTiming | None:
    """All plans against the one that is to be beaten; None, and a warning, where the model does not run."""
    settings = context.experiment.plan
    job = TimeScenario(
        loaded=with_layers(context.loaded, settings.layers),
        scenario=scenario,
        device=context.device,
        threads=context.threads,
        contenders=tuple(_contender(context, scenario, plan, winners) for plan in (best, *challengers)),
        baselines=(_named(best),),
        rounds=max(11, context.experiment.validation.end_to_end_rounds // 2),
        seed=context.seed + 7,
        in_turn=context.device == "cuda",
    )
    try:
        found: list[ScenarioTiming] = run_on_model(
            context, _STAGE, [(f"plans: {scenario}", scenario, job)], _TIMEOUT_S, layers=settings.layers
        )
    except WorkerError as error:
        log.warning("%s: the plan that should save most is taken untimed: %s", scenario, error)
        return None
    return found[0]


def _contender(context: RunContext, scenario: str, plan: Plan, winners: Sequence[Winner]) -> Contender:
    """The plan with all winners of the scenario that exclude nothing."""
    rivals = {part.key for part in parts_of(scenario, winners)}
    kept = [
        winner
        for winner in winners
        if winner.hotspot.scenario == scenario
        and (winner.hotspot.problem.key in plan.keys or winner.hotspot.problem.key not in rivals)
    ]
    return Contender(name=_named(plan), bundle=make_bundle(context, [entry_of(winner) for winner in kept], {}))


def _decided(
    winners: Sequence[Winner], by_scenario: Mapping[str, Sequence[Part]], trials: Sequence[PlanTrial]
) -> tuple[list[Winner], dict[str, str]]:
    """What the accepted plans leave, and why the rest goes."""
    dropped: dict[str, str] = {}
    for scenario, parts in by_scenario.items():
        accepted = [trial for trial in trials if trial.scenario == scenario and trial.accepted]
        if not accepted:
            continue
        kept = set(accepted[-1].keys)
        for part in parts:
            if part.key not in kept:
                takers = [key for key in accepted[-1].keys if key in rivals_of(part.key, parts)]
                dropped[part.key] = f"its nodes go to {' and '.join(takers) or 'others'}, with which {scenario} is faster"
    return [winner for winner in winners if winner.hotspot.problem.key not in dropped], dropped
