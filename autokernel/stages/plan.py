"""Part of stage 3's end: which winners go together where fusions exclude each other, and with which configs, judged end to end.

Of a scenario's plans those that should save most are timed in the model, against each other and interleaved; then what Optuna
proposes, told of that (`search/plan_study.py`): other sets, and runners-up in the place of winners. How many follows from the
share of the step that the choice is about. Where nothing excludes anything and nothing has a runner-up there is nothing to
decide, and where plans differ in what takes no time nothing can be told: then nothing is timed. Scenarios take turns on the
device and compile at the same time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autokernel.errors import WorkerError
from autokernel.evaluate.end_to_end import Contender, ScenarioTiming, TimeScenario
from autokernel.events import PlanTrial, Profiled
from autokernel.records import Winner
from autokernel.search.budget import plans_to_time
from autokernel.search.plan_study import PlanStudy
from autokernel.search.plans import Part, Plan, at_stake_us, best_plans, rivals_of
from autokernel.stages.confirm import entry_of
from autokernel.stages.contenders import keep_ahead, known, tell
from autokernel.stages.context import RunContext
from autokernel.stages.graph import jobs_ahead, largest
from autokernel.stages.plan_parts import in_precedence, parts_of, saved_us
from autokernel.stages.production import make_bundle
from autokernel.stages.rehearsal import rehearse_beside
from autokernel.stages.whole_model import run_on_model, with_layers

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800
_STAGE = "plan"
_TOLD_APART = 0.002  # of a step: what a comparison in the model does not resolve
_ROUNDS = 2  # each loads the model and compiles: those after the first have Optuna's proposals
_INTERVAL = 3.92  # deviations that an interval of 95 % is wide


@dataclass(slots=True, kw_only=True)
class _Contest:
    """One scenario's plans. `step_us` is its step with the plan that should save most, by the sum of all savings."""

    scenario: str
    parts: Sequence[Part]
    study: PlanStudy
    best: Plan
    step_us: float
    challengers: list[Plan]  # of the round that comes next
    rounds: int = 0  # that were timed
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
    contests = [
        _contest(scenario, parts, profiled.scenario_us[scenario], winners, settings.trials, context.seed)
        for scenario, parts in by_scenario.items()
    ]
    if not any(contest.challengers or contest.trials for contest in contests):
        return list(winners), {}
    with context.stage(_STAGE, total=len(by_scenario), note=", ".join(by_scenario)):
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
    scenario: str, parts: Sequence[Part], stock_us: float, winners: Sequence[Winner], limit: int, seed: int
) -> _Contest:
    """The first round: those of the plans that should save most that could be told apart in the model, or Optuna's first."""
    plans = best_plans(parts, limit + 1)
    nothing = Plan(keys=(), saved_us=0.0)
    others_us = sum(saved_us(winner) for winner in _kept(scenario, nothing, parts, winners))
    step_us = max(stock_us - plans[0].saved_us - others_us, 0.0)
    trials = plans_to_time(limit, at_stake_us(plans, parts) / step_us if step_us else 1.0)
    study = PlanStudy(parts, stock_us, trials, seed, _TOLD_APART * step_us)
    best, *others = study.first()
    others = others or study.next()
    contest = _Contest(scenario=scenario, study=study, parts=parts, best=best, step_us=step_us, challengers=others)
    for plan, us in study.left_out[:trials]:
        reason = (
            f"not timed: it replaces other calls than a plan that should save more in {us:.1f} us of {step_us:.0f} us, which "
            f"could not be told apart"
        )
        contest.trials.append(_trial(scenario, plan, None, accepted=False, reason=reason))
    if not others and any(part.rivals or part.taken for part in parts):
        reason = "no other plan" if len(plans) == 1 else "no other plan that may be better"
        reason = "no plan that could be told apart from it" if study.left_out else reason
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
    for plan in challengers:
        speedup = timing.speedups.get(_named(plan))
        if speedup is not None:
            gained, least, most = (contest.step_us * (1 - 1 / one) for one in (speedup.ratio, speedup.low, speedup.high))
            contest.study.tell(plan, challenged, gained, (most - least) / _INTERVAL)
    contest.best, judged = judge(contest.scenario, challenged, challengers, timing)
    contest.trials += judged
    contest.rounds += 1
    if contest.rounds < _ROUNDS:
        contest.challengers = contest.study.next(contest.best)


