"""What a resumed run has to know: the journal's events folded into lookups."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from autokernel.config import LoadedExperiment, parse_experiment
from autokernel.config_messages import without_passwords
from autokernel.errors import ConfigError, StorageError, shortened
from autokernel.events import (
    Ablated,
    Confirmed,
    ContendersTimed,
    Evaluated,
    Event,
    Exported,
    GraphTrial,
    MeasuredRow,
    ModelValidated,
    PlanTrial,
    Profiled,
    Proved,
    RowMeasured,
    RowsHeld,
    RunFinished,
    RunStarted,
    ScenarioTimed,
    SearchPlanned,
    StageFinished,
    StageStarted,
)
from autokernel.fingerprint import experiment_digest, file_digests
from autokernel.records import Evaluation, Status
from autokernel.tracking.journal import Entry, find_runs, is_being_written, read_entries

logger = logging.getLogger(__name__)
_MAX_DIFFERENCES = 4  # that are told
_MAX_SHOWN = 40  # characters of a value
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run as its journal tells it.

    LOST evaluations are left out, so that whoever asks "was this candidate tried?" tries it again. A later event
    replaces an earlier one for the same candidate.
    """

    started: RunStarted  # the first one; resumes repeat it
    profiled: Profiled | None
    planned: SearchPlanned | None
    evaluated: Mapping[str, Evaluated]  # by candidate id
    confirmed: Mapping[str, Confirmed]  # by candidate id
    graph_trials: tuple[GraphTrial, ...]
    plan_trials: tuple[PlanTrial, ...] = ()
    validated: ModelValidated | None
    exported: Exported | None
    proved: Proved | None
    finished: RunFinished | None  # None again once the run was resumed
    stages_done: frozenset[str]
    num_trials: int  # the highest trial number so far, LOST ones included
    timed: tuple[ScenarioTimed, ...] = ()
    ablated: Ablated | None = None
    contenders: Mapping[str, ContendersTimed] = field(default_factory=dict)  # plans and graph options, by what was asked
    rows: Mapping[str, Mapping[int, MeasuredRow]] = field(default_factory=dict)  # by id of the winner, then number of rows
    rows_held: Mapping[str, RowsHeld] = field(default_factory=dict)  # by id of the winner
    stage_seconds: Mapping[str, float] = field(default_factory=dict)  # spent in each stage, by all processes together

    @property
    def run_id(self) -> str:
        return self.started.run_id

    @property
    def experiment_digest(self) -> str:
        return self.started.experiment_digest

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """By candidate id, LOST excluded."""
        return {key: event.evaluation for key, event in self.evaluated.items()}

    @property
    def complete(self) -> bool:
        """It came to its normal end ("won" or "stock"): there is nothing to resume."""
        return self.finished is not None and self.finished.outcome in ("won", "stock")

    @classmethod
    def from_entries(cls, entries: Iterable[Entry]) -> RunState:
        """Fold one journal, and measure how long each stage has taken so far.

        Raises:
            StorageError: the journal does not begin with RunStarted.
        """
        clock = _StageClock()
        return replace(cls.from_events(clock.watch(entries)), stage_seconds=clock.seconds)

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> RunState:
        """Fold events whose times are not known; `stage_seconds` stays empty.

        Raises:
            StorageError: they do not begin with RunStarted.
        """
        started: RunStarted | None = None
        last: dict[type, Event] = {}
        evaluated: dict[str, Evaluated] = {}
        confirmed: dict[str, Confirmed] = {}
        graph_trials: list[GraphTrial] = []
        plan_trials: list[PlanTrial] = []
        timed: list[ScenarioTimed] = []
        contenders: dict[str, ContendersTimed] = {}
        rows: dict[str, dict[int, MeasuredRow]] = {}
        rows_held: dict[str, RowsHeld] = {}
        stages: set[str] = set()
        num_trials = 0
        for event in events:
            if isinstance(event, RunStarted):
                started = started or event
                last.pop(RunFinished, None)
            elif started is None:
                raise StorageError(
                    f"a journal begins with RunStarted, this one with {type(event).__name__}: start with --fresh"
                )
            elif isinstance(event, Evaluated):
                num_trials = max(num_trials, event.number)
                if event.evaluation.status is not Status.LOST:
                    evaluated[event.evaluation.candidate.id] = event
            elif isinstance(event, Confirmed):
                confirmed[event.candidate.id] = event
            elif isinstance(event, GraphTrial):
                graph_trials.append(event)
            elif isinstance(event, PlanTrial):
                plan_trials.append(event)
            elif isinstance(event, ScenarioTimed):
                timed.append(event)
            elif isinstance(event, ContendersTimed):
                contenders[event.asked] = event
            elif isinstance(event, RowMeasured):
                rows.setdefault(event.candidate.id, {})[event.row.m] = event.row
            elif isinstance(event, RowsHeld):
                rows_held[event.candidate.id] = event
            elif isinstance(event, StageFinished):
                stages.add(event.stage)
            else:
                last[type(event)] = event
        if started is None:
            raise StorageError("the journal is empty: the run was killed before it began; start with --fresh")
        return cls(
            started=started,
            profiled=_last(last, Profiled),
            planned=_last(last, SearchPlanned),
            evaluated=evaluated,
            confirmed=confirmed,
            graph_trials=tuple(graph_trials),
            plan_trials=tuple(plan_trials),
            validated=_last(last, ModelValidated),
            exported=_last(last, Exported),
            proved=_last(last, Proved),
            finished=_last(last, RunFinished),
            stages_done=frozenset(stages),
            num_trials=num_trials,
            timed=tuple(timed),
            ablated=_last(last, Ablated),
            contenders=contenders,
            rows=rows,
            rows_held=rows_held,
        )


