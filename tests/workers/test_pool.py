"""What every pool must do, for each of them; then what is the local pool's own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import worker_jobs as jobs

from autokernel.config import ClusterSection
from autokernel.errors import JobCrashed, JobLost, JobTimeout, WorkerError
from autokernel.workers.pool import InlinePool, LocalPool, Pool, QueuedPool, open_pool
from autokernel.workers.worker import Reply, Worker

pytestmark = pytest.mark.clock

ROOT = Path(__file__).resolve().parents[2]
GENEROUS_S = 60.0
ENV = {"AK_TEST": "set", "OMP_NUM_THREADS": "3"}


def _ray_pool(num_workers: int) -> Pool:
    from autokernel.workers.cluster import RayPool

    return RayPool("local", num_workers=num_workers, env=ENV, memory_limit_bytes=256 << 20)


@pytest.fixture(scope="module", params=["inline", "local", pytest.param("ray", marks=pytest.mark.ray)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pool(kind: str) -> Iterator[Pool]:
    made: Pool
    if kind == "inline":
        made = InlinePool()
    elif kind == "local":
        made = LocalPool(2, env=ENV, memory_limit_bytes=256 << 20)
    else:
        made = _ray_pool(2)
    yield made
    made.close()


@pytest.fixture
def isolating(kind: str) -> None:
    if kind == "inline":
        pytest.skip("the inline pool isolates nothing")


class TestEveryPool:
    def test_results_and_exceptions(self, pool: Pool) -> None:
        assert pool.num_workers >= 1
        futures = [pool.submit(jobs.Add(i, 1), GENEROUS_S) for i in range(20)]
        assert [future.result() for future in futures] == list(range(1, 21))
        with pytest.raises(ValueError, match="tile 13"):
            pool.submit(jobs.Raise("value"), GENEROUS_S).result()

    @pytest.mark.usefixtures("isolating")
    def test_exceptions_carry_the_childs_traceback(self, pool: Pool) -> None:
        error = pool.submit(jobs.Raise("value"), GENEROUS_S).exception()
        assert error is not None
        assert "worker_jobs.py" in "".join(error.__notes__)
        error = pool.submit(jobs.Raise("unpicklable"), GENEROUS_S).exception()
        assert type(error) is WorkerError
        assert "LocalError: 7: does not travel" in str(error)

    @pytest.mark.usefixtures("isolating")
    def test_idle_workers_are_renewed(self, pool: Pool) -> None:
        def pids() -> set[int]:
            return {future.result() for future in [pool.submit(jobs.Pid(), GENEROUS_S) for _ in range(8)]}

        before = pids()
        pool.renew()
        assert not before & pids()

    @pytest.mark.usefixtures("isolating")
    def test_every_failure_is_a_typed_value_and_costs_one_job(self, pool: Pool) -> None:
        cases: list[tuple[Callable[[], Any], float, type[WorkerError], str]] = [
            (jobs.Segfault(), GENEROUS_S, JobCrashed, "SIGSEGV"),
            (jobs.Exit(3), GENEROUS_S, JobCrashed, "exit code 3"),
            (jobs.SysExit(), GENEROUS_S, JobCrashed, "SystemExit: 3"),
            (jobs.Allocate(), GENEROUS_S, JobCrashed, "memory limit of 256 MiB"),
            (jobs.Sleep(600), 0.5, JobTimeout, "deadline of 0.5 s"),
            (jobs.Unpicklable(), GENEROUS_S, WorkerError, "cannot be pickled"),
        ]
        futures = [pool.submit(job, timeout_s) for job, timeout_s, _, _ in cases]
        good = [pool.submit(jobs.Add(i, i), GENEROUS_S) for i in range(4)]
        for future, (_, _, cls, says) in zip(futures, cases, strict=True):
            error = future.exception()
            assert type(error) is cls, error
            assert says in str(error)
        assert [future.result() for future in good] == [0, 2, 4, 6]

    @pytest.mark.usefixtures("isolating")
    def test_the_environment_is_the_jobs_own(self, pool: Pool, kind: str) -> None:
        assert pool.submit(jobs.Variable("AK_TEST"), GENEROUS_S).result() == "set"
        assert pool.submit(jobs.Variable("OMP_NUM_THREADS"), GENEROUS_S).result() == "3"
        if kind == "ray":
            assert pool.submit(jobs.Variable("CUDA_VISIBLE_DEVICES"), GENEROUS_S).result() == ""

    @pytest.mark.usefixtures("isolating")
    def test_the_clock_starts_with_the_job(self, pool: Pool) -> None:
        """Six sleeps of 0.4 s on two workers: the last waits longer than any may run."""
        futures = [pool.submit(jobs.Sleep(0.4), 0.75) for _ in range(6)]
        assert [future.result() for future in futures] == [0.4] * 6

    @pytest.mark.usefixtures("isolating")
    def test_workers_run_at_the_same_time(self, pool: Pool) -> None:
        assert pool.num_workers == 2
        pids = {future.result() for future in [pool.submit(jobs.SleepAndPid(0.5), GENEROUS_S) for _ in range(2)]}
        assert len(pids) == 2

    @pytest.mark.usefixtures("isolating")
    def test_what_is_queued_can_be_cancelled(self, pool: Pool, tmp_path: Path) -> None:
        busy = [pool.submit(jobs.Sleep(0.5), GENEROUS_S) for _ in range(2)]
        queued = pool.submit(jobs.Touch(str(tmp_path / "ran"), 0), GENEROUS_S)
        assert queued.cancel()
        wait(busy)
        assert pool.submit(jobs.Add(1, 1), GENEROUS_S).result() == 2
        with pytest.raises(CancelledError):
            queued.result()
        assert not (tmp_path / "ran").exists()

    def test_close_ends_it_all(self, pool: Pool, kind: str, tmp_path: Path, eventually: Callable[..., None]) -> None:
        """The last test of each pool: closes it with two jobs running and one waiting."""
        futures = []
        files = [tmp_path / "a", tmp_path / "b"]
        if kind != "inline":
            futures = [pool.submit(jobs.Touch(str(file), 600), 600) for file in [*files, tmp_path / "never"]]
            eventually(lambda: all(file.exists() and file.read_text() for file in files), GENEROUS_S)
        started = time.monotonic()
        pool.close()
        assert time.monotonic() - started < 8
        for future in futures[:2]:
            assert isinstance(future.exception(1), JobLost)
        if kind != "inline":
            assert futures[2].cancelled()
            assert not (tmp_path / "never").exists()
            eventually(lambda: not any(psutil.pid_exists(int(file.read_text())) for file in files), what="the jobs' end")
        with pytest.raises(WorkerError, match="pool is closed"):
            pool.submit(jobs.Add(1, 1), 1)
        pool.close()


def test_first_in_first_out(tmp_path: Path) -> None:
    pool = LocalPool(1)
    names = [f"job{i}" for i in range(12)]
    futures = [pool.submit(jobs.Note(str(tmp_path / "order"), name, 0.02), GENEROUS_S) for name in names]
    wait(futures)
    pool.close()
    assert (tmp_path / "order").read_text().split() == names


def test_a_pool_whose_children_cannot_start_says_so() -> None:
    pool = LocalPool(1, preload=("no_such_module",))
    with pytest.raises(WorkerError, match="no_such_module"):
        pool.submit(jobs.Add(1, 1), GENEROUS_S).result()
    pool.close()


def test_a_job_that_cannot_be_pickled_is_refused_at_once() -> None:
    pool = LocalPool(1)
    with pytest.raises(WorkerError, match="must be picklable"):
        pool.submit(lambda: 1, GENEROUS_S)
    pool.close()


_STARVED = """
import contextlib, json, os, pathlib, resource, sys, time
sys.path[:0] = {paths!r}
import worker_jobs as jobs
from concurrent.futures import wait
from autokernel.workers.pool import LocalPool

