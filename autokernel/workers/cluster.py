"""Workers on a Ray cluster, which may be just this machine. The only import of Ray.

Each worker is an actor that holds its device and owns a child process (`Worker`) in which the jobs run, so a bad job never
costs the actor. Jobs and replies travel as bytes in Ray's arguments and returns: no disk is shared. An actor that is lost,
by itself or with its node, costs the job it ran (JobLost) and is replaced wherever there is room.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from autokernel.errors import ConfigError, JobCrashed, JobLost, JobTimeout, WorkerError
from autokernel.workers.pool import QueuedPool
from autokernel.workers.worker import Reply, Worker, module_path

_log = logging.getLogger(__name__)

_START_TIMEOUT_S = 180.0
_KILL_S = 2.0  # for a head to take note
_PATIENCE_S = 600.0  # how long the whole pool may be without a single worker before jobs are given up
_MAX_FAILED_STARTS = 3
_KNOCK_S = 10.0
_OBJECT_STORE_BYTES = 256 << 20


class RayPool(QueuedPool):
    """A pool of actors.

    On a cluster that is joined, workers that do not fit yet wait for room (an autoscaler sees them), and the others work.

    Args:
        address: "local" starts Ray here, for as long as the pool lives; "auto", "HOST:PORT" and "ray://HOST:PORT" join.
        num_workers: actors. "local" starts no more than this machine's GPUs have room for.
        num_gpus_per_worker: 0 for CPU jobs, which then see no GPU at all. Below 1, workers share a GPU.
        num_cpus_per_worker: what Ray books; it pins nothing.
        env: variables for the jobs' processes.
        memory_limit_bytes: per worker, its child and whatever that starts together; None for no limit.
        preload: modules that each child imports on start ("torch").

    Raises:
        ConfigError: there is no cluster at the address, or no node with room for one worker.
    """

    def __init__(
        self,
        address: str = "local",
        *,
        num_workers: int,
        num_gpus_per_worker: float = 0.0,
        num_cpus_per_worker: float = 1.0,
        env: Mapping[str, str] | None = None,
        memory_limit_bytes: int | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        env = dict(env or {})
        if num_gpus_per_worker == 0:
            env["CUDA_VISIBLE_DEVICES"] = ""  # Ray itself no longer hides GPUs from those who asked for none
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _connect(address, math.ceil(num_workers * num_cpus_per_worker))
        try:
            num_workers = _fit(address, num_workers, num_gpus_per_worker, num_cpus_per_worker)
        except ConfigError:
            if self._owns_ray:
                ray.shutdown()
            raise
        actor = ray.remote(num_cpus=num_cpus_per_worker, num_gpus=num_gpus_per_worker, max_restarts=0, max_task_retries=0)(
            _Host
        )

        here = module_path()

        def create() -> Any:
            return actor.remote(env, memory_limit_bytes, tuple(preload), here, address == "local")

        fleet = _Fleet()
        super().__init__([_ActorRunner(create, fleet) for _ in range(num_workers)])

    def close(self) -> None:
        """Cancel what is queued, kill the actors with what they run, and leave the cluster. Idempotent."""
        super().close()
        if self._owns_ray:
            self._owns_ray = False
            ray.shutdown()


class _Host:
    """The actor: holds the device that Ray gave it, and a worker."""

    def __init__(
        self,
        env: Mapping[str, str],
        memory_limit_bytes: int | None,
        preload: Sequence[str],
        driver_path: Sequence[str],
        same_machine: bool,
    ) -> None:
        if "OMP_NUM_THREADS" not in env:
            os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to num_cpus, which only books
        # On another node the driver's folders may be missing or hold something else, so they come last there.
        path = driver_path if same_machine else list(dict.fromkeys([*module_path(), *driver_path]))
        self._worker = Worker(
            env=env,
            memory_limit_bytes=memory_limit_bytes,
            preload=preload,
            sys_path=path,
            start_timeout_s=_START_TIMEOUT_S,
        )

    def start(self) -> WorkerError | None:
        """Start the child. Errors are returned, since Ray would wrap what is raised."""
        try:
            self._worker.start()
        except WorkerError as error:
            return error
        return None

    def renew(self) -> None:
        """End the child, unless it runs a job. Actors take one call at a time, so none does."""
        self._worker.renew()

    def run(self, job: bytes, timeout_s: float) -> Reply | WorkerError:
        """Run a job in the child."""
        try:
            return self._worker.run_pickled(job, timeout_s)
        except WorkerError as error:
            return error


class _Fleet:
    """How many of a pool's actors are up, and since when none is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_ready = 0
        self._none_since = time.monotonic()

    def count(self, change: int) -> None:
        with self._lock:
            self._num_ready += change
            if self._num_ready == 0:
                self._none_since = time.monotonic()

    def stranded_s(self) -> float:
        """Seconds since the last actor was up; 0 while one is."""
        with self._lock:
            return 0.0 if self._num_ready else time.monotonic() - self._none_since


