"""The device side of `skinny_mm.py`: inputs that are cold in L2, a check against fp64, CUDA graphs timed by events."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from skinny_kernels import NUM_UNITS, Gemm, Key, compile_kernel
from triton.runtime.errors import OutOfResources

from autokernel.kernels.config import SkinnyConfig

_COLD_BYTES = 160 << 20  # weights that calls rotate over: more than twice the 60 MB of L2
_GRAPH_US = 1500.0  # of device time in one graph
_BYTES_PER_US = 5.0e6  # no H200 reads faster: what claims to is wrong

LAUNCH_ERRORS = (RuntimeError, OutOfResources)

Launch = Callable[[int], None]  # call number -> enqueues one call


class Device:
    """One GEMM's inputs, reference and measurements."""

    def __init__(self, gemm: Gemm) -> None:
        self.gemm = gemm
        self.stream = torch.cuda.Stream()
        self.copies = max(2, math.ceil(_COLD_BYTES / (2 * gemm.n * gemm.k)))
        self.best_us = math.inf
        draw = torch.Generator(device="cuda").manual_seed(gemm.m)
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.x = [torch.randn((gemm.m, gemm.k), generator=draw, **options) for _ in range(self.copies)]
        self.w = [torch.randn((gemm.n, gemm.k), generator=draw, **options).mul_(gemm.k**-0.5) for _ in range(self.copies)]
        self.y = [torch.empty((gemm.m, gemm.n), **options) for _ in range(self.copies)]
        self.counters = torch.zeros(1 << 17, dtype=torch.int32, device="cuda")
        step = 16384  # columns at a time: the LM head's weight would be 4 GB in fp64
        x = self.x[0].double()
        self.reference = torch.cat([x @ self.w[0][i : i + step].double().t() for i in range(0, gemm.n, step)], dim=1)
        self.scale = float(self.reference.norm())
        stock_norm, stock_max = self._errors(self.cublas())
        self.allowed = 2 * stock_norm + 1e-5, 2 * stock_max + 1e-4
        torch.cuda.synchronize()

    def cublas(self) -> Launch:
        """What Inductor's default calls."""

        def launch(call: int) -> None:
            i = call % self.copies
            torch.mm(self.x[i], self.w[i].t(), out=self.y[i])

        return launch

    def kernel(self, key: Key) -> Launch:
        """A compiled config, read from Triton's cache and loaded."""
        gemm, config = self.gemm, SkinnyConfig.from_ints(list(key))
        run = compile_kernel(gemm, key)[(config.programs(gemm.m, gemm.n, gemm.k, NUM_UNITS), 1, 1)]
        size = max(1, config.num_parts(gemm.m, gemm.n, gemm.k, NUM_UNITS))
        parts = torch.empty(size, dtype=torch.float32, device="cuda")
        assert config.num_counters(gemm.m, gemm.n) <= self.counters.numel()
        constants = tuple(config.constants(gemm.m, gemm.n, gemm.k, bias=False, num_units=NUM_UNITS).values())
        pairs: list[tuple[Any, Any]] = list(zip(self.x, self.w, strict=True))
        if config.tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            tiles = [config.block_m, config.block_k], [config.block_n, config.block_k]
            pairs = [(TensorDescriptor.from_tensor(x, tiles[0]), TensorDescriptor.from_tensor(w, tiles[1])) for x, w in pairs]

        def launch(call: int) -> None:
            i = call % self.copies
            run(*pairs[i], self.x[i], self.y[i], parts, self.counters, *constants)

        return launch

    def check_and_time(self, key: Key) -> float:
        """Microseconds of a call.

        Raises:
            ValueError: the output is wrong, not the same twice, or faster than the memory.
        """
        launch = self.kernel(key)
        with torch.cuda.stream(self.stream):
            norm, largest = self._errors(launch)
            if not (norm <= self.allowed[0] and largest <= self.allowed[1]):
                raise ValueError(
                    f"errors {norm:.1e} and {largest:.1e}, allowed are {self.allowed[0]:.1e} and {self.allowed[1]:.1e}"
                )
            first = self.y[0].clone()
            launch(0)
            if not torch.equal(first, self.y[0]):
                raise ValueError("two runs on one input differ")
        us = self.quick(launch)
        if us < self.gemm.num_bytes / _BYTES_PER_US:
            raise ValueError(f"{us:.2f} us is faster than the memory")
        if bool(self.counters.any()):
            self.counters.zero_()
            raise ValueError("counters were left behind")
        return us

    def quick(self, launch: Launch) -> float:
        """Median of a few replays; one call alone for what is far from the best."""
        with torch.cuda.stream(self.stream):
            estimate = self._once(launch)
        if estimate > 6 * self.best_us + 30:  # a call by itself has the launch in it
            return estimate
        timed = self.capture(launch, min(estimate, 1.3 * self.gemm.num_bytes / _BYTES_PER_US))
        us = statistics.median([self.replay(timed) for _ in range(4)][1:])
        self.best_us = min(self.best_us, us)
        return us

    def capture(self, launch: Launch, us: float | None) -> tuple[torch.cuda.CUDAGraph, int, Launch]:
        """A graph of enough calls, each on the next copy; the number of calls; what must live as long."""
        calls = self.copies * max(1, math.ceil(_GRAPH_US / max(us or 1.0, 3.0) / self.copies))
        graph = torch.cuda.CUDAGraph()
        self.stream.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin()
            try:
                for call in range(calls):
                    launch(call)
            finally:
                graph.capture_end()
        return graph, calls, launch

    def replay(self, timed: tuple[torch.cuda.CUDAGraph, int, Launch]) -> float:
        """Microseconds of a call in one replay."""
        graph, calls, _ = timed
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    def close(self) -> None:
        """Let go of the inputs."""
        torch.cuda.synchronize()
        self.x, self.w, self.y = [], [], []
        del self.reference

    def _once(self, launch: Launch) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch(1)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def _errors(self, launch: Launch) -> tuple[float, float]:
        """Norm of the error over the norm of the reference, and its largest element over the reference's."""
        self.y[0].fill_(float("nan"))
        launch(0)
        difference = self.y[0].double() - self.reference
        return float(difference.norm()) / self.scale, float(difference.abs().max() / self.reference.abs().max())
