"""The journal: one JSON line per event, append-only, flushed before `record` returns. What a run is resumed from.

runs/<experiment>/<run_id>/journal.jsonl   the events
                           journal.lock    held (flock) by the one process that writes; names its pid
                           journal.torn    what a killed writer left behind in mid-line, cut off on the next open
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autokernel.errors import StorageError
from autokernel.events import (
    Confirmed,
    Evaluated,
    Event,
    Exported,
    RowMeasured,
    RunFinished,
    RunStarted,
    StageProgress,
    event_from_json,
    event_to_json,
)

logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal.jsonl"
_LOCK_NAME = "journal.lock"
_TORN_NAME = "journal.torn"
_SYNCED = (RunStarted, Evaluated, Confirmed, RowMeasured, Exported, RunFinished)  # these survive a power cut, too
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a journal: an event and when it was written."""

    time: datetime.datetime
    event: Event


class Journal:
    """A Recorder that appends events to `<folder>/journal.jsonl`, and the only writer there while it is open.

    Args:
        folder: the run's folder; made if it is not there.

    Raises:
        StorageError: the folder cannot be written, or another process writes this journal.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / JOURNAL_NAME
        self._num_events = 0
        self._num_evaluated = 0
        self._fd = -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self.folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        try:
            _take_lock(self._lock_fd, self.path)
            _cut_torn_tail(self.path)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._size = os.fstat(self._fd).st_size
            _sync_folder(self.folder)
        except OSError as error:
            self.close()
            raise _unwritable(self.folder, error) from None
        except StorageError:
            self.close()
            raise

    def record(self, event: Event) -> None:
        """Append one event; on the disk (not merely in memory) when this returns if it is one that must not be lost.

        Raises:
            StorageError: the line could not be written; the journal still ends with a whole line.
        """
        if isinstance(event, StageProgress):
            return
        if self._fd < 0:
            raise StorageError(f"{self.path}: the journal is closed; nothing can be recorded after `close()`")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **event_to_json(event)}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        data = line.encode() + b"\n"
        try:
            _write_all(self._fd, data)
            if isinstance(event, _SYNCED):
                os.fsync(self._fd)
        except OSError as error:
            self._shorten()
            raise self._failed(error) from None
        self._size += len(data)
        self._num_events += 1
        self._num_evaluated += isinstance(event, Evaluated)

    def close(self) -> None:
        """Let go of the file and the lock. Idempotent."""
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1

    def _shorten(self) -> None:
        """Take a half-written line back, so that even a reader that knows nothing of torn lines can read the file."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as error:
            logger.warning("%s: a half-written line could not be taken back (%s); the next open cuts it off", self.path, error)

    def _failed(self, error: OSError) -> StorageError:
        cure = "free some space there" if error.errno in _FULL else "make the folder writable"
        return StorageError(
            f"{self.path}: an event could not be appended: {error.strerror}. Saved are the {self._size} bytes before it "
            f"({self._num_events} events of this session, {self._num_evaluated} evaluations): {cure}, then run the same "
            f"command again; it resumes from there and repeats no saved evaluation"
        )


def _write_all(fd: int, data: bytes) -> None:
    """One write where the file system allows it; a short write (a disk that is filling up) is carried on."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _take_lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "pid unknown"
        raise StorageError(
            f"{path}: one run has one writer, and another process ({holder}) is writing this journal; "
            f"wait for it or stop it, or start a run of your own with --fresh"
        ) from None
    # A name that does not fit on a full disk must not keep the journal from saying so at its first event.
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        logger.debug("%s: the lock is held but cannot be labelled: %s", path, error)


def _cut_torn_tail(path: Path) -> None:
    """Cut off what follows the last newline: a line whose writer died, which the next line must not be glued to."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        size = os.fstat(fd).st_size
        keep = _end_of_last_line(fd, size)
        if keep == size:
            return
        torn = os.pread(fd, size - keep, keep)
        try:
            with open(path.with_name(_TORN_NAME), "ab") as f:
                f.write(torn + b"\n")
        except OSError as error:
            logger.warning("%s: the torn line could not be kept in %s: %s", path, _TORN_NAME, error)
        os.ftruncate(fd, keep)
        os.fsync(fd)
        logger.warning(
            "%s: the last line was torn (its writer was killed): %d bytes moved to %s; all events before it are saved",
            path,
            size - keep,
            _TORN_NAME,
        )
    finally:
        os.close(fd)


