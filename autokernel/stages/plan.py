"""Part of stage 3's end: which winners go together where fusions exclude each other, judged end to end.

Of a scenario's plans those that should save most are timed in the model, against each other and interleaved; then, where a
measurement contradicts the sum of the savings, what Optuna proposes from that (`search/plan_study.py`). Where nothing excludes
anything there is nothing to decide, and where plans differ in what takes no time nothing can be told: then nothing is timed.
Scenarios take turns on the device and compile at the same time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autokernel.errors import WorkerError
from autokernel.evaluate.end_to_end import Contender, ScenarioTiming, TimeScenario
from autokernel.events import PlanTrial, Profiled
from autokernel.ops import FUSIONS
from autokernel.records import Winner
from autokernel.search.plan_study import PlanStudy
from autokernel.search.plans import Part, Plan, best_plans, rivals_of
from autokernel.stages.confirm import entry_of
from autokernel.stages.contenders import keep_ahead, known, tell
from autokernel.stages.context import RunContext
from autokernel.stages.graph import jobs_ahead, largest
from autokernel.stages.production import make_bundle
from autokernel.stages.rehearsal import rehearse_beside
from autokernel.stages.whole_model import run_on_model, with_layers

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800
_STAGE = "plan"
_TOLD_APART = 0.002  # of a step: what a comparison in the model does not resolve


@dataclass(slots=True, kw_only=True)
class _Contest:
    """One scenario's plans. `step_us` is its step with the plan that should save most, by the sum of all savings."""

    scenario: str
    parts: Sequence[Part]
    study: PlanStudy
    best: Plan
    step_us: float
    challengers: list[Plan]  # of the round that comes next
    trials: list[PlanTrial] = field(default_factory=list)


def choose_plans(context: RunContext, profiled: Profiled, winners: Sequence[Winner]) -> tuple[list[Winner], dict[str, str]]:
    """Winners that go together, and why others are left out."""
    settings = context.experiment.plan
    winners = in_precedence(winners)
    by_scenario = {name: parts for name in context.experiment.scenarios if (parts := parts_of(name, winners))}
    if not by_scenario or not settings.enabled:
        return list(winners), {}
    if context.state is not None and _STAGE in context.state.stages_done:
        return _decided(winners, by_scenario, context.state.plan_trials)
    with context.stage(_STAGE, total=len(by_scenario), note=", ".join(by_scenario)):
        contests = [
            _contest(scenario, parts, profiled.scenario_us[scenario], winners, settings.trials, context.seed)
            for scenario, parts in by_scenario.items()
        ]
        rehearse_beside(context)
        ahead = _graph_options_of_others(context, contests, winners)
        while open_ones := [contest for contest in contests if contest.challengers]:
            timings = _time(context, open_ones, winners, ahead)
            ahead = []
            for contest in open_ones:
                play(contest, timings.get(contest.scenario))
        trials = [trial for contest in contests for trial in contest.trials]
        for trial in trials:
            context.emit(trial)
    return _decided(winners, by_scenario, trials)


def _contest(
    scenario: str, parts: Sequence[Part], stock_us: float, winners: Sequence[Winner], trials: int, seed: int
) -> _Contest:
    """The first round: those of the plans that should save most that could be told apart in the model."""
    best = best_plans(parts, 1)[0]
    nothing = Plan(keys=(), saved_us=0.0)
    others_us = sum(_saved_us(winner) for winner in _kept(scenario, nothing, parts, winners))
    step_us = max(stock_us - best.saved_us - others_us, 0.0)
    study = PlanStudy(parts, stock_us, trials, seed, _TOLD_APART * step_us)
    best, *others = study.first()
    contest = _Contest(scenario=scenario, study=study, parts=parts, best=best, step_us=step_us, challengers=others)
    for plan, us in study.left_out[:trials]:
        reason = (
            f"not timed: it replaces other calls than a plan that should save more in {us:.1f} us of {step_us:.0f} us, which "
            f"could not be told apart"
        )
        contest.trials.append(_trial(scenario, plan, None, accepted=False, reason=reason))
    if not others:
        reason = "no plan that could be told apart from it" if study.left_out else "no other plan"
        contest.trials.append(_trial(scenario, best, None, accepted=True, reason=reason))
    return contest


