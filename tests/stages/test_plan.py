"""Which winners are parts of plans, which plan is kept, and what becomes of the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from pretended_run import ENVIRONMENT, LLAMA, Listener, context_of

from autokernel.config import load_experiment
from autokernel.errors import JobCrashed
from autokernel.evaluate.end_to_end import ScenarioTiming, TimeScenario
from autokernel.events import (
    ContendersTimed,
    GraphTrial,
    ModeTiming,
    PlanTrial,
    Profiled,
    RunStarted,
    event_from_json,
    event_to_json,
)
from autokernel.profiling.footprint import Footprint, MeasureFootprints
from autokernel.records import (
    Candidate,
    Check,
    Evaluation,
    Hotspot,
    Measurement,
    Problem,
    Speedup,
    Status,
    TensorSpec,
    Verdict,
    Winner,
)
from autokernel.search.plans import Plan, best_plans
from autokernel.stages.confirm import entry_of
from autokernel.stages.graph import search_graph_options
from autokernel.stages.plan import _contest, _decided, choose_plans, judge, play
from autokernel.stages.plan_parts import in_precedence, parts_of
from autokernel.stages.production import make_bundle
from autokernel.stages.rehearsal import Rehearse
from autokernel.tracking.state import RunState

PASSED = Verdict(checks=(Check(name="all", value=0, limit=1, passed=True),))
X = TensorSpec.contiguous((1, 2, 1, 64), "float32")


def attention(scale: float) -> Problem:
    return Problem(op="attention", inputs=(X, X, X), device="cpu", scalars=(("scale", scale),))


MM = Problem(
    op="mm", inputs=(TensorSpec.contiguous((1, 64), "float32"), TensorSpec.contiguous((64, 8), "float32")), device="cpu"
)
MERGED = replace(MM, op="merged_mm", inputs=(*MM.inputs, MM.inputs[1]))
WHOLE, PART = attention(1.0), attention(2.0)


def winner(
    problem: Problem, saved_us: float, *rivals: Problem, scenario: str = "decode", num_calls: int = 1, nodes: str = ""
) -> Winner:
    hotspot = Hotspot(
        problem=problem, scenario=scenario, num_calls=num_calls, time_us=50, share=0.3, weight=0.1, roofline_us=1,
        rivals=tuple(rival.key for rival in rivals), nodes=tuple(nodes),
    )  # fmt: skip
    candidate = Candidate(problem=problem, backend="aten", config={"implementation": "stock"})
    found = Evaluation(
        candidate=candidate, status=Status.OK, verdict=PASSED,
        measurement=Measurement(median_us=10, spread_us=1, num_samples=5, regime="r"),
    )  # fmt: skip
    speedup = Speedup(ratio=1.2, low=1.1, high=1.3, num_rounds=11)
    return Winner(
        hotspot=hotspot, evaluation=found, baseline=candidate, baseline_us=10 + saved_us, winner_us=10, speedup=speedup
    )  # fmt: skip


def test_parts_are_what_excludes_or_is_excluded_in_the_scenario() -> None:
    winners = [winner(WHOLE, 5, PART, MM, num_calls=3), winner(PART, 2), winner(MM, 1, WHOLE), winner(attention(3.0), 9)]
    parts = parts_of("decode", winners)
    assert [(part.key, part.saved_us) for part in parts] == [(WHOLE.key, 15), (PART.key, 2), (MM.key, 1)]
    assert parts[0].rivals == {PART.key, MM.key}
    assert parts[0].stock_us == 3 * (10 + 5)
    assert parts_of("prefill", winners) == []
    assert parts_of("decode", winners[1:]) == [], "who excluded them has not won"


def test_merged_products_and_their_parts_are_no_rivals_here() -> None:
    assert parts_of("decode", [winner(MM, 1, MERGED), winner(MERGED, 2, MM)]) == []


def test_what_is_merged_saves_nothing_by_itself() -> None:
    """Else a plan with a merged product counts the savings of its parts as well, and wins over a fusion that takes both."""
    mm, merged, fused = winner(MM, 3, MERGED, WHOLE, num_calls=4), winner(MERGED, 2, MM, WHOLE), winner(WHOLE, 9, MERGED, MM)
    for calls, saved in ((4, 0), (1, 9), (0, 12)):
        taken = replace(mm, hotspot=replace(mm.hotspot, rival_calls=(calls, 4)))
        found = {part.key: part.saved_us for part in parts_of("decode", [taken, merged, fused])}
        assert found == {MM.key: saved, MERGED.key: 2, WHOLE.key: 9}, "what the fusion takes is for the plan to say"
    taken = replace(mm, hotspot=replace(mm.hotspot, rival_calls=(4, 4)))
    assert {part.key: part.saved_us for part in parts_of("decode", [taken, fused])}[MM.key] == 12, "merging has not won"


def shared(one: Winner, **calls: int) -> Winner:
    """With so many of its calls shared with each of its rivals, by their numbers."""
    return replace(one, hotspot=replace(one.hotspot, rival_calls=tuple(calls.values())))


def test_a_fusion_that_loses_some_of_its_calls_keeps_the_rest() -> None:
    taker = shared(winner(WHOLE, 5, PART, MM, num_calls=32), part=32, mm=32)
    loser = shared(winner(PART, 2, WHOLE, num_calls=64), whole=16)
    mm = shared(winner(MM, 1, WHOLE, num_calls=32), whole=32)
    parts = {part.key: part for part in parts_of("decode", [loser, taker, mm])}
    assert (parts[PART.key].rivals, parts[WHOLE.key].rivals) == (frozenset(), {MM.key})
    assert (parts[PART.key].taken, parts[WHOLE.key].taken) == ({WHOLE.key: 0.25}, {})
    assert best_plans(list(parts.values()), 1)[0].saved_us == 32 * 5 + 64 * 2 * 0.75
    assert in_precedence([loser, mm, taker]) == [taker, loser, mm], "who takes is asked first"
    assert in_precedence([taker, mm, loser]) == [taker, mm, loser]
    for all_of_it in (
        [shared(winner(WHOLE, 5, PART, num_calls=32), part=31), loser],  # it does not want all of its own calls there
        [shared(winner(WHOLE, 5, PART, num_calls=32), part=32), shared(winner(PART, 2, WHOLE, num_calls=16), whole=16)],
        [winner(WHOLE, 5, PART, num_calls=32), winner(PART, 2, WHOLE, num_calls=64)],  # not known
    ):
        found = parts_of("decode", all_of_it)
        assert [part.rivals for part in found] == [{PART.key}, {WHOLE.key}]
        assert in_precedence(list(reversed(all_of_it))) == list(reversed(all_of_it))


FIRST, SECOND = Plan(keys=(WHOLE.key,), saved_us=15), Plan(keys=(PART.key, MM.key), saved_us=3)


def timing(low: float, ratio: float, high: float) -> ScenarioTiming:
    name = " + ".join(SECOND.keys)
    speedup = Speedup(ratio=ratio, low=low, high=high, num_rounds=11)
    modes = (ModeTiming(mode=" + ".join(FIRST.keys), median_us=100, spread_us=1),)
    return ScenarioTiming(scenario="decode", baseline=modes[0].mode, modes=modes, speedups={name: speedup})


@pytest.mark.parametrize(("low", "kept"), [(1.01, SECOND), (0.99, FIRST)])
def test_a_plan_has_to_be_clearly_faster_than_the_one_that_should_be(low: float, kept: Plan) -> None:
    best, trials = judge("decode", FIRST, [SECOND], timing(low, 1.03, 1.05))
    assert best is kept
    assert [trial.keys for trial in trials][-1] == kept.keys
    assert [trial.accepted for trial in trials] == [False, True]
    assert "1.030 times as fast" in next(trial.reason for trial in trials if trial.keys == SECOND.keys)
    assert [event_from_json(event_to_json(trial)) for trial in trials] == trials


def test_a_plan_that_does_not_run_is_told() -> None:
    failed = replace(timing(1, 1, 1), speedups={}, failures={" + ".join(SECOND.keys): "it does not compile"})
    best, trials = judge("decode", FIRST, [SECOND], failed)
    assert best is FIRST
    assert trials[0].reason == "it does not compile"


def test_the_last_accepted_plan_decides_and_the_rest_is_dropped_with_the_reason() -> None:
    winners = [winner(WHOLE, 5, PART, MM), winner(PART, 2), winner(MM, 1), winner(attention(3.0), 9)]
    parts = {"decode": parts_of("decode", winners)}

    def trial(plan: Plan, accepted: bool) -> PlanTrial:
        return PlanTrial(scenario="decode", keys=plan.keys, saved_us=plan.saved_us, speedup=None, accepted=accepted)

    kept, dropped = _decided(winners, parts, [trial(SECOND, True), trial(FIRST, True), trial(SECOND, False)])
    assert [one.hotspot.problem for one in kept] == [WHOLE, attention(3.0)]
    assert set(dropped) == {PART.key, MM.key}
    assert dropped[MM.key] == f"its nodes go to {WHOLE.key}, with which decode is faster"
    assert _decided(winners, parts, []) == (winners, {}), "nothing was decided: nothing is dropped"


def contest(step_us: float, trials: int = 4) -> Any:
    winners = [winner(WHOLE, 5, PART, num_calls=3), winner(PART, 2), winner(attention(3.0), 9)]
    return _contest("decode", parts_of("decode", winners), step_us, winners, trials, 0)


def test_what_could_not_be_told_apart_in_the_model_is_not_timed() -> None:
    small = contest(step_us=100 + 24)  # without what the better plan and its company save
    assert (small.step_us, [plan.keys for plan in small.challengers], small.trials) == (100, [(PART.key,)], [])
    large = contest(step_us=(45 + 12) / 0.002 + 24 + 1)
    assert large.challengers == []
    refused, accepted = large.trials
    assert (refused.keys, accepted.keys, accepted.accepted) == ((PART.key,), (WHOLE.key,), True)
    assert "not timed: it replaces other calls than a plan that should save more in 57.0 us of 28501 us" in refused.reason
    assert accepted.reason == "no plan that could be told apart from it"


def test_plans_of_the_same_nodes_are_told_apart_by_their_own_times() -> None:
    winners = [winner(WHOLE, 5, PART, nodes="x"), winner(PART, 2, nodes="x")]
    refused, accepted = _contest("decode", parts_of("decode", winners), 100, winners, 4, 0).trials
    assert (refused.keys, accepted.keys, accepted.accepted) == ((PART.key,), (WHOLE.key,), True)
    gemms = [winner(WHOLE, 5, MM, nodes="x"), winner(MM, 2, nodes="x")]
    found = _contest("decode", parts_of("decode", gemms), 100, gemms, 4, 0)
    assert found.challengers, "what Inductor sees into may be fused with its neighbours"


@pytest.mark.parametrize(("ratio", "contradicts"), [(100 / 113, False), (1.02, True)])
def test_optuna_is_asked_for_the_second_round_whatever_the_first_says(ratio: float, contradicts: bool) -> None:
    """The challenger should take 13 us more of 100. Another round costs as much again: two are all."""
    played = contest(step_us=124)
    asked: list[tuple[str, ...]] = []

    def nothing(best: Plan) -> list[Plan]:
        asked.append(best.keys)
        return []

    played.study.next = nothing
    (challenger,) = played.challengers
    speedup = Speedup(ratio=ratio, low=ratio - 0.005, high=ratio + 0.005, num_rounds=11)
    modes = (ModeTiming(mode=WHOLE.key, median_us=20, spread_us=1),)  # of a part of the model
    timing = ScenarioTiming(scenario="decode", baseline=WHOLE.key, modes=modes, speedups={PART.key: speedup})
    play(played, timing)
    assert asked == [(PART.key,) if contradicts else (WHOLE.key,)]
    assert played.best == (challenger if contradicts else contest(124).best)
    assert played.trials[-1].keys == played.best.keys
    gained_us, noise_us = 100 * (1 - 1 / ratio), 100 * (1 / (ratio - 0.005) - 1 / (ratio + 0.005)) / 3.92
    found, off = played.study._beliefs.gain_us(challenger, contest(124).best)
    assert found == pytest.approx(gained_us, abs=0.8), "the study knows what was measured"
    assert noise_us / 2 < off < noise_us
    played.challengers = [challenger]
    play(played, timing)
    assert len(asked) == 1


STARTED = RunStarted(run_id="r", name="t", experiment="", experiment_digest="", environment=ENVIRONMENT, seed=0, version="")
SIZES = dict.fromkeys(load_experiment(LLAMA).experiment.scenarios, 10)


@dataclass
class Timer:
    """A pool that answers comparisons of plans: the second one is faster, except where the model does not run."""

    broken: str = ""
    num_workers: int = 2
    asked: list[TimeScenario] = field(default_factory=list)
    rehearsed: list[str] = field(default_factory=list)

    def submit(self, job: Callable[[], Any], timeout_s: float) -> Future[Any]:
        future: Future[Any] = Future()
        if isinstance(job, MeasureFootprints):
            future.set_result(tuple(Footprint(scenarios=SIZES, device=100) for _ in job.models))
            return future
        if isinstance(job, Rehearse):
            self.rehearsed.append(job.scenario)
            future.set_result(1.0)
            return future
        assert isinstance(job, TimeScenario)
        self.asked.append(job)
        if job.scenario == self.broken:
            future.set_exception(JobCrashed("it broke"))
            return future
        first, *others = (contender.name for contender in job.contenders)
        faster = Speedup(ratio=1.1, low=1.09, high=1.11, num_rounds=11)
        modes = (ModeTiming(mode=first, median_us=10, spread_us=1),)
        future.set_result(
            ScenarioTiming(scenario=job.scenario, baseline=first, modes=modes, speedups=dict.fromkeys(others, faster))
        )
        return future

    def renew(self) -> None:
        """There is nothing to end."""

    def close(self) -> None:
        """There is nothing to close."""


def test_stock_modes_are_rehearsed_beside_plans_on_a_gpu() -> None:
    winners = [
        winner(attention(10.0), 5, attention(20.0), scenario="decode-b64"),
        winner(attention(20.0), 2, scenario="decode-b64"),
    ]
    pool = Timer()
    profiled = Profiled(hotspots=(), scenario_us={"decode-b64": 100.0}, read_gb_per_s=1, peak_tflops={})
    choose_plans(context_of(pool, "cuda"), profiled, winners)
    assert [job.scenario for job in pool.asked][:1] == ["decode-b64"]
    assert len(pool.rehearsed) == 1, "one of the two workers is the stage's own"


def test_graph_options_of_scenarios_without_plans_are_timed_beside_the_plans_of_others() -> None:
    own, other = winner(attention(30.0), 4, scenario="decode-b16"), attention(20.0)
    winners = [winner(attention(10.0), 5, other, scenario="decode-b64"), winner(other, 2, scenario="decode-b64"), own]
    pool = Timer()
    context = context_of(pool, "cuda")
    profiled = Profiled(hotspots=(), scenario_us={"decode-b64": 100.0}, read_gb_per_s=1, peak_tflops={})
    kept, _ = choose_plans(context, profiled, winners)
    first, *beside = pool.asked
    others = sorted(set(SIZES) - {"decode-b64"})
    assert (first.scenario, sorted(job.scenario for job in beside)) == ("decode-b64", others)
    pool.asked.clear()
    bundle = make_bundle(context, [entry_of(one) for one in kept], {})
    search_graph_options(context, bundle)
    tried = [job.scenario for job in pool.asked if len(job.contenders) == len(beside[0].contenders)]
    assert tried == ["decode-b64"], "what was timed ahead is found"
    pool.asked.clear()
    search_graph_options(context, make_bundle(context, [entry_of(one) for one in kept if one is not own], {}))
    again = [job.scenario for job in pool.asked if len(job.contenders) == len(beside[0].contenders)]
    assert sorted(again) == ["decode-b16", "decode-b64"], "it has other entries now"


def test_a_plan_without_challengers_holds_up_no_graph_options() -> None:
    other, settled = attention(20.0), attention(40.0)
    winners = [
        winner(attention(10.0), 5, other, scenario="decode-b64"),
        winner(other, 2, scenario="decode-b64"),
        winner(attention(30.0), 5, settled, scenario="decode-b16", nodes="x"),
        winner(settled, 2, scenario="decode-b16", nodes="x"),
    ]
    pool = Timer()
    context = context_of(pool, "cuda")
    times = dict.fromkeys(("decode-b16", "decode-b64"), 100.0)
    kept, _ = choose_plans(context, Profiled(hotspots=(), scenario_us=times, read_gb_per_s=1, peak_tflops={}), winners)
    (ahead,) = [job for job in pool.asked if job.scenario == "decode-b16"]
    pool.asked.clear()
    search_graph_options(context, make_bundle(context, [entry_of(one) for one in kept], {}))
    tried = [job.scenario for job in pool.asked if len(job.contenders) == len(ahead.contenders)]
    assert tried == ["decode-b64"], "it was timed with the very entries that its plan has"


def test_what_was_timed_before_a_kill_is_not_timed_again() -> None:
    """Plans and graph options are decided when all are there; a run that is killed before that keeps their times."""
    other = attention(20.0)
    winners = [winner(attention(10.0), 5, other, scenario="decode-b64"), winner(other, 2, scenario="decode-b64")]
    profiled = Profiled(hotspots=(), scenario_us={"decode-b64": 100.0}, read_gb_per_s=1, peak_tflops={})

    def decide(state: RunState | None) -> tuple[Timer, Listener, Any]:
        pool, listener = Timer(), Listener()
        context = context_of(pool, "cuda", listener)
        context.state = state
        kept, _ = choose_plans(context, profiled, winners)
        options = search_graph_options(context, make_bundle(context, [entry_of(one) for one in kept], {}))
        return pool, listener, (kept, options)

    def resumed(events: Sequence[Any]) -> RunState:
        journal = [json.loads(json.dumps(event_to_json(event))) for event in (STARTED, *events)]
        return RunState.from_events(map(event_from_json, journal))

    first, listener, decided = decide(None)
    times = [event for event in listener.events if isinstance(event, ContendersTimed)]
    assert len(times) == len(first.asked) > len(SIZES)
    trials = [n for n, event in enumerate(listener.events) if isinstance(event, (PlanTrial, GraphTrial))]
    assert listener.events.index(times[0]) < min(trials)
    again, _, found = decide(resumed(times))
    assert (again.asked, found) == ([], decided)
    missing = times[3]
    again, _, found = decide(resumed([event for event in times if event is not missing]))
    assert ([job.scenario for job in again.asked], found) == ([missing.scenario], decided)
    winners[0] = winner(attention(11.0), 5, other, scenario="decode-b64")
    again, _, _ = decide(resumed(times))
    assert {job.scenario for job in again.asked} == {"decode-b64"}, "it has other entries now"


def test_all_scenarios_are_timed_together_and_one_that_fails_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    names = "decode-b1", "decode-b16", "decode-b64"
    winners = [
        one
        for number, name in enumerate(names)
        for one in (
            winner(attention(10.0 + number), 5, attention(20.0 + number), scenario=name),
            winner(attention(20.0 + number), 2, scenario=name),
        )
    ]
    pool, listener = Timer(broken="decode-b16"), Listener()
    context = context_of(pool, "cpu", listener)
    profiled = Profiled(hotspots=(), scenario_us=dict.fromkeys(names, 100.0), read_gb_per_s=1, peak_tflops={})
    kept, dropped = choose_plans(context, profiled, winners)
    assert [job.scenario for job in pool.asked[:3]] == list(names), "before any of them answers"
    assert [one.hotspot.problem for one in kept] == [attention(20.0), attention(11.0), attention(22.0)]
    assert len(dropped) == 3
    assert "decode-b16: the plan that should save most is taken untimed: it broke" in caplog.text
    accepted = {event.scenario: event for event in listener.events if isinstance(event, PlanTrial) and event.accepted}
    assert accepted["decode-b16"].reason == "the model does not run with the others"
