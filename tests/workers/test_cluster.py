"""A cluster of two emulated nodes: actors and nodes are killed for real."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import worker_jobs as jobs

from autokernel.config import ClusterSection
from autokernel.errors import ConfigError, JobLost, WorkerError
from autokernel.workers.device_lock import device_lock
from autokernel.workers.pool import Pool, open_pool

pytestmark = [pytest.mark.ray, pytest.mark.clock]

ROOT = Path(__file__).resolve().parents[2]
GENEROUS_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room for any worker, and two nodes with room for one each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        yield made
    finally:
        import ray

        ray.shutdown()
        made.shutdown()


def section(cluster: Any, **changes: Any) -> ClusterSection:
    return ClusterSection(**{"address": cluster.address, **changes})


@pytest.fixture(scope="module")
def pool(cluster: Any) -> Iterator[Pool]:
    made = open_pool(section(cluster), device="cpu", num_workers=2, env={"AK_TEST": "set"}, memory_limit_bytes=1 << 30)
    yield made
    made.close()


def places(pool: Pool) -> list[tuple[int, int]]:
    """(actor, node) of two jobs that run at the same time."""
    return [future.result(GENEROUS_S) for future in [pool.submit(jobs.Where(0.5), GENEROUS_S) for _ in range(2)]]


def test_no_room_is_said_up_front(cluster: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"needs 1 GPU and 1 CPU on one node, but the cluster has 1 x \(0 GPU, 0 CPU\), 2 x \(0 GPU, 1 CPU\); lower",
    ):
        open_pool(section(cluster), device="cuda", num_workers=2, env={})
    with pytest.raises(ConfigError, match=r"needs 0 GPU and 2 CPU on one node"):  # two nodes of one CPU do not make one of two
        open_pool(section(cluster, cpus_per_worker=2), device="cpu", num_workers=1, env={})


def test_the_package_travels_to_the_nodes(cluster: Any, tmp_path: Path) -> None:
    """A driver in a folder of its own: the nodes can have the package from Ray alone."""
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]!r}
import worker_jobs
from autokernel.workers.cluster import RayPool
pool = RayPool({cluster.address!r}, num_workers=1)
print("ORIGIN", pool.submit(worker_jobs.OriginOf("autokernel"), 60).result())
pool.close()
"""
    script = tmp_path / "driver.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    origin = next((line for line in done.stdout.splitlines() if line.startswith("ORIGIN")), done.stderr)
    assert "py_modules_files" in origin


def test_workers_that_cannot_start_say_so(cluster: Any) -> None:
    pool = open_pool(section(cluster), device="cpu", num_workers=1, env={}, preload=("no_such_module",))
    error = pool.submit(jobs.Add(1, 1), GENEROUS_S).exception(GENEROUS_S)
    pool.close()
    assert type(error) is WorkerError
    assert "'no_such_module' of `preload` cannot be imported" in str(error)


