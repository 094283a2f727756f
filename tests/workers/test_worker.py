"""Real child processes that crash, hang, allocate and print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
import worker_jobs as jobs

from autokernel.errors import AutokernelError, DeviceFull, JobCrashed, JobLost, JobTimeout, WorkerError
from autokernel.workers.device_lock import device_lock
from autokernel.workers.worker import Worker

pytestmark = pytest.mark.clock

ROOT = Path(__file__).resolve().parents[2]
GENEROUS_S = 30.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


def test_returns_what_the_job_returns_and_keeps_its_process(worker: Worker) -> None:
    assert worker.run(jobs.Add(2, 3), GENEROUS_S) == 5
    first = worker.run(jobs.Pid(), GENEROUS_S)
    assert first == worker.run(jobs.Pid(), GENEROUS_S) == worker.pid != os.getpid()
    assert os.getsid(first) == first


def test_a_job_may_be_the_last_of_its_process(worker: Worker, all_gone: Callable[[list[int]], None]) -> None:
    first = worker.run(jobs.Pid(), GENEROUS_S)
    assert worker.run(jobs.LastPid(), GENEROUS_S) == first
    all_gone([first])
    assert worker.run(jobs.LastPid(ends_process=False), GENEROUS_S) == worker.run(jobs.Pid(), GENEROUS_S) != first


def test_what_found_a_device_full_gives_back_all_that_it_took(worker: Worker, all_gone: Callable[[list[int]], None]) -> None:
    first = worker.run(jobs.Pid(), GENEROUS_S)
    with pytest.raises(DeviceFull, match=r"\Ano room\n") as caught:
        worker.run(jobs.FindsNoRoom(), GENEROUS_S)
    assert "In the child process" in notes(caught.value)
    all_gone([first])
    assert worker.run(jobs.Pid(), GENEROUS_S) != first


def test_an_idle_process_is_renewed_and_a_busy_one_is_not(worker: Worker, all_gone: Callable[[list[int]], None]) -> None:
    worker.renew()  # there is none yet
    first = worker.run(jobs.Pid(), GENEROUS_S)
    worker.renew()
    all_gone([first])
    worker.start()
    new = worker.pid
    worker.renew()
    second = worker.run(jobs.Pid(), GENEROUS_S)
    assert second == new != first, "a process that ran nothing holds nothing"
    with ThreadPoolExecutor(1) as thread:
        busy = thread.submit(worker.run, partial(time.sleep, 1.0), GENEROUS_S)
        time.sleep(0.2)
        worker.renew()
        busy.result()
    assert worker.run(jobs.Pid(), GENEROUS_S) == second


def test_large_jobs_and_results_travel(worker: Worker) -> None:
    payload = os.urandom(5_000_000)
    assert worker.run(jobs.Echo(payload), GENEROUS_S) == payload


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (jobs.Segfault(), "was killed by SIGSEGV"),
        (jobs.Exit(3), "ended with exit code 3"),
        (jobs.KillSelf(), "was killed by SIGKILL (the machine may be out of memory)"),
        (jobs.CrashHoldingPipes(), "ended with exit code 7"),
        (jobs.ClosePipes(), "ended with exit code 1"),
        (jobs.SysExit(), "SystemExit: 3"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_job_that_ends_its_process_costs_one_job(worker: Worker, job: Callable[[], None], says: str) -> None:
    with pytest.raises(JobCrashed) as caught:
        worker.run(job, GENEROUS_S)
    assert says in str(caught.value)
    assert worker.run(jobs.Add(1, 1), GENEROUS_S) == 2


def test_a_job_that_asks_for_the_end_of_its_process_gets_it(worker: Worker) -> None:
    worker.start()
    before = worker.pid
    with pytest.raises(JobCrashed):
        worker.run(jobs.SysExit(), GENEROUS_S)
    worker.start()
    assert worker.pid != before, "what made it exit must not meet the next job"


def test_a_crash_carries_the_end_of_the_log_and_the_stack(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with pytest.raises(JobCrashed) as caught:
        worker.run(jobs.Segfault(), GENEROUS_S)
    assert "about to die" in str(caught.value)
    assert "worker_jobs.py" in str(caught.value), "faulthandler names the line"
    assert "about to die" in worker.log_tail()
    with pytest.raises(JobCrashed, match="leaving"):
        worker.run(jobs.Exit(1), GENEROUS_S)


def test_a_hang_is_killed_at_its_deadline_with_all_it_started(
    worker: Worker, tmp_path: Path, all_gone: Callable[[list[int]], None]
) -> None:
    worker.start()
    started = time.monotonic()
    with pytest.raises(JobTimeout, match=r"deadline of 1\.5 s") as caught:
        worker.run(jobs.HangWithFamily(str(tmp_path / "pids")), 1.5)
    assert 1.5 <= time.monotonic() - started < 6
    assert "worker_jobs.py" in str(caught.value), "the stack at the deadline names the line"
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    all_gone(pids)
    assert worker.run(jobs.Add(1, 1), GENEROUS_S) == 2


@pytest.fixture
def lock_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / f"autokernel-{os.getuid()}"


def test_time_that_a_job_waits_for_the_device_does_not_count(lock_folder: Path, tmp_path: Path) -> None:
    """Whoever has the device may be hanging there until its own deadline."""
    worker = Worker()
    pid = worker.run(jobs.Pid(), GENEROUS_S)
    announcement = lock_folder / f"session-{pid}.waits"
    with ThreadPoolExecutor() as threads:
        with device_lock("cpu", exclusive=True):
            waiting = threads.submit(worker.run, jobs.TakeTheDevice(str(tmp_path / "begun"), 0.1), 1.0)
            time.sleep(2.5)
            assert (tmp_path / "begun").exists()
            assert not waiting.done()
            assert announcement.exists()
        assert waiting.result(10) == "done"
    begin = time.monotonic()
    with pytest.raises(JobTimeout, match="deadline of 1 s"):
        worker.run(jobs.TakeTheDevice(str(tmp_path / "begun"), 600), 1.0)
    assert time.monotonic() - begin < 5, "having the device does count"
    worker.close()
    assert not announcement.exists(), "nothing is left of it"


def test_a_crash_leaves_no_process_behind(worker: Worker, eventually: Callable[..., None]) -> None:
    leader = worker.run(jobs.Pid(), GENEROUS_S)
    with pytest.raises(JobCrashed):
        worker.run(jobs.CrashHoldingPipes(), GENEROUS_S)
    eventually(lambda: not [pid for pid in psutil.pids() if _session(pid) == leader], what="an empty session")


def _session(pid: int) -> int:
    try:
        return -1 if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else os.getsid(pid)
    except (OSError, psutil.Error):
        return -1


@pytest.mark.parametrize("in_grandchild", [False, True])
def test_endless_allocation_is_killed_at_the_memory_limit(in_grandchild: bool) -> None:
    worker = Worker(memory_limit_bytes=256 << 20)
    with pytest.raises(JobCrashed, match=r"used .* more than its memory limit of 256 MiB"):
        worker.run(jobs.Allocate(in_grandchild), GENEROUS_S)
    assert worker.run(jobs.Add(1, 1), GENEROUS_S) == 2
    worker.close()


def test_memory_that_processes_share_counts_once() -> None:
    worker = Worker(memory_limit_bytes=220 << 20)
    assert worker.run(jobs.ShareMemory(), GENEROUS_S) == "kept 120"
    worker.close()


def test_fifty_megabytes_of_output_cost_no_memory_and_keep_their_end(worker: Worker) -> None:
    worker.start()
    before = psutil.Process().memory_info().rss
    assert worker.run(jobs.Say(50_000_000, "last words"), GENEROUS_S) == "said"
    assert psutil.Process().memory_info().rss - before < 20 << 20
    assert worker.log_tail().endswith("last words\non stderr\n")
    assert len(worker.log_tail()) <= 8192


def test_what_a_job_prints_cannot_be_taken_for_a_reply(worker: Worker) -> None:
    assert worker.run(jobs.WriteToAllPipes(), GENEROUS_S) == "unharmed"
    assert worker.run(jobs.ForkAndReturn(), GENEROUS_S) == "once"
    time.sleep(0.1)
    assert worker.run(jobs.Add(1, 1), GENEROUS_S) == 2


def test_an_exception_comes_back_with_the_childs_traceback(worker: Worker) -> None:
    with pytest.raises(ValueError, match="tile 13 is not a multiple of 8") as caught:
        worker.run(jobs.Raise("value"), GENEROUS_S)
    assert "Traceback" in notes(caught.value)
    assert "worker_jobs.py" in notes(caught.value)
    assert "printed before" in notes(caught.value)


@pytest.mark.parametrize(
    ("kind", "says"), [("unpicklable", "LocalError: 7: does not travel"), ("lock", "ValueError: holds a thread lock")]
)
def test_an_exception_that_cannot_travel_becomes_text(worker: Worker, kind: str, says: str) -> None:
    with pytest.raises(WorkerError, match=says) as caught:
        worker.run(jobs.Raise(kind), GENEROUS_S)
    assert type(caught.value) is WorkerError
    assert "worker_jobs.py" in notes(caught.value)


def test_an_endless_message_is_cut(worker: Worker) -> None:
    with pytest.raises(WorkerError) as caught:
        worker.run(jobs.Raise("endless"), GENEROUS_S)
    assert len(str(caught.value)) + len(notes(caught.value)) < 60_000


def test_a_result_that_cannot_be_pickled_says_so(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"result \(function\) cannot be pickled"):
        worker.run(jobs.Unpicklable(), GENEROUS_S)


def test_a_job_that_cannot_travel_says_so(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerError, match="must be picklable: a frozen dataclass"):
        worker.run(lambda: 1, GENEROUS_S)
    monkeypatch.setattr(jobs.Add, "__module__", "__main__")
    with pytest.raises(WorkerError, match="must come from an importable module"):
        worker.run(jobs.Add(1, 2), GENEROUS_S)


def test_a_job_whose_module_is_missing_in_the_child_says_so() -> None:
    worker = Worker(sys_path=[path for path in sys.path if path != str(Path(__file__).parent)])
    with pytest.raises(WorkerError, match=r"cannot be loaded in the child.*No module named 'worker_jobs'"):
        worker.run(jobs.Add(1, 2), GENEROUS_S)
    worker.close()


def test_environment_and_preload_reach_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AK_TEST_OUTER", "outer")
    worker = Worker(env={"OMP_WAIT_POLICY": "passive"}, preload=("sqlite3",))
    assert worker.run(jobs.Variable("OMP_WAIT_POLICY"), GENEROUS_S) == "passive"
    assert worker.run(jobs.Variable("AK_TEST_OUTER"), GENEROUS_S) == "outer"
    assert worker.run(jobs.IsLoaded("sqlite3"), GENEROUS_S)
    for heavy in ("torch", "pydantic", "ray", "asyncio"):
        assert not worker.run(jobs.IsLoaded(heavy), GENEROUS_S), f"a child must not import {heavy} unasked"
    worker.close()


def test_a_preload_that_fails_is_named() -> None:
    worker = Worker(preload=("no_such_module",))
    with pytest.raises(WorkerError, match="'no_such_module' of `preload` cannot be imported"):
        worker.run(jobs.Add(1, 2), GENEROUS_S)
    worker.close()


def test_kill_from_another_thread(worker: Worker, tmp_path: Path, eventually: Callable[..., None]) -> None:
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            worker.run(jobs.Touch(str(tmp_path / "begun"), 600), 600)
        except AutokernelError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    eventually((tmp_path / "begun").exists)
    worker.kill()
    thread.join(5)
    assert not thread.is_alive()
    assert isinstance(outcome[0], JobLost)
    assert worker.run(jobs.Add(1, 1), GENEROUS_S) == 2


def test_a_child_that_died_while_idle_is_replaced(worker: Worker, all_gone: Callable[[list[int]], None]) -> None:
    pid = worker.run(jobs.Pid(), GENEROUS_S)
    os.kill(pid, signal.SIGKILL)
    all_gone([pid])
    assert worker.run(jobs.Add(1, 1), GENEROUS_S) == 2


def test_an_interrupted_job_leaves_no_result_to_the_next(worker: Worker, all_gone: Callable[[list[int]], None]) -> None:
    """As Ctrl-C does, in the middle of an exchange."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = worker.run(jobs.Pid(), GENEROUS_S)
    usual = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.run(jobs.SleepAndPid(0.6), GENEROUS_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert worker.run(jobs.Add(1, 1), GENEROUS_S) == 2
    all_gone([before])


def test_a_folder_that_is_gone_does_not_leave_a_child_half_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: Worker
) -> None:
    """The working directory is on the module path, and then is removed."""
    (tmp_path / "gone").mkdir()
    monkeypatch.syspath_prepend("")
    with monkeypatch.context() as inside:
        inside.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(FileNotFoundError):
            worker.run(jobs.Add(1, 1), GENEROUS_S)
        assert worker.pid is None
    assert worker.run(jobs.Add(1, 1), GENEROUS_S) == 2


