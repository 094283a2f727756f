"""The device side of the recorder: inputs that are cold in L2, one check per kernel, CUDA graphs timed by events."""

from __future__ import annotations

import ctypes
import datetime
import json
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from gemm_kernels import Gemm, compile_kernel, grid_of
from landscape_file import slug

_COLD_BYTES = 160 << 20  # that calls rotate over: more than twice the 60 MB of L2
_SCRATCH_BYTES = 64 << 20  # for TMA descriptors
_QUICK_US = 2500.0  # of device time in one graph
_HEAD_START_CYCLES = 120_000  # 60 us in which the CPU gets ahead of the device
_READ_BYTES_PER_US, _FLOP_PER_US = 5.0e6, 1.05e9  # no H200 is faster: what claims to be is wrong

Key = TypeVar("Key", bound=Hashable)
Launch = Callable[[int], None]  # call number -> enqueues one call


@triton.jit
def _sum_parts(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total, mask=at < size)


@triton.jit
def _write_again(x, size, LETS_START: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    if LETS_START:
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < size), mask=at < size)


class WrongResultError(Exception):
    """The kernel's output is not the product."""


@dataclass(slots=True)
class Timed:
    """A captured graph and how many calls it holds."""

    graph: torch.cuda.CUDAGraph
    calls: int
    keep: tuple[Any, ...]


