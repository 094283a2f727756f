"""Worker processes that compile kernels ahead of the device. They use no GPU: what they make lies in Triton's cache."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cute_kernels
from gemm_kernels import MAX_SHARED, Gemm, compile_kernel

from autokernel.cutedsl.spec import KernelSpec

COMPILE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One kernel to compile: Triton's, whose module file has the `name`, or with a `spec` CuTe DSL's."""

    gemm: Gemm
    config: dict[str, Any]
    name: str
    spec: KernelSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A task's end: status "OK" or why there is no kernel."""

    task: Task
    status: str
    message: str = ""


def compile_worker(pipe: Connection, folder: str) -> None:
    """A worker's loop: a task comes in, its status goes out; ends when the pipe does."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for stream in (1, 2):  # Triton prints the whole PTX of what ptxas refuses
            os.dup2(nowhere.fileno(), stream)
    while True:
        try:
            task: Task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            status, message = _compiled(task, Path(folder))
        except Exception as error:  # noqa: BLE001 -- the boundary of a child process: any compiler error is a status
            status, message = "BUILD_ERROR", f"{type(error).__name__}: {error}"[:200]
        try:
            pipe.send((status, message))
        except OSError:
            return


def _compiled(task: Task, folder: Path) -> tuple[str, str]:
    """Status and message."""
    if task.spec is not None:
        cute_kernels.compile_kernel(task.spec)
        return "OK", ""
    kernel = compile_kernel(task.gemm, task.config, folder, task.name)
    shared = int(kernel.metadata.shared)
    return ("OK", "") if shared <= MAX_SHARED else ("BUILD_ERROR", f"{shared} bytes of shared memory")


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: Task | None = None
    since: float = 0.0


class Farm:
    """Keeps workers busy with queued tasks, in order; never more than `ahead` results lie unread.

    Args:
        workers: how many processes.
        folder: for the modules of Triton's kernels.
        ahead: results.
        context: that the processes are started in; default: spawned.
    """

    def __init__(self, workers: int, folder: Path, ahead: int = 500, context: BaseContext | None = None) -> None:
        self._context = context if context is not None else multiprocessing.get_context("spawn")
        self._folder = folder
        self._ahead = ahead
        self._queue: deque[Task] = deque()
        self._ready: dict[str, deque[Built]] = {}
        self._dropped: set[str] = set()
        self._workers = [self._start() for _ in range(workers)]

    def submit(self, tasks: Iterable[Task]) -> None:
        """Queue tasks behind those that wait."""
        self._queue.extend(tasks)

    def drop(self, gemm_name: str) -> None:
        """Forget a GEMM's tasks and results, those that are being compiled too."""
        self._dropped.add(gemm_name)
        self._queue = deque(task for task in self._queue if task.gemm.name != gemm_name)
        self._ready.pop(gemm_name, None)

    def take(self, gemm_name: str, timeout_s: float) -> Built | None:
        """The next result of a GEMM; None when none comes in time."""
        until = time.monotonic() + timeout_s
        while True:
            self._pump(0.0)
            found = self._ready.get(gemm_name)
            if found:
                return found.popleft()
            left = until - time.monotonic()
            if left <= 0:
                return None
            self._pump(min(left, 0.2))

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=5)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(  # type: ignore[attr-defined]
            target=compile_worker, args=(theirs, str(self._folder)), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process=process, pipe=ours)

    def _pump(self, timeout_s: float) -> None:
        unread = sum(len(found) for found in self._ready.values())
        for i, worker in enumerate(self._workers):
            if worker.task is not None and time.monotonic() - worker.since > COMPILE_TIMEOUT_S:
                worker.process.kill()
                self._finish(worker, "TIMEOUT", f"no kernel after {COMPILE_TIMEOUT_S:.0f} s")
                self._workers[i] = self._start()
            elif worker.task is None and self._queue and unread < self._ahead:
                worker.task, worker.since = self._queue.popleft(), time.monotonic()
                with contextlib.suppress(OSError):
                    worker.pipe.send(worker.task)
        busy = {worker.pipe: i for i, worker in enumerate(self._workers) if worker.task is not None}
        if not busy:
            time.sleep(timeout_s)
            return
        for pipe in wait(list(busy), timeout_s):
            i = busy[pipe]  # type: ignore[index]
            try:
                status, message = self._workers[i].pipe.recv()
                self._finish(self._workers[i], status, message)
            except (EOFError, OSError):
                self._finish(self._workers[i], "BUILD_ERROR", "the compiler crashed")
                self._workers[i] = self._start()

    def _finish(self, worker: _Worker, status: str, message: str) -> None:
        assert worker.task is not None
        if worker.task.gemm.name not in self._dropped:
            built = Built(task=worker.task, status=status, message=message)
            self._ready.setdefault(worker.task.gemm.name, deque()).append(built)
        worker.task = None
