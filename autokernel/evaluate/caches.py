"""Sizes of the caches that inputs have to be larger than. Read from Linux's sysfs, or from the GPU's properties."""

from __future__ import annotations

import os
from pathlib import Path

_SYSFS = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}
# Where the machine does not say (no sysfs), assume rather too much: more copies cost memory, too few cost the truth.
_ASSUMED_BYTES_PER_CORE = {2: 2 * 1024**2, 3: 4 * 1024**2}


def cache_bytes(device: str, threads: int | None = None) -> int:
    """Bytes of L2 that the run can keep data in: a GPU's L2, or together the L2s of the CPU cores in use.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads in use; default: all cores this process may run on.
    """
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    return cpu_cache_bytes(2, threads)


def last_level_bytes(device: str) -> int:
    """Bytes of the largest cache level, summed over its instances."""
    if device == "cuda":
        return cache_bytes(device)
    levels = [cpu_cache_bytes(level) for level in (2, 3, 4)]
    return max(levels)


def cpu_cache_bytes(level: int, num_cores: int | None = None, sysfs: Path = _SYSFS) -> int:
    """Bytes of the largest caches of one level, at most `num_cores` of them; 0 for a level that is not there.

    Any of them may be in use: threads are pinned to no CPU, and how CPUs are numbered says nothing of which share a cache.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    num_cores = min(num_cores or len(allowed), len(allowed))
    seen: dict[tuple[str, str], int] = {}
    found = False
    for core in allowed:
        for index in sorted((sysfs / f"cpu{core}" / "cache").glob("index[0-9]*")):
            found = True
            if _read(index / "level") == str(level) and _read(index / "type") in ("Unified", "Data"):
                seen[(_read(index / "level"), _read(index / "shared_cpu_list"))] = _parse_size(_read(index / "size"))
    if not found:
        return _ASSUMED_BYTES_PER_CORE.get(level, 0) * num_cores
    return sum(sorted(seen.values(), reverse=True)[:num_cores])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _parse_size(text: str) -> int:
    if not text:
        return 0
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)
