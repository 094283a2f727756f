"""Makes `worker_jobs` importable, here and, through the module path that workers hand over, in their children."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)

# Before any test imports Ray: it reads some of these once.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", RAY_SCHEDULER_EVENTS="0")


def gone(pid: int) -> bool:
    """Whether a process is dead; a zombie that nobody has reaped yet is."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Waits for a condition and fails the test when it does not come true."""

    def wait(condition: Callable[[], object], timeout_s: float = 10.0, what: str = "the condition") -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"{what} did not come true within {timeout_s} s"
            time.sleep(0.01)

    return wait


@pytest.fixture
def all_gone(eventually: Callable[..., None]) -> Callable[[list[int]], None]:
    """Waits until all these processes are dead."""

    def wait(pids: list[int]) -> None:
        eventually(lambda: all(gone(pid) for pid in pids), 5.0, f"the end of processes {pids}")

    return wait
