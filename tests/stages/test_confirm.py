"""Which candidates are confirmed, which win, and which winners go together."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from pretended_run import ENVIRONMENT, Listener, context_of

from autokernel.errors import JobCrashed, JobLost, StorageError
from autokernel.evaluate.confirm import Confirmation, ConfirmCandidates, Contender
from autokernel.evaluate.roofline import Ceilings
from autokernel.evaluate.timing import Comparison
from autokernel.events import Confirmed, Event, Profiled, RunStarted, StageFinished, event_from_json, event_to_json
from autokernel.records import (
    Candidate,
    Check,
    ConfigValue,
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
from autokernel.stages.confirm import (
    _judge,
    compatible,
    confirm,
    confirmations,
    copied_bytes,
    entry_of,
    finalists_of,
    fitting,
    slack_of,
)
from autokernel.tracking.state import RunState

X = TensorSpec.contiguous((1, 64), "float32")
CEILINGS = Ceilings(device="cpu", read_gb_per_s=10.0, tflops={"float32": 0.1}).to_json()
PASSED = Verdict(checks=(Check(name="all", value=0, limit=1, passed=True),))


def weight(n: int) -> TensorSpec:
    return TensorSpec(shape=(64, n), dtype="float32", stride=(1, 64))


MM = Problem(op="mm", inputs=(X, weight(32)), device="cpu", constants=(1,))
OTHER = Problem(op="mm", inputs=(X, weight(48)), device="cpu", constants=(1,))
MERGED = Problem(op="merged_mm", inputs=(X, weight(32), weight(32)), device="cpu", constants=(1, 2))


def evaluation(problem: Problem, us: float, backend: str = "aten", **config: ConfigValue) -> Evaluation:
    candidate = Candidate(problem=problem, backend=backend, config=config)
    measurement = Measurement(median_us=us, spread_us=1, num_samples=5, regime="r")
    return Evaluation(candidate=candidate, status=Status.OK, verdict=PASSED, measurement=measurement)


def failed(problem: Problem, **config: ConfigValue) -> Evaluation:
    candidate = Candidate(problem=problem, backend="inductor", config=config)
    return Evaluation(candidate=candidate, status=Status.WRONG, message="no")


STOCK = evaluation(MM, 10, prepack=False)


def hotspot(problem: Problem, weight: float = 0.1) -> Hotspot:
    return Hotspot(problem=problem, scenario="s", num_calls=1, time_us=10, share=0.3, weight=weight, roofline_us=1)


def winner(problem: Problem, us: float, **config: ConfigValue) -> Winner:
    found = evaluation(problem, us, **config)
    speedup = Speedup(ratio=1.2, low=1.1, high=1.3, num_rounds=11)
    baseline = evaluation(problem, us * 1.2, prepack=False).candidate
    return Winner(
        hotspot=hotspot(problem), evaluation=found, baseline=baseline, baseline_us=us * 1.2, winner_us=us, speedup=speedup
    )


def test_the_fastest_are_finalists_and_only_what_works() -> None:
    slow, fast, faster = (evaluation(MM, us, "inductor", k=us) for us in (11.0, 8.0, 7.0))
    finalists, baselines = finalists_of([slow, fast, STOCK, faster, failed(MM, k=1)], top=2)
    assert finalists == (faster.candidate, fast.candidate)
    assert baselines == (STOCK.candidate,)
    assert finalists_of([slow, STOCK], top=2)[0] == ()
    assert finalists_of([fast], top=2) == ((), ()), "without a stock time nothing can be claimed"


def test_the_librarys_best_is_a_finalist_however_many_kernels_are_faster() -> None:
    stock = evaluation(MERGED, 12, prepack=False, merge="none")
    fast = [evaluation(MERGED, us, "triton", merge="fused", k=us) for us in (10.00, 10.01)]
    library = [evaluation(MERGED, us, prepack=p, merge="concat") for us, p in ((10.03, False), (10.02, True))]
    finalists, baselines = finalists_of([stock, *fast, *library], top=2)
    assert finalists == (*(e.candidate for e in fast), library[1].candidate)
    assert baselines == (stock.candidate,)
    assert finalists_of([stock, *fast, *library], top=4)[0] == (*finalists, library[0].candidate)
    slow = evaluation(MERGED, 12.1, prepack=True, merge="concat")
    assert finalists_of([stock, *fast, slow], top=2)[0] == finalists[:2], "it is no better than stock"


def product(m: int, device: str, n: int = 4096, k: int = 4096) -> Problem:
    weight = TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))
    return Problem(op="mm", inputs=(TensorSpec.contiguous((m, k), "bfloat16"), weight), device=device, constants=(1,))


def test_where_power_is_the_limit_a_finalist_may_be_slower_on_the_cool_card() -> None:
    h200 = Ceilings(device="cuda", read_gb_per_s=4300.0, tflops={"bfloat16": 790.0})
    assert slack_of(product(128, "cuda"), h200) == 0, "it reads"
    assert slack_of(product(2048, "cuda"), h200) == 0.05
    assert slack_of(product(2048, "cpu"), h200) == 0
    problem = product(2048, "cuda")
    stock, close, far = (evaluation(problem, us, backend) for us, backend in ((100, "aten"), (103, "cutedsl"), (106, "triton")))
    assert finalists_of([stock, close, far], top=3)[0] == ()
    assert finalists_of([stock, close, far], top=3, slack=0.05)[0] == (close.candidate,)


def test_merging_has_to_beat_the_best_separate_way() -> None:
    stock = evaluation(MERGED, 20, prepack=False, merge="none")
    packed = evaluation(MERGED, 12, prepack=True, merge="none")
    concat = evaluation(MERGED, 10, prepack=True, merge="concat")
    finalists, baselines = finalists_of([stock, packed, concat], top=2)
    assert finalists == (concat.candidate,)
    assert set(baselines) == {stock.candidate, packed.candidate}


def contender(found: Evaluation, speedup: tuple[float, float, float] | None) -> Contender:
    assert found.measurement is not None
    interval = None if speedup is None else Speedup(ratio=speedup[0], low=speedup[1], high=speedup[2], num_rounds=11)
    return Contender(
        candidate=found.candidate, verdict=PASSED, measurement=found.measurement, deterministic=True, speedup=interval
    )


@pytest.mark.parametrize(
    ("intervals", "accepted"),
    [
        ([(1.2, 1.1, 1.3)], [True]),
        ([(1.2, 1.019, 1.3)], [False]),
        ([(1.01, 1.005, 1.02)], [False]),
        ([(1.2, 1.1, 1.3), (1.3, 1.2, 1.4)], [False, True]),
        ([(1.5, 0.9, 1.9), (1.1, 1.05, 1.2)], [False, True]),
    ],
)
def test_a_winner_needs_the_lower_bound(intervals: list[tuple[float, float, float]], accepted: list[bool]) -> None:
    finalists = tuple(contender(evaluation(MM, 10 / i[0], "inductor", k=i[0]), i) for i in intervals)
    confirmation = Confirmation(problem=MM, baseline=STOCK.candidate, baselines=(contender(STOCK, None),), finalists=finalists)
    events = _judge(hotspot(MM), confirmation, 0.02)
    assert [event.accepted for event in events] == accepted
    assert [event.winner is not None for event in events] == accepted
    assert all(event.reason for event in events)


def raced(rounds: dict[str, list[float]], problem: Problem = MM) -> Confirmation:
    """Finalists by backend with their times of each round; the baseline takes 20 us."""
    stock = evaluation(problem, 10, prepack=False)
    found = {backend: evaluation(problem, min(times), backend, k=i) for i, (backend, times) in enumerate(rounds.items())}
    times = {found[backend].candidate.id: tuple(values) for backend, values in rounds.items()}
    times[stock.candidate.id] = (20.0,) * len(next(iter(rounds.values())))
    comparison = Comparison(
        baseline=stock.candidate.id, medians_us={}, spreads_us={}, num_rounds=5, num_discarded=0, drift=0.0, rounds_us=times
    )
    speedups = {backend: comparison.faster(found[backend].candidate.id, stock.candidate.id) for backend in rounds}
    finalists = tuple(
        contender(found[backend], (speedup.ratio, speedup.low, speedup.high)) for backend, speedup in speedups.items()
    )
    baselines = (contender(stock, None),)
    return Confirmation(
        problem=problem, baseline=stock.candidate, baselines=baselines, finalists=finalists, comparison=comparison
    )


@pytest.mark.parametrize(
    ("rounds", "winner"),
    [
        ({"aten": [10.0, 10.1, 10.2], "triton": [9.98, 10.06, 10.17]}, "aten"),  # a third of a percent
        ({"aten": [10.0, 10.1, 10.2], "triton": [9.6, 9.7, 9.8]}, "triton"),
        ({"aten": [10.0, 10.1, 10.2], "triton": [9.6, 9.7, 10.3]}, "aten"),  # not in every round
        ({"inductor": [10.0, 10.1, 10.2], "triton": [9.98, 10.06, 10.17]}, "triton"),  # both are kernels to bring along
        ({"triton": [8.0, 10.1, 10.2], "inductor": [9.9, 9.9, 9.9]}, "inductor"),  # one lucky round is no median
    ],
)
def test_a_kernel_to_bring_along_has_to_beat_the_librarys_own(rounds: dict[str, list[float]], winner: str) -> None:
    accepted = [event for event in _judge(hotspot(MM), raced(rounds), 0.005) if event.accepted]
    assert [event.candidate.backend for event in accepted] == [winner]


@pytest.mark.parametrize(
    ("rounds", "runners_up"),
    [
        ({"triton": [9.6, 9.7, 9.8], "inductor": [9.7, 9.8, 9.9]}, ["inductor"]),
        ({"triton": [9.6, 9.7, 9.8], "inductor": [10.0, 10.1, 10.2]}, ["inductor"]),  # 4 % behind
        ({"triton": [9.6, 9.7, 9.8], "inductor": [10.3, 10.4, 10.5]}, []),  # 7 %
        ({"triton": [9.6, 9.7, 9.8], "inductor": [9.6, 10.5, 10.6]}, ["inductor"]),  # in one round it was as fast
        ({"triton": [9.6, 9.7, 9.8], "inductor": [19.9, 20.1, 19.9]}, []),  # it is no faster than stock
        ({"aten": [10.0, 10.1, 10.2], "triton": [9.98, 10.06, 10.17]}, ["triton"]),  # the library's is preferred
        (
            {"triton": [9.6, 9.7, 9.8], "inductor": [9.9, 9.9, 9.9], "cutedsl": [9.8, 9.8, 9.8], "aten": [10.0, 10.0, 10.0]},
            ["cutedsl", "inductor"],
        ),
    ],
)
def test_who_lost_by_little_may_be_tried_in_the_model(rounds: dict[str, list[float]], runners_up: list[str]) -> None:
    confirmation = raced(rounds)
    (accepted,) = [event for event in _judge(hotspot(MM), confirmation, 0.005) if event.accepted]
    assert accepted.winner is not None
    assert [one.evaluation.candidate.backend for one in accepted.winner.runners_up] == runners_up
    for one in accepted.winner.runners_up:
        (finalist,) = [found for found in confirmation.finalists if found.candidate == one.evaluation.candidate]
        assert (one.speedup, one.evaluation.measurement) == (finalist.speedup, finalist.measurement)
        assert one.evaluation.verdict == finalist.verdict
    assert event_from_json(json.loads(json.dumps(event_to_json(accepted)))) == accepted


def test_a_library_kernel_need_not_be_a_winner_to_be_as_fast() -> None:
    """The gain of the kernel to bring along over stock is clear, that over the library's best is not: stock stays."""
    rounds = {"aten": [19.8, 20.1, 20.2], "triton": [19.75, 19.8, 19.9]}
    events = {event.candidate.backend: event for event in _judge(hotspot(MM), raced(rounds), 0.004)}
    assert [events[backend].speedup.low > 1.004 for backend in ("aten", "triton")] == [False, True]
    assert not any(event.accepted for event in events.values())
    assert "simpler and as fast" in events["triton"].reason
    clear = _judge(hotspot(MM), raced({**rounds, "triton": [19.4, 19.5, 19.6]}), 0.004)
    assert [event.candidate.backend for event in clear if event.accepted] == ["triton"]


