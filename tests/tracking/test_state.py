from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pytest
from small_experiments import written

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.errors import StorageError
from autokernel.events import Evaluated, Event, GraphTrial, RunFinished, RunStarted, StageFinished, StageStarted
from autokernel.fingerprint import experiment_digest, file_digests
from autokernel.records import Speedup, Status
from autokernel.tracking.journal import Entry, Journal, read_journal, run_folder
from autokernel.tracking.state import RunState, experiment_differences, find_resumable, why_a_new_run

EXPERIMENT = """\
name: changed
model: {factory: "model.py:make", dtype: float32}
scenarios:
  one: {kind: call, inputs: "model.py:inputs"}
search: {trials: 50, seconds: 75}
storage: postgresql://me:secret@host/db
"""
ID = "20261121-014900-3f2a"


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


# --- an experiment that was changed


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return written(tmp_path, EXPERIMENT)


def _begun(events: list[Event], loaded: LoadedExperiment) -> list[Event]:
    """The events of a run of this very experiment."""
    start = events[0]
    assert isinstance(start, RunStarted)
    named = dataclasses.replace(
        start,
        name="changed",
        experiment=loaded.text,
        experiment_digest=experiment_digest(loaded),
        overrides=loaded.overrides,
        files=file_digests(loaded),
    )
    return [named, *events[1:]]


def test_a_new_run_is_explained_by_what_was_changed(tmp_path: Path, experiment: Path, synthetic_events: list[Event]) -> None:
    runs, same = tmp_path / "runs", load_experiment(experiment)
    changed = load_experiment(experiment, ("search.seconds=200",))
    assert why_a_new_run(runs, changed) is None, "there is no run yet"
    journal = Journal(run_folder(runs, "changed", ID))
    for event in _begun(synthetic_events, same)[:30]:
        journal.record(event)
    assert why_a_new_run(runs, changed) is None, "it goes on at this moment"
    journal.close()
    assert why_a_new_run(runs, same) is None, "it is gone on with"
    assert (
        why_a_new_run(runs, changed)
        == f"the unfinished run {ID} (24 trials) is of another version of this experiment (search.seconds 75 → 200): "
        "a new run starts; its results are seeds (history)"
    )
    changed = load_experiment(experiment, ("search.seconds=200", "search.seeds=[stock]"))
    said = why_a_new_run(runs, changed)
    assert said is not None
    assert "(search.seconds 75 → 200, search.seeds [stock, history, nvmatmul] → [stock])" in said
    assert said.endswith("a new run starts; its results are not used: search.seeds lacks history")
    many = tuple(f"search.{key}=3" for key in ("trials", "workers", "min_trials", "hotspots", "seed", "max_copies"))
    said = why_a_new_run(runs, load_experiment(experiment, many))
    assert said is not None
    assert "search.hotspots 16 → 3, and 2 more): a new run starts" in said


def test_runs_that_nobody_misses_need_no_explanation(tmp_path: Path, experiment: Path, synthetic_events: list[Event]) -> None:
    runs, same = tmp_path / "runs", load_experiment(experiment)
    changed = load_experiment(experiment, ("search.seconds=200",))
    events = _begun(synthetic_events, same)
    folder = run_folder(runs, "changed", ID)
    _write(folder, events[:2])
    assert why_a_new_run(runs, changed) is None, "it had done nothing"
    _write(folder, events[2:5])
    said = why_a_new_run(runs, changed)
    changes = "is of another version of this experiment (search.seconds 75 → 200)"
    assert said == f"the unfinished run {ID} (0 trials) {changes}: a new run starts"
    _write(folder, events[5:30])
    assert why_a_new_run(runs, changed) is not None
    damaged = run_folder(runs, "changed", "20261123-000000-dead")
    damaged.mkdir()
    (damaged / "journal.jsonl").write_text("damaged\n")
    assert why_a_new_run(runs, changed) is not None, "damaged ones are passed over"
    _write(run_folder(runs, "changed", "20261122-000000-beef"), events)
    assert why_a_new_run(runs, changed) is None, "a newer one came to its end"


def test_what_an_experiment_says_otherwise(experiment: Path, synthetic_events: list[Event]) -> None:
    same = load_experiment(experiment)
    started = _begun(synthetic_events, same)[0]
    assert isinstance(started, RunStarted)
    assert experiment_differences(started, same) == []
    overrides = (
        "storage=postgresql://me:other@host/more",
        "threads=2",
        "graph.enabled=false",
        "scenarios.two={kind: call, inputs: model.py:f}",
    )
    changed = load_experiment(experiment, overrides)
    assert experiment_differences(started, changed) == [
        "scenarios.two none → {...}",
        "threads none → 2",
        "graph.enabled true → false",
        "storage postgresql://me:***@host/db → postgresql://me:***@host/more",
        "the contents of scenarios.two.inputs",
    ]
    of_changed = _begun(synthetic_events, changed)[0]
    assert isinstance(of_changed, RunStarted)
    assert of_changed.overrides[0] == "storage=postgresql://me:***@host/more", "no journal has its password"
    assert experiment_differences(of_changed, changed) == []
    (experiment.parent / "model.py").write_text("# other code\n")
    assert experiment_differences(started, same) == ["the contents of model.factory", "the contents of scenarios.one.inputs"]
    older = dataclasses.replace(started, files=None)
    assert experiment_differences(older, same) == ["what --set said, or the contents of a file"]
    assert experiment_differences(older, load_experiment(experiment, ("threads=2",))) == ["threads none → 2"]
    strange = dataclasses.replace(started, experiment="name: changed\nno_more: 1\n")
    assert experiment_differences(strange, same) == ["it says what this version does not read"]
