from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pytest

from autokernel.errors import StorageError
from autokernel.events import Evaluated, Event, GraphTrial, RunFinished, RunStarted, StageFinished, StageStarted
from autokernel.records import Speedup, Status
from autokernel.tracking.journal import Entry, Journal, read_journal, run_folder
from autokernel.tracking.state import RunState, find_resumable


def _write(folder: Path, events: list[Event]) -> None:
    journal = Journal(folder)
    for event in events:
        journal.record(event)
    journal.close()


def test_state_of_a_finished_run(tmp_path: Path, synthetic_events: list[Event]) -> None:
    _write(tmp_path, synthetic_events)
    state = RunState.from_events(read_journal(tmp_path))
    trials = [e for e in synthetic_events if isinstance(e, Evaluated)]
    lost = [e for e in trials if e.evaluation.status is Status.LOST]
    assert lost
    assert state.run_id == "20261121-014900-3f2a"
    assert state.experiment_digest == "d1gest"
    assert state.num_trials == 60
    assert len(state.evaluations) == 60 - len(lost)
    assert all(state.evaluations[e.evaluation.candidate.id] == e.evaluation for e in trials if e not in lost)
    assert len(state.confirmed) == 6
    assert state.profiled is not None
    assert state.complete
    assert {"profile", "search", "prove"} <= state.stages_done
    assert isinstance(state.graph_trials[0], GraphTrial)
    assert all(isinstance(s, Speedup) for s in state.graph_trials[0].speedups.values())


def test_retried_candidate_counts_once_with_its_result(synthetic_events: list[Event]) -> None:
    trials = [e for e in synthetic_events if isinstance(e, Evaluated)]
    lost = next(e for e in trials if e.evaluation.status is Status.LOST)
    ok = next(e for e in trials if e.evaluation.status is Status.OK).evaluation
    retried = Evaluated(
        evaluation=dataclasses.replace(ok, candidate=lost.evaluation.candidate), origin=lost.origin, number=lost.number
    )
    state = RunState.from_events([*synthetic_events, retried])
    assert state.evaluations[lost.evaluation.candidate.id].status is Status.OK


def test_resumed_run_is_not_finished(synthetic_events: list[Event]) -> None:
    start = synthetic_events[0]
    assert isinstance(start, RunStarted)
    stopped = RunFinished(outcome="interrupted", message="Ctrl-C", seconds=1)
    assert not RunState.from_events([*synthetic_events[:20], stopped]).complete
    assert RunState.from_events([*synthetic_events[:20], stopped]).finished == stopped
    resumed = [*synthetic_events[:20], stopped, dataclasses.replace(start, resumed=True)]
    state = RunState.from_events(resumed)
    assert state.finished is None
    assert not state.started.resumed


@pytest.mark.parametrize(("events", "message"), [(slice(0, 0), "empty"), (slice(1, 3), "begins with RunStarted")])
def test_journal_without_a_start_is_refused(synthetic_events: list[Event], events: slice, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        RunState.from_events(synthetic_events[events])


def test_newest_unfinished_run_of_the_same_experiment_is_resumed(tmp_path: Path, synthetic_events: list[Event]) -> None:
    assert find_resumable(tmp_path, "synthetic-llama", "d1gest") is None
    folder = run_folder(tmp_path, "synthetic-llama", "20261121-014900-3f2a")
    _write(folder, synthetic_events[:30])
    (run_folder(tmp_path, "synthetic-llama", "20261122-000000-dead") / "journal.jsonl").parent.mkdir()
    (run_folder(tmp_path, "synthetic-llama", "20261122-000000-dead") / "journal.jsonl").write_text("damaged\n")
    found = find_resumable(tmp_path, "synthetic-llama", "d1gest")
    assert found is not None
    assert found[0] == folder
    assert find_resumable(tmp_path, "synthetic-llama", "0ther") is None
    _write(folder, synthetic_events[30:])
    assert find_resumable(tmp_path, "synthetic-llama", "d1gest") is None


def test_time_spent_in_stages_adds_up_over_processes_and_pauses_do_not_count(synthetic_events: list[Event]) -> None:
    start = synthetic_events[0]
    assert isinstance(start, RunStarted)
    trial = next(e for e in synthetic_events if isinstance(e, Evaluated))
    search = StageStarted(stage="search", budget_s=60)
    interrupted = RunFinished(outcome="interrupted", message="Ctrl-C", seconds=1)
    timed: list[tuple[float, Event]] = [
        (0, start),
        (1, StageStarted(stage="profile")),
        (11, StageFinished(stage="profile", seconds=10)),
        (20, search),
        (25, trial),  # then killed
        (1000, dataclasses.replace(start, resumed=True)),
        (1003, search),
        (1010, trial),
        (1008, trial),  # the clock was set back
        (1012, interrupted),
        (9000, dataclasses.replace(start, resumed=True)),
        (9001, search),
        (9002.5, StageFinished(stage="search", seconds=1.5)),
        (9100, StageStarted(stage="confirm")),
    ]
    epoch = datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC)
    entries = [Entry(time=epoch + datetime.timedelta(seconds=second), event=event) for second, event in timed]
    state = RunState.from_entries(entries)
    assert state.stage_seconds == {"profile": 10, "search": 5 + 7 + 0 + 4 + 1.5}
    assert state.evaluations.keys() == {trial.evaluation.candidate.id}


def test_a_resumed_runs_state_knows_its_times(tmp_path: Path, synthetic_events: list[Event]) -> None:
    folder = run_folder(tmp_path, "synthetic-llama", "20261121-014900-3f2a")
    _write(folder, synthetic_events[:30])
    found = find_resumable(tmp_path, "synthetic-llama", "d1gest")
    assert found is not None
    assert found[1].stage_seconds.keys() == {"profile", "search"}
