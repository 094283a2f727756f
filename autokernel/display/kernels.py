"""`autokernel cache` for people."""

from __future__ import annotations

import time

from rich.console import RenderableType
from rich.text import Text

from autokernel.cutedsl.cache import FOLDER_VARIABLE, CacheStatistics, ObjectCache
from autokernel.display.layout import spaced, table
from autokernel.display.words import duration

__all__ = ["ObjectCache", "cache_view", "megabytes"]
_DAY_S = 86400


def cache_view(found: CacheStatistics) -> RenderableType:
    """The cache of compiled kernels: where, how much, of what, and how long unused."""
    shown = table("", ("", "fold"))
    shown.show_header = False
    shown.add_row("folder", found.folder)
    shown.add_row("kernels", f"{found.num_objects:,}, {megabytes(found.num_bytes)} of {megabytes(found.max_bytes)} at most")
    for kind, count in found.kinds.items():
        shown.add_row("", f"{count:,} {kind}")
    if found.oldest is not None and found.newest is not None:
        shown.add_row("last used", f"{_ago(found.newest)}; the longest unused {_ago(found.oldest)}")
    hint = f"`autokernel cache clear` empties it; {FOLDER_VARIABLE} names another folder."
    return spaced([shown, Text(hint, "dim")])


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    return f"{seconds / _DAY_S:.0f} days ago" if seconds >= 2 * _DAY_S else f"{duration(seconds)} ago"