@contextlib.contextmanager
def no_descriptor_left():
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(0))
    yield
    for fd in taken:
        os.close(fd)

_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
begun = pathlib.Path({begun!r})

def num_files():
    return len(os.listdir("/proc/self/fd"))

pool = LocalPool(1, memory_limit_bytes={memory_limit_bytes!r})
first = pool.submit(jobs.Pid(), 60).result(60)
"""


def _starved(script: str, tmp_path: Path, memory_limit_bytes: int | None) -> Any:
    """What a driver prints, as JSON, that may open 64 files; its pool has one worker, whose child is there."""
    paths = [str(ROOT), str(Path(__file__).parent)]
    setup = _STARVED.format(paths=paths, begun=str(tmp_path / "begun"), memory_limit_bytes=memory_limit_bytes)
    command = [sys.executable, "-c", setup + script + "\npool.close()\n"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True, timeout=60)
    return json.loads(done.stdout)


def test_a_job_that_cannot_be_watched_is_lost_and_its_process_with_it(
    tmp_path: Path, all_gone: Callable[[list[int]], None]
) -> None:
    """The memory of a job is looked up in files, and in the middle of the job none can be opened any more."""
    script = """
before = num_files()
lost = pool.submit(jobs.HangWithFamily(str(begun)), 60)
while not begun.exists() or not begun.read_text():
    time.sleep(0.01)
with no_descriptor_left():
    error = lost.exception(20)
    not_started = [pool.submit(jobs.Add(0, 0), 20)]
    wait(not_started)
not_started.append(pool.submit(jobs.Add(0, 0), 20))  # the worker may have failed to start before there was room again
wait(not_started)
after = [pool.submit(jobs.Add(i, i), 20).result(20) for i in (1, 2)]
second = pool.submit(jobs.Pid(), 20).result(20)
print(json.dumps([type(error).__name__, str(error), first, second, after, num_files() - before]))
"""
    name, message, first, second, after, leaked = _starved(script, tmp_path, 1 << 30)
    assert name == "JobLost"
    assert "could not be watched any longer and was killed: [Errno 24] Too many open files" in message
    assert "this process may open 64 files: raise that limit (`ulimit -n`) or use fewer workers" in message
    assert after == [2, 4], "each job gets its own result"
    assert second != first
    assert leaked == 0
    pids = [int(pid) for pid in (tmp_path / "begun").read_text().split()]
    assert len(pids) == 3
    all_gone(pids)


def test_not_even_a_list_of_processes_keeps_a_child_alive_that_cannot_be_watched(
    tmp_path: Path, all_gone: Callable[[list[int]], None]
) -> None:
    """The limit is below what is open: closing a file makes no room either."""
    script = """