def _end_of_last_line(fd: int, size: int) -> int:
    """Position behind the last newline; 0 if there is none."""
    end = size
    while end > 0:
        start = max(0, end - 65536)
        at = os.pread(fd, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _sync_folder(folder: Path) -> None:
    """Make the journal's name durable, not only its contents."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:  # some network file systems cannot
        logger.debug("%s: fsync of the folder: %s", folder, error)
    finally:
        os.close(fd)


def _unwritable(folder: Path, error: OSError) -> StorageError:
    cure = "free some space there" if error.errno in _FULL else "make it writable"
    return StorageError(
        f"{folder}: a run needs a folder it can write its journal to: {error.strerror}; {cure}, or name another with --runs"
    )


def read_entries(path: Path | str) -> Iterator[Entry]:
    """The lines of a journal, in order. A torn last line is left out; it was never saved.

    Args:
        path: a `journal.jsonl`, or the run's folder.

    Raises:
        StorageError: the file is not there, or a whole line of it is not an event.
    """
    path = Path(path)
    if path.is_dir():
        path = path / JOURNAL_NAME
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, start=1):
                if not line.endswith(b"\n"):
                    logger.info("%s:%d: torn last line ignored (%d bytes)", path, number, len(line))
                    return
                yield parse_line(line, path, number)
    except OSError as error:
        raise StorageError(f"{path}: the journal cannot be read: {error.strerror}") from None


def parse_line(line: bytes, path: Path, number: int) -> Entry:
    """One whole line.

    Raises:
        StorageError: names the line and the cure.
    """
    try:
        data = json.loads(line)
        if not isinstance(data, dict) or "time" not in data:
            raise ValueError("not an event with a time")
        time = datetime.datetime.fromisoformat(data.pop("time"))
        return Entry(time=time, event=event_from_json(data))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(
            f"{path}:{number}: a journal holds one event per line, and this line is none ({error}). It was edited or "
            f"damaged, or written by another version of autokernel: restore the file, or cut it off before line {number} "
            f"(`head -n {number - 1}`) to resume from there, or start over with --fresh"
        ) from None


def read_journal(path: Path | str) -> list[Event]:
    """The events of a journal; see `read_entries`."""
    return [entry.event for entry in read_entries(path)]


def new_run_id(now: datetime.datetime | None = None) -> str:
    """Sorts by time and does not collide: `20261121-014900-3f2a91c0` (UTC)."""
    now = now or datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def run_folder(runs_folder: Path | str, name: str, run_id: str) -> Path:
    """Where a run lives: `<runs folder>/<experiment name>/<run_id>`."""
    return Path(runs_folder) / name / run_id


def bundle_folder(folder: Path, exported: Exported) -> Path:
    """The bundle of a run: in the run's folder, wherever that was moved to, else where it was written."""
    here = folder / "bundle"
    return here if here.is_dir() else folder / exported.folder  # the latter as it is if absolute


def find_runs(runs_folder: Path | str, name: str | None = None) -> list[Path]:
    """Folders of the runs that have a journal, newest first; `name` keeps one experiment's."""
    pattern = f"{name or '*'}/*/{JOURNAL_NAME}"
    return sorted((p.parent for p in Path(runs_folder).glob(pattern)), key=lambda p: p.name, reverse=True)


def is_being_written(folder: Path | str) -> bool:
    """Whether a process holds the journal of a run open for writing right now."""
    try:
        fd = os.open(Path(folder) / _LOCK_NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
