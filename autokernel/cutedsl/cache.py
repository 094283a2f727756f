"""Compiled kernels on disk: `<key>.so` with its record `<key>.json` beside it, shared by all processes of a user.

A record is written last, so that an object without one is no entry. Whoever compiles holds the key's lock, which the system
takes from a process that dies; the others wait for it. Objects used least recently go first when the folder is full.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autokernel.cutedsl.spec import KernelSpec, ObjectInfo
from autokernel.errors import StorageError
from autokernel.records import Record

FOLDER_VARIABLE = "AUTOKERNEL_CACHE_DIR"
MAX_BYTES = 2 * 10**9
LOCK_TIMEOUT_S = 300.0  # a kernel takes seconds; a machine with more jobs than cores, longer
_POLL_S = 0.02
_LEFT_BEHIND_S = 3600.0  # then a file without a record belongs to no process that is still writing
_LOCKS = "locks"
_NUM_LOCK_DIGITS = 3  # of a key: as many locks as keys would litter, and deleting a lock file is a race

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatistics(Record):
    """What a cache holds. Times are seconds since the epoch, None if it is empty."""

    folder: str
    num_objects: int
    num_bytes: int
    max_bytes: int
    kinds: Mapping[str, int] = field(default_factory=dict)  # "quack sm_90a" -> how many
    oldest: float | None = None  # the longest unused
    newest: float | None = None


class ObjectCache:
    """The compiled kernels of a folder.

    Args:
        folder: made when something is put into it.
        max_bytes: of all objects together.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder if folder is not None else default_folder()
        self.max_bytes = max_bytes

    def get(self, key: str) -> tuple[ObjectInfo, Path] | None:
        """The record of a compiled kernel and its file, if it is here and whole. Damaged ones are dropped."""
        found = self._read(key)
        if found is None and (self._record(key).exists() or self._object(key).exists()):
            with self._locked(key):  # nobody is writing it
                found = self._read(key)
                if found is None:
                    _log.warning("dropped %s: damaged, or left behind by a process that died", self._object(key))
                    self._drop(key)
        if found is not None:
            with contextlib.suppress(OSError):  # of a read-only cache
                os.utime(found[1])
        return found

    def put(self, info: ObjectInfo, content: bytes) -> Path:
        """Keep a compiled kernel; returns its file.

        Raises:
            StorageError: the folder cannot be written.
        """
        with self._locked(info.key):
            return self._write(info, content)

    def get_or_compile(self, spec: KernelSpec) -> tuple[ObjectInfo, Path]:
        """A kernel from the cache, or compiled now in this process. One process compiles it, others wait.

        Raises:
            CompileError: it cannot be compiled.
            StorageError: the folder cannot be written, or another process has held the kernel's lock for too long.
        """
        from autokernel.cutedsl.compiler import compile_kernel, versions

        key = spec.key(versions())
        if (found := self.get(key)) is not None:
            return found
        with self._locked(key):
            if (found := self._read(key)) is not None:
                return found
            info, content = compile_kernel(spec)
            return info, self._write(info, content)

    def statistics(self) -> CacheStatistics:
        """How much there is, of what. Records alone are read."""
        kinds: Counter[str] = Counter()
        entries = self._entries()
        for path, _, _ in entries:
            info = self._info(path.stem)
            kinds[f"{info.spec.config.get('source')} {info.spec.arch}" if info is not None else "unreadable"] += 1
        used = [moment for _, moment, _ in entries]
        return CacheStatistics(
            folder=str(self.folder),
            num_objects=len(entries),
            num_bytes=sum(num_bytes for _, _, num_bytes in entries),
            max_bytes=self.max_bytes,
            kinds=dict(sorted(kinds.items())),
            oldest=min(used, default=None),
            newest=max(used, default=None),
        )

    def clear(self, unused_for_s: float = 0.0) -> tuple[int, int]:
        """Delete objects that were not used for so long.

        Returns:
            How many, and their bytes.
        """
        old = [entry for entry in self._entries() if time.time() - entry[1] >= unused_for_s]
        for path, _, _ in old:
            self._drop(path.stem)
        self._tidy()
        return len(old), sum(num_bytes for _, _, num_bytes in old)

    def _object(self, key: str) -> Path:
        return self.folder / f"{key}.so"

    def _record(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _info(self, key: str) -> ObjectInfo | None:
        try:
            return ObjectInfo.from_json(json.loads(self._record(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def _read(self, key: str) -> tuple[ObjectInfo, Path] | None:
        info, path = self._info(key), self._object(key)
        try:
            if info is None or info.key != key or hashlib.sha256(path.read_bytes()).hexdigest() != info.sha256:
                return None
        except OSError:
            return None
        return info, path

    def _write(self, info: ObjectInfo, content: bytes) -> Path:
        path = self._object(info.key)
        record = json.dumps(info.to_json(), ensure_ascii=False).encode()
        try:
            for target, data in ((path, content), (self._record(info.key), record)):
                handle, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(name, target)
        except OSError as error:
            raise StorageError(
                f"the cache of compiled kernels, {self.folder}, cannot be written: {error}; "
                f"make room or set {FOLDER_VARIABLE} to another folder"
            ) from error
        self._make_room(info.key)
        return path

    def _entries(self) -> list[tuple[Path, float, int]]:
        """(object, when it was last used, bytes with its record), the longest unused first."""
        found = []
        for path in self.folder.glob("*.so"):
            with contextlib.suppress(OSError):  # another process has just deleted it
                status = path.stat()
                found.append((path, status.st_mtime, status.st_size + self._record(path.stem).stat().st_size))
        return sorted(found, key=lambda entry: entry[1])

    def _make_room(self, kept: str) -> None:
        entries = self._entries()
        total = sum(num_bytes for _, _, num_bytes in entries)
        for path, _, num_bytes in entries:
            if total <= self.max_bytes:
                return
            if path.stem != kept:
                self._drop(path.stem)
                total -= num_bytes
        self._tidy()

    def _drop(self, key: str) -> None:
        self._record(key).unlink(missing_ok=True)
        self._object(key).unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Delete what processes that died have left."""
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("*.so"), *self.folder.glob("*.json")]:
            partner = path.with_suffix({".so": ".json", ".json": ".so"}.get(path.suffix, ""))
            with contextlib.suppress(OSError):
                if (path.suffix == ".tmp" or not partner.exists()) and time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                    path.unlink()

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold a key against all other processes. The system frees the lock of a process that dies."""
        path = self.folder / _LOCKS / key[:_NUM_LOCK_DIGITS]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        except OSError as error:
            raise StorageError(
                f"the cache of compiled kernels, {self.folder}, cannot be written: {error}; "
                f"set {FOLDER_VARIABLE} to a folder that can"
            ) from error
        with file:
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StorageError(
                            f"another process has held {path} for {LOCK_TIMEOUT_S:.0f} s: it compiles, or hangs; "
                            "stop it, or try again"
                        ) from None
                    time.sleep(_POLL_S)
            yield


def default_folder() -> Path:
    """In the user's cache folder, unless AUTOKERNEL_CACHE_DIR names another."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser() / "cutedsl"
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "autokernel" / "cutedsl"
