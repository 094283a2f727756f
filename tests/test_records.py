"""Records and events: JSON there and back, and no nonsense."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import synthetic_events as synthetic
from hypothesis import given
from hypothesis import strategies as st

from autokernel.events import EVENT_TYPES, RunFinished, StageProgress, event_from_json, event_to_json
from autokernel.records import (
    Candidate,
    Check,
    Evaluation,
    Measurement,
    Problem,
    Speedup,
    Status,
    TensorSpec,
    Verdict,
    canonical_json,
    digest_of,
)

PROBLEM = synthetic.UP
MEASURED = Measurement(median_us=1.5, spread_us=0.0, num_samples=3, regime="invented")


def evaluation(**changes: object) -> Evaluation:
    fields: dict[str, object] = {
        "candidate": Candidate(problem=PROBLEM, backend="aten"),
        "status": Status.WRONG,
        "message": "x",
    }
    return Evaluation(**{**fields, **changes})  # type: ignore[arg-type]


def test_every_event_of_a_run_survives_json() -> None:
    events = [*synthetic.whole_run(Path("/nowhere")), StageProgress(stage="search", done=1, total=2, message="m")]
    seen = set()
    for event in events:
        text = json.dumps(event_to_json(event), allow_nan=False)
        assert event_from_json(json.loads(text)) == event
        seen.add(type(event).__name__)
    assert seen == set(EVENT_TYPES), "the synthetic run must have every kind of event"


def test_events_of_unknown_type_or_field_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown event type 'Nothing'; known: RunStarted, "):
        event_from_json({"type": "Nothing"})
    with pytest.raises(ValueError, match="unknown event type None"):
        event_from_json({"outcome": "won"})
    finished = event_to_json(RunFinished(outcome="won", message="", seconds=1.0))
    with pytest.raises(ValueError, match=r"RunFinished has no field \['mood'\]; it has \['message', 'outcome', 'seconds'\]"):
        event_from_json({**finished, "mood": "good"})
    del finished["seconds"]
    with pytest.raises(ValueError, match=r"RunFinished: .*missing 1 required keyword-only argument: 'seconds'"):
        event_from_json(finished)


@given(st.sampled_from([float("inf"), float("-inf")]) | st.floats(allow_nan=False))
def test_floats_survive_json_even_if_they_are_not_finite(value: float) -> None:
    check = Check(name="error", value=value, limit=1.0, passed=False)
    assert Check.from_json(json.loads(json.dumps(check.to_json(), allow_nan=False))) == check


def test_nan_survives_json() -> None:
    back = Check.from_json(json.loads(json.dumps(Check(name="e", value=float("nan"), limit=1.0, passed=False).to_json())))
    assert back.value != back.value


@given(
    st.dictionaries(
        st.text(max_size=8), st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    )
)
def test_candidates_keep_their_identity_through_json_and_pickle(config: dict[str, int | float | str | bool]) -> None:
    candidate = Candidate(problem=PROBLEM, backend="inductor", config=config)
    for other in (
        Candidate.from_json(json.loads(json.dumps(candidate.to_json()))),
        pickle.loads(pickle.dumps(candidate)),
        Candidate(problem=PROBLEM, backend="inductor", config=dict(reversed(list(config.items())))),
    ):
        assert other == candidate
        assert other.id == candidate.id
        assert hash(other) == hash(candidate)


def test_a_candidate_cannot_be_changed() -> None:
    mine = {"a": 1}
    candidate = Candidate(problem=PROBLEM, backend="aten", config=mine)
    mine["a"] = 2
    assert candidate.config["a"] == 1
    with pytest.raises(TypeError):
        candidate.config["a"] = 3  # type: ignore[index]


def test_digests_do_not_depend_on_order_and_refuse_nan() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1}) != digest_of({"a": 1, "b": [2, 1]})
    assert canonical_json({"b": "×", "a": 1}) == '{"a":1,"b":"×"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_problem_keys_tell_everything_apart() -> None:
    base = PROBLEM
    x, w = base.inputs
    rowwise = TensorSpec.contiguous(w.shape, w.dtype)
    others = [
        Problem(op="mm", inputs=(x, rowwise), device="cpu", constants=(1,)),
        Problem(op="mm", inputs=(x, w), device="cpu"),
        Problem(op="mm", inputs=(x, w), device="cuda", constants=(1,)),
        Problem(op="mm", inputs=(x, w), device="cpu", constants=(1,), epilogue=("silu",)),
        Problem(op="mm", inputs=(x, w), device="cpu", constants=(1,), scalars=(("alpha", 2),)),
    ]
    keys = {p.key for p in (base, *others)}
    assert len(keys) == 6
    assert base.key == "cpu: mm(bfloat16[512x384], const bfloat16[384x1280]@1,384)"
    assert others[0].key == "cpu: mm(bfloat16[512x384], const bfloat16[384x1280])"


def test_bytes_count_broadcast_elements_once() -> None:
    assert TensorSpec.contiguous((4, 8), "bfloat16").num_bytes == 64
    assert TensorSpec(shape=(4, 8), dtype="float32", stride=(0, 1)).num_bytes == 32
    assert TensorSpec.contiguous((4, 8), "float32").stride == (8, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorSpec(shape=(2, 3), dtype="float32", stride=(1,)), r"shape \(2, 3\) and stride \(1,\) differ in rank"),
        (lambda: TensorSpec(shape=(2,), dtype="float31", stride=(1,)), r"dtype 'float31' is not one of \["),
        (lambda: Problem(op="mm", inputs=PROBLEM.inputs, device="cpu", constants=(2,)), "must be positions among 2 inputs"),
        (lambda: Measurement(median_us=0.0, spread_us=0, num_samples=1, regime=""), "not a measurement: 0.0 us"),
        (lambda: Measurement(median_us=float("nan"), spread_us=0, num_samples=1, regime=""), "not a measurement: nan"),
        (lambda: Measurement(median_us=1.0, spread_us=-1, num_samples=1, regime=""), "spread -1"),
        (lambda: Measurement(median_us=1.0, spread_us=0, num_samples=0, regime=""), "0 samples"),
        (lambda: evaluation(status=Status.OK, verdict=synthetic.PASSED), "status OK needs a measurement"),
        (lambda: evaluation(measurement=MEASURED), "status WRONG forbids a measurement"),
        (lambda: evaluation(status=Status.OK, measurement=MEASURED), "status OK needs a verdict that passed"),
        (
            lambda: evaluation(status=Status.OK, measurement=MEASURED, verdict=Verdict(checks=())),
            "status OK needs a verdict that passed",
        ),
        (lambda: evaluation(message=""), "status WRONG needs a message that says why"),
        (lambda: Speedup(ratio=1.2, low=1.3, high=1.4, num_rounds=9), r"ratio 1.2 lies outside its interval \[1.3, 1.4\]"),
    ],
)
def test_nonsense_is_forbidden(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_verdict_without_checks_has_not_passed() -> None:
    bad = Check(name="late", value=2.0, limit=1.0, passed=False)
    assert not Verdict(checks=()).passed
    assert synthetic.PASSED.passed
    assert Verdict(checks=(*synthetic.PASSED.checks, bad)).failures == (bad,)


def test_attainable_gain_follows_amdahl() -> None:
    spot = synthetic.hotspot(PROBLEM, "prefill", share=0.4, time_us=300.0)
    assert spot.attainable_gain == pytest.approx(0.2 * (1 - 1 / 3))
    idle = synthetic.hotspot(PROBLEM, "prefill", share=0.4, time_us=0.0)
    assert idle.attainable_gain == 0.0