lost = pool.submit(jobs.Touch(str(begun), 60), 60)
while not begun.exists() or not begun.read_text():
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
errors = [lost.exception(20), pool.submit(jobs.Add(1, 1), 20).exception(20)]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
wait([pool.submit(jobs.Add(0, 0), 20)])  # the worker may have failed to start once more before there was room
print(json.dumps([[(type(error).__name__, str(error)) for error in errors], pool.submit(jobs.Add(2, 2), 20).result(20)]))
"""
    errors, after = _starved(script, tmp_path, 1 << 30)
    assert [name for name, _ in errors] == ["JobLost", "WorkerError"]
    assert errors[1][1].startswith("a worker's child process cannot be started: [Errno 24] Too many open files; this process")
    assert after == 4
    all_gone([int((tmp_path / "begun").read_text())])


def test_a_job_without_memory_limit_needs_no_file_of_its_driver(tmp_path: Path) -> None:
    script = """
with no_descriptor_left():
    second = pool.submit(jobs.Pid(), 60).result(20)
print(json.dumps([first, second]))
"""
    first, second = _starved(script, tmp_path, None)
    assert first == second


def test_no_failure_of_a_worker_leaves_a_future_open() -> None:
    """An environment that no process can have, which is found out when the child starts."""
    pool = LocalPool(1, env={"AK_TEST": "a\0b"})
    for _ in range(2):
        error = pool.submit(jobs.Add(1, 1), GENEROUS_S).exception(10)
        assert (type(error), str(error)) == (WorkerError, "the worker itself failed: ValueError: embedded null byte")
    pool.close()


def test_no_failure_in_the_middle_of_a_job_leaves_a_future_open() -> None:
    class Failing(Worker):
        def run_pickled(self, job: bytes, timeout_s: float) -> Reply:
            reply = super().run_pickled(job, timeout_s)
            if reply.open() == (13, None):
                raise SystemError("not foreseen")
            return reply

    pool = QueuedPool([Failing()])
    error = pool.submit(jobs.Add(12, 1), GENEROUS_S).exception(10)
    assert (type(error), str(error)) == (WorkerError, "the worker itself failed: SystemError: not foreseen")
    assert isinstance(error.__cause__, SystemError)
    assert pool.submit(jobs.Add(1, 1), GENEROUS_S).result(10) == 2
    pool.close()


def test_inline_address_needs_no_ray() -> None:
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]!r}
import worker_jobs
from autokernel.config import ClusterSection
from autokernel.workers.pool import open_pool
pool = open_pool(ClusterSection(address="inline"), device="cpu", num_workers=1, env={{}})
assert pool.submit(worker_jobs.Variable("CUDA_VISIBLE_DEVICES"), 30).result() == "", "CPU jobs see no GPU"
pool.close()
assert "ray" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_pool_without_workers() -> None:
    with pytest.raises(ValueError, match="at least one worker, not 0"):
        open_pool(ClusterSection(address="inline"), device="cpu", num_workers=0, env={})


def driver_of(pool: str, begun: Path) -> subprocess.Popen[bytes]:
    """A process whose pool runs a job that never ends, and writes into `begun` where it runs. Interrupted, it ends with 130.

    Args:
        pool: lines that make `pool`.
        begun: a file.
    """
    code = f"""
import signal, sys
sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]!r}
import worker_jobs
from autokernel.config import ClusterSection
from autokernel.workers.pool import LocalPool, open_pool
{pool}
try:
    pool.submit(worker_jobs.Touch({str(begun)!r}, 600), 600).result()
except KeyboardInterrupt:
    pool.close()
    sys.exit(130)
"""
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_ctrl_c_ends_quickly(tmp_path: Path, eventually: Callable[..., None], all_gone: Callable[[list[int]], None]) -> None:
    """As a terminal sends it: to the whole process group of the driver."""
    begun = tmp_path / "begun"
    driver = driver_of("pool = LocalPool(1)", begun)
    eventually(lambda: begun.exists() and begun.read_text(), 30)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(5) == 130
    all_gone([int(begun.read_text())])


@pytest.mark.ray
def test_a_schedulers_signal_reaches_the_handler_that_was_there_before_ray(
    tmp_path: Path, eventually: Callable[..., None], all_gone: Callable[[list[int]], None]
) -> None:
    begun = tmp_path / "begun"
    local = 'pool = open_pool(ClusterSection(address="local"), device="cpu", num_workers=1, env={})'
    driver = driver_of(f"signal.signal(signal.SIGTERM, signal.default_int_handler)\n{local}", begun)
    try:
        eventually(lambda: begun.exists() and begun.read_text(), GENEROUS_S)
        driver.terminate()
        assert driver.wait(GENEROUS_S) == 130
    finally:
        driver.kill()
    all_gone([int(begun.read_text())])
