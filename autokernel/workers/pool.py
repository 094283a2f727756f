"""The pool protocol: hand over a job, get a future. Pools know nothing of kernels.

`open_pool` chooses among them: child processes of this one (`LocalPool`), or actors on a Ray cluster (`cluster.RayPool`).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from autokernel.errors import WorkerError
from autokernel.workers.worker import Reply, Worker, pickle_job

if TYPE_CHECKING:
    from autokernel.config import ClusterSection

T = TypeVar("T")

_log = logging.getLogger(__name__)

_JOIN_S = 15.0


class Pool(Protocol):
    """Runs picklable jobs, each in a child process that dies with its job if it must."""

    num_workers: int

    def submit(self, job: Callable[[], T], timeout_s: float) -> Future[T]:
        """Run `job()` in a worker's child process.

        A job is a picklable frozen dataclass with `__call__`; its class must be importable in the child.
        The future raises what the job raised, or JobTimeout, JobCrashed, or JobLost (autokernel.errors).
        The clock of `timeout_s` starts when the job starts, not while it waits for a free worker.
        A job with a true attribute `ends_process` is the last one of its child process, and frees whatever it held; so is one
        that raises an exception with such an attribute.
        """
        ...

    def renew(self) -> None:
        """End the processes of idle workers that ran jobs, with all memory they hold on a device; later jobs start new ones."""
        ...

    def close(self) -> None:
        """Kill what runs and free everything. Idempotent."""
        ...


class Runner(Protocol):
    """Where a `QueuedPool` runs its jobs: one at a time, from one thread; only `renew` and `close` may come from another."""

    def start(self) -> None:
        """Get ready, which may take a while. Called before every job.

        Raises:
            WorkerError: it cannot; the next job is told so.
        """
        ...

    def run_pickled(self, job: bytes, timeout_s: float) -> Reply:
        """Run one job; what the job raised is inside the reply.

        Raises:
            WorkerError: JobTimeout, JobCrashed, JobLost.
        """
        ...

    def renew(self) -> None:
        """End the process that ran the last job, if it is still there and runs none now."""
        ...

    def close(self) -> None:
        """End at once whatever runs (it raises JobLost)."""
        ...


@dataclass(frozen=True, slots=True)
class _Task:
    job: bytes
    timeout_s: float
    future: Future[Any]


class QueuedPool:
    """A queue in front of runners, one thread for each. First in, first out; a queued future can be cancelled."""

    def __init__(self, runners: Sequence[Runner]) -> None:
        self.num_workers = len(runners)
        self._runners = tuple(runners)
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(runner,), name=f"autokernel-worker-{i}", daemon=True)
            for i, runner in enumerate(self._runners)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], T], timeout_s: float) -> Future[T]:
        """See `Pool.submit`.

        Raises:
            WorkerError: the job cannot be pickled, or the pool is closed.
        """
        data = pickle_job(job)
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise WorkerError("the pool is closed: it takes no more jobs")
            self._tasks.put(_Task(data, timeout_s, future))
        return future

    def renew(self) -> None:
        """See `Pool.renew`."""
        for runner in self._runners:
            runner.renew()

    def close(self) -> None:
        """Cancel what is queued, kill what runs (JobLost), free everything. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None:
                    task.future.cancel()
                    task.future.set_running_or_notify_cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for runner in self._runners:
            runner.close()
        for thread in self._threads:
            thread.join(_JOIN_S)
            if thread.is_alive():
                _log.warning("%s did not end within %g s", thread.name, _JOIN_S)

    def _serve(self, runner: Runner) -> None:
        while True:
            problem: WorkerError | None = None
            try:
                runner.start()
            except BaseException as error:  # noqa: BLE001  without this thread, futures would never end
                problem = _as_worker_error(error)
            task = self._tasks.get()
            if task is None:
                return
            if not task.future.set_running_or_notify_cancel():
                continue
            if problem is not None:
                task.future.set_exception(problem)
                continue
            try:
                value, problem_of_job = runner.run_pickled(task.job, task.timeout_s).open()
            except BaseException as error:  # noqa: BLE001  likewise
                value, problem_of_job = None, _as_worker_error(error)
            if problem_of_job is not None:
                task.future.set_exception(problem_of_job)
            else:
                task.future.set_result(value)


class LocalPool(QueuedPool):
    """Child processes of this process, without Ray.

    Args:
        num_workers: jobs at a time.
        env: variables for the children, over those of this process.
        memory_limit_bytes: per worker, its child and whatever that starts together; None for no limit.
        preload: modules that each child imports on start ("torch").
    """

    def __init__(
        self,
        num_workers: int,
        *,
        env: Mapping[str, str] | None = None,
        memory_limit_bytes: int | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        _check_workers(num_workers)
        super().__init__([Worker(env=env, memory_limit_bytes=memory_limit_bytes, preload=preload) for _ in range(num_workers)])


class InlinePool:
    """Runs each job in this very process, to its end, before `submit` returns. No isolation, no timeout: for tests."""

    def __init__(self) -> None:
        self.num_workers = 1
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="autokernel-inline")
        self._closed = False

    def submit(self, job: Callable[[], T], timeout_s: float) -> Future[T]:
        """See `Pool.submit`; `timeout_s` is not kept."""
        if self._closed:
            raise WorkerError("the pool is closed: it takes no more jobs")
        future = self._executor.submit(job)
        wait([future])
        return future

    def renew(self) -> None:
        """There is no process to end."""

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self._executor.shutdown()


def open_pool(
    cluster: ClusterSection,
    *,
    device: str,
    num_workers: int,
    env: Mapping[str, str],
    memory_limit_bytes: int | None = None,
    preload: Sequence[str] = (),
) -> Pool:
    """The pool that an experiment's `cluster` section asks for.

    Args:
        cluster: address "inline" is a `LocalPool`; everything else is Ray.
        device: "cpu" or "cuda". CPU jobs see no GPU.
        num_workers: jobs at a time.
        env: variables for the jobs' processes (OMP_NUM_THREADS, TORCHINDUCTOR_CACHE_DIR, ...).
        memory_limit_bytes: per worker.
        preload: modules that each child imports on start.

    Raises:
        ConfigError: the cluster cannot be reached, or has no room for a single worker.
    """
    _check_workers(num_workers)
    env = dict(env)
    if device == "cpu":
        env.setdefault("CUDA_VISIBLE_DEVICES", "")
    if cluster.address == "inline":
        return LocalPool(num_workers, env=env, memory_limit_bytes=memory_limit_bytes, preload=preload)
    from autokernel.workers.cluster import RayPool

    return RayPool(
        cluster.address,
        num_workers=num_workers,
        num_gpus_per_worker=cluster.gpus_per_worker if device == "cuda" else 0,
        num_cpus_per_worker=cluster.cpus_per_worker,
        env=env,
        memory_limit_bytes=memory_limit_bytes,
        preload=preload,
    )


def _as_worker_error(error: BaseException) -> WorkerError:
    """What a runner raised; what is no WorkerError was not foreseen."""
    if isinstance(error, WorkerError):
        return error
    failure = WorkerError(f"the worker itself failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _check_workers(num_workers: int) -> None:
    if num_workers < 1:
        raise ValueError(f"a pool needs at least one worker, not {num_workers}")