def test_without_a_sound_baseline_nothing_is_claimed() -> None:
    assert _judge(hotspot(MM), Confirmation(problem=MM, baseline=None), 0.02) == []


GB_PER_S = 100.0


def part(us: float, n: int = 32) -> Winner:
    """A GEMM of the merged ones with an entry of its own."""
    return winner(replace(MM, inputs=(X, weight(n))), us, prepack=True)


@pytest.mark.parametrize(("us", "stays"), [(4, False), (5, False), (5.1, True), (9, True)])
def test_merged_winners_stay_only_if_entries_of_their_parts_are_slower(us: float, stays: bool) -> None:
    merged = winner(MERGED, 10, prepack=True, merge="concat")
    kept, dropped = compatible([merged, part(us)], {MM.key: [evaluation(MM, 1, prepack=True)]}, GB_PER_S)
    assert (merged in kept) is stays
    if not stays:
        assert dropped == {MERGED.key: f"its GEMMs take {2 * us:.1f} us apart, 10.0 us merged"}


def test_screening_says_nothing_about_merging() -> None:
    merged = winner(MERGED, 10, prepack=True, merge="concat")
    screened = {MM.key: [evaluation(MM, 3, prepack=False), evaluation(MM, 2, prepack=True)]}
    assert compatible([merged], screened, GB_PER_S) == ([merged], {})


