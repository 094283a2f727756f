"""Plans and their configs as the summary, the tables, the report and MLflow tell them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import synthetic_events as synthetic
from rich.console import Console

from autokernel.display.results import hotspot_rows
from autokernel.display.tables import plan_table
from autokernel.events import Confirmed, Event, PlanTrial
from autokernel.records import RunnerUp, Winner
from autokernel.tracking.mlflow_layout import campaign_note, hotspot_result
from autokernel.tracking.plans import plan_lines
from autokernel.tracking.report import render_report
from autokernel.tracking.summary import RunSummary, summarize

SPEEDUP = synthetic.above(1.01)
SECOND = synthetic.TRIALS[1]  # of the first problem: it lost by itself


def planned(folder: Path) -> list[Event]:
    """A whole run in which a plan has the second kernel of `UP`, and none that was tried before."""
    runner_up = RunnerUp(evaluation=SECOND.evaluation, speedup=synthetic.above(1.29))
    events: list[Event] = []
    for event in synthetic.whole_run(folder):
        if isinstance(event, Confirmed) and event.problem_key == synthetic.UP.key:
            assert event.winner is not None
            events.append(replace(event, winner=replace(event.winner, runners_up=(runner_up,))))
            events.append(
                replace(event, candidate=SECOND.evaluation.candidate, speedup=runner_up.speedup, accepted=False, winner=None)
            )
        elif isinstance(event, PlanTrial):
            keys = (synthetic.UP.key, synthetic.QKV.key)
            configs = {synthetic.UP.key: SECOND.evaluation.candidate.id}
            first = PlanTrial(scenario="prefill", keys=keys, saved_us=5.0, speedup=None, accepted=True, origin="sum")
            events.append(first)
            events.append(
                replace(first, saved_us=4.0, speedup=SPEEDUP, configs=configs, origin="optuna", reason="it is [the] faster one")
            )
        else:
            events.append(event)
    return events


def up(run: RunSummary) -> tuple[Winner, str]:
    (problem,) = [one for one in run.problems if one.problem == synthetic.UP]
    assert problem.winner is not None
    assert problem.finalist is not None
    assert [event.accepted for event in problem.confirmed].count(True) == 1
    assert problem.finalist.winner == problem.winner
    return problem.winner, problem.finalist.reason


def test_the_kernel_that_is_used_is_the_plans(tmp_path: Path) -> None:
    events = planned(tmp_path)
    run = summarize(events)
    used, reason = up(run)
    assert used.evaluation == SECOND.evaluation
    assert (used.winner_us, used.speedup) == (640.0, synthetic.above(1.29))
    assert "with it the model is faster" in reason
    (row,) = [row for row in hotspot_rows(run) if row.key == synthetic.UP.key]
    assert (row.candidate, row.candidate_us) == (SECOND.evaluation.candidate, 640.0)
    (problem,) = [one for one in run.problems if one.problem == synthetic.UP]
    assert hotspot_result(problem)[0]["speedup"] == 1.32
    untouched = summarize([event for event in events if not isinstance(event, PlanTrial)])
    assert up(untouched)[0].winner_us == 561.5, "without plans it is who won"


def test_a_plan_that_was_beaten_changes_nothing(tmp_path: Path) -> None:
    events = planned(tmp_path)
    last = next(number for number, event in enumerate(events) if isinstance(event, PlanTrial) and event.configs)
    beaten = replace(events[last], accepted=False)  # type: ignore[type-var]
    assert up(summarize([*events[:last], beaten, *events[last + 1 :]]))[0].winner_us == 561.5
    assert up(summarize([*events[: last + 1], events[last - 1], *events[last + 1 :]]))[0].winner_us == 561.5, "the last counts"


def test_plans_are_shown_with_who_proposed_them(tmp_path: Path) -> None:
    run = summarize(planned(tmp_path))
    first, second = run.plan_trials
    assert plan_lines(run, first) == [run.problems[0].title, plan_lines(run, second)[1]]
    assert plan_lines(run, second)[0] == f"{run.problems[0].title} with inductor template=onednn prepack"
    console = Console(width=200, record=True)
    console.print(plan_table(run))
    text = console.export_text()
    for part in ("optuna", "with inductor template=onednn prepack", "over the best"):
        assert part in text
    html = render_report(run)
    assert "with inductor template=onednn prepack" in html
    assert "it is [the] faster one" in html
    assert re.search(r"<h2>Plans</h2>.*<td>optuna</td>.*1\.040× \[1\.010, 1\.070\]", html, re.DOTALL)
    note = campaign_note(run)
    assert "#### Plans" in note
    assert re.search(
        r"\| prefill \| .* with inductor template=onednn prepack; .* \| optuna \| 4 \| 1\.040× \[1\.010, 1\.070\] \| yes \|",
        note,
    )
