"""What runs inside a worker's child process: read a pickled job, call it, answer; again and again.

Started as `python -m autokernel.workers.child REQUEST_FD REPLY_FD`. Frames are eight bytes of length and then the payload; they
travel over pipes of their own, so whatever a job prints corrupts nothing. An answer is a marshalled tuple of plain values,
so that it can be passed on by a process that knows neither the job nor its result:

    (VALUE, pickled result, "", "")
    (LAST, pickled result, "", "")                                                 likewise, and this process is to end
    (ERROR, pickled exception, what the exception says, formatted traceback)      the exception can be pickled
    (ERROR, b"", what the exception says, formatted traceback)                    it cannot
    (LAST_ERROR, ...)                                              as of ERROR, and this process is to end
    (EXIT, b"", what the exception says, formatted traceback)                     SystemExit and the like
    (BROKEN, b"", what is wrong, formatted traceback)                             the machinery: preload, job, result

Only the standard library is imported here, plus what `preload` names and what a job's pickle needs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import marshal
import os
import pickle
import select
import signal
import struct
import sys
import traceback
from collections.abc import Sequence

VALUE, LAST, ERROR, LAST_ERROR, EXIT, BROKEN = "value", "last", "error", "last error", "exit", "broken"
Answer = tuple[str, bytes, str, str]

HEADER = struct.Struct(">Q")
DUMP_SIGNAL = signal.SIGUSR1  # makes the child write all its stacks to its log

_MAX_TEXT = 16_384  # characters of a message or traceback that travel
_MAX_EXCEPTION_BYTES = 1 << 20  # a larger exception travels as text


def main(request_fd: int, reply_fd: int) -> None:
    """Serve requests until the parent closes its end."""
    for fd in (request_fd, reply_fd):
        os.set_inheritable(fd, False)  # what jobs start must not hold the pipes
    _start_guardian(request_fd, reply_fd)
    _be_first_to_go()
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a crash must not eat what was printed
    request = _read_frame(request_fd)
    if request is None:
        return
    _write_frame(reply_fd, marshal.dumps(_prepare(request)))
    pid = os.getpid()
    while (request := _read_frame(request_fd)) is not None:
        answer = _answer(request)
        if os.getpid() != pid:
            os._exit(0)  # the job forked and its copy came back here: one job, one answer
        with contextlib.suppress(OSError, ValueError):  # the job may have closed them
            sys.stdout.flush()
            sys.stderr.flush()
        _write_frame(reply_fd, marshal.dumps(answer))


def _start_guardian(request_fd: int, reply_fd: int) -> None:
    """Fork a process that kills this whole process group as soon as the parent is gone.

    The parent's death closes the last writing end of the request pipe. A thread could not see that while a job holds
    the interpreter lock, and a death signal (PR_SET_PDEATHSIG) would spare what the job started and would fire when
    the parent's *thread* ends.
    """
    if os.fork() != 0:
        return
    os.close(reply_fd)  # else the parent would not see the end of a child that dies
    poller = select.poll()
    poller.register(request_fd, 0)  # no event but the hang-up
    poller.poll()
    os.killpg(0, signal.SIGKILL)


def _be_first_to_go() -> None:
    """When the machine runs out of memory, the kernel shall take this process and not the driver."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as f:
        f.write("1000")


def _prepare(request: bytes) -> Answer:
    """Take over the parent's module path and import what every job is going to need."""
    sys_path, preload = pickle.loads(request)
    sys.path[:] = sys_path
    for module in preload:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001  the boundary of the child
            return BROKEN, b"", f"module {module!r} of `preload` cannot be imported: {_one_line(error)}", _trace(error)
    return VALUE, b"", "", ""


def _answer(request: bytes) -> Answer:
    """Run one job. Whatever it raises ends here."""
    try:
        job = pickle.loads(request)
    except Exception as error:  # noqa: BLE001  the boundary of the child
        rule = "the job cannot be loaded in the child; its class must be importable from a module that is installed there"
        return BROKEN, b"", f"{rule}: {_one_line(error)}", _trace(error)
    try:
        value = job()
    except Exception as error:  # noqa: BLE001  the boundary of the child
        kind = LAST_ERROR if getattr(error, "ends_process", False) else ERROR
        return kind, _pickled(error), _one_line(error), _trace(error)
    except BaseException as error:  # noqa: BLE001  SystemExit must cost the job, not the process
        return EXIT, b"", _one_line(error), _trace(error)
    try:
        return LAST if getattr(job, "ends_process", False) else VALUE, pickle.dumps(value), "", ""
    except Exception as error:  # noqa: BLE001  the boundary of the child
        return BROKEN, b"", f"the job's result ({type(value).__name__}) cannot be pickled: {_one_line(error)}", _trace(error)


def _pickled(error: Exception) -> bytes:
    """The exception as a pickle, or nothing; whether that loads again, only the other side can tell."""
    try:
        data = pickle.dumps(error)
    except Exception:  # noqa: BLE001  any class may do anything here
        return b""
    return data if len(data) <= _MAX_EXCEPTION_BYTES else b""


def _one_line(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  a __str__ of the job's own
        text = "(its __str__ fails)"
    return _shorten(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _trace(error: BaseException) -> str:
    return _shorten("".join(traceback.format_exception(error)))


def _shorten(text: str) -> str:
    if len(text) <= _MAX_TEXT:
        return text
    half = _MAX_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _read_frame(fd: int) -> bytes | None:
    """The next frame, or None when the parent is gone."""
    header = _read_exactly(fd, HEADER.size)
    return None if header is None else _read_exactly(fd, HEADER.unpack(header)[0])


def _read_exactly(fd: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(fd, min(size - len(data), 1 << 20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def _write_frame(fd: int, payload: bytes) -> None:
    for part in (HEADER.pack(len(payload)), payload):
        view = memoryview(part)
        while view:
            view = view[os.write(fd, view) :]


def _arguments(argv: Sequence[str]) -> tuple[int, int]:
    request_fd, reply_fd = (int(word) for word in argv)
    return request_fd, reply_fd


if __name__ == "__main__":
    main(*_arguments(sys.argv[1:]))