def test_closed_for_good(worker: Worker, all_gone: Callable[[list[int]], None]) -> None:
    pid = worker.run(jobs.Pid(), GENEROUS_S)
    worker.close()
    worker.close()
    all_gone([pid])
    with pytest.raises(JobLost, match="closed"):
        worker.run(jobs.Add(1, 1), GENEROUS_S)


def test_no_descriptor_is_leaked() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        worker = Worker()
        with pytest.raises(JobCrashed):
            worker.run(jobs.Exit(1), GENEROUS_S)
        worker.run(jobs.Add(1, 1), GENEROUS_S)
        worker.close()
    assert count() == before


_PARENT = """
import sys
import tempfile
sys.path[:0] = {paths!r}
import worker_jobs
from autokernel.workers.device_lock import device_lock
from autokernel.workers.worker import Worker
Worker().run({job}, 600)
"""


@pytest.mark.parametrize("job", ["HoldTheInterpreter", "HangWithFamily"])
def test_nothing_survives_a_parent_that_is_killed(
    job: str, tmp_path: Path, eventually: Callable[..., None], all_gone: Callable[[list[int]], None]
) -> None:
    """Even if the child cannot run a line of Python, and with what it started in its session."""
    file = tmp_path / "pids"
    paths = [str(ROOT), str(Path(__file__).parent)]
    script = _PARENT.format(paths=paths, job=f"worker_jobs.{job}({str(file)!r})")
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        eventually(partial(_written, file), GENEROUS_S, "the job's start")
        time.sleep(0.2)
        pids = [int(pid) for pid in file.read_text().split()]
        assert parent.poll() is None
    finally:
        parent.kill()
        parent.wait()
    # the third one left the session, and only a parent that lives can find it
    all_gone(pids[:2])
    for pid in pids[2:]:
        os.kill(pid, signal.SIGKILL)


def _written(path: Path) -> bool:
    return path.exists() and path.read_text() != ""
