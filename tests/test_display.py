"""Progress and tables, fed with the events of an invented run."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_events as synthetic
import synthetic_gpu
from rich.console import Console, RenderableType

from autokernel import pipeline
from autokernel.display import words
from autokernel.display.layout import detailed_table
from autokernel.display.logs import LOG_NAME, LineHandler, LogFile
from autokernel.display.progress import LiveProgress, PlainProgress, panel
from autokernel.display.results import failure_json, hotspot_rows, result_json
from autokernel.display.state import STAGES, ProgressState
from autokernel.display.tables import profile_table, result_view, scenario_table, search_table
from autokernel.events import Evaluated, ModelValidated, RunFinished, StageFinished, StageProgress, StageStarted
from autokernel.records import Candidate, Problem, Speedup, Status, TensorSpec
from autokernel.tracking.summary import RunSummary, summarize
from autokernel.tracking.titles import config_title, problem_title

pytestmark = pytest.mark.clock

FOLDER = Path("/somewhere/runs/invented/20990101-000000-abcd")


def text_of(what: RenderableType, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what, markup=False, highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def won() -> RunSummary:
    return summarize(synthetic.whole_run(FOLDER))


class Clock:
    """A clock that goes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- words


@pytest.mark.parametrize(
    ("problem", "short"),
    [
        (synthetic.gemm(1, 1280, 384), "mm 1×1280×384 bf16"),
        (synthetic.gemm(8, 384, 1280, epilogue=("silu", "add")), "mm 8×384×1280 bf16 +silu +add"),
        (synthetic.merged(1, (384, 128), 96), "merged_mm 1×(384+128)×96 bf16"),
        (
            Problem(
                op="addmm",
                inputs=tuple(TensorSpec.contiguous(s, "float32") for s in ((9,), (4, 7), (7, 9))),
                device="cpu",
            ),
            "addmm 4×9×7 fp32",
        ),
        (
            Problem(
                op="bmm", inputs=tuple(TensorSpec.contiguous(s, "float32") for s in ((6, 1, 64), (6, 64, 256))), device="cpu"
            ),
            "bmm 6·1×256×64 fp32",
        ),
        (Problem(op="norm", inputs=(TensorSpec.contiguous((4, 7), "float32"),), device="cpu"), "norm 4×7 fp32"),
        (
            Problem(op="mm", inputs=tuple(TensorSpec.contiguous(s, "float32") for s in ((4, 7), (9, 7))), device="cpu"),
            "mm 4×7 · 9×7 fp32",
        ),
    ],
)
def test_problems_are_spelled_shortly(problem: Problem, short: str) -> None:
    assert problem_title(problem) == short


def test_configs_name_their_kind_first_and_leave_out_what_says_nothing() -> None:
    config = {"cache_blocking": "4,2", "template": "cpp_gemm", "prepack": True, "merge": "none", "epilogue": False, "zero": 0.5}
    candidate = Candidate(problem=synthetic.UP, backend="inductor", config=config)
    assert config_title(candidate) == "inductor template=cpp_gemm cache_blocking=4,2 prepack zero=0.5"


def test_numbers() -> None:
    assert [words.microseconds(us) for us in (0.456, 9.999, 128.34, 18250.4)] == ["0.46", "10.00", "128.3", "18,250"]
    assert [words.duration(s) for s in (-1, 7.4, 750, 3723)] == ["0:00", "0:07", "12:30", "1:02:03"]
    assert words.ratio(Speedup(ratio=1.5234, low=1.481, high=1.559, num_rounds=9)) == "1.52× [1.48, 1.56]"
    assert words.failures({Status.OK: 9, Status.WRONG: 1, Status.INVALID: 3}) == "3 INVALID, 1 WRONG"
    assert words.one_line("\n first\nsecond") == "first …"
    assert words.one_line("x" * 50, 10) == "xxxxxxxx …"
    assert words.one_line("only") == "only"


# --- results


