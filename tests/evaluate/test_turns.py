"""A job's turns on the device are counted, and one that never ends ends its process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from autokernel.evaluate.turns import Turns, leave, return_spare_memory, wake
from autokernel.workers.limits import OVERDUE_EXIT_CODE, deadline

pytestmark = pytest.mark.clock


@pytest.fixture(autouse=True)
def _own_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_waiting_and_having_are_counted_apart() -> None:
    turns, other = Turns("cpu"), Turns("cpu")
    inside = threading.Event()

    def hold() -> None:
        with other.take("the other", exclusive=True):
            inside.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with turns.take("ours", exclusive=True):
        time.sleep(0.1)
    thread.join()
    assert 0.2 < turns.waited_s < 5
    assert 0.1 <= turns.alone_s < 0.25
    with turns.take("a build", exclusive=False):
        time.sleep(0.1)
    assert turns.alone_s < 0.25


@pytest.mark.parametrize(("seconds", "code"), [(0.2, OVERDUE_EXIT_CODE), (30, 0)])
def test_a_deadline_ends_the_process(seconds: float, code: int) -> None:
    script = f"import time; from autokernel.workers.limits import deadline\nwith deadline({seconds}, 'the test'): time.sleep(1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code
    assert ("the test took more than 0.2 s" in done.stderr) == (code != 0)


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        ("turns.go_on(None); sleep(1.2); turns.go_on('checks'); sleep(0.5)", 0),
        ("turns.go_on(None); turns.go_on('checks'); sleep(1.2)", OVERDUE_EXIT_CODE),
    ],
)
def test_within_a_turn_each_use_has_its_own_time(rest: str, code: int) -> None:
    script = f"""
from time import sleep
from autokernel.evaluate.turns import Turns
turns = Turns("cuda", longest_s=0.8)
with turns.take("the reference", exclusive=True):
    sleep(0.5)
    {rest}
sleep(1.2)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert ("checks took more than 0.8 s" in done.stderr) == (code != 0)


def test_no_deadline_and_no_gpu_cost_nothing() -> None:
    before = threading.active_count()
    with deadline(None, "anything"):
        assert threading.active_count() == before
    wake("cpu")
    return_spare_memory("cpu")
    leave("cpu", "whatever it was")
