"""Which winners are parts of plans, which plan is kept, and what becomes of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autokernel.evaluate.end_to_end import ScenarioTiming
from autokernel.events import ModeTiming, PlanTrial, event_from_json, event_to_json
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
from autokernel.search.plans import Plan
from autokernel.stages.plan import _decided, judge, parts_of

PASSED = Verdict(checks=(Check(name="all", value=0, limit=1, passed=True),))
X = TensorSpec.contiguous((1, 2, 1, 64), "float32")


def attention(scale: float) -> Problem:
    return Problem(op="attention", inputs=(X, X, X), device="cpu", scalars=(("scale", scale),))


MM = Problem(
    op="mm", inputs=(TensorSpec.contiguous((1, 64), "float32"), TensorSpec.contiguous((64, 8), "float32")), device="cpu"
)
MERGED = replace(MM, op="merged_mm", inputs=(*MM.inputs, MM.inputs[1]))
WHOLE, PART = attention(1.0), attention(2.0)


def winner(problem: Problem, saved_us: float, *rivals: Problem, scenario: str = "decode", num_calls: int = 1) -> Winner:
    hotspot = Hotspot(
        problem=problem, scenario=scenario, num_calls=num_calls, time_us=50, share=0.3, weight=0.1, roofline_us=1,
        rivals=tuple(rival.key for rival in rivals),
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
    assert parts_of("prefill", winners) == []
    assert parts_of("decode", winners[1:]) == [], "who excluded them has not won"


def test_merged_products_and_their_parts_are_no_rivals_here() -> None:
    assert parts_of("decode", [winner(MM, 1, MERGED), winner(MERGED, 2, MM)]) == []


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