def test_rows_say_what_came_of_each_hotspot(won: RunSummary) -> None:
    rows = {row.key: row for row in hotspot_rows(won)}
    assert {key: row.verdict for key, row in rows.items()} == {
        synthetic.UP.key: "won",
        synthetic.DOWN.key: "stock",
        synthetic.QKV.key: "dropped",
        synthetic.HEAD.key: "stock",
        synthetic.TINY.key: "not searched",
    }
    up = rows[synthetic.UP.key]
    assert (up.baseline_us, up.candidate_us, up.num_trials, up.share) == (853.0, 561.5, 4, 0.21)
    assert up.speedup is not None
    assert up.speedup.low == 1.47
    assert rows[synthetic.DOWN.key].why == "lower bound 0.990 is not above 1.020"
    assert "not equivalent" in rows[synthetic.QKV.key].why
    assert rows[synthetic.HEAD.key].why == "no other candidate passed its checks"
    assert rows[synthetic.HEAD.key].candidate is None


def test_a_run_under_way_is_not_judged_yet() -> None:
    summary = summarize([synthetic.start(), *synthetic.profile_events(), *synthetic.search_events()])
    rows = {row.key: row for row in hotspot_rows(summary)}
    assert rows[synthetic.UP.key].verdict == "searched"
    assert rows[synthetic.UP.key].speedup is None
    assert rows[synthetic.UP.key].screened == pytest.approx(853.0 / 561.5)
    document = result_json(summary, FOLDER)
    assert (document["outcome"], document["bundle"], document["scenarios"]) == ("unfinished", None, [])
    assert "Unfinished; done so far: profile, search." in text_of(result_view(summary, FOLDER, Path("runs")))


def test_json_has_everything_and_is_json(won: RunSummary) -> None:
    document = json.loads(json.dumps(result_json(won, FOLDER), allow_nan=False))
    assert {"outcome", "message", "folder", "bundle", "seconds", "hotspots", "scenarios", "evals"} <= set(document)
    assert document["outcome"] == "won"
    assert document["bundle"] == str(FOLDER / "bundle")
    assert document["hotspots"][0]["config"]["thread_factors"] == "1,2,1"
    assert document["statuses"] == {"OK": 8, "WRONG": 1, "INVALID": 1, "CRASHED": 1}
    assert document["evals"][0]["metric"] == "bits_per_byte"
    assert document["dropped"] == {synthetic.QKV.key: "the model was not equivalent with it: error 1.31, limit 1"}


def test_json_of_a_failure_has_the_same_keys(tmp_path: Path, won: RunSummary) -> None:
    assert failure_json(None)["hotspots"] == []
    assert failure_json(tmp_path)["folder"] is None, "a folder without a journal"
    assert failure_json(synthetic.write_run(tmp_path))["outcome"] == "won"
    assert set(failure_json(None)) <= set(result_json(won, FOLDER))


# --- tables