def play(contest: _Contest, timing: ScenarioTiming | None) -> None:
    """One round's result: its events, the plan that is the best now, and who challenges it next."""
    challengers, contest.challengers = contest.challengers, []
    challenged = contest.best
    if timing is None:
        reason = "the model does not run with the others"
        contest.trials.append(_trial(contest.scenario, challenged, None, accepted=True, reason=reason))
        return
    surprising = False
    for plan in challengers:
        speedup = timing.speedups.get(_named(plan))
        if speedup is None:
            continue
        # what it saves beyond the plan that it was timed against
        contest.study.tell(plan, challenged.saved_us + contest.step_us * (1 - 1 / speedup.ratio))
        expected = (plan.saved_us - challenged.saved_us) / contest.step_us if contest.step_us else 0.0
        surprising |= not 1 - 1 / speedup.low - _TOLD_APART <= expected <= 1 - 1 / speedup.high + _TOLD_APART
    contest.best, judged = judge(contest.scenario, challenged, challengers, timing)
    contest.trials += judged
    if surprising:  # else savings add up here, and Optuna knows nothing that the sums do not say
        contest.challengers = contest.study.next()


def parts_of(scenario: str, winners: Sequence[Winner]) -> list[Part]:
    """The scenario's winners that exclude others or are excluded; empty where all go together.

    GEMMs that share an input are no rivals here: whether they are merged is decided by their own times (`confirm.compatible`).
    What is merged saves nothing by itself.
    """
    own = {winner.hotspot.problem.key: winner for winner in winners if winner.hotspot.scenario == scenario}
    taken = {key: _taken(winner, own) for key, winner in own.items()}
    rivals = {
        key: frozenset(
            other
            for other in winner.hotspot.rivals
            if other in own
            and (_is_fusion(winner) or _is_fusion(own[other]))
            and other not in taken[key]
            and key not in taken[other]
        )
        for key, winner in own.items()
    }
    if not any(rivals.values()):
        return []
    lost = {taker for takers in taken.values() for taker in takers}
    return [
        Part(
            key=key,
            saved_us=_saved_us(winner) * _share_apart(winner, own),
            rivals=rivals[key],
            stock_us=winner.baseline_us * winner.hotspot.num_calls,
            # what Inductor can see into does not leave its neighbours the same
            nodes=frozenset(winner.hotspot.nodes if _is_fusion(winner) else ()),
            taken=taken[key],
        )
        for key, winner in own.items()
        if rivals[key] or taken[key] or key in lost or any(key in others for others in rivals.values())
    ]


def in_precedence(winners: Sequence[Winner]) -> list[Winner]:
    """Winners in the order in which they get nodes: those that take some of another's calls before the other."""
    own: dict[str, dict[str, Winner]] = {}
    for winner in winners:
        own.setdefault(winner.hotspot.scenario, {})[winner.hotspot.problem.key] = winner
    placed: dict[tuple[str, str], Winner] = {}

    def place(winner: Winner, above: frozenset[str]) -> None:
        key, scenario = winner.hotspot.problem.key, winner.hotspot.scenario
        for taker in _taken(winner, own[scenario]):
            if taker not in above:
                place(own[scenario][taker], above | {key})
        placed.setdefault((scenario, key), winner)

    for winner in winners:
        place(winner, frozenset())
    return list(placed.values())


def _taken(winner: Winner, own: Mapping[str, Winner]) -> dict[str, float]:
    """The fraction of a fusion's calls that others of the scenario take which want nodes of all their own calls there.

    The fusion keeps the rest. Those with the very same nodes are rivals.
    """
    found = {}
    key, calls = winner.hotspot.problem.key, winner.hotspot.num_calls
    for other, shared in zip(winner.hotspot.rivals, winner.hotspot.rival_calls, strict=False):
        if other not in own or not (_is_fusion(winner) and _is_fusion(own[other])) or not 0 < shared < calls:
            continue
        taker = own[other].hotspot
        of_taker = dict(zip(taker.rivals, taker.rival_calls, strict=False)).get(key, 0)
        if of_taker >= taker.num_calls and not set(taker.nodes) & set(winner.hotspot.nodes):
            found[other] = shared / calls
    return found


