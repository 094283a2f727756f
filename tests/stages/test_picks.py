"""No winner is slower than what max-autotune runs for the same problem: who is refused, and what is said of it."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace

import pytest
from pretended_run import Listener, context_of
from stages.test_confirm import MERGED, MM, PASSED, STOCK, evaluation, failed, hotspot, product, profiled, raced, resumed

from autokernel.backends.max_autotune import max_autotune_of
from autokernel.errors import JobCrashed, JobLost, JobTimeout
from autokernel.evaluate.confirm import Confirmation, ConfirmCandidates, Contender
from autokernel.events import Confirmed, event_from_json, event_to_json
from autokernel.records import Evaluation, Measurement, Problem, Status, TensorSpec
from autokernel.stages.confirm import _judge, confirm
from autokernel.stages.picks import asks

GAIN = 0.005
ASKED = "validation.max_autotune_picks=true"  # llama.yaml, which is pretended to run, leaves it to gemms.yaml


def against(rounds: dict[str, list[float]], rival_us: list[float], picked: str = "aten mm") -> Confirmation:
    """A race of finalists by backend, in which max-autotune took part; stock takes 20 us."""
    found = raced(rounds)
    assert found.comparison is not None
    rival = max_autotune_of(MM)
    comparison = replace(found.comparison, rounds_us={**found.comparison.rounds_us, rival.id: tuple(rival_us)})
    measurement = Measurement(median_us=sorted(rival_us)[1], spread_us=1, num_samples=3, regime="r")
    contender = Contender(candidate=rival, verdict=PASSED, measurement=measurement, deterministic=True)
    return replace(found, comparison=comparison, max_autotune=contender, picked=picked)


@pytest.mark.parametrize(
    ("rounds", "rival", "winner"),
    [
        ({"triton": [9.6, 9.7, 9.8]}, [10.0, 10.1, 10.2], "triton"),
        ({"triton": [10.0, 10.1, 10.2]}, [9.8, 9.9, 10.0], None),  # 2 % slower in every round
        ({"triton": [10.0, 10.1, 9.9]}, [9.9, 10.0, 10.0], "triton"),  # not in every round
        ({"triton": [10.0, 10.1, 10.2], "inductor": [9.5, 9.6, 9.7]}, [9.5, 9.6, 9.7], "inductor"),  # the pick itself
        # the library's best is preferred where it is as good as another, but not where max-autotune is faster
        ({"aten": [10.0, 10.01, 10.02], "triton": [9.98, 9.99, 10.0]}, [9.98, 9.99, 10.0], "triton"),
        ({"aten": [10.0, 10.01, 10.02], "triton": [9.98, 9.99, 10.0]}, [10.1, 10.1, 10.1], "aten"),
    ],
)
def test_who_is_slower_than_max_autotune_is_no_winner(
    rounds: dict[str, list[float]], rival: list[float], winner: str | None
) -> None:
    events = _judge(hotspot(MM), against(rounds, rival), GAIN)
    assert [event.candidate.backend for event in events if event.accepted] == ([winner] if winner else [])
    for event in events:
        assert event.over_max_autotune is not None
        assert event.max_autotune == "aten mm"
        assert not event.accepted or event.over_max_autotune.high >= 1
        assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


def test_a_refused_one_says_how_much_slower_it_is() -> None:
    (event,) = _judge(hotspot(MM), against({"triton": [10.0, 10.1, 10.2]}, [9.8, 9.9, 10.0], "triton mm BLOCK_M=16"), GAIN)
    assert event.reason == "max-autotune is faster, with triton mm BLOCK_M=16: over it 0.980 [0.980, 0.980]"
    (slow,) = _judge(hotspot(MM), against({"triton": [20.0, 20.1, 20.2]}, [9.8, 9.9, 10.0]), GAIN)
    assert "is not above" in slow.reason, "it does not even gain over stock"


def test_runners_up_are_no_slower_either() -> None:
    rounds = {"triton": [9.6, 9.7, 9.8], "inductor": [9.9, 9.9, 9.9]}
    for rival, expected in (([10.0, 10.0, 10.0], ["inductor"]), ([9.7, 9.8, 9.85], [])):
        (accepted,) = [event for event in _judge(hotspot(MM), against(rounds, rival), GAIN) if event.accepted]
        assert accepted.winner is not None
        assert [one.evaluation.candidate.backend for one in accepted.winner.runners_up] == expected


def test_where_it_did_not_take_part_the_reason_is_kept() -> None:
    failure = Evaluation(candidate=max_autotune_of(MM), status=Status.BUILD_ERROR, message="no kernel image")
    found = replace(raced({"triton": [9.6, 9.7, 9.8]}), failures=(failure,))
    (event,) = _judge(hotspot(MM), found, GAIN)
    assert (event.accepted, event.over_max_autotune) == (True, None)
    assert event.max_autotune == "not compared, BUILD_ERROR: no kernel image"


def test_lines_of_older_journals_are_read() -> None:
    (event,) = _judge(hotspot(MM), raced({"triton": [9.6, 9.7, 9.8]}), GAIN)
    line = event_to_json(event)
    assert (line.pop("over_max_autotune"), line.pop("max_autotune")) == (None, "")
    assert event_from_json(line) == event


MATRIX = TensorSpec.contiguous((64, 64), "float32")


@pytest.mark.parametrize(
    ("override", "expected"),
    [("", True), ("validation.max_autotune_picks=false", False), ("validation.baselines=[eager, default]", False)],
    ids=["asked for", "switched off", "no baseline"],
)
def test_it_is_asked_where_it_is_a_baseline(override: str, expected: bool) -> None:
    experiment = context_of(None, "cpu", overrides=[ASKED, *([override] if override else [])]).experiment
    norm = Problem(op="rms_norm", inputs=(MATRIX, TensorSpec.contiguous((64,), "float32")), device="cpu")
    mlp = Problem(op="merged_mm", inputs=(MATRIX, MATRIX, MATRIX), device="cpu", constants=(1, 2))
    assert [asks(experiment, problem) for problem in (MM, mlp, norm)] == [expected, expected, False]
    heads = TensorSpec.contiguous((1, 4, 8, 16), "float32")
    call = Problem(op="attention", inputs=(heads, heads, heads), device="cpu", scalars=(("scale", 0.25),))
    written = replace(call, scalars=(*call.scalars, ("written", "eager")))
    assert [asks(experiment, problem) for problem in (call, written)] == [False, expected], "two products, or a call"


class Crashing:
    """A pool whose process dies, or never ends, while max-autotune takes part."""

    def __init__(self, error: Exception, times: dict[str, list[float]]) -> None:
        self.error, self.times = error, times
        self.asked: list[ConfirmCandidates] = []

    def submit(self, job: ConfirmCandidates, timeout_s: float) -> Future[Confirmation]:
        self.asked.append(job)
        future: Future[Confirmation] = Future()
        if job.max_autotune:
            future.set_exception(self.error)
        else:
            future.set_result(raced(self.times))
        return future


@pytest.mark.parametrize("error", [JobCrashed("signal 11"), JobTimeout("900 s")], ids=str)
def test_a_crash_of_its_costs_no_winner(error: Exception) -> None:
    pool, journal = Crashing(error, {"inductor": [10.0, 10.1, 10.2]}), Listener()
    found = {MM.key: [STOCK, evaluation(MM, 8, "inductor", k=0)]}
    (winner,) = confirm(context_of(pool, "cpu", journal, overrides=[ASKED]), profiled(MM), found)
    assert winner.evaluation.candidate.backend == "inductor"
    assert [(job.max_autotune, job.pick_may_win) for job in pool.asked] == [(True, True), (False, True)]
    assert [event.max_autotune for event in journal.events if isinstance(event, Confirmed)] == [f"not compared: {error}"]
    again = context_of(pool, "cpu")
    again.state = resumed(*(event for event in journal.events if isinstance(event, Confirmed)))
    assert confirm(again, profiled(MM), found) == [winner]


def test_a_crash_of_its_costs_no_winner_that_was_lost_before() -> None:
    """As on a busy device: no room at first, then Inductor's list brings the second try down."""

    class Lost(Crashing):
        def submit(self, job: ConfirmCandidates, timeout_s: float) -> Future[Confirmation]:
            future = super().submit(job, timeout_s)
            if job.alone:
                return future
            full: Future[Confirmation] = Future()
            full.set_exception(JobLost("the device is full"))
            return full

        def renew(self) -> None:
            pass

    pool, journal = Lost(JobTimeout("900 s"), {"inductor": [10.0, 10.1, 10.2]}), Listener()
    found = {MM.key: [STOCK, evaluation(MM, 8, "inductor", k=0)]}
    (winner,) = confirm(context_of(pool, "cpu", journal, overrides=[ASKED]), profiled(MM), found)
    assert winner.evaluation.candidate.backend == "inductor"
    assert [(job.alone, job.max_autotune) for job in pool.asked] == [(False, True), (True, True), (True, False)]
    assert [event.max_autotune for event in journal.events if isinstance(event, Confirmed)] == ["not compared: 900 s"]


