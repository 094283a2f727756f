"""Jobs that the tests of the workers run in real child processes; each does to its process what a bad kernel may do."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Add:
    a: int
    b: int

    def __call__(self) -> int:
        return self.a + self.b


@dataclass(frozen=True)
class Pid:
    def __call__(self) -> int:
        return os.getpid()


@dataclass(frozen=True)
class LastPid:
    """The same, and the last job of its process."""

    ends_process: bool = True

    def __call__(self) -> int:
        return os.getpid()


@dataclass(frozen=True)
class ParentPid:
    def __call__(self) -> int:
        return os.getppid()


@dataclass(frozen=True)
class Where:
    """The process that owns the worker (an actor), and its parent (the node's own process)."""

    seconds: float = 0.0

    def __call__(self) -> tuple[int, int]:
        time.sleep(self.seconds)
        owner = psutil.Process(os.getppid())
        return owner.pid, owner.ppid()


@dataclass(frozen=True)
class SleepAndPid:
    seconds: float

    def __call__(self) -> int:
        time.sleep(self.seconds)
        return os.getpid()


@dataclass(frozen=True)
class Variable:
    name: str

    def __call__(self) -> str | None:
        return os.environ.get(self.name)


@dataclass(frozen=True)
class IsLoaded:
    module: str

    def __call__(self) -> bool:
        return self.module in sys.modules


@dataclass(frozen=True)
class OriginOf:
    module: str

    def __call__(self) -> str:
        return str(sys.modules[self.module].__file__)


@dataclass(frozen=True)
class Say:
    num_bytes: int
    last_words: str = ""

    def __call__(self) -> str:
        line = "x" * 999 + "\n"
        for _ in range(self.num_bytes // len(line)):
            sys.stdout.write(line)
        print(self.last_words)
        print("on stderr", file=sys.stderr)
        return "said"


@dataclass(frozen=True)
class WriteToAllPipes:
    """Prints what looks like a frame on stdout."""

    def __call__(self) -> str:
        os.write(1, b"\x00" * 7 + b"\x04junk")
        return "unharmed"


@dataclass(frozen=True)
class ForkAndReturn:
    """Both the process and its copy return."""

    def __call__(self) -> str:
        os.fork()
        return "once"


@dataclass(frozen=True)
class Sleep:
    seconds: float

    def __call__(self) -> float:
        time.sleep(self.seconds)
        return self.seconds


@dataclass(frozen=True)
class HoldTheInterpreter:
    """Hangs in C code with the interpreter lock held: no Python thread of the process ever runs again."""

    pid_file: str

    def __call__(self) -> None:
        Path(self.pid_file).write_text(f"{os.getpid()} {os.getppid()}")
        ctypes.PyDLL(None).sleep(600)


@dataclass(frozen=True)
class Segfault:
    def __call__(self) -> None:
        print("about to die", flush=True)
        ctypes.string_at(0)


@dataclass(frozen=True)
class Exit:
    code: int

    def __call__(self) -> None:
        print("leaving")
        os._exit(self.code)


@dataclass(frozen=True)
class SysExit:
    def __call__(self) -> None:
        sys.exit(3)


@dataclass(frozen=True)
class KillSelf:
    def __call__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class HangWithFamily:
    """Starts a process in its group and one in a session of its own, writes their ids, and hangs."""

    pid_file: str

    def __call__(self) -> None:
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        pids = [subprocess.Popen(sleeper, start_new_session=new).pid for new in (False, True)]
        Path(self.pid_file).write_text(" ".join(map(str, [os.getpid(), *pids])))
        time.sleep(600)


@dataclass(frozen=True)
class CrashHoldingPipes:
    """Forks a process that keeps every descriptor open, then dies: the pipes stay open although the child is gone."""

    def __call__(self) -> None:
        if os.fork() == 0:
            time.sleep(600)
        os._exit(7)


@dataclass(frozen=True)
class ClosePipes:
    def __call__(self) -> None:
        os.closerange(3, 4096)  # a test process may have many open, and the child has the same numbers


@dataclass(frozen=True)
class Allocate:
    """Allocates and touches memory without end, in itself or in a process it starts."""

    in_grandchild: bool = False

    def __call__(self) -> None:
        if self.in_grandchild:
            code = "import time\nkept = []\nwhile True:\n kept.append(b'x' * (16 << 20)); time.sleep(0.005)"
            subprocess.run([sys.executable, "-c", code], check=False)
            return
        kept = []
        while True:
            kept.append(b"x" * (16 << 20))
            time.sleep(0.005)


@dataclass(frozen=True)
class ShareMemory:
    """Two processes share 120 MiB: twice in the sum of their resident sizes, once in memory."""

    def __call__(self) -> str:
        kept = b"x" * (120 << 20)
        if (pid := os.fork()) == 0:
            time.sleep(1.2)
            os._exit(0)
        os.waitpid(pid, 0)
        return f"kept {len(kept) >> 20}"


class LocalError(Exception):
    """Takes arguments that its pickle does not carry."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")


@dataclass(frozen=True)
class Raise:
    kind: str

    def __call__(self) -> None:
        print("printed before")
        if self.kind == "value":
            raise ValueError("tile 13 is not a multiple of 8")
        if self.kind == "unpicklable":
            raise LocalError(7, detail="does not travel")
        if self.kind == "endless":
            raise ValueError("y" * 50_000_000)
        error = ValueError("holds a thread lock")
        error.lock = __import__("threading").Lock()  # type: ignore[attr-defined]
        raise error


@dataclass(frozen=True)
class Unpicklable:
    def __call__(self) -> Any:
        return lambda: None


@dataclass(frozen=True)
class Echo:
    payload: bytes

    def __call__(self) -> bytes:
        return self.payload


@dataclass(frozen=True)
class Note:
    """Appends its name to a file when it starts."""

    path: str
    name: str
    seconds: float = 0.0

    def __call__(self) -> str:
        with open(self.path, "a", encoding="ascii") as f:
            f.write(self.name + "\n")
        time.sleep(self.seconds)
        return self.name


@dataclass(frozen=True)
class Touch:
    """Writes a file and then sleeps: tells a test that it has begun."""

    path: str
    seconds: float

    def __call__(self) -> str:
        Path(self.path).write_text(str(os.getpid()))
        time.sleep(self.seconds)
        return "slept"


@dataclass(frozen=True)
class StarveTheOwner:
    """Leaves the process that owns the worker without a file that it could open, and goes on for long."""

    begun: str

    def __call__(self) -> None:
        owner = psutil.Process(os.getppid())
        _, most = owner.rlimit(psutil.RLIMIT_NOFILE)
        Path(self.begun).write_text(f"{os.getpid()} {owner.pid} {most}")
        owner.rlimit(psutil.RLIMIT_NOFILE, (3, most))
        time.sleep(600)


@dataclass(frozen=True)
class TakeTheDevice:
    """Writes a file, waits for the device, and then works for a while."""

    path: str
    seconds: float
    device: str = "cpu"

    def __call__(self) -> str:
        from autokernel.workers.device_lock import device_lock

        Path(self.path).write_text("")
        with device_lock(self.device, exclusive=True):
            time.sleep(self.seconds)
        return "done"


@dataclass(frozen=True)
class FindsNoRoom:
    """A job for which a device is full."""

    def __call__(self) -> int:
        from autokernel.errors import DeviceFull

        raise DeviceFull("no room")
