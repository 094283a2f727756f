"""One thing on a device at a time, across all processes of this user on this host.

On a CPU, builds hold the lock shared and timing holds it exclusively, so that no compiler runs while a kernel is timed. On a
GPU only checks and timing take it, exclusively. The locks are `flock`s: the kernel releases them when their holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from autokernel.errors import StorageError


@contextlib.contextmanager
def device_lock(device: str, *, exclusive: bool) -> Iterator[None]:
    """Hold a device for as long as the block runs; wait for it as long as it takes.

    Every acquisition opens files of its own, so threads exclude each other like processes. Not re-entrant: a second
    acquisition within the first waits for ever, unless both are shared and nobody waits for the device exclusively.

    Args:
        device: "cpu", "cuda", "cuda:1", or a GPU's UUID. "cuda:1" means the second GPU of CUDA_VISIBLE_DEVICES, so that
            processes that see one GPU under different numbers share its lock.
        exclusive: alone, or along with other shared holders.

    Raises:
        StorageError: the lock's folder cannot be used.
    """
    folder = _folder()
    name = lock_name(device)
    operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with _opened(folder / f"{name}.lock") as lock:
        # The turnstile: who waits for the device holds it, and newcomers queue behind. Without it, builds that overlap
        # each other would keep the device shared for ever, and timing would starve.
        with _announced(folder), _opened(folder / f"{name}.queue") as turnstile, _flocked(turnstile, fcntl.LOCK_EX):
            fcntl.flock(lock, operation)
        try:
            yield
        finally:
            # Unlocked by name, not just closed: a process that the block forked may still have the file open.
            fcntl.flock(lock, fcntl.LOCK_UN)


def waits_for_device(leader: int) -> bool:
    """Whether any process of the session that `leader` leads waits for a device right now.

    Whoever counts a job's seconds leaves these out: a job must not run out of time because another one hangs.
    """
    try:
        fd = os.open(_announcement(_folder(), leader), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, StorageError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def forget_session(leader: int) -> None:
    """Remove what is left of a session whose processes are gone."""
    with contextlib.suppress(OSError, StorageError):
        _announcement(_folder(), leader).unlink(missing_ok=True)


def lock_name(device: str) -> str:
    """The file name, without suffix, that stands for a device: a GPU goes by its entry in CUDA_VISIBLE_DEVICES."""
    name = device
    if device == "cuda" or device.startswith("cuda:"):
        index = int(device.partition(":")[2] or 0)
        visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
        name = visible[index] if index < len(visible) else str(index)
        name = f"cuda-{name}" if name.isdigit() else name
    if re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"autokernel-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise StorageError(f"{folder}: device locks live there, but it cannot be made: {error}; set TMPDIR") from error
    if status.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
        raise StorageError(f"{folder}: device locks live there, so it must be a folder of your own; remove it or set TMPDIR")
    return folder


def _announcement(folder: Path, leader: int) -> Path:
    return folder / f"session-{leader}.waits"


@contextlib.contextmanager
def _announced(folder: Path) -> Iterator[None]:
    """For `waits_for_device`. A lock and not just a file, so that a process that dies waits no longer."""
    with _opened(_announcement(folder, os.getsid(0))) as fd, _flocked(fd, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError(f"{path}: the device lock cannot be opened: {error}; set TMPDIR to a writable folder") from error
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _flocked(fd: int, operation: int) -> Iterator[None]:
    fcntl.flock(fd, operation)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