@pytest.mark.parametrize(
    ("stock_us", "stays"), [({32: 10.0, 16: 10.0}, True), ({32: 30.0, 16: 10.0}, False), ({32: 30.0}, True)]
)
def test_a_part_without_an_entry_takes_its_share_of_stock(stock_us: dict[int, float], stays: bool) -> None:
    """Merging was confirmed against 12 us, of which the narrow one takes 6, 3, or by its columns 4."""
    problem = replace(MERGED, inputs=(X, weight(32), weight(16)))
    merged = winner(problem, 10, prepack=True, merge="concat")
    apart = {n: replace(MM, inputs=(X, weight(n))) for n in stock_us}
    screened = {apart[n].key: [evaluation(apart[n], us, prepack=False)] for n, us in stock_us.items()}
    kept, _ = compatible([merged, part(6.5)], screened, GB_PER_S)
    assert (merged in kept) is stays


@pytest.mark.parametrize(("gb_per_s", "stays"), [(1e6, False), (2.0, False), (1.0, True)])
def test_what_follows_separate_parts_is_a_kernel_of_its_own(gb_per_s: float, stays: bool) -> None:
    """32 + 32 results are read and 32 written: 384 bytes, 0.19 or 0.38 us beyond 2 times 4.85."""
    merged = winner(replace(MERGED, epilogue=("gated_silu",)), 10, prepack=True, merge="concat")
    kept, _ = compatible([merged, part(4.85)], {}, gb_per_s)
    assert (merged in kept) is stays