class _ActorRunner:
    """One place in the pool: an actor, and its replacement when it is lost."""

    def __init__(self, create: Callable[[], Any], fleet: _Fleet) -> None:
        self._create = create
        self._fleet = fleet
        self._lock = threading.Lock()
        self._closed = False
        self._actor: Any = None
        self._starting: Any = None  # the pending answer of a new actor's `start`
        self._ready = False

    def start(self) -> None:
        failures = 0
        while not self._ready:
            try:
                self._wait_for_actor()
            except ray.exceptions.RuntimeEnvSetupError as error:
                self._discard()
                raise WorkerError(f"a cluster node cannot set up the workers' environment: {error}") from error
            except ray.exceptions.RayError as error:
                self._discard()
                if self._closed:
                    raise JobLost("the pool is closed") from error
                failures += 1
                _log.warning("a new worker was lost while it started: %s", _first_line(error))
                if failures >= _MAX_FAILED_STARTS:
                    raise WorkerError(f"no worker starts on the cluster; {failures} tries, the last one: {error}") from error

    def _wait_for_actor(self) -> None:
        with self._lock:
            if self._closed:
                raise JobLost("the pool is closed")
            if self._actor is None:
                self._actor = self._create()
                self._starting = self._actor.start.remote()
        while not ray.wait([self._starting], timeout=0.25)[0]:
            if self._closed:
                raise JobLost("the pool is closed")
            if (waited := self._fleet.stranded_s()) > _PATIENCE_S:
                raise JobLost(f"no node of the cluster has had room for a worker for {waited:.0f} s; it has {_offer()}")
        problem = ray.get(self._starting)
        if problem is not None:
            self._discard()
            raise problem
        self._ready = True
        self._fleet.count(+1)

    def run_pickled(self, job: bytes, timeout_s: float) -> Reply:
        try:
            # Without a deadline here: the actor has the job's, which leaves out its waits for the device, and Ray tells of an
            # actor or a node that is gone.
            reply = ray.get(self._actor.run.remote(job, timeout_s))
        except ray.exceptions.RayTaskError as error:
            self._discard()  # its child may still run the job, and would answer the next one with this one's result
            raise WorkerError(f"the worker itself failed: {error}") from error
        except ray.exceptions.RayError as error:
            # Also when the actor is only out of reach: the job may still be running there, so that actor has to go.
            self._discard()
            if self._closed:
                raise JobLost("the pool was closed while the job ran") from error
            _log.warning("a worker was lost: %s", _first_line(error))
            raise JobLost(f"the worker or its node went away while the job ran: {_first_line(error)}") from error
        if isinstance(reply, WorkerError):
            if self._closed and isinstance(reply, JobCrashed):  # of the two that Ray kills, the child may go first
                raise JobLost("the pool was closed while the job ran") from reply
            if not isinstance(reply, JobTimeout | JobCrashed):  # not the job but the actor failed; a new one may do better
                self._discard()
            raise reply
        return reply  # type: ignore[no-any-return]

    def renew(self) -> None:
        with self._lock:
            actor = self._actor if self._ready else None
        if actor is not None:
            actor.renew.remote()  # in front of the next job; an actor that is gone has nothing to end

    def close(self) -> None:
        with self._lock:
            self._closed = True
            actor = self._actor
        if actor is not None:
            _kill(actor)

    def _discard(self) -> None:
        with self._lock:
            actor, self._actor, self._starting = self._actor, None, None
        if self._ready:
            self._ready = False
            self._fleet.count(-1)
        if actor is not None:
            _kill(actor)


