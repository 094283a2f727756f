"""One child process with its pipes, its deadline and its memory limit. It moves bytes and knows nothing of jobs.

The child leads a session of its own. Everything it starts belongs to it, counts against its memory limit, and is killed with
it. What it prints goes through a pipe into a short tail kept here: no file, and no more memory for a job that prints a lot.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import psutil

from autokernel.errors import JobCrashed, JobLost, JobTimeout, WorkerError
from autokernel.workers.child import DUMP_SIGNAL, HEADER
from autokernel.workers.device_lock import forget_session, waits_for_device

_log = logging.getLogger(__name__)

LOG_TAIL_BYTES = 8192
_CHUNK = 1 << 16
_LIVENESS_S = 0.2  # how often to ask whether the child still lives while its pipes are silent
_LAST_WORDS_S = 0.3  # for the stacks of a child that is about to be killed at its deadline
_REAP_S = 10.0  # a process inside the kernel (a hung GPU driver) may not die at once
_FASTEST_ALLOCATION = 8 << 30  # bytes a second that a process can touch: how soon the headroom can be gone


class ChildProcess:
    """One running child. `exchange` belongs to one thread at a time; `kill` to any.

    Args:
        env: the child's environment variables, whole.
        memory_limit_bytes: of the child and all it started, together.

    Raises:
        WorkerError: the process cannot be started.
    """

    def __init__(self, env: Mapping[str, str], memory_limit_bytes: int | None = None) -> None:
        self._memory_limit_bytes = memory_limit_bytes
        self._lock = threading.Lock()
        self._reaped = False
        self.killed = False  # by `kill`, from outside
        self._log = bytearray()
        with contextlib.ExitStack() as undo:
            try:
                request_read, self._request = _pipe(undo)
                self._reply, reply_write = _pipe(undo)
                self._output, output_write = _pipe(undo)
                self._process = subprocess.Popen(
                    # -P: the working directory must not shadow this package or the standard library
                    [sys.executable, "-P", "-m", "autokernel.workers.child", str(request_read), str(reply_write)],
                    stdin=subprocess.DEVNULL,
                    stdout=output_write,
                    stderr=output_write,
                    pass_fds=(request_read, reply_write),
                    env=_importable(env),
                    start_new_session=True,
                )
            except OSError as error:
                raise WorkerError(f"a worker's child process cannot be started: {error}; {_cure(error)}") from error
            undo.pop_all()
        for fd in (request_read, reply_write, output_write):
            os.close(fd)
        for fd in (self._request, self._reply, self._output):
            os.set_blocking(fd, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exchange(self, request: bytes, timeout_s: float) -> bytes:
        """Send one frame and wait for one. Time that the child waits for a device does not count.

        Raises:
            JobTimeout: no answer in time; the process group was killed.
            JobCrashed: the process died, or was killed for its memory.
            JobLost: this process cannot go on (no file descriptor is left, say); the process group was killed.

        Messages end with the log's tail.
        """
        self._log.clear()
        try:
            return self._send_and_receive(request, timeout_s)
        except OSError as error:
            self._give_up(error)

    def _send_and_receive(self, request: bytes, timeout_s: float) -> bytes:
        started = looked = time.monotonic()
        outgoing = memoryview(HEADER.pack(len(request)) + request)
        frame = bytearray()
        next_memory_check = started
        with selectors.PollSelector() as selector:  # unlike epoll, it needs no file descriptor, of which none may be left
            selector.register(self._request, selectors.EVENT_WRITE)
            selector.register(self._reply, selectors.EVENT_READ)
            selector.register(self._output, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if waits_for_device(self.pid):
                    started += now - looked
                looked = now
                if now - started >= timeout_s:
                    self._time_out(timeout_s)
                if self._memory_limit_bytes is not None and now >= next_memory_check:
                    next_memory_check = now + self._check_memory(self._memory_limit_bytes)
                wait = min(_LIVENESS_S, started + timeout_s - now)
                if self._memory_limit_bytes is not None:
                    wait = min(wait, next_memory_check - now)
                events = selector.select(max(wait, 0))
                alive = bool(events) or not self.exited()
                for key, _ in events:
                    if key.fd == self._output and not self._read_log(_CHUNK):
                        selector.unregister(self._output)
                    elif key.fd == self._reply:
                        alive = self._read_into(frame) and alive
                    elif key.fd == self._request:
                        outgoing = self._send(outgoing)
                        if not outgoing:
                            selector.unregister(self._request)
                if len(frame) >= HEADER.size and len(frame) - HEADER.size >= HEADER.unpack_from(frame)[0]:
                    self._read_log(1 << 20)
                    return bytes(frame[HEADER.size :])
                if not alive:
                    self._crash()

    def log_tail(self) -> str:
        """The end of what the child printed since the last request."""
        return self._log.decode(errors="replace")

    def kill(self) -> None:
        """Kill the child and everything it started, at once. Thread-safe and idempotent; `exchange` raises JobCrashed."""
        self.killed = True
        self._kill_group()

    def close(self) -> None:
        """Kill, and free the pipes. Not while another thread is in `exchange`."""
        self._kill_group()
        for fd in (self._request, self._reply, self._output):
            if fd >= 0:
                os.close(fd)
        self._request = self._reply = self._output = -1

    def _send(self, outgoing: memoryview) -> memoryview:
        try:
            return outgoing[os.write(self._request, outgoing[:_CHUNK]) :]
        except BlockingIOError:
            return outgoing
        except BrokenPipeError:  # it died; the reply pipe tells
            return memoryview(b"")

    def _read_into(self, frame: bytearray) -> bool:
        """Append what the reply pipe holds; False at its end."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._reply, 1 << 20)
            frame += data
            return bool(data)
        return True

    def _read_log(self, num_bytes: int) -> bool:
        """Move up to `num_bytes` from the output pipe into the tail; False at its end."""
        with contextlib.suppress(BlockingIOError):
            while num_bytes > 0:
                data = os.read(self._output, _CHUNK)
                if not data:
                    return False
                num_bytes -= len(data)
                self._log += data
                del self._log[:-LOG_TAIL_BYTES]
        return True

    def exited(self) -> bool:
        """Whether the child is dead; thread-safe. It stays a zombie, so that its id cannot be given to others."""
        with self._lock:
            if self._reaped:
                return True
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _kill_group(self) -> None:
        with self._lock:
            if self._reaped:
                return
            strays: list[psutil.Process] = []
            members: list[int] = []
            unseen: OSError | None = None
            try:
                strays = [p for p in _descendants(self.pid) if _session(p.pid) != self.pid]  # they left the session
            except OSError as error:
                unseen = error
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            try:
                members = _members(self.pid)  # they left the group only
            except OSError as error:
                unseen = error
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for stray in strays:
                with contextlib.suppress(psutil.Error, OSError):
                    stray.kill()
            if unseen is not None:
                _log.warning("process %d was killed; what it started in other groups may live on: %s", self.pid, unseen)
            try:
                self._process.wait(_REAP_S)
            except subprocess.TimeoutExpired:
                _log.warning("process %d was killed but is still there after %g s (a hung driver?)", self.pid, _REAP_S)
            self._reaped = True
        forget_session(self.pid)

    def _time_out(self, timeout_s: float) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            if not self._reaped:
                os.kill(self.pid, DUMP_SIGNAL)
        end = time.monotonic() + _LAST_WORDS_S
        with selectors.PollSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while (left := end - time.monotonic()) > 0 and (not selector.select(left) or self._read_log(_CHUNK)):
                continue
        self._kill_group()
        raise JobTimeout(self._with_log(f"the job ran past its deadline of {timeout_s:g} s and was killed"))

    def _crash(self) -> None:
        exited = self.exited()
        end = time.monotonic() + 1.0
        while not exited and time.monotonic() < end:  # the pipe closes a moment before the process is gone
            time.sleep(0.002)
            exited = self.exited()
        self._kill_group()
        self._read_log(1 << 20)
        how = "closed its pipe" if not exited else _cause(self._process.returncode)
        raise JobCrashed(self._with_log(f"the process that ran the job {how}"))

    def _give_up(self, error: OSError) -> NoReturn:
        """Kill a child that cannot be watched any longer, even when no file can be opened."""
        with contextlib.suppress(OSError):
            self._read_log(1 << 20)
        if self._reply >= 0:  # the place of its descriptor is what looking for the job's processes takes
            fd, self._reply = self._reply, -1
            with contextlib.suppress(OSError):
                os.close(fd)
        self._kill_group()
        text = f"the process that ran the job could not be watched any longer and was killed: {error}; {_cure(error)}"
        raise JobLost(self._with_log(text)) from error

    def _check_memory(self, limit_bytes: int) -> float:
        """Kill if above the limit; otherwise seconds until it could be reached."""
        used = sum(_memory(pid, "rss") for pid in _members(self.pid))
        if used > limit_bytes:  # pages shared among processes count once, which takes longer to find out
            used = sum(_memory(pid, "pss") for pid in _members(self.pid))
        if used > limit_bytes:
            self._kill_group()
            self._read_log(1 << 20)
            text = f"the job was killed: it used {_size(used)}, more than its memory limit of {_size(limit_bytes)}"
            raise JobCrashed(self._with_log(text))
        return min(0.5, max(0.02, (limit_bytes - used) / _FASTEST_ALLOCATION))

    def _with_log(self, message: str) -> str:
        tail = self.log_tail().strip()
        return f"{message}\nEnd of its log:\n{tail}" if tail else message


def _importable(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with this package's own folder on the module path: the parent's `sys.path` follows in the first frame."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    return {**env, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _pipe(undo: contextlib.ExitStack) -> tuple[int, int]:
    """A reading and a writing end, which `undo` will close."""
    ends = os.pipe()
    for fd in ends:
        undo.callback(os.close, fd)
    return ends


def _cure(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"this process may open {limit} files: raise that limit (`ulimit -n`) or use fewer workers"
    return "try again; `ulimit -a` and `dmesg` may tell what this machine is short of"


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _members(leader: int) -> list[int]:
    """Processes of the session that `leader` leads: two system calls per process of the machine, no parsing."""
    return [pid for pid in psutil.pids() if _session(pid) == leader]


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _memory(pid: int, kind: str) -> int:
    try:
        process = psutil.Process(pid)
        if kind == "pss":
            with contextlib.suppress(psutil.AccessDenied, AttributeError):
                return int(process.memory_full_info().pss)
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _cause(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (the machine may be out of memory)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