def test_an_entry_says_what_the_winner_proved() -> None:
    made = entry_of(winner(MM, 8, prepack=True))
    assert (made.problem, made.backend, dict(made.config)) == (MM, "aten", {"prepack": True})
    assert made.speedup is not None
    assert made.speedup.low == 1.1
    assert made.scenario == "s"


def test_copies_of_weights_are_bounded_and_the_least_useful_ones_go() -> None:
    large = winner(MERGED, 10, prepack=False, merge="concat")  # 2 x 64 x 32 float32
    small = winner(MM, 10, prepack=True)
    free = winner(replace(MM, inputs=(X, weight(48))), 10, prepack=False)
    assert [copied_bytes(w) for w in (large, small, free)] == [16384, 8192, 0]
    assert fitting([large, small, free], 30000) == ([large, small, free], {})
    kept, dropped = fitting([large, small, free], 20000)
    assert kept == [small, free], "the same gain for half the bytes"
    assert dropped == {MERGED.key: "it copies 1.64e-05 GB of weights, of 2e-05 GB 1.18e-05 are left (validation.max_copied_gb)"}
    many = replace(small, hotspot=replace(small.hotspot, num_calls=3))
    assert copied_bytes(many) == 3 * 8192


@dataclass
class Full:
    """A pool whose device has room for one job at a time."""

    asked: list[ConfirmCandidates] = field(default_factory=list)
    renewed: int = 0

    def submit(self, job: ConfirmCandidates, timeout_s: float) -> Future[Confirmation]:
        self.asked.append(job)
        future: Future[Confirmation] = Future()
        if job.problem == MERGED and not job.alone:
            future.set_exception(JobLost("the device had no room"))
        elif job.problem == OTHER:
            future.set_exception(JobLost("the device had no room") if not job.alone else JobCrashed("signal 11"))
        else:
            future.set_result(Confirmation(problem=job.problem, baseline=None))
        return future

    def renew(self) -> None:
        assert all(not job.alone for job in self.asked)
        self.renewed += 1