class Bench:
    """One GEMM on the device: inputs, reference, and the measurements of its kernels."""

    def __init__(self, gemm: Gemm, folder: Path, scratch: torch.Tensor) -> None:
        self.gemm = gemm
        self.folder = folder
        self.busy_us = 0.0
        self.best_us = math.inf
        self._scratch = scratch
        self._modules: list[int] = []
        self._stream = torch.cuda.Stream()
        self.copies = max(2, math.ceil(_COLD_BYTES / gemm.bytes))
        generator = torch.Generator(device="cuda").manual_seed(0)
        self._a = [self._input("A", generator) for _ in range(self.copies)]
        self._b = [self._input("B", generator) for _ in range(self.copies)]
        lead = (gemm.batch,) if gemm.op == "bmm" else ()
        self._out = [torch.empty((*lead, gemm.m, gemm.n), dtype=torch.bfloat16, device="cuda") for _ in range(self.copies)]
        self._bias = torch.randn(gemm.n, generator=generator, device="cuda").to(torch.bfloat16)
        self._reference = self._exact()
        self._scale = float(self._reference.norm())
        self._allowed = 2 * self._error(self.stock_launch()) + 1e-4
        torch.cuda.synchronize()

    def _input(self, which: str, generator: torch.Generator) -> torch.Tensor:
        gemm = self.gemm
        lead = (gemm.batch,) if gemm.op == "bmm" else ()
        if which == "A":
            return torch.randn((*lead, gemm.m, gemm.k), generator=generator, device="cuda", dtype=torch.bfloat16)
        shape = (gemm.n, gemm.k) if gemm.k_major else (gemm.k, gemm.n)
        b = torch.randn((*lead, *shape), generator=generator, device="cuda", dtype=torch.bfloat16)
        b *= gemm.k**-0.5
        return b.transpose(-1, -2) if gemm.k_major else b

    def _exact(self) -> torch.Tensor:
        product = torch.matmul(self._a[0].float(), self._b[0].float())
        return product + self._bias.float() if self.gemm.op == "addmm" else product

    def _error(self, launch: Launch) -> float:
        self._out[0].fill_(float("nan"))
        launch(0)
        return float((self._out[0].float() - self._reference).norm()) / self._scale

    def stock_launch(self) -> Launch:
        """What Inductor's default would call."""

        def launch(call: int) -> None:
            i = call % self.copies
            if self.gemm.op == "addmm":
                torch.addmm(self._bias, self._a[i], self._b[i], out=self._out[i])
            else:
                torch.matmul(self._a[i], self._b[i], out=self._out[i])

        return launch

    def decompose_launch(self, splits: int) -> Launch:
        """The GEMM cut along K: a batched GEMM with fp32 output, and a sum."""
        m, n, k = self.gemm.m, self.gemm.n, self.gemm.k
        block = 1024 if m * n >= 1024 else 256

        def launch(call: int) -> None:
            i = call % self.copies
            a = self._a[i].view(m, splits, k // splits).permute(1, 0, 2)
            b = self._b[i].reshape(splits, k // splits, n)
            parts = torch.bmm(a, b, out_dtype=torch.float32)
            _sum_parts[(triton.cdiv(m * n, block),)](parts, self._out[i], m * n, SPLITS=splits, BLOCK=block)

        return launch

    def kernel_launch(self, config: dict[str, Any], name: str) -> Launch:
        """A compiled kernel, read from Triton's cache and loaded."""
        kernel = compile_kernel(self.gemm, config, self.folder, name)
        run = kernel[grid_of(self.gemm, config)]
        self._modules.append(int(kernel.module))
        head = (self._bias,) if self.gemm.op == "addmm" else ()
        sets = [(*head, a, b, out) for a, b, out in zip(self._a, self._b, self._out, strict=True)]

        def launch(call: int) -> None:
            run(*sets[call % self.copies])

        return launch

    def cute_launch(self, config: dict[str, Any], *, pdl: bool = False) -> Launch:
        """A compiled CuTe DSL kernel, from the package's cache. Parts of K that it leaves are summed behind it."""
        import cute_kernels
        from tvm_ffi import convert

        from autokernel.cutedsl.call import Device, current_gpu, written
        from autokernel.cutedsl.config import CuteConfig
        from autokernel.cutedsl.objects import load

        path = cute_kernels.compile_kernel(cute_kernels.spec_of(self.gemm, config, pdl=pdl))
        kernel, device, size = load(str(path)), current_gpu(), self._out[0].numel()
        parts, current = kernel.info.spec.num_parts, 0

        def empty(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            out = self._out[current]
            return out if tuple(shape) == tuple(out.shape) and dtype == out.dtype else device.empty(shape, strides, dtype)

        run = written(
            kernel.info,
            kernel.function,
            Device(empty=empty, stream=device.stream),
            CuteConfig.from_entry(config).swizzle_of_calls,
            convert,
        )
        block = 1024 if size >= 1024 else 256

        def launch(call: int) -> None:
            nonlocal current
            current = call % self.copies
            result = run(self._a[current], self._b[current], ())
            if parts:
                _sum_parts[(triton.cdiv(size, block),)](result, self._out[current], size, SPLITS=parts, BLOCK=block)

        return launch

    def behind_small(self, launch: Launch | None, *, lets_start: bool) -> Launch:
        """The call behind a small kernel that writes its first operand once more; None: that kernel alone.

        Args:
            launch: of the GEMM.
            lets_start: whether the small kernel lets what is behind it start at once, if that is launched programmatically.
        """
        size, block = self._a[0].numel(), 4096

        def both(call: int) -> None:
            _write_again[(triton.cdiv(size, block),)](self._a[call % self.copies], size, LETS_START=lets_start, BLOCK=block)
            if launch is not None:
                launch(call)

        return both

    def quick(self, launch: Launch) -> float:
        """Check once, then the median microseconds of a call; one call alone for what is far from the best."""
        with torch.cuda.stream(self._stream):
            error = self._error(launch)
            if not error <= self._allowed:
                raise WrongResultError(f"relative error {error:.2e}, allowed are {self._allowed:.2e}")
            estimate = self._once(launch)
            if estimate > max(10 * self.best_us, 300.0):
                return self._plausible(estimate)
            timed = self.capture(launch, estimate)
            samples = [self.replay(timed) for _ in range(2 if estimate > 3 * self.best_us else 4)]
            us = statistics.median(samples[1:])  # the first one warms up
        self.best_us = min(self.best_us, us)
        return self._plausible(us)

    def capture(self, launch: Launch, estimate_us: float) -> Timed:
        """A graph of enough calls, each on the next copy of the inputs."""
        calls = min(400, max(self.copies, math.ceil(_QUICK_US / max(estimate_us, 1.0))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            launch(0)
            self._stream.synchronize()
            graph.capture_begin()
            try:
                for call in range(calls):
                    launch(call)
            finally:
                graph.capture_end()
        return Timed(graph=graph, calls=calls, keep=(launch,))

    def replay(self, timed: Timed) -> float:
        """Microseconds of a call in one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(_HEAD_START_CYCLES)
            start.record()
            timed.graph.replay()
            end.record()
            end.synchronize()
        us = start.elapsed_time(end) * 1e3
        self.busy_us += us
        return us / timed.calls

    def interleaved(self, graphs: Mapping[Key, Timed], rounds: int, until: float = math.inf) -> dict[Key, float]:
        """Median microseconds of a call of each, replays taking turns in random order; none begins a round behind `until`."""
        samples: dict[Key, list[float]] = {key: [] for key in graphs}
        order, rng = list(graphs), random.Random(0)
        for _ in range(rounds):
            rng.shuffle(order)
            for key in order:
                samples[key].append(self.replay(graphs[key]))
            if time.monotonic() > until:
                break
        return {key: statistics.median(found) for key, found in samples.items() if found}

    def unload(self) -> None:
        """Free the code of all kernels loaded so far; no graph may hold one. Triton itself keeps every module."""
        torch.cuda.synchronize()
        driver = ctypes.CDLL("libcuda.so.1")
        for module in self._modules:
            driver.cuModuleUnload(ctypes.c_void_p(module))
        self._modules.clear()

    def _once(self, launch: Launch) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HEAD_START_CYCLES)
        start.record()
        launch(1)
        end.record()
        end.synchronize()
        us = start.elapsed_time(end) * 1e3
        self.busy_us += 2 * us  # this call, and the one that was checked
        return us

    def _plausible(self, us: float) -> float:
        floor = max(self.gemm.bytes / _READ_BYTES_PER_US, self.gemm.flops / _FLOP_PER_US)
        if us < floor:
            raise WrongResultError(f"{us:.2f} us, faster than the {floor:.2f} us that the device needs at least")
        return us


def open_device() -> torch.Tensor:
    """Prepares the process for measuring; the scratch memory that all benches share."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.init()
    scratch = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
    triton.set_allocator(lambda size, _alignment, _stream: scratch[:size])  # one launch at a time: they may share it
    return scratch


def describe_device() -> dict[str, Any]:
    """Name and versions, for a landscape's header."""
    return {
        "hardware": torch.cuda.get_device_name(0),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
    }


def record(folder: Path, name: str, protocol: str, results: Iterable[dict[str, Any]]) -> Path:
    """The file of what is measured, GEMM by GEMM, written anew with each."""
    device, today = describe_device(), datetime.date.today().isoformat()
    data: dict[str, Any] = {"date": today, **device, "protocol": protocol, "gemms": []}
    path = folder / f"{name}-{slug(str(device['hardware']))}-{today}.json"
    for result in results:
        data["gemms"].append(result)
        path.write_text(json.dumps(data, separators=(",", ":")))
    return path


def sensors() -> str:
    """Clock, power and temperature as nvidia-smi says them; empty where it cannot be asked."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