@pytest.mark.parametrize("width", [100, 120, 140])
def test_tables_fit_their_width(won: RunSummary, width: int) -> None:
    for view in (result_view(won, FOLDER, Path("runs")), profile_table(won), search_table(won)):
        text = text_of(view, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "\x1b" not in text, "no escape sequences where there is no terminal"


def test_a_scenario_in_which_eager_beats_all_that_is_compiled_says_so() -> None:
    slower = Speedup(ratio=0.9, low=0.88, high=0.92, num_rounds=41)
    behind = synthetic.scenario("one", (10.0, 14.0, 13.0, 11.0), slower, best_stock="eager")
    ahead = synthetic.scenario("four", (40.0, 30.0, 29.0, 20.0), synthetic.above(1.4))
    assert "eager is faster" in text_of(scenario_table([behind]), 140)
    assert pipeline._gains([ahead]) == "Faster than the best stock mode: four 1.43x."
    assert pipeline._gains([behind]) == "No faster than eager, which beats all that is compiled: one 0.90x."
    said = "; no faster than eager, which beats all that is compiled: one 0.90x."
    assert pipeline._gains([ahead, behind]) == f"Faster than the best stock mode: four 1.43x{said}"
    level = synthetic.scenario("two", (9.0, 8.0, 8.0, 8.0), Speedup(ratio=1.0, low=0.99, high=1.01, num_rounds=41))
    assert pipeline._gains([level]) == "No scenario is slower: two 1.00x."
    assert pipeline._gains([level, ahead]) == "Faster than the best stock mode: four 1.43x; no slower: two 1.00x."


@pytest.mark.parametrize("width", [100, 140])
def test_the_result_says_everything_on_unbroken_lines(won: RunSummary, width: int) -> None:
    text = text_of(result_view(won, FOLDER, Path("my runs")), width)
    for said in (
        r"^mm 512×1280×384 bf16 +21.0 % +853.0 +561.5 +1.50× \[1.47, 1.53\] +won$",
        r"^  prefill: inductor template=cpp_gemm cache_blocking=4,2,6 prepack thread_factors=1,2,1$",
        r"^mm 512×384×1280 bf16 \+add .* 1.02× \[0.99, 1.05\] +stock$",
        r"^merged_mm 1×\(384\+128\+128\)×384 bf16 .* dropped$",
        r"^prefill +14,210 +12,190 +12,044 +9,610 +1.27× \[1.24, 1.30\] default +faster *$",
        r"^decode +310.5 +243.4 +251.0 +238.8 +1.02× \[0.99, 1.05] default +not slower *$",
        r"^bits_per_byte +2.1412 +2.1415 +\+0.014% +\+0.040% +0.200% +256 +within its limit *$",
        r"^11 candidates in 1:42; failed: 1 INVALID, 1 WRONG, 1 CRASHED.$",
        r"^Faster than the best stock mode: prefill 1.26x. \(3:42\)$",
        r"^bundle +/somewhere/runs/invented/20990101-000000-abcd/bundle \(1 entry\) \(not here\) *$",
        r"^fresh process +1 of 1 entries hit, 0 kernels benchmarked",
        r"^MLflow +autokernel ui --runs 'my runs' *$",
    ):
        assert re.search(said, text, re.MULTILINE), f"{said}\nnot in\n{text}"


def test_a_stock_run_says_so() -> None:
    text = text_of(result_view(summarize(synthetic.whole_run(FOLDER, outcome="stock")), FOLDER, Path("runs")))
    assert "changes nothing" in text
    assert not re.search(r" won$", text, re.MULTILINE)
    assert "not slower" in text


def test_a_profile_is_ranked_with_its_ceilings(won: RunSummary) -> None:
    text = text_of(profile_table(won), 120)
    assert re.search(r"^1 +prefill +mm 512×1280×384 bf16 +6 +5,120 +42.0 % +1,707 +14.0 % +mul → silu *$", text, re.MULTILINE)
    assert "31.4 GB/s read, float32 0.41 TFLOP/s, bfloat16 1.93 TFLOP/s" in text
    assert "3 smaller ones are not shown" in text_of(profile_table(won, limit=2))
    assert "Not profiled yet" in text_of(profile_table(summarize([synthetic.start()])))


def test_the_report_is_named_when_it_is_there(tmp_path: Path, won: RunSummary) -> None:
    assert "report.html" not in text_of(result_view(won, tmp_path, Path("runs")), 200)
    (tmp_path / "report.html").write_text("")
    assert str(tmp_path / "report.html") in text_of(result_view(won, tmp_path, Path("runs")), 200)


def test_the_bundle_is_where_the_run_was_moved_to(tmp_path: Path, won: RunSummary) -> None:
    moved, gone = tmp_path / "moved", str(FOLDER / "bundle")
    text = text_of(result_view(won, moved, Path("runs")), 200)
    assert re.search(rf"^bundle +{gone} \(1 entry\) \(not here\) *$", text, re.MULTILINE)
    assert "torch.compile" not in text, "nobody can use it from there"
    assert result_json(won, moved)["bundle"] == gone
    (moved / "bundle").mkdir(parents=True)
    text = text_of(result_view(won, moved, Path("runs")), 200)
    assert re.search(rf"^bundle +{moved}/bundle \(1 entry\) *$", text, re.MULTILINE)
    assert f'torch.compile(model, backend=autokernel.backend("{moved}/bundle"))' in text
    assert gone not in text
    assert result_json(won, moved)["bundle"] == str(moved / "bundle")


def test_wide_characters_keep_columns_straight() -> None:
    text = text_of(detailed_table("名前", ("n", "right"), rows=[(["日本", "1"], "d"), (["ab", "22"], "")]))
    assert text.splitlines() == ["名前   n", "────────", "日本   1", "  d", "ab    22"]


def test_without_colour_there_are_no_escape_sequences(won: RunSummary, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        console = Console(file=io.StringIO(), width=100, force_terminal=True)
        console.print(result_view(won, FOLDER, Path("runs")))
        return console.file.getvalue()  # type: ignore[attr-defined]

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;32m" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown())


# --- progress


def folded(*, upto: int | None = None, clock: Callable[[], float] = time.monotonic) -> ProgressState:
    state = ProgressState(clock)
    for event in [synthetic.start(), *synthetic.profile_events(), *synthetic.search_events()][:upto]:
        state.take(event)
    return state


def test_stages_are_those_of_the_pipeline() -> None:
    assert STAGES == pipeline.STAGES


def test_the_state_knows_what_goes_on() -> None:
    state = folded(upto=-1)
    assert (state.stage, state.done, state.total) == ("search", 11, 40)
    assert dict(state.statuses) == {Status.OK: 8, Status.WRONG: 1, Status.INVALID: 1, Status.CRASHED: 1}
    up = state.hotspots[synthetic.UP.key]
    assert (up.num_trials, up.planned, up.num_failed, up.stock_us, up.best_us) == (4, 20, 1, 853.0, 561.5)
    assert up.ratio == pytest.approx(1.519, abs=1e-3)
    assert up.scenario == "prefill"
    assert state.current == synthetic.HEAD.key
    assert list(state.finished) == ["profile"]
    state.take(RunFinished(outcome="won", message="", seconds=1))
    assert (state.stage, state.outcome) == ("", "won")


def test_new_bests_are_told_but_not_those_of_stock() -> None:
    state = ProgressState()
    told = [event.number for event in synthetic.TRIALS if state.take(event)]
    assert told == [2, 3, 6, 8]


def test_lost_trials_do_not_count_as_tried() -> None:
    state = ProgressState()
    state.take(synthetic.trial(1, synthetic.UP, None, synthetic.CPP, status=Status.LOST))
    assert state.hotspots[synthetic.UP.key].num_trials == 0


def test_time_left_follows_the_pace_but_never_exceeds_the_budget() -> None:
    clock = Clock()
    state = ProgressState(clock)
    state.take(synthetic.start())
    state.take(StageStarted(stage="search", total=100, budget_s=60.0))
    assert state.seconds_left == 60.0
    clock.now += 10
    assert state.seconds_left == 50.0
    state.take(StageProgress(stage="search", done=50, total=100))
    assert state.seconds_left == 10.0
    state.take(StageProgress(stage="search", done=1, total=100))
    assert state.seconds_left == 50.0
    clock.now += 100
    assert state.seconds_left == 0.0
    state.take(StageStarted(stage="graph"))
    assert state.seconds_left is None


def test_the_panel_shows_stage_hotspots_bests_and_failures() -> None:
    clock = Clock()
    state = folded(upto=-1, clock=clock)
    clock.now += 11
    text = text_of(panel(state))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "✓ profile 0:12  ▶ search  · confirm" in text
    assert "11/40  0:11 used, 0:29 left" in text
    assert re.search(r"^  mm 512×1280×384 bf16 +prefill +4/20 +853.0 +561.5 +1.52×  inductor template", text, re.MULTILINE)
    assert "▶ mm 1×256×384 bf16" in text
    assert "failed: 1 INVALID, 1 WRONG, 1 CRASHED" in text
    text_of(panel(ProgressState())), text_of(panel(state), 20)  # an empty state and a narrow terminal are no error


def test_plain_lines_name_stages_bests_and_the_end() -> None:
    lines: list[str] = []
    display = PlainProgress(lines.append)
    for event in synthetic.whole_run(FOLDER):
        display.record(event)
    display.close()
    display.release()
    text = "\n".join(lines)
    assert lines[0].startswith("[0:00] invented: run 20990101-000000-abcd starts on Invented CPU 9000, 2 threads")
    assert "search, 40 steps, at most 4:00 (4 hotspots)" in text
    best = "  prefill mm 512×1280×384 bf16: 561.5 us, 1.52× stock (inductor template=cpp_gemm cache_blocking=4,2,6 prepack"
    assert best in text
    assert "search done in 1:42; failed: 1 INVALID, 1 WRONG, 1 CRASHED" in text
    assert "  prefill: bundle 9.610 ms, 1.270× default [1.240, 1.300]" in text
    assert "won: Faster than the best stock mode: prefill 1.26x." in text
    assert "waiting until MLflow" in lines[-1]
    assert all("\n" not in line for line in lines)
    assert len(lines) < 30


def test_times_of_a_run_without_a_verdict_are_shown() -> None:
    events = synthetic.whole_run(FOLDER)
    until = next(i for i, event in enumerate(events) if isinstance(event, ModelValidated))
    summary = summarize(events[:until])
    assert summary.validated is None
    assert summary.scenarios == summarize(events).scenarios
    assert set(summary.end_to_end) == {"prefill", "decode"}
    assert "End to end, us per step" in text_of(result_view(summary, FOLDER, FOLDER.parent))


def test_plain_progress_gives_signs_of_life_without_events() -> None:
    lines: list[str] = []
    display = PlainProgress(lines.append, quiet_s=0.05)
    display.record(synthetic.start())
    display.record(StageStarted(stage="confirm", total=3))
    display.record(StageProgress(stage="confirm", done=1, total=3, message="mm"))
    deadline = time.monotonic() + 5
    while len(lines) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    display.release()
    assert "confirm 1/3" in lines[-1]
    said = len(lines)
    time.sleep(0.2)
    assert len(lines) == said, "nothing after its end"


def test_a_resumed_run_shows_what_it_had_reached() -> None:
    lines: list[str] = []
    old = [synthetic.start(), *synthetic.profile_events(), *synthetic.search_events()[:8]]
    display = PlainProgress(lines.append, lambda started: old)
    display.record(synthetic.start(resumed=True))
    display.release()
    assert "goes on: 3 trials, stages done: profile; on Invented CPU" in lines[0]
    assert display.state.hotspots[synthetic.UP.key].best_us == 561.5


@pytest.mark.parametrize("error", [BrokenPipeError, ValueError("I/O operation on closed file")])
def test_a_terminal_that_goes_away_does_not_break_the_run(error: Exception) -> None:
    def write(line: str) -> None:
        raise error

    plain = PlainProgress(write)
    stream = io.StringIO()
    live = LiveProgress(Console(file=stream, force_terminal=True, width=100))
    whole = synthetic.whole_run(FOLDER)
    for i, event in enumerate(whole):
        plain.record(event)
        live.record(event)
        if i == 3:
            stream.close()
    for display in (plain, live):
        display.close()
        display.release()
        assert display.state.outcome == whole[-1].outcome, "it went on to follow the run"
        assert display.state.finished.keys() == {e.stage for e in whole if isinstance(e, StageFinished)}


def test_the_live_panel_comes_and_goes() -> None:
    stream = io.StringIO()
    live = LiveProgress(Console(file=stream, force_terminal=True, width=100, height=40))
    for event in [synthetic.start(), *synthetic.profile_events(), *synthetic.search_events()[:-1]]:
        live.record(event)
    time.sleep(0.6)
    live.close()
    time.sleep(0.4)
    live.release()
    live.release()
    shown = stream.getvalue()
    assert "512×1280×384" in shown
    assert "waiting until MLflow" in shown
    assert shown.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in shown, "the cursor is back"


@pytest.mark.parametrize("kind", ["live", "plain"])
def test_an_event_costs_less_than_a_millisecond(kind: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    display = LiveProgress(console) if kind == "live" else PlainProgress([].append)
    display.record(synthetic.start())
    for event in synthetic.profile_events():
        display.record(event)
    events = [synthetic.trial(n, synthetic.UP, 500.0 - n / 10, {"n": n}) for n in range(1000)]
    costs = []
    for event in events:
        begin = time.perf_counter()
        display.record(event)
        costs.append(time.perf_counter() - begin)
    display.release()
    assert sorted(costs)[len(costs) // 2] < 1e-3


# --- logs


def test_log_lines_are_single_and_of_their_level() -> None:
    lines: list[tuple[str, int]] = []
    logger = logging.Logger("test")
    logger.addHandler(LineHandler(lambda line, level: lines.append((line, level)), logging.WARNING))
    logger.info("not shown")
    logger.warning("first %d\nsecond", 1)
    assert lines == [("first 1 …", logging.WARNING)]


def test_the_log_file_has_what_was_logged_before_the_folder_was_known(tmp_path: Path) -> None:
    logger = logging.Logger("test", logging.INFO)
    log = LogFile(tmp_path, logger)
    logger.info("early")
    folder = tmp_path / synthetic.NAME / synthetic.RUN_ID
    folder.mkdir(parents=True)
    log.record(synthetic.start())
    logger.info("late\nwith a second line")
    log.close()
    logger.warning("after the recorders were closed")
    log.release()
    log.release()
    assert logger.handlers == []
    text = (folder / LOG_NAME).read_text()
    assert log.path == folder / LOG_NAME
    assert re.findall(r"(INFO|WARNING) test: (\w+)", text) == [("INFO", "early"), ("INFO", "late"), ("WARNING", "after")]
    assert "with a second line" in text


def test_a_log_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = LogFile(tmp_path / "missing", logging.Logger("test"))
    log.record(synthetic.start())
    log.release()
    assert log.path is None
    assert "cannot be written, the run goes on without it" in caplog.text


def test_a_full_disk_silences_the_log_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = synthetic.start()
    path = tmp_path / started.name / started.run_id / LOG_NAME
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    logger = logging.getLogger("autokernel.test_of_a_full_disk")
    log_file = LogFile(tmp_path, logger)
    logger.warning("early")
    log_file.record(started)
    assert log_file.path == path
    logger.warning("late")
    log_file.release()
    assert logger.handlers == []
    assert capfd.readouterr().err == ""


# --- a GPU


@pytest.mark.parametrize("width", [100, 140])
def test_a_gpu_run_says_whose_kernels_won_and_how_near_the_roofline_they_are(width: int) -> None:
    summary = summarize(synthetic_gpu.make_gpu_events())
    text = text_of(result_view(summary, FOLDER, FOLDER), width)
    for said in (
        r"^NVIDIA H200, sm_90, 132 multiprocessors, torch 2\.11\.0\+cu130$",
        r"^decode-b1 +5 +4 +1\.\d{3}× +triton 4, aten 1 +8\d → 8\d %",
        r"^While confirming: 1,7\d\d–1,980 MHz, 3\d\d–69\d W, 4\d–5\d °C\.$",
        r"^The device was busy for 83 % of the search\.$",
        r"tile=\d+×\d+×\d+",
        r"^triton +\d+ +\d+ +\+\d+\.\d % +",
    ):
        assert re.search(said, text, re.MULTILINE), f"{said}\nnot in\n{text}"
    assert max(map(len, text.splitlines())) <= width
    document = result_json(summary, FOLDER)
    row = next(h for h in document["hotspots"] if h["verdict"] == "won" and h["backend"] == "triton")
    assert set(row["by_backend_us"]) == {"aten", "inductor", "triton"}
    assert row["runner_up"]["backend"] in ("aten", "inductor")
    assert row["runner_up"]["takes"] == pytest.approx(
        row["by_backend_us"][row["runner_up"]["backend"]] / row["by_backend_us"]["triton"]
    )
    assert 0 < row["roofline_stock"] < row["roofline"]
    assert sum(b["num_used"] for b in document["backends"]) == sum(h["num_trials"] > 0 for h in document["hotspots"])
    assert document["conditions"]["clock_mhz"][1] == 1980.0
    assert json.loads(json.dumps(document)) == document


def test_the_panel_shows_the_hotspot_under_search_however_many_there_are() -> None:
    state = ProgressState()
    events = synthetic_gpu.make_gpu_events()
    searching = next(i for i, event in enumerate(events) if isinstance(event, Evaluated))
    for event in events[: searching + 27]:
        state.take(event)
    text = text_of(panel(state), 140)
    assert text.count("▶") == 2  # the stage, and this hotspot
    assert "and 22 more" in text
