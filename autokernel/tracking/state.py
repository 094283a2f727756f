"""What a resumed run has to know: the journal's events folded into lookups."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from autokernel.errors import StorageError
from autokernel.events import (
    Ablated,
    Confirmed,
    Evaluated,
    Event,
    Exported,
    GraphTrial,
    ModelValidated,
    PlanTrial,
    Profiled,
    Proved,
    RunFinished,
    RunStarted,
    ScenarioTimed,
    SearchPlanned,
    StageFinished,
    StageStarted,
)
from autokernel.records import Evaluation, Status
from autokernel.tracking.journal import Entry, find_runs, read_entries

logger = logging.getLogger(__name__)
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
