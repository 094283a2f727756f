"""For which rows winners are measured, what they then hold for, and what of it a run and a bundle say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from pretended_run import ENVIRONMENT, Listener, context_of

from autokernel import pipeline
from autokernel.config import DecodeScenario
from autokernel.environment import current_environment
from autokernel.errors import JobCrashed, JobLost
from autokernel.evaluate.confirm import Confirmation, ConfirmCandidates, Contender
from autokernel.evaluate.roofline import Ceilings
from autokernel.events import (
    Event,
    ModelValidated,
    Profiled,
    RowMeasured,
    RowsHeld,
    RunStarted,
    StageFinished,
    StageStarted,
    event_from_json,
    event_to_json,
)
from autokernel.export.bundle import Bundle, read_bundle, write_bundle
from autokernel.export.matching import gemm_of, with_rows
from autokernel.kernels.config import MAX_M
from autokernel.model_config import MOST_ROWS
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
from autokernel.stages.confirm import entry_of
from autokernel.stages.production import batches_to_show, make_bundle
from autokernel.stages.rows import ALL_OF, MAX_GAP, evidence_of, hold_rows, rows_to_measure, wanted_rows, widest
from autokernel.tracking.state import RunState

N, K = 512, 256
CEILINGS = Ceilings(device="cuda", read_gb_per_s=4000.0, tflops={"bfloat16": 700.0}).to_json()
PASSED = Verdict(checks=(Check(name="all", value=0, limit=1, passed=True),))
WEIGHT = TensorSpec(shape=(K, N), dtype="bfloat16", stride=(1, K))
SKINNY: dict[str, ConfigValue] = {
    "kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "split_k": 1,
}  # fmt: skip
FASTER, EQUAL, SLOWER = (Speedup(ratio=ratio, low=ratio - 0.02, high=ratio + 0.02, num_rounds=11) for ratio in (1.1, 0.99, 0.9))


def mm(m: int) -> Problem:
    x = TensorSpec.contiguous((m, K), "bfloat16")
    return Problem(op="mm", inputs=(x, WEIGHT), device="cuda", constants=(1,))


def merged(m: int) -> Problem:
    return replace(mm(m), op="merged_mm", inputs=(*mm(m).inputs, WEIGHT), constants=(1, 2))


def measurement(us: float = 10.0) -> Measurement:
    return Measurement(median_us=us, spread_us=1, num_samples=5, regime="r")


def hotspot(problem: Problem, scenario: str = "decode-b16") -> Hotspot:
    return Hotspot(problem=problem, scenario=scenario, num_calls=1, time_us=10, share=0.3, weight=0.1, roofline_us=1)


def winner(problem: Problem, backend: str = "triton", scenario: str = "decode-b16", **config: ConfigValue) -> Winner:
    merge: dict[str, ConfigValue] = {"merge": "concat"} if problem.op == "merged_mm" else {}
    candidate = Candidate(problem=problem, backend=backend, config={**SKINNY, **merge, **config})
    evaluation = Evaluation(candidate=candidate, status=Status.OK, verdict=PASSED, measurement=measurement())
    stock = Candidate(problem=problem, backend="aten", config={"prepack": False})
    return Winner(
        hotspot=hotspot(problem, scenario),
        evaluation=evaluation,
        baseline=stock,
        baseline_us=11.0,
        winner_us=10.0,
        speedup=FASTER,
    )


def profiled(*hotspots: Hotspot) -> Profiled:
    return Profiled(hotspots=hotspots, scenario_us={}, read_gb_per_s=4000.0, peak_tflops={}, ceilings=CEILINGS)


Answer = Speedup | str | Exception | None


@dataclass
class Measuring:
    """A pool that confirms at once, by the number of rows: a text is why a candidate failed, None that no stock works."""

    answer: Callable[[int], Answer]
    asked: list[ConfirmCandidates] = field(default_factory=list)

    def submit(self, job: ConfirmCandidates, timeout_s: float) -> Future[Confirmation]:
        self.asked.append(job)
        gemm = gemm_of(job.problem)
        assert gemm is not None
        future: Future[Confirmation] = Future()
        answer = self.answer(gemm.m)
        (finalist,), (stock,) = job.finalists, job.baselines
        if isinstance(answer, Exception):
            future.set_exception(answer)
        elif answer is None:
            future.set_result(Confirmation(problem=job.problem, baseline=None))
        elif isinstance(answer, str):
            failure = Evaluation(candidate=finalist, status=Status.WRONG, message=answer)
            future.set_result(Confirmation(problem=job.problem, baseline=stock, failures=(failure,)))
        else:
            made = Contender(candidate=finalist, verdict=PASSED, measurement=measurement(), deterministic=True, speedup=answer)
            future.set_result(Confirmation(problem=job.problem, baseline=stock, finalists=(made,)))
        return future

    def renew(self) -> None:
        """Its workers hold nothing."""

    @property
    def rows(self) -> list[int]:
        return [gemm.m for job in self.asked if (gemm := gemm_of(job.problem)) is not None]


def context_with(pool: Any, rows: Mapping[str, Sequence[int]], *listeners: Listener) -> Any:
    overrides = [f"scenarios.{name}.rows={list(span)}" for name, span in rows.items()]
    return context_of(pool, "cuda", *listeners, overrides=overrides)


def of(kind: type, events: Sequence[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


# --- which rows


def test_short_ranges_are_measured_row_by_row() -> None:
    assert rows_to_measure(9, 16, 16, 16) == [9, 10, 11, 12, 13, 14, 15]
    assert rows_to_measure(1, ALL_OF, 7, 64) == [m for m in range(1, ALL_OF + 1) if m != 7]
    assert rows_to_measure(16, 16, 16, 16) == []


@pytest.mark.parametrize(("first", "last", "tuned", "block_m"), [(1, 128, 64, 16), (33, 128, 128, 64), (2, 100, 16, 128)])
def test_long_ranges_are_measured_at_ends_and_edges_and_nowhere_far_apart(
    first: int, last: int, tuned: int, block_m: int
) -> None:
    chosen = rows_to_measure(first, last, tuned, block_m)
    known = sorted([*chosen, tuned])
    assert known == sorted(set(known))
    assert (known[0], known[-1]) == (first, last)
    assert tuned not in chosen
    assert max(high - low for low, high in pairwise(known)) <= MAX_GAP
    edges = {m for edge in range(block_m, last + 1, block_m) for m in (edge - 1, edge, edge + 1)}
    assert {m for m in (*edges, tuned - 1, tuned + 1) if first <= m <= last} <= set(known)
    assert len(known) < last - first


def test_what_is_measured_of_a_long_range() -> None:
    chosen = rows_to_measure(1, 70, 48, 32)
    assert chosen == [1, 8, 16, 23, 31, 32, 33, 40, 47, 49, 56, 63, 64, 65, 70]


def test_a_range_ends_before_the_first_rows_that_do_not_hold() -> None:
    asked = [9, 10, 11, 13, 14, 20, 28]
    assert widest(12, asked, set(asked)) == (9, 28)
    assert widest(12, asked, set(asked) - {10, 20}) == (11, 14), "what lies behind a gap does not count"
    assert widest(12, asked, {9, 28}) == (12, 12)
    assert widest(12, [], ()) == (12, 12)


def test_rows_of_a_scenario_are_asked_of_its_own_kernels() -> None:
    context = context_with(None, {"decode-b16": [9, 24]})
    spots = profiled(hotspot(mm(16)), hotspot(merged(16)), hotspot(mm(16), "decode-b64"), hotspot(mm(32), "decode-b1"))
    assert wanted_rows(context, profiled(hotspot(mm(16))), winner(mm(16))) == (9, 24)
    assert wanted_rows(context, spots, winner(merged(16))) == (9, 24)
    assert wanted_rows(context, spots, winner(mm(32), scenario="decode-b1")) is None, "nothing was asked of that scenario"
    assert wanted_rows(context, profiled(hotspot(mm(48))), winner(mm(48))) is None, "of other rows than those of the range"
    one = winner(mm(16), mode="vector", BLOCK_M=1)
    assert wanted_rows(context, profiled(hotspot(mm(16))), one) is None, "a kernel of one row"
    for other in (winner(mm(16), "cutedsl"), winner(mm(16), kernel="other"), winner(replace(mm(16), op="rms_norm"))):
        assert wanted_rows(context, profiled(hotspot(mm(16))), other) is None


def test_ranges_of_scenarios_with_one_product_are_one_and_end_before_what_is_tuned_by_itself() -> None:
    both = context_with(None, {"decode-b16": [9, 16], "decode-b64": [33, 64]})
    both.loaded.experiment.scenarios["decode-b64"] = DecodeScenario(kind="decode", batch=16, context=8, rows=(12, 30))
    spots = (hotspot(mm(16)), hotspot(mm(16), "decode-b64"))
    assert wanted_rows(both, profiled(*spots), winner(mm(16))) == (9, 30)
    tuned = profiled(*spots, hotspot(mm(11), "prefill-1x2048"), hotspot(mm(24), "decode-b1"), hotspot(merged(14)))
    assert wanted_rows(both, tuned, winner(mm(16))) == (12, 23)
    near = profiled(*spots, *(hotspot(mm(m)) for m in (15, 17)))
    assert wanted_rows(both, near, winner(mm(16))) is None


def test_the_experiment_may_ask_for_as_many_rows_as_the_kernel_takes() -> None:
    assert MOST_ROWS == MAX_M


# --- measuring


def test_a_winner_holds_as_far_as_it_is_right_and_not_slower() -> None:
    answers: dict[int, Answer] = {9: FASTER, 10: "max error is 3, limit 2", 11: EQUAL, 19: SLOWER}
    pool, listener = Measuring(lambda m: answers.get(m, FASTER)), Listener()
    context = context_with(pool, {"decode-b16": [9, 20]}, listener)
    won = winner(mm(16))
    held = hold_rows(context, profiled(hotspot(mm(16))), [won])
    assert pool.rows == [m for m in range(9, 21) if m != 16]
    event = held[mm(16).key]
    assert (event.wanted, event.held) == ((9, 20), (11, 18))
    assert {row.m: row.message for row in event.measured if row.message} == {10: "WRONG: max error is 3, limit 2"}
    assert [row.m for row in event.measured if not row.holds] == [10, 19]
    assert of(RowsHeld, listener.events) == [event]
    assert [one.row for one in of(RowMeasured, listener.events)] == list(event.measured)
    assert [stage.stage for stage in of(StageStarted, listener.events)] == ["rows"]
    assert entry_of(won, event).config == {**SKINNY, "m_min": 11, "m_max": 18}
    assert entry_of(won).config == SKINNY


def test_each_is_checked_and_raced_as_any_confirmation() -> None:
    pool = Measuring(lambda m: FASTER)
    context = context_with(pool, {"decode-b16": [15, 17]})
    hold_rows(context, profiled(hotspot(merged(16))), [winner(merged(16))])
    settings = context.experiment.validation
    assert pool.rows == [15, 17]
    for job in pool.asked:
        gemm = gemm_of(job.problem)
        assert gemm is not None
        assert job.problem == with_rows(merged(16), gemm.m)
        (finalist,), (stock,) = job.finalists, job.baselines
        assert (finalist.backend, dict(finalist.config)) == ("triton", {**SKINNY, "merge": "concat"})
        assert (stock.backend, dict(stock.config)) == ("aten", {"prepack": False, "merge": "none"})
        assert (job.rounds, job.deterministic_required) == (settings.confirm_rounds, settings.deterministic)
        assert job.ceilings is not None


def test_a_range_ends_at_what_could_not_be_measured() -> None:
    """A worker that dies, no room beside others, and no stock choice that works are no reason to hold for these rows."""
    answers: dict[int, Answer] = {13: JobCrashed("signal 11"), 18: JobLost("no room"), 20: None}
    pool = Measuring(lambda m: answers.get(m, FASTER))
    held = hold_rows(context_with(pool, {"decode-b16": [9, 24]}), profiled(hotspot(mm(16))), [winner(mm(16))])
    event = held[mm(16).key]
    assert event.held == (14, 17)
    assert {row.m for row in event.measured} == set(range(9, 25)) - {13, 16, 18}
    assert [job.alone for job in pool.asked if job.problem == mm(18)] == [False, True]


def test_what_holds_for_its_own_rows_alone_is_an_entry_as_any() -> None:
    held = hold_rows(
        context_with(Measuring(lambda m: SLOWER), {"decode-b16": [15, 17]}), profiled(hotspot(mm(16))), [winner(mm(16))]
    )
    assert held[mm(16).key].held == (16, 16)
    assert entry_of(winner(mm(16)), held[mm(16).key]).rows is None


def test_without_rows_nothing_is_measured_nor_said() -> None:
    listener = Listener()
    assert hold_rows(context_with(None, {}, listener), profiled(hotspot(mm(16))), [winner(mm(16))]) == {}
    assert listener.events == []


def test_rows_that_no_winner_can_hold_for_are_told(caplog: pytest.LogCaptureFixture) -> None:
    context = context_with(None, {"decode-b16": [9, 16], "decode-b64": [33, 64]})
    hold_rows(context, profiled(hotspot(mm(16))), [winner(mm(16), "cutedsl")])
    assert [record.args for record in caplog.records] == [("decode-b16",), ("decode-b64",)]


# --- resuming


def resumed(*events: Event) -> RunState:
    start = RunStarted(run_id="r", name="t", experiment="", experiment_digest="", environment=ENVIRONMENT, seed=0, version="")
    journal = [event_to_json(event) for event in (start, *events)]
    return RunState.from_events(event_from_json(line) for line in journal)


def test_a_resumed_run_measures_what_is_missing_and_nothing_twice() -> None:
    answers: dict[int, Answer] = {10: SLOWER}
    listener, spots, won = Listener(), profiled(hotspot(mm(16))), winner(mm(16))
    held = hold_rows(context_with(Measuring(lambda m: answers.get(m, FASTER)), {"decode-b16": [9, 18]}, listener), spots, [won])
    rows = of(RowMeasured, listener.events)
    halfway, rest = Measuring(lambda m: FASTER), Listener()
    context = context_with(halfway, {"decode-b16": [9, 18]}, rest)
    context.state = resumed(*rows[:5])
    assert hold_rows(context, spots, [won]) == held
    assert halfway.rows == [row.row.m for row in rows[5:]]
    assert of(RowMeasured, rest.events) == rows[5:]
    again, silent = Measuring(lambda m: SLOWER), Listener()
    context = context_with(again, {"decode-b16": [9, 18]}, silent)
    context.state = resumed(
        *of(RowMeasured, listener.events)[:3], *of(RowsHeld, listener.events), StageFinished(stage="rows", seconds=1)
    )
    assert hold_rows(context, spots, [won]) == held, "what was lost stays so: later stages have judged what there was"
    assert (again.asked, silent.events) == ([], [])


def test_journals_of_runs_that_knew_no_ranges_are_read() -> None:
    state = resumed(StageFinished(stage="confirm", seconds=1))
    assert (dict(state.rows), dict(state.rows_held)) == ({}, {})


# --- bundle and proof


def test_the_bundle_says_what_was_measured(tmp_path: Any) -> None:
    context = context_with(Measuring(lambda m: SLOWER if m == 14 else FASTER), {"decode-b16": [13, 17]})
    won, other = winner(mm(16)), winner(mm(64), scenario="decode-b64")
    held = hold_rows(context, profiled(hotspot(mm(16)), hotspot(mm(64), "decode-b64")), [won, other])
    plain = make_bundle(context, [entry_of(w, held.get(w.hotspot.problem.key)) for w in (won, other)], {})
    bundle = make_bundle(context, plain.entries, {}, rows=evidence_of(held, plain))
    write_bundle(bundle, tmp_path / "bundle")
    read = read_bundle(tmp_path / "bundle")
    assert [entry.rows for entry in read.entries] == [(15, 17), None]
    said = read.results["rows"]
    assert list(said) == [mm(16).key]
    assert [row["m"] for row in said[mm(16).key]["measured"]] == [13, 14, 15, 17]
    assert said[mm(16).key]["measured"][1]["speedup"]["high"] == SLOWER.high
    assert plain.applied_digest == bundle.applied_digest
    assert (
        "rows"
        not in make_bundle(
            context, plain.entries[1:], {}, rows=evidence_of(held, replace(plain, entries=plain.entries[1:]))
        ).results
    )


def test_a_run_validates_and_exports_its_winners_with_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Bundle] = {}
    validated = ModelValidated(verdict=PASSED, evals=(), scenarios=())
    stages = "autokernel.stages"

    def keep(name: str, result: Any = None) -> Any:
        def stage(context: Any, bundle: Bundle, *_: Any) -> Any:
            seen[name] = bundle
            return result(bundle) if result is not None else None

        return stage

    for name, answer in {
        "whole_model.measure_ahead": lambda context: None,
        "profile.profile": lambda context: profiled(hotspot(mm(16))),
        "search.search": lambda *_: {},
        "confirm.confirm": lambda *_: [winner(mm(16))],
        "plan.choose_plans": lambda context, found, winners: (winners, {}),
        "graph.search_graph_options": lambda *_: ({}, ()),
        "model.validate": keep("validated", lambda bundle: (validated, bundle)),
        "production.export_bundle": keep("exported"),
    }.items():
        monkeypatch.setattr(f"{stages}.{name}", answer)
    context = context_with(Measuring(lambda m: SLOWER if m < 13 else FASTER), {"decode-b16": [9, 17]}, Listener())
    pipeline._run_stages(replace(context, environment=current_environment("cpu")), "export")
    assert [entry.rows for entry in seen["validated"].entries] == [(13, 17)]
    assert seen["exported"].entries == seen["validated"].entries
    assert len(seen["exported"].results["rows"][mm(16).key]["measured"]) == 8


def bundle_of(*winners: tuple[Winner, tuple[int, int]]) -> Bundle:
    entries = []
    for won, (first, last) in winners:
        held = RowsHeld(candidate=won.evaluation.candidate, wanted=(first, last), held=(first, last), measured=())
        entries.append(entry_of(won, held))
    return Bundle(name="b", created="", version="", environment=current_environment("cpu"), entries=tuple(entries))


def test_batches_that_show_ranges_are_few_and_one_lies_beyond() -> None:
    scenario = DecodeScenario(kind="decode", batch=16, context=8)
    wide, narrow, above = (winner(problem) for problem in (mm(16), merged(16), replace(mm(16), epilogue=("relu",))))
    assert batches_to_show(bundle_of((wide, (9, 16)), (narrow, (13, 16))), "decode-b16", scenario) == (13, 17)
    assert batches_to_show(bundle_of((wide, (9, 16)), (above, (16, 20))), "decode-b16", scenario) == (9, 20, 21)
    assert batches_to_show(bundle_of((wide, (9, 16))), "decode-b1", scenario) == ()
    assert batches_to_show(bundle_of((wide, (16, 16))), "decode-b16", scenario) == ()
    reduced = replace(bundle_of((wide, (1, 16))), graph_options={"one_row": "all"})  # one row goes into a reduction there
    assert batches_to_show(reduced, "decode-b16", scenario) == (2, 17)
    assert batches_to_show(bundle_of((wide, (1, 16))), "decode-b16", scenario) == (1, 17)
    each = DecodeScenario(kind="decode", batch=4, context=8)  # four rows a sample
    assert batches_to_show(bundle_of((wide, (9, 23))), "decode-b16", each) == (3, 6)
    assert batches_to_show(bundle_of((wide, (14, 19))), "decode-b16", each) == (5,), "no other batch makes rows of that range"
