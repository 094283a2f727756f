"""What every stage needs: the experiment, where to run jobs, whom to tell, and what an earlier process already did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from autokernel.config import Experiment, LoadedExperiment
from autokernel.environment import Environment
from autokernel.errors import JobLost
from autokernel.events import Event, Recorder, StageFinished, StageProgress, StageStarted
from autokernel.tracking.state import RunState
from autokernel.workers.pool import Pool

T = TypeVar("T")

MAX_LOST = 3  # times that one job may be lost with its worker before the run gives up on it


@dataclass(slots=True, kw_only=True)
class RunContext:
    """One run in progress. Used from one thread."""

    loaded: LoadedExperiment
    folder: Path
    run_id: str
    device: str
    threads: int
    environment: Environment
    pool: Pool
    recorders: Sequence[Recorder]
    state: RunState | None = None
    history: Sequence[Path] = field(default_factory=tuple)  # journals of earlier runs, for seeds
    started: float = field(default_factory=time.monotonic)

    @property
    def experiment(self) -> Experiment:
        return self.loaded.experiment

    @property
    def seed(self) -> int:
        return self.experiment.search.seed

    def emit(self, event: Event) -> None:
        """Tell every recorder; the journal is the first of them."""
        for recorder in self.recorders:
            recorder.record(event)

    @contextmanager
    def stage(self, name: str, total: int = 0, budget_s: float = 0.0, note: str = "") -> Iterator[None]:
        """Announce a stage and its end."""
        start = time.monotonic()
        self.emit(StageStarted(stage=name, total=total, budget_s=budget_s, note=note))
        yield
        self.emit(StageFinished(stage=name, seconds=round(time.monotonic() - start, 2)))

    def progress(self, stage: str, done: int, total: int, message: str = "") -> None:
        self.emit(StageProgress(stage=stage, done=done, total=total, message=message))

    def run_all(self, stage: str, jobs: Sequence[tuple[str, Callable[[], T]]], timeout_s: float) -> list[T]:
        """Run labelled jobs on the pool and return their values in order.

        Raises:
            WorkerError: a job crashed, hung, or was lost `MAX_LOST` times; the others are waited for first.
        """
        futures = [self.pool.submit(job, timeout_s) for _, job in jobs]
        values = []
        for i, (label, job) in enumerate(jobs):
            self.progress(stage, i, len(jobs), label)
            values.append(self._value(futures[i], job, timeout_s))
        self.progress(stage, len(jobs), len(jobs))
        return values

    def _value(self, future: Future[T], job: Callable[[], T], timeout_s: float) -> T:
        for attempt in range(MAX_LOST):
            try:
                return future.result()
            except JobLost:
                if attempt == MAX_LOST - 1:
                    raise
                future = self.pool.submit(job, timeout_s)
        raise AssertionError("unreachable")


def close_all(recorders: Iterable[Recorder]) -> None:
    """Displays first (they may say what is still waited for), then the journal, then its mirror, which reads it to the end."""
    journal, mirror, *others = recorders
    for recorder in (*others, journal, mirror):
        recorder.close()