def resumed(*events: Event) -> RunState:
    """What an earlier process left in its journal."""
    return RunState.from_events(
        [
            RunStarted(run_id="r", name="t", experiment="", experiment_digest="", environment=ENVIRONMENT, seed=0, version=""),
            *events,
        ]
    )


def profiled(*problems: Problem) -> Profiled:
    hotspots = tuple(hotspot(problem) for problem in problems)
    return Profiled(hotspots=hotspots, scenario_us={"s": 100.0}, read_gb_per_s=GB_PER_S, peak_tflops={}, ceilings=CEILINGS)


def test_what_was_not_confirmed_stays_so_once_the_stage_is_done() -> None:
    """Graph options and the verdict on the whole model are without it: what comes later was seen by none of them."""
    others = [evaluation(MERGED, 10, prepack=False, merge="none"), evaluation(MERGED, 8, merge="concat")]
    found = {MM.key: [STOCK, evaluation(MM, 8, "inductor")], MERGED.key: others}
    pool, later = Full(), Full()
    (event,) = _judge(hotspot(MM), raced({"inductor": [10.0, 10.1, 10.2]}), 0.005)
    assert event.winner is not None
    for context, events in (
        (context_of(pool, "cpu"), [event]),
        (context_of(later, "cpu"), [event, StageFinished(stage="confirm", seconds=1)]),
    ):
        context.state = resumed(*events)
        assert confirm(context, profiled(MM, MERGED), found) == [event.winner]
    assert [(job.problem, job.alone) for job in pool.asked] == [(MERGED, False), (MERGED, True)]
    assert later.asked == []


@dataclass
class Answering:
    """A pool that confirms at once what it is told to."""

    confirmation: Confirmation

    def submit(self, job: ConfirmCandidates, timeout_s: float) -> Future[Confirmation]:
        future: Future[Confirmation] = Future()
        future.set_result(self.confirmation)
        return future


class Filling(Listener):
    """A disk with room for one line of a problem."""

    def record(self, event: Event) -> None:
        if isinstance(event, Confirmed) and self.events and isinstance(self.events[-1], Confirmed):
            raise StorageError("no space left")
        super().record(event)


