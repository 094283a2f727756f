"""A worker: one job at a time, in one child process that lives from job to job and dies with a job if it must."""

from __future__ import annotations

import logging
import marshal
import os
import pickle
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from autokernel.errors import JobCrashed, JobLost, JobTimeout, WorkerError
from autokernel.workers.child import BROKEN, ERROR, EXIT, LAST, LAST_ERROR, VALUE
from autokernel.workers.process import ChildProcess

T = TypeVar("T")

_log = logging.getLogger(__name__)
_IDLE_WITHIN_S = 0.2  # a moment after its last job, a worker looks whether its child is well


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a job came to, still pickled: it can be passed on by a process that cannot import the job's classes."""

    kind: str
    payload: bytes
    message: str
    trace: str
    log_tail: str

    def open(self) -> tuple[Any, BaseException | None]:
        """The job's result, or the exception to raise in its stead, with the child's traceback as a note."""
        if self.kind in (VALUE, LAST):
            try:
                return pickle.loads(self.payload), None
            except Exception as error:  # noqa: BLE001  whatever a class's own unpickling raises
                return None, WorkerError(f"the job's result cannot be loaded here: {type(error).__name__}: {error}")
        return None, self._error()

    def _error(self) -> BaseException:
        error: BaseException | None = None
        if self.kind in (ERROR, LAST_ERROR) and self.payload:
            try:
                error = pickle.loads(self.payload)
            except Exception:  # noqa: BLE001  then its text has to do
                error = None
        if not isinstance(error, BaseException):
            error = JobCrashed(f"the job ended its process: {self.message}") if self.kind == EXIT else WorkerError(self.message)
        if self.trace:
            error.add_note(f"In the child process:\n{self.trace.rstrip()}")
        if self.log_tail.strip():
            error.add_note(f"End of its log:\n{self.log_tail.strip()}")
        return error


def pickle_job(job: Callable[[], Any]) -> bytes:
    """The job as bytes.

    Raises:
        WorkerError: it cannot be pickled, or would not load in another process.
    """
    if getattr(job if hasattr(job, "__qualname__") else type(job), "__module__", None) == "__main__":
        raise WorkerError(f"job {job!r}: jobs must come from an importable module, not from a script: move it to a module")
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        rule = "must be picklable: a frozen dataclass of plain values at the top level of a module"
        raise WorkerError(f"job {type(job).__qualname__} {rule}: {error}") from error


class Worker:
    """Runs jobs one after the other in a child process, which is started when needed.

    Args:
        env: variables for the child, over those of this process.
        memory_limit_bytes: of the child and whatever it starts, together; None for no limit.
        preload: modules that the child imports before its first job ("torch").
        sys_path: the child's module path; default: this process's.
        start_timeout_s: for starting the child and importing `preload`; no part of any job's time.
    """

    def __init__(
        self,
        *,
        env: Mapping[str, str] | None = None,
        memory_limit_bytes: int | None = None,
        preload: Sequence[str] = (),
        sys_path: Sequence[str] | None = None,
        start_timeout_s: float = 180.0,
    ) -> None:
        self._env = dict(env or {})
        self._memory_limit_bytes = memory_limit_bytes
        self._preload = tuple(preload)
        self._sys_path = None if sys_path is None else list(sys_path)
        self._start_timeout_s = start_timeout_s
        self._busy = threading.Lock()  # held while the pipes are in use
        self._guard = threading.Lock()  # of the two below
        self._child: ChildProcess | None = None
        self._closed = False
        self._used = False  # the child has run a job, or runs one: only then can it hold memory of a device
        self._log_tail = ""

    @property
    def pid(self) -> int | None:
        """Of the child, if one is there."""
        child = self._child
        return None if child is None else child.pid

    def run(self, job: Callable[[], T], timeout_s: float) -> T:
        """Run `job()` in the child.

        Raises:
            JobTimeout: it ran past `timeout_s`, counted from its start.
            JobCrashed: the child died: a signal, an exit, the memory limit.
            JobLost: `kill` or `close` was called meanwhile, or the child could not be watched any longer.
            WorkerError: the machinery failed; the message says how.
            Exception: whatever the job raised, with the child's traceback as a note.
        """
        value, error = self.run_pickled(pickle_job(job), timeout_s).open()
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def run_pickled(self, job: bytes, timeout_s: float) -> Reply:
        """Like `run`, for a job from `pickle_job`; what the job itself raised comes back inside the reply."""
        with self._busy:
            child = self._started()
            self._used = True
            return self._exchange(child, job, timeout_s)

    def start(self) -> None:
        """Start the child and import `preload` now rather than with the first job.

        Raises:
            WorkerError: it does not start.
        """
        with self._busy:
            self._started()

    def log_tail(self) -> str:
        """The last 8 KiB that the last job printed."""
        return self._log_tail

    def kill(self) -> None:
        """Kill the child, from any thread. A job that runs raises JobLost; the next one starts a new child."""
        with self._guard:
            child = self._child
        if child is not None:
            child.kill()

    def renew(self) -> None:
        """End an idle child that has run jobs, with all memory it holds; the next job starts a new one.

        A job that runs is left alone, and so is a child that is new: it holds nothing, and starting one takes seconds.
        """
        if self._used and self._busy.acquire(timeout=_IDLE_WITHIN_S):
            try:
                self._discard()
            finally:
                self._busy.release()

    def close(self) -> None:
        """Kill the child for good. Idempotent, from any thread."""
        with self._guard:
            self._closed = True
        self.kill()
        with self._busy:
            self._discard()

    def _started(self) -> ChildProcess:
        if self._child is not None and (self._child.killed or self._child.exited()):
            self._discard()
        if self._child is not None:
            return self._child
        hello = pickle.dumps((self._sys_path if self._sys_path is not None else module_path(), self._preload))
        child = self._new_child()
        try:
            reply = self._exchange(child, hello, self._start_timeout_s)
        except (JobTimeout, JobCrashed) as error:
            raise WorkerError(f"the worker's child process did not start: {error}") from error
        if reply.kind == BROKEN:
            self._discard()
            _, problem = reply.open()
            raise problem if problem is not None else WorkerError(reply.message)
        _log.debug("child process %d is ready", child.pid)
        return child

    def _new_child(self) -> ChildProcess:
        with self._guard:
            if self._closed:
                raise JobLost("the worker is closed")
            self._child = ChildProcess({**os.environ, **self._env}, self._memory_limit_bytes)
            return self._child

    def _exchange(self, child: ChildProcess, request: bytes, timeout_s: float) -> Reply:
        keep = False
        try:
            kind, payload, message, trace = marshal.loads(child.exchange(request, timeout_s))
            # why it asks for the end of its process (a dead CUDA context) must not meet the next job
            keep = kind not in (EXIT, LAST, LAST_ERROR)
        except (JobTimeout, JobCrashed) as error:
            if child.killed:
                raise JobLost("the worker was killed from outside while the job ran") from error
            raise
        except (ValueError, EOFError, TypeError) as error:  # not a marshalled answer
            raise JobCrashed("the job wrote into the worker's own pipe") from error
        finally:
            self._log_tail = child.log_tail()
            if not keep:  # whatever was raised: a child that still runs this job would answer the next one with its result
                self._discard()
        return Reply(kind=kind, payload=payload, message=message, trace=trace, log_tail=self._log_tail if message else "")

    def _discard(self) -> None:
        self._used = False
        with self._guard:
            child, self._child = self._child, None
        if child is not None:
            child.close()


def module_path() -> list[str]:
    """`sys.path` with the working directory spelled out."""
    return [path or os.getcwd() for path in sys.path]
