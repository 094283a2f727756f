"""What people are told of how winners compare with max-autotune: report, MLflow, command line, JSON."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from autokernel.display.results import hotspot_json, hotspot_rows
from autokernel.display.tables import hotspot_table
from autokernel.events import Confirmed, Event
from autokernel.records import Speedup
from autokernel.tracking.mlflow_layout import hotspot_note
from autokernel.tracking.report import render_report
from autokernel.tracking.summary import summarize

OVER = Speedup(ratio=1.084, low=1.071, high=1.093, num_rounds=41)
SAID = "1.08× [1.07, 1.09] max-autotune (aten mm)"


def told(events: list[Event], over: Speedup | None, text: str) -> list[Event]:
    """The run, where every confirmation says this of max-autotune."""
    return [
        replace(event, over_max_autotune=over, max_autotune=text) if isinstance(event, Confirmed) else event for event in events
    ]


def test_it_is_said_wherever_winners_are(synthetic_events: list[Event]) -> None:
    run = summarize(told(synthetic_events, OVER, "aten mm"))
    problem = next(problem for problem in run.problems if problem.verdict == "won")
    assert problem.against_max_autotune == SAID
    assert SAID in render_report(run)
    assert f"Confirmed: {SAID}." in hotspot_note(problem)
    rows = hotspot_rows(run)
    row = next(row for row in rows if row.key == problem.problem.key)
    assert hotspot_json(row)["over_max_autotune"] == OVER.to_json()
    assert hotspot_json(row)["max_autotune"] == "aten mm"
    console = Console(width=250)
    with console.capture() as captured:
        console.print(hotspot_table(run))
    assert SAID in captured.get()


def test_so_is_why_it_is_not_known(synthetic_events: list[Event]) -> None:
    run = summarize(told(synthetic_events, None, "not compared, TIMEOUT: 900 s"))
    problem = next(problem for problem in run.problems if problem.verdict == "won")
    assert problem.against_max_autotune == "max-autotune: not compared, TIMEOUT: 900 s"
    assert "not compared, TIMEOUT: 900 s" in render_report(run)


def test_runs_that_did_not_ask_say_nothing(synthetic_events: list[Event]) -> None:
    run = summarize(synthetic_events)
    assert {problem.against_max_autotune for problem in run.problems} == {""}
    assert "max-autotune (" not in render_report(run)
    assert {(row.over_max_autotune, row.max_autotune) for row in hotspot_rows(run)} == {(None, "")}
