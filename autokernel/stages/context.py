"""What every stage needs: the experiment, where to run jobs, whom to tell, and what an earlier process already did."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from autokernel.config import Experiment, LoadedExperiment
from autokernel.environment import Environment
from autokernel.errors import JobLost
from autokernel.events import Event, Recorder, StageFinished, StageProgress, StageStarted
from autokernel.stages.beside import Beside
from autokernel.tracking.state import RunState
from autokernel.workers.pool import Pool

if TYPE_CHECKING:
    from autokernel.evaluate.end_to_end import ScenarioTiming
    from autokernel.profiling.footprint import Footprint

T = TypeVar("T")

log = logging.getLogger(__name__)

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
    footprints: dict[int | None, Footprint] = field(default_factory=dict)  # by the model's number of layers, if fewer
    peak_bytes: Mapping[str, int] = field(default_factory=dict)  # of the GPU, that each scenario took when it was profiled
    measuring: Future[tuple[Footprint, ...]] | None = None  # of all that a run needs, while they are not there yet
    beside: Beside = field(default_factory=Beside)  # what runs beside stages, and ends with none of them
    rehearsing: bool = False  # what validation will compile is compiled beside them
    timed_ahead: dict[str, ScenarioTiming] = field(default_factory=dict)  # graph options, beside plans, by what was asked

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

    def run_all(
        self,
        stage: str,
        jobs: Sequence[tuple[str, Callable[[], T]]],
        timeout_s: float,
        sizes: Sequence[int] = (),
        room: int = 0,
        arrived: Callable[[T], None] | None = None,
    ) -> list[T]:
        """Run labelled jobs on the pool and return their values in order.

        With `sizes`, one per job, those that run at once are together no larger than `room`, the largest first; one job always
        runs. What waits in `beside` is started when all jobs are, and need not be finished in the end. `arrived` is told of
        each value at once.

        Raises:
            WorkerError: a job crashed, hung, or was lost `MAX_LOST` times; the others are waited for first.
        """
        weights = list(sizes) or [0] * len(jobs)
        waiting = sorted(range(len(jobs)), key=lambda i: -weights[i])
        running: dict[Future[T], int] = {}
        values: dict[int, T] = {}
        attempts = [0] * len(jobs)
        began = [0.0] * len(jobs)
        error: BaseException | None = None
        while waiting or running:
            for i in list(waiting):
                used = self.beside.size + sum(weights[j] for j in running.values())
                if used + weights[i] <= room or not sizes or not (running or self.beside.running):
                    running[self.pool.submit(jobs[i][1], timeout_s)] = i
                    waiting.remove(i)
                    began[i] = time.monotonic()
            if sizes and not waiting:
                self.beside.start(self.pool, room, sum(weights[j] for j in running.values()), max(weights))
            self.progress(stage, len(values), len(jobs), jobs[next(iter(running.values()))][0] if running else "")
            for future in self.beside.settled(wait([*running, *self.beside.running], return_when=FIRST_COMPLETED).done):
                i = running.pop(future)
                problem = future.exception()
                log.info("%s: %s took %.1f s", stage, jobs[i][0], time.monotonic() - began[i])
                if problem is None:
                    values[i] = future.result()
                    if arrived is not None:
                        arrived(values[i])
                elif isinstance(problem, JobLost) and attempts[i] < MAX_LOST - 1:
                    attempts[i] += 1
                    waiting.append(i)
                elif error is None:
                    error = problem
        if error is not None:
            raise error
        self.progress(stage, len(jobs), len(jobs))
        return [values[i] for i in range(len(jobs))]


def close_all(recorders: Iterable[Recorder]) -> None:
    """Displays first (they may say what is still waited for), then the journal, then its mirror, which reads it to the end."""
    journal, mirror, *others = recorders
    for recorder in (*others, journal, mirror):
        recorder.close()
