"""What people are told of winners that were measured for other rows than their own: report, MLflow, command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from autokernel.display.progress import event_lines, panel
from autokernel.display.results import hotspot_json, hotspot_rows
from autokernel.display.state import ProgressState
from autokernel.display.tables import hotspot_table
from autokernel.events import (
    Confirmed,
    Event,
    MeasuredRow,
    ModelValidated,
    Proved,
    RowsHeld,
    StageFinished,
    StageStarted,
    event_from_json,
    event_to_json,
)
from autokernel.records import Speedup
from autokernel.tracking.journal import Journal, read_journal
from autokernel.tracking.mlflow_layout import hotspot_note, hotspot_result
from autokernel.tracking.report import render_report
from autokernel.tracking.summary import ProblemSummary, summarize

SLOWER = Speedup(ratio=0.9, low=0.88, high=0.92, num_rounds=41)


def text_of(renderable: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def with_rows(events: list[Event], held: tuple[int, int], *measured: MeasuredRow) -> list[Event]:
    """The run, where its first winner that nothing dropped was asked to hold for 9 to 24 rows."""
    dropped = next(event.dropped for event in events if isinstance(event, ModelValidated))
    won = next(e for e in events if isinstance(e, Confirmed) and e.accepted and e.problem_key not in dropped)
    at = next(i for i, e in enumerate(events) if isinstance(e, StageFinished) and e.stage == "confirm")
    told = RowsHeld(candidate=won.candidate, wanted=(9, 24), held=held, measured=measured)
    lines = ("decode at batch 9: 1 entries for ranges of rows used, 0 not",)
    rest = [replace(event, rows=lines) if isinstance(event, Proved) else event for event in events[at + 1 :]]
    return [*events[: at + 1], StageStarted(stage="rows", total=15), told, StageFinished(stage="rows", seconds=9), *rest]


def asked(events: list[Event]) -> ProblemSummary:
    (problem,) = [problem for problem in summarize(events).problems if problem.rows is not None]
    return problem


def test_what_a_winner_holds_for_is_shown_wherever_winners_are(synthetic_events: list[Event]) -> None:
    events = with_rows(synthetic_events, (12, 16))
    said = "holds for 12 to 16 rows (9 to 24 were asked for)"
    problem, summary = asked(events), summarize(events)
    assert problem.rows_held == said
    assert render_report(summary).count(said) == 1
    assert "decode at batch 9: 1 entries for ranges of rows used, 0 not" in render_report(summary)
    assert f"The winner {said}." in hotspot_note(problem)
    values, _ = hotspot_result(problem)
    assert (values["rows_min"], values["rows_max"]) == (12, 16)
    assert said in text_of(hotspot_table(summary))
    rows = [hotspot_json(row)["rows"] for row in hotspot_rows(summary)]
    assert [span for span in rows if span is not None] == [[12, 16]]


def test_it_is_said_when_a_winner_holds_for_nothing_else(synthetic_events: list[Event]) -> None:
    assert asked(with_rows(synthetic_events, (9, 24))).rows_held == "holds for 9 to 24 rows"
    alone = with_rows(synthetic_events, (16, 16))
    assert asked(alone).rows_held == "holds for its own rows alone (9 to 24 were asked for)"
    assert all(problem.rows_held == "" for problem in summarize(synthetic_events).problems)
    dropped = [
        replace(event, dropped={**event.dropped, asked(alone).problem.key: "slower"})
        if isinstance(event, ModelValidated)
        else event
        for event in alone
    ]
    assert asked(dropped).rows_held == "", "it is no winner any more"


def test_progress_shows_the_stage_and_where_a_range_ends(synthetic_events: list[Event]) -> None:
    measured = (MeasuredRow(m=11, speedup=SLOWER), MeasuredRow(m=12), MeasuredRow(m=17, message="WRONG: error of 3, limit 2"))
    events = with_rows(synthetic_events, (12, 16), *measured)
    (held,) = [event for event in events if isinstance(event, RowsHeld)]
    (line,) = event_lines(ProgressState(), held, False)
    assert line.endswith(
        ": holds for 12 to 16 rows of 9 to 24; at 11 it does not: 0.90× stock [0.88, 0.92]; at 17 it does not: WRONG: error of "
        "3, limit 2"
    )
    state = ProgressState()
    for event in events:
        state.take(event)
        if isinstance(event, StageStarted) and event.stage == "rows":
            assert "✓ confirm" in (shown := text_of(panel(state)))
            assert "▶ rows" in shown
    for stage in ("plan", "rows"):
        state.finished[stage] = 3.0
    shown = text_of(panel(state))
    assert [shown.index(stage) for stage in ("✓ confirm", "✓ plan", "✓ rows")] == sorted(
        shown.index(stage) for stage in ("✓ confirm", "✓ plan", "✓ rows")
    )


def test_the_journal_keeps_it(tmp_path: Path, synthetic_events: list[Event]) -> None:
    events = with_rows(synthetic_events, (12, 16), MeasuredRow(m=11, speedup=SLOWER))
    journal = Journal(tmp_path)
    for event in events:
        journal.record(event)
    journal.close()
    assert read_journal(tmp_path) == events
    proved = next(event for event in synthetic_events if isinstance(event, Proved))
    old = event_to_json(proved)
    old.pop("rows")  # as versions wrote it that knew no ranges
    assert event_from_json(old) == proved
