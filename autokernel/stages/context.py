"""What every stage needs: the experiment, where to run jobs, whom to tell, and what an earlier process already did."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autokernel.config import Experiment, LoadedExperiment
from autokernel.environment import Environment
from autokernel.errors import JobLost
from autokernel.events import Event, Recorder, StageFinished, StageProgress, StageStarted
from autokernel.tracking.state import RunState
from autokernel.workers.pool import Pool

if TYPE_CHECKING:
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
    measuring: Future[tuple[Footprint, ...]] | None = None  # of all that a run needs, while they are not there yet
    rehearsed: dict[str, str] = field(default_factory=dict)  # scenario -> the stage beside which max-autotune was

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
        optional: Sequence[tuple[str, Callable[[], object]]] = (),
        arrived: Callable[[T], None] | None = None,
    ) -> list[T]:
        """Run labelled jobs on the pool and return their values in order.

        With `sizes`, one per job and then one per optional job, those that run at once are together no larger than `room`,
        the largest first; one job always runs. What fails among the `optional` ones is logged, and their values are dropped.
        `arrived` is told of each value of the others at once.

        Raises:
            WorkerError: a job crashed, hung, or was lost `MAX_LOST` times; the others are waited for first.
        """
        tasks: list[tuple[str, Callable[[], Any]]] = [*jobs, *optional]
        weights = list(sizes) or [0] * len(tasks)
        waiting = sorted(range(len(tasks)), key=lambda i: -weights[i])
        running: dict[Future[Any], int] = {}
        values: dict[int, Any] = {}
        attempts = [0] * len(tasks)
        began = [0.0] * len(tasks)
        error: BaseException | None = None
        while waiting or running:
            for i in list(waiting):
                if not running or sum(weights[j] for j in running.values()) + weights[i] <= room or not sizes:
                    running[self.pool.submit(tasks[i][1], timeout_s)] = i
                    waiting.remove(i)
                    began[i] = time.monotonic()
            self.progress(stage, len(values), len(tasks), tasks[next(iter(running.values()))][0])
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                i = running.pop(future)
                problem = future.exception()
                log.info("%s: %s took %.1f s", stage, tasks[i][0], time.monotonic() - began[i])
                if problem is None:
                    values[i] = future.result()
                    if arrived is not None and i < len(jobs):
                        arrived(values[i])
                elif isinstance(problem, JobLost) and attempts[i] < MAX_LOST - 1:
                    attempts[i] += 1
                    waiting.append(i)
                elif i >= len(jobs):
                    values[i] = None
                    log.warning("%s failed, which costs nothing but time: %s", tasks[i][0], problem)
                elif error is None:
                    error = problem
        if error is not None:
            raise error
        self.progress(stage, len(tasks), len(tasks))
        return [values[i] for i in range(len(jobs))]


def close_all(recorders: Iterable[Recorder]) -> None:
    """Displays first (they may say what is still waited for), then the journal, then its mirror, which reads it to the end."""
    journal, mirror, *others = recorders
    for recorder in (*others, journal, mirror):
        recorder.close()
