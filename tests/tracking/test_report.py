from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic_events as synthetic

from autokernel.events import (
    Confirmed,
    Evaluated,
    Event,
    ModelValidated,
    Profiled,
    Proved,
    RunFinished,
    StageFinished,
    StageStarted,
)
from autokernel.records import Status
from autokernel.tracking.plots import parameter_importance, svg_plots, write_plots
from autokernel.tracking.report import format_interval, format_us, write_report
from autokernel.tracking.summary import latency_us, summarize

_VOID = {"meta", "input", "br", "path", "use", "rect", "link"}


class _Page(HTMLParser):
    """Collects references and ids, and sees that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.references += [v for k in ("src", "href", "xlink:href") if (v := values.get(k))]
        self.ids += [v for v in [values.get("id")] if v]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory, synthetic_events: list[Event]) -> str:
    path = write_report(synthetic_events, tmp_path_factory.mktemp("report") / "sub" / "report.html")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_report_needs_nothing_else(html: str) -> None:
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_report_holds_the_numbers(html: str, synthetic_events: list[Event]) -> None:
    for event in synthetic_events:
        if isinstance(event, Confirmed):
            assert format_interval(event.speedup) in html
            if event.winner is not None:
                assert format_us(event.winner.baseline_us) in html
                assert format_us(event.winner.winner_us) in html
        if isinstance(event, ModelValidated):
            for scenario in event.scenarios:
                assert format_interval(scenario.speedup) in html
                assert all(format_us(m.median_us) in html for m in scenario.modes)
            assert "1.4213" in html
            assert "0.0400\u00a0%" in html
            assert all(why in html for why in event.dropped.values())
        if isinstance(event, Proved):
            assert f"{event.num_hits} of {event.num_entries} entries hit" in html
    assert html.count('class="badge s-OK">OK</span>') == 50
    assert "0123456789abcdef" in html
    assert "# synthetic: for tests" in html


def test_text_of_users_is_escaped(html: str) -> None:
    assert "SIGSEGV &lt;while timing&gt;" in html
    assert "<while timing>" not in html


@pytest.mark.parametrize("count", [1, 3, 20, 66])
def test_report_of_an_unfinished_run(tmp_path: Path, synthetic_events: list[Event], count: int) -> None:
    text = write_report(synthetic_events[:count], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The run is unfinished" in text


def test_report_of_a_stock_run(tmp_path: Path, synthetic_events: list[Event]) -> None:
    events = [*synthetic_events[:20], RunFinished(outcome="stock", message="", seconds=9)]
    assert "a normal outcome" in write_report(events, tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_without_a_start_is_refused(tmp_path: Path, synthetic_events: list[Event]) -> None:
    with pytest.raises(ValueError, match="RunStarted"):
        write_report(synthetic_events[1:], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_plots_are_written(tmp_path: Path, synthetic_events: list[Event]) -> None:
    paths = write_plots(summarize(synthetic_events), tmp_path / "plots")
    assert [p.name for p in paths] == ["end_to_end.png", "speedups.png", "history.png", "importance.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5000 for p in paths)
    assert write_plots(summarize(synthetic_events[:1]), tmp_path / "none") == []


def test_plots_follow_the_theme(synthetic_events: list[Event]) -> None:
    for svg in svg_plots(summarize(synthetic_events)).values():
        assert "currentColor" in svg
        assert "var(--line)" in svg
        assert "#1b1f24" not in svg


def test_importance_finds_the_parameters_that_were_made_to_matter(synthetic_run: object) -> None:
    shares = parameter_importance(summarize(synthetic_run(600)))  # type: ignore[operator]
    assert set(list(shares)[:3]) == {"block_n", "k_slices", "freezing"}
    assert shares["block_m"] < 0.02
    assert all(0 <= share <= 1 for share in shares.values())


def test_summary_counts_and_ranks(synthetic_events: list[Event]) -> None:
    run = summarize(synthetic_events)
    trials = [e for e in synthetic_events if isinstance(e, Evaluated)]
    assert sum(run.statuses.values()) == len(trials) == 60
    assert set(run.statuses) == set(Status)
    assert [p.weight for p in run.problems] == sorted((p.weight for p in run.problems), reverse=True)
    assert {p.verdict for p in run.problems} == {"won", "kept stock", "dropped"}
    for problem in run.problems:
        best = [us for _, us in problem.best_so_far()]
        assert best == sorted(best, reverse=True)
        assert problem.best is not None
        assert problem.best.evaluation.measurement is not None
        assert best[-1] == problem.best.evaluation.measurement.median_us


def test_report_of_a_gpu_run(tmp_path: Path, gpu_events: list[Event]) -> None:
    """Backends side by side, rooflines, the state of the card; hundreds of trials in a file of bearable size."""
    path = write_report(gpu_events, tmp_path / "report.html")
    html, run = path.read_text(encoding="utf-8"), summarize(gpu_events)
    assert "NVIDIA H200 (cuda, sm_90, 132 multiprocessors)" in html
    for said in (
        r"Clock while confirming</th><td>1,7\d\d to 1,980 MHz",
        "Power while confirming",
        "Temperature while confirming",
    ):
        assert re.search(said, html)
    assert "Device busy during the search</th><td>83 %" in html
    assert "Screened as: cuda, graph replay, cold L2, 20 calls a sample." in html
    won = next(p for p in run.problems if p.verdict == "won" and p.backend == "triton")
    assert won.runner_up is not None
    assert f"{100 * (won.runner_up[1] - 1):+.1f} %" in html
    assert "template=mm_persistent_tma tile=" in html
    assert path.stat().st_size < 2_000_000


def test_rooflines_backends_and_scenarios_are_summed_up(gpu_events: list[Event]) -> None:
    run = summarize(gpu_events)
    assert set(run.backends) == {"aten", "triton", "inductor"}
    for problem in run.problems:
        stock = problem.by_backend["aten"]
        assert problem.runner_up is not None
        other, factor = problem.runner_up
        assert other.evaluation.candidate.backend != problem.backend
        if problem.backend == "aten":
            assert factor == pytest.approx(latency_us(other) / latency_us(stock))
        assert 0.5 < (problem.roofline_part(problem.baseline_us) or 0) < 1
    assert [s.scenario for s in run.by_scenario][:2] == ["decode-b1", "decode-b16"]
    assert all(s.num_searched == 5 for s in run.by_scenario)
    assert all((s.geometric_mean > 1) == (s.num_won > 0) for s in run.by_scenario)
    assert run.device_busy == pytest.approx(1 / 1.2, rel=1e-3)
    assert run.conditions["power_w"][1] > 600


def test_a_search_that_was_interrupted_keeps_nothing_busy(gpu_events: list[Event]) -> None:
    """Its candidates are in the journal, and how long it took is not: resumed for its last seconds, it was busy for 663 %."""
    at = next(i for i, event in enumerate(gpu_events) if isinstance(event, StageStarted) and event.stage == "search")
    trials = [event for event in gpu_events if isinstance(event, Evaluated)]
    end = next(i for i, event in enumerate(gpu_events) if isinstance(event, StageFinished) and event.stage == "search")
    resumed = [*gpu_events[: at + 1], *trials[:-1], gpu_events[0], gpu_events[at], trials[-1], *gpu_events[end:]]
    busy = summarize(resumed).device_busy
    assert busy is not None
    assert busy == pytest.approx(trials[-1].evaluation.device_s / summarize(gpu_events).stage_seconds["search"])


def test_gemms_that_share_a_search_are_one_problem() -> None:
    """They differ in their epilogue alone: no entry can tell them apart."""
    plain, fused = synthetic.gemm(8, 64, 32), synthetic.gemm(8, 64, 32, epilogue=("silu",))
    spots = (synthetic.hotspot(plain, "a", 0.2, 10.0), synthetic.hotspot(fused, "b", 0.4, 20.0))
    profiled = Profiled(hotspots=spots, scenario_us={"a": 50.0, "b": 50.0}, read_gb_per_s=1.0, peak_tflops={})
    (before,) = summarize([synthetic.start(), profiled]).problems
    (after,) = summarize([synthetic.start(), profiled, synthetic.trial(1, fused, 3.0, synthetic.STOCK, "stock")]).problems
    assert before.problem == after.problem == fused
    assert after.scenarios == ("b", "a")
    assert after.weight == pytest.approx(0.3)