def test_its_pick_is_no_entry_where_the_experiment_leaves_inductor_out() -> None:
    pool = Crashing(JobCrashed("signal 11"), {"inductor": [10.0, 10.1, 10.2]})
    context = context_of(pool, "cpu", overrides=[ASKED, "backends=[aten, triton]"])
    confirm(context, profiled(MM), {MM.key: [STOCK, evaluation(MM, 8, "triton", k=0)]})
    assert [job.pick_may_win for job in pool.asked] == [False, False]


class Racing(Crashing):
    """A pool that answers with this race, whoever takes part; or fails."""

    def __init__(self, problem: Problem, error: Exception | None) -> None:
        super().__init__(error or JobCrashed(""), {"inductor": [10.0, 10.1, 10.2]})
        self.problem, self.fails = problem, error is not None

    def submit(self, job: ConfirmCandidates, timeout_s: float) -> Future[Confirmation]:
        if self.fails:
            return super().submit(job, timeout_s)
        self.asked.append(job)
        future: Future[Confirmation] = Future()
        future.set_result(raced(self.times, self.problem))
        return future


@pytest.mark.parametrize("error", [None, JobCrashed("signal 11")], ids=["it runs", "it crashes"])
def test_where_nothing_was_faster_its_pick_alone_meets_stock_on_a_gpu(error: Exception | None) -> None:
    problem = product(16, "cuda")
    found = {problem.key: [evaluation(problem, 10, prepack=False), evaluation(problem, 11, "triton", k=0)]}
    pool = Racing(problem, error)
    winners = confirm(context_of(pool, overrides=[ASKED]), profiled(problem), found)
    assert [(job.finalists, job.max_autotune, job.pick_may_win) for job in pool.asked] == [((), True, True)], "and never again"
    assert [winner.evaluation.candidate.backend for winner in winners] == ([] if error else ["inductor"])


@pytest.mark.parametrize(
    ("device", "override"),
    [("cpu", ""), ("cuda", "validation.max_autotune_picks=false"), ("cuda", "backends=[aten, triton]")],
    ids=["cpu", "switched off", "no entry"],
)
def test_elsewhere_nobody_is_raced_where_nothing_was_faster(device: str, override: str) -> None:
    problem = product(16, device)
    pool = Racing(problem, None)
    found = {problem.key: [evaluation(problem, 10, prepack=False)]}
    assert (
        confirm(context_of(pool, device, overrides=[ASKED, *([override] if override else [])]), profiled(problem), found) == []
    )
    assert pool.asked == []


def test_without_a_stock_time_nobody_is_raced() -> None:
    """A separate way to run products that could be merged is a baseline, but not stock."""
    merged = replace(MERGED, device="cuda")
    pool = Racing(merged, None)
    found = {merged.key: [failed(merged, k=0), evaluation(merged, 10, "inductor", merge="none")]}
    assert confirm(context_of(pool, overrides=[ASKED]), profiled(merged), found) == []
    assert pool.asked == []