def _kill(actor: Any) -> None:
    """Ask for an actor's end, without waiting for a head that does not answer."""

    def ask() -> None:
        try:
            ray.kill(actor)
        except (ray.exceptions.RayError, RuntimeError, ValueError) as error:  # it is gone, or so is the connection
            _log.info("a worker could not be ended: %s", _first_line(error))

    asking = threading.Thread(target=ask, name="autokernel-kill", daemon=True)
    asking.start()
    asking.join(_KILL_S)


def _connect(address: str, num_cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        # "local", not the default: a plain init would join whatever cluster a stranger left running on this host.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        options |= {
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, num_cpus),
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    else:
        options["runtime_env"] = {"py_modules": [str(Path(__file__).resolve().parents[1])]}
    try:
        if address not in ("local", "auto"):
            _knock(address)
        with _keeping_sigterm():
            ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        cure = "start one with `ray start --head` or `ray up`, or use `local`"
        raise ConfigError(f"cluster.address: no Ray cluster can be reached at {address!r}: {error}; {cure}") from error


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Keeps a handler of SIGTERM that this process has: Ray puts one in its place that exits with a code of its own.

    Without any, Ray's stays, since processes of Ray would outlive this one by a minute. In other threads than the main one
    handlers cannot be set, which Ray does not try either.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        there_is_one = handler is not None and handler != signal.SIG_DFL
        if there_is_one and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _knock(address: str) -> None:
    """Raise within seconds when nobody listens there: Ray itself tries for minutes, with a page of warnings.

    Raises:
        ValueError: not an address.
        OSError: nobody listens.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ValueError("it must be `local`, `auto`, `HOST:PORT` or `ray://HOST:PORT` (or `inline`, without Ray)")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def _fit(address: str, num_workers: int, num_gpus: float, num_cpus: float) -> int:
    """How many actors to create.

    Raises:
        ConfigError: not even one fits on any node.
    """
    room = sum(
        int(min(node["Resources"].get(kind, 0.0) / need for kind, need in (("GPU", num_gpus), ("CPU", num_cpus)) if need > 0))
        for node in ray.nodes()
        if node["Alive"]
    )
    if room == 0:
        cure = "lower cluster.gpus_per_worker or cluster.cpus_per_worker, or wait until `ray status` shows more nodes"
        raise ConfigError(
            f"a worker needs {num_gpus:g} GPU and {num_cpus:g} CPU on one node, but the cluster has {_offer()}; {cure}"
        )
    if room >= num_workers:
        return num_workers
    if address == "local":
        _log.info("%d workers instead of %d: that is what this machine has room for", room, num_workers)
        return room
    _log.warning("the cluster has room for %d of %d workers now; the others wait for more nodes", room, num_workers)
    return num_workers


def _offer() -> str:
    """The nodes in words: "2 x (8 GPU, 96 CPU), 1 x (0 GPU, 8 CPU)"."""
    nodes = (node["Resources"] for node in ray.nodes() if node["Alive"])
    kinds = Counter(f"({node.get('GPU', 0):g} GPU, {node.get('CPU', 0):g} CPU)" for node in nodes)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "no node"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
