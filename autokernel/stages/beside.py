"""Jobs that run beside those of the stages, whenever there is room, and end with none of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from autokernel.workers.pool import Pool

log = logging.getLogger(__name__)

_SHARE = 0.6  # of the room that all jobs have: the rest is the stages' own


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideJob:
    """A job whose value nobody needs, and which may fail."""

    label: str
    job: Callable[[], object]
    size: int  # bytes of the device
    timeout_s: float
    smaller: BesideJob | None = None  # what is started in its place where there is room for that alone


@dataclass(slots=True)
class Beside:
    """What waits and what runs. Used from the run's thread."""

    waiting: list[BesideJob] = field(default_factory=list)
    running: dict[Future[Any], tuple[BesideJob, float]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the device that they take now."""
        return sum(job.size for job, _ in self.running.values())

    def start(self, pool: Pool, room: int, used: int, largest: int = 0) -> None:
        """Start those that fit, the largest first, into a share of `room`, beside what a stage uses, and its largest job.

        They have half of the workers at most, so that stages always find one.
        """
        for job in sorted(self.waiting, key=lambda job: -job.size):
            left = min(_SHARE * room, room - used, room - largest) - self.size
            chosen = next((one for one in (job, job.smaller) if one is not None and one.size <= left), None)
            if chosen is not None and len(self.running) < pool.num_workers // 2:
                self.waiting.remove(job)
                self.running[pool.submit(chosen.job, chosen.timeout_s)] = (chosen, time.monotonic())

    def settled(self, done: Iterable[Future[Any]]) -> list[Future[Any]]:
        """Note which of them are done; the other futures are for whoever asked."""
        others = []
        for future in done:
            if future not in self.running:
                others.append(future)
                continue
            job, began = self.running.pop(future)
            if problem := future.exception():
                log.warning("%s failed, which costs nothing but time: %s", job.label, problem)
            else:
                log.info("%s took %.1f s", job.label, time.monotonic() - began)
        return others

    def finish(self) -> None:
        """Wait for those that run; those that never found room are dropped."""
        self.waiting.clear()
        self.settled(wait(self.running).done)
