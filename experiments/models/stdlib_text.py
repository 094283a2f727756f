"""The text that the quickstart model is trained and measured on: the Python standard library's own sources.

A file is held out when a hash of its path inside the library says so, so that training and evaluation agree on the
split for any Python version, without a list to ship.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

HELD_OUT_ONE_IN = 20
_SKIPPED_PARTS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib2to3", "bad_coding"})


def is_held_out(relative_path: str) -> bool:
    """Whether the file at this path (inside the library, with forward slashes) is kept away from training."""
    digest = hashlib.blake2b(relative_path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def source_files(stdlib: Path | None = None) -> list[tuple[str, Path]]:
    """All `.py` files of the standard library as (path inside the library, path), sorted."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIPPED_PARTS.intersection(relative.parts):
            files.append((relative.as_posix(), path))
    return sorted(files)


def read_split(held_out: bool, stdlib: Path | None = None, max_bytes: int | None = None) -> bytes:
    """The concatenated bytes of one side of the split, files separated by a zero byte.

    Test files of the library (`test/`) are never part of the held-out side: some distributions do not install them.

    Raises:
        FileNotFoundError: this Python was installed without its library's sources.
    """
    pieces: list[bytes] = []
    total = 0
    for name, path in source_files(stdlib):
        if is_held_out(name) != held_out or (held_out and "test" in name.split("/")[:-1]):
            continue
        data = path.read_bytes()
        pieces.append(data)
        total += len(data) + 1
        if max_bytes is not None and total >= max_bytes:
            break
    if not pieces:
        raise FileNotFoundError(f"no Python sources under {stdlib or sysconfig.get_path('stdlib')}")
    text = b"\0".join(pieces)
    return text if max_bytes is None else text[:max_bytes]


def held_out() -> bytes:
    """The text that an experiment's `validation.eval.data` names: what the model was not trained on."""
    return read_split(held_out=True)
