"""What jobs on the whole model share: the device in turns, compilers that work side by side, memory given back.

On a GPU several such jobs compile at once, and whatever one of them runs on the device, it runs alone: the first run of
compiled code, the benchmarks of Inductor's autotuning, checks and timing.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from autokernel.evaluate.timing import pin_threads
from autokernel.workers.device_lock import device_lock, lock_name

log = logging.getLogger(__name__)

Backend = Callable[..., Callable[..., Any]]
_MAX_COMPILE_THREADS = 8  # of one job; some four of them at once have work for all cores
_LEFT_OVER_BYTES = 1 << 30


class JobTurns:
    """The device lock of one job, which is used from one thread: to be taken again while it is held."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._lock = ExitStack()
        self._holder: int | None = None  # the thread that has the device
        self._patient = False  # others may have it in between
        self.waited_s = 0.0  # for the device, so far
        self.held_s = 0.0
        self._since = 0.0

    @contextmanager
    def alone(self, *, patient: bool = False) -> Iterator[None]:
        """Nobody else is on the device; what was launched is finished in the end.

        `patient`: others may come in between, where a block says so by `aside`.
        """
        if self._holder == threading.get_ident():
            yield
            return
        self._take()
        self._patient = patient
        try:
            yield
            self._finish()
        finally:
            self._patient = False
            self._leave()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let others on the device while this job does something that does not need it, if it is patient."""
        if not self._patient or self._holder != threading.get_ident():
            yield
            return
        self._finish()
        self._leave()
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        asked = time.monotonic()
        self._lock.enter_context(device_lock(self.device, exclusive=True))
        self._since = time.monotonic()
        self.waited_s += self._since - asked
        self._holder = threading.get_ident()

    def _leave(self) -> None:
        self._holder = None
        self.held_s += time.monotonic() - self._since
        self._lock.close()

    def _finish(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """One job tunes at a time on a device, and has it for that; others may come in between, where a block says `aside`.

        Inductor's file of timings is read before the first benchmark and written behind the last: jobs that tuned at the same
        time would lose each other's, and make them again. A job that has the device for all of its work does not wait here.
        """
        if self._holder == threading.get_ident():
            yield
            return
        asked = time.monotonic()
        with device_lock(f"{lock_name(self.device)}-tuning", exclusive=True):
            self.waited_s += time.monotonic() - asked
            with self.alone(patient=True):
                yield

    @contextmanager
    def building(self) -> Iterator[None]:
        """Around a compilation. On a CPU, builds of several jobs overlap, but no timing; on a GPU, both."""
        if self.device == "cuda":
            with _benchmarks_take_turns(self), _tuning_takes_turns(self):
                yield
        else:
            with device_lock(self.device, exclusive=False):
                yield

    def first_run_alone(self, backend: Backend, kept: list[Any]) -> Backend:
        """A backend for `torch.compile` whose compiled code runs alone for the first time; compiling needs no device.

        Coordinate descent compiles and times kernel after kernel in that first run: others get their turn while it compiles.

        Compiled code goes into `kept` as well: a CUDA graph reads its constants, and Dynamo may let go of it.
        """

        def compile_graph(module: Any, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
            compiled = backend(module, inputs, **options)
            kept.append(compiled)
            ran = False

            def run(*args: Any) -> Any:
                nonlocal ran
                if ran:
                    return compiled(*args)
                with self.alone(patient=True):
                    result = compiled(*args)
                ran = True
                return result

            return run

        return compile_graph


class ModelJob:
    """What jobs on the whole model have in common."""

    __slots__ = ()
    device: str

    @property
    def ends_process(self) -> bool:
        """On a GPU: what compilers and caches keep there, nothing but the end of their process gives back for certain."""
        return self.device == "cuda"


@contextmanager
def model_job(device: str, threads: int) -> Iterator[JobTurns]:
    """Around the work of a job on the whole model. What it made must be out of scope in the end: call a function inside."""
    import torch

    pin_threads(threads)
    torch.compiler.reset()
    if device != "cuda":
        yield JobTurns(device)
        return
    import torch._inductor.config as options
    from torch._inductor.async_compile import AsyncCompile, shutdown_compile_workers

    free_memory()
    # The default of workers is one compiling thread, since each builds a candidate; here few jobs share all cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with options.patch(compile_threads=max(1, min(_MAX_COMPILE_THREADS, cores // 4))):
        AsyncCompile.wakeup()  # its processes start while the model is loaded
        try:
            yield JobTurns(device)
        finally:
            shutdown_compile_workers()
            free_memory()


def free_memory(*, everything: bool = True) -> None:
    """Give a GPU's memory back to other processes: compiled code holds weights, and the allocator what was freed.

    `everything` includes compiled code that is still in use.
    """
    import torch
    import torch._inductor.utils

    if everything:
        torch.compiler.reset()
    torch._inductor.utils.clear_caches()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
        if everything and left > _LEFT_OVER_BYTES:
            log.warning("%.1f GB of GPU memory are still in use after a job on the whole model", left / 1e9)


def stock_backend(mode: str) -> Backend:
    """Inductor as `torch.compile(mode=...)` calls it, as a plain function."""
    import torch._dynamo
    import torch._inductor

    patches: Mapping[str, Any] = torch._inductor.list_mode_options(mode) if mode != "default" else {}
    inductor: Any = torch._dynamo.lookup_backend("inductor")

    def compile_graph(module: Any, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        return inductor(module, list(inputs), config_patches=dict(patches))  # type: ignore[no-any-return]

    return compile_graph


@contextmanager
def cuda_graphs_or_error() -> Iterator[None]:
    """Inductor says why it captures no CUDA graph, as a RuntimeError, instead of launching kernels one by one.

    It finds out in the first runs of compiled code as well as while it compiles.
    """
    import torch._inductor.config as options

    with options.patch({"triton.cudagraph_or_error": True}):
        yield


def unknown_options(names: Sequence[str]) -> list[str]:
    """Those that the installed torch does not have."""
    import torch._inductor

    known = set(torch._inductor.list_options())
    return [name for name in names if name not in known]


@contextmanager
def _benchmarks_take_turns(turns: JobTurns) -> Iterator[None]:
    """Whatever Inductor times while it compiles, it times alone."""
    from torch._inductor.runtime.benchmarking import benchmarker

    stock: Any = benchmarker.benchmark_gpu

    def alone(*args: Any, **kwargs: Any) -> Any:
        with turns.aside():
            pass  # whoever waits comes first: a GEMM has dozens of choices, of a fifth of a second each
        with turns.alone():
            return stock(*args, **kwargs)

    benchmarker.benchmark_gpu = alone  # type: ignore[method-assign]
    try:
        yield
    finally:
        del benchmarker.benchmark_gpu  # the class's own again


@contextmanager
def _tuning_takes_turns(turns: JobTurns) -> Iterator[None]:
    """One job tunes at a time, and lets others have the device between two benchmarks, and while coordinate descent compiles.

    All choices of a GEMM are compiled before the first is timed, so nothing is compiled under the lock.
    """
    from torch._inductor.codecache import PersistentCache
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    lookup: Any = PersistentCache.lookup
    compile_config: Any = CachingAutotuner._precompile_config

    def lookup_alone(self: Any, choices: Any, op: Any, inputs: Any, benchmark: Any = None, **options: Any) -> Any:
        timings = lookup(self, choices, op, inputs, None, **options)
        if benchmark is None or len(timings) == len(choices):
            return timings
        with turns.tuning():
            return lookup(self, choices, op, inputs, benchmark, **options)

    def compile_aside(self: Any, *args: Any) -> Any:
        with turns.aside():
            return compile_config(self, *args)

    places: list[tuple[Any, str, Any, Any]] = [
        (PersistentCache, "lookup", lookup, lookup_alone),
        (CachingAutotuner, "_precompile_config", compile_config, compile_aside),
    ]
    for place, name, _, ours in places:
        setattr(place, name, ours)
    try:
        yield
    finally:
        for place, name, stock, _ in places:
            setattr(place, name, stock)