def judge(scenario: str, best: Plan, challengers: Sequence[Plan], timing: ScenarioTiming) -> tuple[Plan, list[PlanTrial]]:
    """The plan to keep, the one event of which is accepted and the last: a challenger has to be clearly faster."""
    clear = [plan for plan in challengers if _named(plan) in timing.speedups and timing.speedups[_named(plan)].low > 1]
    chosen = max(clear, key=lambda plan: timing.speedups[_named(plan)].ratio, default=best)
    trials = []
    for plan in (*(plan for plan in (best, *challengers) if plan is not chosen), chosen):
        speedup = timing.speedups.get(_named(plan))
        reason = timing.failures.get(_named(plan), "")
        if not reason and speedup is not None:
            reason = f"{speedup.ratio:.3f} times as fast as the plan to beat [{speedup.low:.3f}, {speedup.high:.3f}]"
        trials.append(_trial(scenario, plan, timing, accepted=plan is chosen, reason=reason))
    return chosen, trials


def _trial(scenario: str, plan: Plan, timing: ScenarioTiming | None, *, accepted: bool, reason: str) -> PlanTrial:
    speedup = timing.speedups.get(_named(plan)) if timing is not None else None
    return PlanTrial(
        scenario=scenario,
        keys=plan.keys,
        saved_us=plan.saved_us,
        speedup=speedup,
        accepted=accepted,
        reason=reason,
        configs=dict(plan.configs),
        origin=plan.origin,
    )


def _named(plan: Plan) -> str:
    configs = dict(plan.configs)
    return " + ".join(f"{key} as {configs[key]}" if key in configs else key for key in plan.keys)


def _graph_options_of_others(
    context: RunContext, contests: Sequence[_Contest], winners: Sequence[Winner]
) -> list[tuple[str, str, TimeScenario]]:
    """Jobs of the next stage that wait for no plan: they compile while plans do."""
    with_plans = {contest.scenario for contest in contests}
    kept = [winner for winner in winners if winner.hotspot.scenario not in with_plans]
    for contest in contests:
        kept += _kept(contest.scenario, contest.best, contest.parts, winners)
    undecided = {contest.scenario for contest in contests if contest.challengers}
    return jobs_ahead(context, make_bundle(context, [entry_of(winner) for winner in kept], {}), undecided)


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
    """The plan's winners, each with its config there, with all of the scenario that are no parts."""
    contested = {part.key for part in parts}
    own = [winner for winner in winners if winner.hotspot.scenario == scenario]
    kept = [w for w in own if w.hotspot.problem.key in plan.keys or w.hotspot.problem.key not in contested]
    return _configured(kept, dict(plan.configs))


def _configured(winners: Sequence[Winner], configs: Mapping[str, str]) -> list[Winner]:
    """Winners with the runners-up of these ids in the place of those of these problems."""
    keys = [winner.hotspot.problem.key for winner in winners]
    return [winner.instead(configs[key]) if key in configs else winner for key, winner in zip(keys, winners, strict=True)]


def _contender(context: RunContext, contest: _Contest, plan: Plan, winners: Sequence[Winner]) -> Contender:
    kept = _kept(contest.scenario, plan, contest.parts, winners)
    return Contender(name=_named(plan), bundle=make_bundle(context, [entry_of(winner) for winner in kept], {}))


def _decided(
    winners: Sequence[Winner], by_scenario: Mapping[str, Sequence[Part]], trials: Sequence[PlanTrial]
) -> tuple[list[Winner], dict[str, str]]:
    """What the accepted plans leave, with the configs that it has there, and why the rest goes."""
    dropped: dict[str, str] = {}
    configs: dict[str, str] = {}
    for scenario, parts in by_scenario.items():
        accepted = [trial for trial in trials if trial.scenario == scenario and trial.accepted]
        if not accepted:
            continue
        kept = set(accepted[-1].keys)
        configs |= accepted[-1].configs
        for part in parts:
            if part.key not in kept:
                takers = [key for key in accepted[-1].keys if key in rivals_of(part.key, parts)]
                dropped[part.key] = f"its nodes go to {' and '.join(takers) or 'others'}, with which {scenario} is faster"
    return _configured([winner for winner in winners if winner.hotspot.problem.key not in dropped], configs), dropped