class _StageClock:
    """How long each stage took, from the times of its events.

    A process that was killed counts up to its last event: what it did after that has to be done again anyhow.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage = ""
        self._last: datetime | None = None

    def watch(self, entries: Iterable[Entry]) -> Iterator[Event]:
        """Pass the events on."""
        for entry in entries:
            event = entry.event
            if isinstance(event, RunStarted):
                self._stage = ""  # the pause before a resume is nobody's
            elif self._stage and self._last is not None:
                spent = (entry.time - self._last).total_seconds()
                self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + max(0.0, spent)  # clocks are set back, too
            if isinstance(event, StageStarted):
                self._stage = event.stage
            elif isinstance(event, StageFinished):
                self._stage = ""
            self._last = entry.time
            yield event


def _last(events: Mapping[type, Event], kind: type[T]) -> T | None:
    event = events.get(kind)
    return event if isinstance(event, kind) else None


def find_resumable(runs_folder: Path | str, name: str, experiment_digest: str) -> tuple[Path, RunState] | None:
    """The newest run of this very experiment that did not come to its end, with its state; None if there is none.

    Journals that cannot be read are passed over with a warning: they must not keep a new run from starting.
    """
    for folder in find_runs(runs_folder, name):
        try:
            state = RunState.from_entries(read_entries(folder))
        except StorageError as error:
            logger.warning("%s cannot be resumed: %s", folder, error)
            continue
        if state.experiment_digest == experiment_digest:
            return None if state.complete else (folder, state)
    return None


def why_a_new_run(runs_folder: Path | str, loaded: LoadedExperiment) -> str | None:
    """Why the newest run of this name is not gone on with although it is unfinished: the experiment was changed since.

    To be asked where `find_resumable` found nothing. None if there is nothing to tell: that run came to its end, has nothing
    that could be missed, goes on at this moment, or is of this very experiment.
    """
    digest = experiment_digest(loaded)
    for folder in find_runs(runs_folder, loaded.experiment.name):
        try:
            state = RunState.from_entries(read_entries(folder))
        except StorageError:
            continue  # `find_resumable` has warned of it
        begun = state.stages_done or state.num_trials
        if state.complete or not begun or state.experiment_digest == digest or is_being_written(folder):
            return None
        found = experiment_differences(state.started, loaded)
        more = f", and {len(found) - _MAX_DIFFERENCES} more" if len(found) > _MAX_DIFFERENCES else ""
        told = f" ({', '.join(found[:_MAX_DIFFERENCES])}{more})" if found else ""
        start = f"the unfinished run {state.run_id} ({state.num_trials} trials) is of another version of this experiment{told}"
        if not state.num_trials:
            return f"{start}: a new run starts"
        seeds = "history" in loaded.experiment.search.seeds
        used = "are seeds (history)" if seeds else "are not used: search.seeds lacks history"
        return f"{start}: a new run starts; its results {used}"
    return None


def experiment_differences(started: RunStarted, loaded: LoadedExperiment) -> list[str]:
    """What an experiment says otherwise than a run's: `search.seconds 75 → 200`, `the file of model.factory`."""
    try:
        before = parse_experiment(started.experiment, loaded.path, started.overrides)
    except ConfigError:
        return ["it says what this version does not read"]
    settings, now = (experiment.model_dump(mode="json") for experiment in (before, loaded.experiment))
    found = dict(_changes(settings, now, ""))
    if started.files is not None:
        files = file_digests(loaded)
        for key in dict.fromkeys([*started.files, *files]):
            if started.files.get(key) != files.get(key):
                found.setdefault(key, f"the contents of {key}")
    elif not found:
        return ["what --set said, or the contents of a file"]
    return list(found.values())


def _changes(before: Any, after: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, what was there and what is) for every value that is not the same."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            yield from _changes(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif _comparable(before) != _comparable(after):
        yield key, f"{key} {_shown(before)} → {_shown(after)}"


def _comparable(value: Any) -> Any:
    return without_passwords(value) if isinstance(value, str) else value  # as it is recorded


def _shown(value: Any) -> str:
    match value:
        case list():
            text = f"[{', '.join(map(_shown, value))}]"
        case dict():
            text = "{...}"
        case None:
            text = "none"
        case bool():
            text = str(value).lower()
        case float():
            text = f"{value:g}"
        case _:
            text = without_passwords(str(value))
    return shortened(text, _MAX_SHOWN)