def test_a_winner_is_kept_where_the_next_line_is_lost() -> None:
    """One line decides a problem: on a resume it is not confirmed again."""
    times = {"inductor": [10.0, 10.1, 10.2], "triton": [9.0, 9.1, 9.2]}
    journal, found = Filling(), {MM.key: [STOCK, *(evaluation(MM, 9, b, k=i) for i, b in enumerate(times))]}
    with pytest.raises(StorageError):
        confirm(context_of(Answering(raced(times)), "cpu", journal), profiled(MM), found)
    again = context_of(Full(), "cpu")
    again.state = resumed(*(event for event in journal.events if isinstance(event, Confirmed)))
    assert [won.evaluation.candidate.backend for won in confirm(again, profiled(MM), found)] == ["triton"]


@dataclass
class Slow:
    """A pool whose first job ends once another was recorded: `record` is told of that; or after a while."""

    answers: dict[str, Confirmation]
    first: Future[Confirmation] | None = None
    problem: str = ""

    def submit(self, job: ConfirmCandidates, timeout_s: float) -> Future[Confirmation]:
        future: Future[Confirmation] = Future()
        if self.first is None:
            self.first, self.problem = future, job.problem.key
            timer = threading.Timer(5, self.end)
            timer.daemon = True
            timer.start()
        else:
            future.set_result(self.answers[job.problem.key])
        return future

    def end(self) -> None:
        assert self.first is not None
        with contextlib.suppress(InvalidStateError):
            self.first.set_result(self.answers[self.problem])

    def record(self, event: Event) -> None:
        if isinstance(event, Confirmed):
            self.end()

    def close(self) -> None:
        """Nothing is open."""


def test_what_is_confirmed_is_journaled_while_others_are_not() -> None:
    """A run that is killed keeps it; which comes first decides nothing."""
    problems = (OTHER, MM)
    pool = Slow({problem.key: raced({"inductor": [10.0, 10.1, 10.2]}, problem) for problem in problems})
    listener = Listener()
    context = context_of(pool, "cpu", listener)
    context.recorders = [listener, pool]
    found = {p.key: [evaluation(p, 10, prepack=False), evaluation(p, 8, "inductor", k=0)] for p in problems}
    winners = confirm(context, profiled(*problems), found)
    assert [event.problem_key for event in listener.events if isinstance(event, Confirmed)] == [MM.key, OTHER.key]
    assert [won.hotspot.problem for won in winners] == [OTHER, MM], "of equal weight: as they were searched"
    resuming = context_of(Full(), "cpu")
    resuming.state = resumed(*(event for event in listener.events if isinstance(event, Confirmed)))
    assert confirm(resuming, profiled(*problems), found) == winners


def test_what_had_no_room_is_confirmed_alone_behind_the_others(caplog: pytest.LogCaptureFixture) -> None:
    pool = Full()
    context: Any = SimpleNamespace(pool=pool, progress=lambda *_: None)
    jobs = [
        (hotspot(problem), ConfirmCandidates(problem=problem, finalists=(), baselines=(evaluation(problem, 1).candidate,)))
        for problem in (MERGED, OTHER, MM)
    ]
    found = [(one.problem, confirmation.problem) for one, confirmation in confirmations(context, jobs)]
    assert found == [(MM, MM), (MERGED, MERGED)]
    assert [(job.problem, job.alone) for job in pool.asked[3:]] == [(MERGED, True), (OTHER, True)]
    assert pool.renewed == 1
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{OTHER.key} was not confirmed: signal 11"
    ]
    assert list(confirmations(context, [])) == []
    assert pool.renewed == 1


def test_a_problem_whose_stock_code_was_lost_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can be compared with what was not measured: it stays stock, and not without a word."""
    lost = replace(STOCK, status=Status.RUN_ERROR, measurement=None, message="the device went away")
    context = context_of(Full(), "cpu")
    context.recorders = [Listener()]
    found = {MM.key: [lost, evaluation(MM, 8, "inductor", k=0)], OTHER.key: [failed(OTHER, k=1)]}
    assert confirm(context, profiled(MM, OTHER), found) == []
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].endswith("stays with stock code, for that was not measured: RUN_ERROR: the device went away")
