"""The device lock, held by real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autokernel.errors import StorageError
from autokernel.workers.device_lock import device_lock, lock_name

pytestmark = pytest.mark.clock

ROOT = Path(__file__).resolve().parents[2]

# Takes the lock, writes a file, and holds on until told to let go.
_HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from autokernel.workers.device_lock import device_lock
open({waits!r}, "w").close()
with device_lock({device!r}, exclusive={exclusive}):
    open({has!r}, "w").close()
    while not Path({release!r}).exists():
        time.sleep(0.005)
open({done!r}, "w").close()
"""


class Holder:
    """A process that holds, or waits for, a device."""

    def __init__(self, folder: Path, name: str, *, exclusive: bool, device: str = "cpu") -> None:
        self.waits, self.has, self.release, self.done = (folder / f"{name}.{what}" for what in ("waits", "has", "go", "done"))
        code = _HOLDER.format(
            root=str(ROOT),
            device=device,
            exclusive=exclusive,
            waits=str(self.waits),
            has=str(self.has),
            release=str(self.release),
            done=str(self.done),
        )
        self.process = subprocess.Popen([sys.executable, "-c", code])

    def holds(self) -> bool:
        return self.has.exists()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "locks"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    holders: list[Holder] = []

    def make(name: str, *, exclusive: bool, device: str = "cpu") -> Holder:
        holders.append(Holder(tmp_path, name, exclusive=exclusive, device=device))
        return holders[-1]

    yield make
    for holder in holders:
        holder.process.kill()
        holder.process.wait()


def settle(holder: Holder, eventually: Callable[..., None]) -> None:
    """Wait until a holder that cannot get the lock has had the time to ask for it."""
    eventually(holder.waits.exists)
    time.sleep(0.15)


def test_shared_holders_overlap_and_exclude_an_exclusive_one(
    hold: Callable[..., Holder], eventually: Callable[..., None]
) -> None:
    first, second = hold("a", exclusive=False), hold("b", exclusive=False)
    eventually(lambda: first.holds() and second.holds())
    timing = hold("timing", exclusive=True)
    settle(timing, eventually)
    assert not timing.holds()
    first.release.touch()
    eventually(first.done.exists)
    time.sleep(0.1)
    assert not timing.holds(), "one shared holder is left"
    second.release.touch()
    eventually(timing.holds)


def test_an_exclusive_holder_excludes_all(hold: Callable[..., Holder], eventually: Callable[..., None]) -> None:
    timing = hold("timing", exclusive=True)
    eventually(timing.holds)
    build, other = hold("build", exclusive=False), hold("other", exclusive=True)
    settle(build, eventually)
    settle(other, eventually)
    assert not build.holds()
    assert not other.holds()
    timing.release.touch()
    eventually(lambda: build.holds() or other.holds())
    build.release.touch()
    other.release.touch()
    eventually(lambda: build.done.exists() and other.done.exists())


def test_who_waits_for_the_device_is_not_starved_by_builds(
    hold: Callable[..., Holder], eventually: Callable[..., None]
) -> None:
    first = hold("first", exclusive=False)
    eventually(first.holds)
    timing = hold("timing", exclusive=True)
    settle(timing, eventually)
    late = hold("late", exclusive=False)
    settle(late, eventually)
    assert not late.holds(), "a newcomer passed the process that waits to time"
    first.release.touch()
    eventually(timing.holds)
    assert not late.holds()
    timing.release.touch()
    eventually(late.holds)


@pytest.mark.parametrize("victim", ["holder", "waiter"])
def test_kill_minus_nine_frees_the_device(victim: str, hold: Callable[..., Holder], eventually: Callable[..., None]) -> None:
    holder = hold("holder", exclusive=True)
    eventually(holder.holds)
    waiter = hold("waiter", exclusive=True)
    settle(waiter, eventually)
    if victim == "holder":
        holder.process.kill()
        eventually(waiter.holds)
    else:  # it held the turnstile
        waiter.process.kill()
        waiter.process.wait()
        third = hold("third", exclusive=False)
        settle(third, eventually)
        assert not third.holds()
        holder.release.touch()
        eventually(third.holds)


def test_devices_are_independent(hold: Callable[..., Holder], eventually: Callable[..., None]) -> None:
    one, two = hold("one", exclusive=True, device="cpu"), hold("two", exclusive=True, device="cuda:0")
    third = hold("third", exclusive=True, device="cuda:0")
    eventually(lambda: one.holds() and (two.holds() or third.holds()))
    assert not one.done.exists(), "it holds on while the other device is taken"
    settle(two, eventually)
    settle(third, eventually)
    assert two.holds() != third.holds(), "the same device is not shared"


def test_threads_exclude_each_other(eventually: Callable[..., None]) -> None:
    order: list[str] = []

    def other() -> None:
        with device_lock("cpu", exclusive=True):
            order.append("other")

    with device_lock("cpu", exclusive=True):
        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(5)
    assert order == ["first", "other"]


def fork_and_fail(children: list[int]) -> None:
    """Hold the device, fork a process that keeps the lock's file open, as a compiler's helper would, and fail."""
    with device_lock("cpu", exclusive=True):
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        children.append(pid)
        raise ZeroDivisionError


def test_freed_after_an_exception_and_in_spite_of_a_fork() -> None:
    children: list[int] = []
    with pytest.raises(ZeroDivisionError):
        fork_and_fail(children)
    started = time.monotonic()
    with device_lock("cpu", exclusive=True):
        assert time.monotonic() - started < 5
    os.kill(children[0], 9)
    os.waitpid(children[0], 0)


def test_a_gpu_goes_by_its_visible_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert lock_name("cpu") == "cpu"
    assert lock_name("cuda") == lock_name("cuda:0") == "cuda-0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert lock_name("cuda:0") == "cuda-3"
    assert lock_name("cuda:1") == lock_name("GPU-abc") == "GPU-abc"
    assert "/" not in lock_name("../escape")


def test_a_folder_that_is_not_ours_is_refused(own_folder: Path) -> None:
    trap = own_folder / f"autokernel-{os.getuid()}"
    trap.symlink_to(own_folder)
    with (
        pytest.raises(StorageError, match="must be a folder of your own; remove it or set TMPDIR"),
        device_lock("cpu", exclusive=True),
    ):
        pass
    trap.unlink()
    trap.write_text("")
    with pytest.raises(StorageError, match=r"cannot be made.*set TMPDIR"), device_lock("cpu", exclusive=True):
        pass