def _is_fusion(winner: Winner) -> bool:
    return winner.hotspot.problem.op in FUSIONS


def _share_apart(winner: Winner, own: Mapping[str, Winner]) -> float:
    """The part of a GEMM's calls that no merged winner takes."""
    merged = [
        calls
        for key, calls in zip(winner.hotspot.rivals, winner.hotspot.rival_calls, strict=False)
        if key in own and own[key].hotspot.problem.op == "merged_mm"
    ]
    taken = 0 if winner.hotspot.problem.op == "merged_mm" or _is_fusion(winner) else max(merged, default=0)
    return 1 - taken / winner.hotspot.num_calls


def _saved_us(winner: Winner) -> float:
    return (winner.baseline_us - winner.winner_us) * winner.hotspot.num_calls


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


def _graph_options_of_others(
    context: RunContext, contests: Sequence[_Contest], winners: Sequence[Winner]
) -> list[tuple[str, str, TimeScenario]]:
    """Jobs of the next stage that wait for no plan: they compile while plans do."""
    contested = {contest.scenario: contest for contest in contests}
    kept = [winner for winner in winners if winner.hotspot.scenario not in contested]
    for name, contest in contested.items():
        kept += _kept(name, contest.best, contest.parts, winners)
    return jobs_ahead(context, make_bundle(context, [entry_of(winner) for winner in kept], {}), contested)


def _time(
    context: RunContext,
    contests: Sequence[_Contest],
    winners: Sequence[Winner],
    beside: Sequence[tuple[str, str, TimeScenario]],
) -> dict[str, ScenarioTiming]:
    """Every challenger against the plan that is to be beaten, by scenario; without those on which the model does not run.

    The graph stage's jobs `beside` are run with them.
    """
    settings = context.experiment.plan
    loaded = with_layers(context.loaded, settings.layers)
    jobs: list[tuple[str, str, TimeScenario]] = []
    found: dict[str, ScenarioTiming] = {}
    for contest in contests:
        plans = (contest.best, *contest.challengers)
        job = TimeScenario(
            loaded=loaded,
            scenario=contest.scenario,
            device=context.device,
            threads=context.threads,
            contenders=tuple(_contender(context, contest, plan, winners) for plan in plans),
            baselines=(_named(contest.best),),
            rounds=max(11, context.experiment.validation.end_to_end_rounds // 2),
            seed=context.seed + 7,
            in_turn=context.device == "cuda",
        )
        timing = known(context, job)
        if timing is None:
            jobs.append((f"plans: {contest.scenario}", contest.scenario, job))
        else:
            found[contest.scenario] = timing
    if not jobs and not beside:
        return found

    def arrived(timing: ScenarioTiming) -> None:
        tell(context, [job for _, _, job in (*jobs, *beside)], timing)
        if any(timing.scenario == contest.scenario for contest in contests):
            found[timing.scenario] = timing
        else:
            keep_ahead(context, [job for _, _, job in beside], timing)

    bundle = make_bundle(context, [entry_of(winner) for winner in winners], {})
    try:
        run_on_model(
            context,
            _STAGE,
            [*jobs, *beside],
            _TIMEOUT_S,
            layers=settings.layers,
            bundle=largest(bundle) if beside else bundle,
            arrived=arrived,
        )
    except WorkerError as error:
        missing = ", ".join(contest.scenario for contest in contests if contest.scenario not in found)
        if missing:
            log.warning("%s: the plan that should save most is taken untimed: %s", missing, error)
    return found


def _kept(scenario: str, plan: Plan, parts: Sequence[Part], winners: Sequence[Winner]) -> list[Winner]:
    """The plan's winners, with all of the scenario that exclude nothing."""
    rivals = {part.key for part in parts}
    own = [winner for winner in winners if winner.hotspot.scenario == scenario]
    return [w for w in own if w.hotspot.problem.key in plan.keys or w.hotspot.problem.key not in rivals]


def _contender(context: RunContext, contest: _Contest, plan: Plan, winners: Sequence[Winner]) -> Contender:
    kept = _kept(contest.scenario, plan, contest.parts, winners)
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
