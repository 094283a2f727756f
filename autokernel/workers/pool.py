"""The pool protocol: hand over a job, get a future. Pools know nothing of kernels."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

T = TypeVar("T")


class Pool(Protocol):
    """Runs picklable jobs, each in a child process that dies with its job if it must."""

    num_workers: int

    def submit(self, job: Callable[[], T], timeout_s: float) -> Future[T]:
        """Run `job()` in a worker's child process.

        A job is a picklable frozen dataclass with `__call__`; its class must be importable in the child.
        The future raises what the job raised, or JobTimeout, JobCrashed, or JobLost (autokernel.errors).
        The clock of `timeout_s` starts when the job starts, not while it waits for a free worker.
        """
        ...

    def close(self) -> None:
        """Kill what runs and free everything. Idempotent."""
        ...