def test_workers_that_die_as_they_start_say_so(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor is killed, each time, by what its child imports first."""
    owners = tmp_path / "owners"
    (tmp_path / "kills_its_owner.py").write_text(f"""
import os, signal
with open({str(owners)!r}, "a") as f:
    f.write(f"{{os.getppid()}}\\n")
os.kill(os.getppid(), signal.SIGKILL)
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    opened = open_pool(section(cluster), device="cpu", num_workers=1, env={}, preload=("kills_its_owner",))
    with contextlib.closing(opened) as pool:
        error = pool.submit(jobs.Add(1, 1), GENEROUS_S).exception(GENEROUS_S)
    assert type(error) is WorkerError
    assert str(error).startswith("no worker starts on the cluster; 3 tries, the last one: The actor died unexpectedly")
    assert len(set(owners.read_text().split())) >= 3, "each try is a new actor"


def test_an_environment_that_no_node_can_set_up_is_named(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The driver's connection names a package that the cluster does not hold (any more). Trying again would not help."""
    import ray

    package = "gcs://_ray_pkg_0123456789abcdef.zip"
    ray.init(address=cluster.address, runtime_env={"py_modules": [package]}, log_to_driver=False)
    try:
        with contextlib.closing(open_pool(section(cluster), device="cpu", num_workers=1, env={})) as pool:
            error = pool.submit(jobs.Add(1, 1), GENEROUS_S).exception(GENEROUS_S)
            assert "a new worker was lost" not in caplog.text
        assert ray.is_initialized(), "the pool leaves a connection alone that is not its own"
    finally:
        ray.shutdown()
    assert type(error) is WorkerError
    assert str(error).startswith("a cluster node cannot set up the workers' environment: Failed to set up runtime environment.")
    assert package in str(error)


def test_closing_while_a_worker_starts_is_no_loss(
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The child's first import takes long; closing kills the actor that waits for it."""
    begun = tmp_path / "begun"
    (tmp_path / "takes_long.py").write_text(f"""
import pathlib, time
pathlib.Path({str(begun)!r}).write_text("")
time.sleep(60)
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = open_pool(section(cluster), device="cpu", num_workers=1, env={}, preload=("takes_long",))
    eventually(begun.exists, GENEROUS_S, "the import")
    pool.close()
    assert "lost" not in caplog.text


def test_a_worker_that_fails_costs_its_job_and_is_replaced(
    cluster: Any, tmp_path: Path, all_gone: Callable[[list[int]], None]
) -> None:
    """The actor runs out of file descriptors and cannot watch its child, which goes on and will have a result."""
    begun = tmp_path / "begun"
    opened = open_pool(section(cluster), device="cpu", num_workers=1, env={}, memory_limit_bytes=1 << 30)
    with contextlib.closing(opened) as pool:
        error = pool.submit(jobs.StarveTheOwner(str(begun)), GENEROUS_S).exception(GENEROUS_S)
        assert type(error) is JobLost
        assert "could not be watched any longer and was killed: [Errno 24] Too many open files" in str(error)
        child, owner, num_files = map(int, begun.read_text().split())
        with contextlib.suppress(psutil.NoSuchProcess):  # else Ray cannot reach it and takes 5 s to kill it
            psutil.Process(owner).rlimit(psutil.RLIMIT_NOFILE, (num_files, num_files))
        all_gone([child, owner])  # else the next job would go to a child that still runs this one, and get its result
        assert pool.submit(jobs.ParentPid(), GENEROUS_S).result() != owner


def test_an_actor_that_fails_unforeseen_costs_its_job_and_is_replaced(
    cluster: Any, all_gone: Callable[[list[int]], None]
) -> None:
    """One place of a pool, whose actor raises what no worker of ours is known to raise."""
    import ray

    from autokernel.workers.cluster import _ActorRunner, _Fleet, _Host
    from autokernel.workers.worker import module_path, pickle_job

    class Failing(_Host):
        def run(self, job: bytes, timeout_s: float) -> Any:
            reply = super().run(job, timeout_s)
            raise SystemError(f"not foreseen, in {os.getpid()}, after {reply}") from None

    def create() -> Any:
        return ray.remote(num_cpus=1)(Failing).remote({}, None, (), module_path(), True)

    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"py_modules": [str(ROOT / "autokernel")]})
    try:
        runner = _ActorRunner(create, _Fleet())
        owners = []
        for _ in range(2):
            runner.start()
            with pytest.raises(WorkerError, match=r"\Athe worker itself failed: ") as caught:
                runner.run_pickled(pickle_job(jobs.ParentPid()), GENEROUS_S)
            (owner,) = re.findall(r"not foreseen, in (\d+), after", str(caught.value))[:1]
            owners.append(int(owner))
        assert owners[0] != owners[1]
        all_gone(owners)
    finally:
        ray.shutdown()


def test_closing_does_not_wait_for_room(
    cluster: Any, tmp_path: Path, eventually: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    pool = open_pool(section(cluster), device="cpu", num_workers=3, env={})
    assert "the cluster has room for 2 of 3 workers now; the others wait for more nodes" in caplog.text
    running = [pool.submit(jobs.Touch(str(file), 600), 600) for file in files]
    eventually(lambda: all(file.exists() and file.read_text() for file in files), GENEROUS_S)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 8
    errors = [future.exception(1) for future in running]
    assert [(type(error), str(error)) for error in errors] == [(JobLost, "the pool was closed while the job ran")] * 2


def test_a_child_that_closing_killed_before_its_actor_is_a_lost_job(
    cluster: Any, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    """One place of a pool: Ray kills the actor and what that started, in no order. Here the child goes first."""
    import ray

    from autokernel.workers.cluster import _ActorRunner, _Fleet, _Host
    from autokernel.workers.worker import module_path, pickle_job

    def create() -> Any:
        return ray.remote(num_cpus=1)(_Host).remote({}, None, (), module_path(), True)

    file = tmp_path / "pid"
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"py_modules": [str(ROOT / "autokernel")]})
    try:
        runner = _ActorRunner(create, _Fleet())
        runner.start()
        with ThreadPoolExecutor(1) as executor:
            running = executor.submit(runner.run_pickled, pickle_job(jobs.Touch(str(file), 600)), 600)
            eventually(lambda: file.exists() and file.read_text(), GENEROUS_S)
            runner._closed = True  # `close`, before it reaches the actor
            os.kill(int(file.read_text()), signal.SIGKILL)
            error = running.exception(GENEROUS_S)
        assert (type(error), str(error)) == (JobLost, "the pool was closed while the job ran")
        runner.close()
    finally:
        ray.shutdown()


def test_a_closed_place_waits_for_no_worker_and_asks_for_none(cluster: Any, eventually: Callable[..., None]) -> None:
    """One place of a pool, without the pool: once that is closed, it has no job left to tell of it.

    The actor waits for a resource that no node has. The head hangs (SIGSTOP), else it would tell first that the actor is gone.
    """
    import ray

    from autokernel.workers.cluster import _ActorRunner, _Fleet, _Host

    asked: list[Any] = []

    def create() -> Any:
        asked.append(ray.remote(num_cpus=0, resources={"nowhere": 1})(_Host).remote({}, None, (), [], False))
        return asked[-1]

    head = psutil.Process(cluster.head_node.all_processes["gcs_server"][0].process.pid)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        runner = _ActorRunner(create, _Fleet())
        with ThreadPoolExecutor(1) as executor:
            starting = executor.submit(runner.start)
            eventually(lambda: asked, GENEROUS_S, "a worker that waits")
            head.suspend()
            try:
                runner.close()
                error = starting.exception(10)
            finally:
                head.resume()
        assert (type(error), str(error)) == (JobLost, "the pool is closed")
        with pytest.raises(JobLost, match=r"\Athe pool is closed\Z"):
            runner.start()
        assert len(asked) == 1
    finally:
        ray.shutdown()


def test_jobs_run_on_both_nodes_with_their_own_environment(pool: Pool, eventually: Callable[..., None]) -> None:
    eventually(lambda: len({node for _, node in places(pool)}) == 2, GENEROUS_S, "work on both nodes")
    assert pool.submit(jobs.Variable("AK_TEST"), GENEROUS_S).result() == "set"
    assert pool.submit(jobs.Variable("CUDA_VISIBLE_DEVICES"), GENEROUS_S).result() == ""
    assert pool.submit(jobs.Variable("OMP_NUM_THREADS"), GENEROUS_S).result() is None, "Ray's own 1 must not get through"


def test_time_that_a_job_waits_for_the_device_does_not_count(
    pool: Pool, tmp_path: Path, eventually: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the driver give a worker up that does nothing but wait."""
    from autokernel.workers import cluster as module

    waits: list[dict[str, Any]] = []
    get = module.ray.get

    def watched(*answers: Any, **options: Any) -> Any:
        waits.append(options)
        return get(*answers, **options)

    monkeypatch.setattr(module.ray, "get", watched)
    device, begun = f"test-{os.getpid()}", tmp_path / "begun"
    with device_lock(device, exclusive=True):
        waiting = pool.submit(jobs.TakeTheDevice(str(begun), 0.1, device), 1.0)
        eventually(begun.exists, GENEROUS_S, "the job")
        time.sleep(2.5)
        assert not waiting.done()
    assert waiting.result(GENEROUS_S) == "done"
    assert waits
    assert not any(waits), "a deadline of the driver's own"


def test_an_actor_that_is_killed_costs_its_job_and_is_replaced(
    pool: Pool, tmp_path: Path, eventually: Callable[..., None], all_gone: Callable[[list[int]], None]
) -> None:
    begun = tmp_path / "begun"
    lost = pool.submit(jobs.Touch(str(begun), 600), 600)
    eventually(lambda: begun.exists() and begun.read_text(), GENEROUS_S)
    child = int(begun.read_text())
    os.kill(psutil.Process(child).ppid(), signal.SIGKILL)
    error = lost.exception(GENEROUS_S)
    assert type(error) is JobLost
    assert "went away while the job ran" in str(error)
    all_gone([child])
    eventually(lambda: len({actor for actor, _ in places(pool)}) == 2, GENEROUS_S, "the replacement")


def test_a_node_that_dies_costs_its_jobs_and_the_others_go_on(
    cluster: Any, pool: Pool, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    running = [pool.submit(jobs.Touch(str(file), 4), GENEROUS_S) for file in files]
    queued = [pool.submit(jobs.Where(0.05), GENEROUS_S) for _ in range(6)]
    eventually(lambda: all(file.exists() and file.read_text() for file in files), GENEROUS_S)
    raylet = psutil.Process(int(files[0].read_text())).parent().parent().pid  # type: ignore[union-attr]
    victim = next(node for node in cluster.worker_nodes if _raylet(node) == raylet)
    cluster.remove_node(victim, allow_graceful=False)
    assert type(running[0].exception(GENEROUS_S)) is JobLost
    assert running[1].result(GENEROUS_S) == "slept"
    assert {future.result(GENEROUS_S)[1] for future in queued} == {_raylet(node) for node in cluster.worker_nodes}
    cluster.add_node(num_cpus=1)  # a new machine joins: the pool is whole again
    eventually(lambda: len({node for _, node in places(pool)}) == 2, GENEROUS_S, "work on the node that joined")


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def test_a_cluster_without_nodes_does_not_keep_jobs_waiting_for_ever(
    cluster: Any, pool: Pool, monkeypatch: pytest.MonkeyPatch, all_gone: Callable[[list[int]], None]
) -> None:
    from autokernel.workers import cluster as module

    monkeypatch.setattr(module, "_PATIENCE_S", 1.0)
    actors = [actor for actor, _ in places(pool)]
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)
    all_gone(actors)
    futures = [pool.submit(jobs.Add(1, 1), GENEROUS_S) for _ in range(4)]
    errors = [future.exception(GENEROUS_S) for future in futures]
    assert {type(error) for error in errors} == {JobLost}
    assert re.search(
        r"no node of the cluster has had room for a worker for \d+ s; it has 1 x \(0 GPU, 0 CPU\)", str(errors[-1])
    )


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:port", "it must be `local`, `auto`, `HOST:PORT`"),
    ],
)
def test_no_cluster_at_the_address(address: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # this process is connected to the cluster of this module
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"no Ray cluster can be reached at '{address}'.*{says}"):
        # the experiment's own check would refuse some of them, but not everybody who opens a pool has one
        open_pool(ClusterSection.model_construct(address=address), device="cpu", num_workers=1, env={})
    assert time.monotonic() - started < 5
