"""What this machine can do at best, measured; and that nothing may claim to be faster than that."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autokernel.evaluate.caches import cache_bytes, last_level_bytes
from autokernel.evaluate.call_graphs import graph_of
from autokernel.evaluate.timing import pin_threads, quiet, timer
from autokernel.evaluate.turns import leave
from autokernel.ops import Op
from autokernel.ops.base import compute_dtype
from autokernel.records import DTYPE_BYTES, Candidate, Check, ConfigValue, Measurement, Problem, Record, TensorSpec

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_MARGIN = 1.1
# A cycle through more than this many times a cache finds next to nothing of it there. A CPU's replacement keeps some of a
# working set that is only a little too large; MEASURING.md counts twice a GPU's L2 as cold.
_COLD_FACTOR = {"cpu": 4, "cuda": 2}
# On a CPU, at most; on a GPU, always: of a kernel of 70 us (300 MB) the first and last microseconds are 4 %, and a product that
# reads 1 GB was 1.04 times as fast as a ceiling of that kind allowed.
_READ_BYTES_LIMIT = 1 << 30
_SECOND_LOOK_S = 1.0
_MUCH_TOO_LONG = 100
_GRAPH_US, _MAX_GRAPH_CALLS = 1000.0, 64
_READING_COLUMNS = 4096
# Of products of one row, those that read memory fastest, by what was measured on an H200.
_READING_TILES = ((2048, 1, 4, 1), (2048, 2, 4, 1), (1024, 4, 2, 4))  # block_k, block_n, num_warps, num_stages
_EIGHT_OVER_SIXTEEN = {"cuda": 2}  # peak of 8 bits over that of 16
# Peak of fp32 as three TF32 products over that of dtypes so wide, in bytes: on NVIDIA's, TF32 has half the peak of 16 bits.
_SPLIT_FP32 = {"cuda": {2: 1 / 6, 1: 1 / 12}}
EIGHT_BIT_DTYPES = ("float8_e4m3fn", "int8")  # what quantized models multiply in, on a GPU with twice the peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings(Record):
    """The best that was seen on one machine: reading from memory and from the caches, and multiplying by dtype.

    `cache_gb_per_s` is for what fits into the last level, `l2_gb_per_s` for what fits into the L2s.
    """

    device: str = "cpu"
    threads: int = 1
    read_gb_per_s: float
    tflops: Mapping[str, float] = field(default_factory=dict)
    cache_gb_per_s: float = 0.0
    cache_bytes: int = 0
    l2_gb_per_s: float = 0.0
    l2_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.read_gb_per_s > 0 or any(not value > 0 for value in self.tflops.values()):
            raise ValueError(f"ceilings must be positive: {self.read_gb_per_s} GB/s, {dict(self.tflops)} TFLOP/s")

    def read_ceiling(self, working_set_bytes: int) -> float:
        """GB/s from the fastest level that could hold (part of) a working set of this size."""
        factor = _COLD_FACTOR.get(self.device, 4)
        speed = self.read_gb_per_s
        if working_set_bytes <= factor * self.cache_bytes:
            speed = max(speed, self.cache_gb_per_s)
        if working_set_bytes <= factor * self.l2_bytes:
            speed = max(speed, self.l2_gb_per_s)
        return speed

    def peak_tflops(self, dtype: str, *, split: bool = False) -> float:
        """TFLOP/s of a dtype; for one that was not measured, the best of those as wide, or else of all.

        So little is called too fast by mistake, and looked at again before it is (`sound_physics_check`). 8 bits may be
        multiplied as what is wider: where the device knows no such product, that is faster. On a GPU all 8-bit dtypes have
        the peak of the fastest of them, and twice that of 16 bits at least, as the matrix units of NVIDIA's do: torch's own
        product of int8 reaches 0.6 of what other kernels do on an H200.

        fp32 has the peak of torch's own product, as the process that measured it lets torch multiply (in TF32 too, if that is
        allowed there). With `split`, numbers may be split in two, and multiplied as three TF32 products.
        """
        width = DTYPE_BYTES[dtype]
        if width == 1:
            faster = _EIGHT_OVER_SIXTEEN.get(self.device, 1)
            return max(
                (peak * (faster if DTYPE_BYTES[name] == 2 else 1) for name, peak in self.tflops.items()), default=math.inf
            )
        alike = [dtype] if dtype in self.tflops else [name for name in self.tflops if DTYPE_BYTES[name] == width]
        peak = max((self.tflops[name] for name in alike or self.tflops), default=math.inf)
        if split and dtype == "float32":
            shares = _SPLIT_FP32.get(self.device, {})
            peak = max([peak, *(shares.get(DTYPE_BYTES[name], 0) * other for name, other in self.tflops.items())])
        return peak

    def best_with(self, other: Ceilings) -> Ceilings:
        """The higher of each pair: whatever either measurement saw is possible. Sizes stay."""
        peaks = {d: max(self.tflops.get(d, 0.0), other.tflops.get(d, 0.0)) for d in (*self.tflops, *other.tflops)}
        return dataclasses.replace(
            self,
            read_gb_per_s=max(self.read_gb_per_s, other.read_gb_per_s),
            cache_gb_per_s=max(self.cache_gb_per_s, other.cache_gb_per_s),
            l2_gb_per_s=max(self.l2_gb_per_s, other.l2_gb_per_s),
            tflops=peaks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureCeilings:
    """A job for a pool: `measure_ceilings` with the device to itself."""

    device: str
    threads: int | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    budget_s: float = 3.0

    def __call__(self) -> Ceilings:
        from autokernel.workers.device_lock import device_lock

        with device_lock(self.device, exclusive=True):
            ceilings = measure_ceilings(self.device, self.threads, self.dtypes, self.budget_s)
        leave(self.device)
        return ceilings


def roofline_us(flops: int, num_bytes: int, dtype: str, ceilings: Ceilings) -> float:
    """Least time of one call whose data come from memory, in microseconds."""
    return max(num_bytes / (ceilings.read_gb_per_s * 1e3), flops / (ceilings.peak_tflops(dtype) * 1e6))


def may_split_fp32(candidate: Candidate) -> bool:
    """Whether a candidate may multiply fp32 as three TF32 products: our kernels say so, libraries may (attention's does)."""
    return candidate.config.get("precision", "ieee" if candidate.backend == "triton" else "") != "ieee"


def physics_check(
    measurement: Measurement, problem: Problem, op: Op, ceilings: Ceilings, num_copies: int = 1, *, split: bool = False
) -> Check:
    """Whether a measurement is possible: the roofline's time over the measured one must not exceed 1.1.

    Args:
        measurement: time of one call.
        problem: what was solved.
        op: says its operations, what dtype they have, and its least traffic.
        ceilings: of this machine, with the same number of threads.
        num_copies: sets of inputs that the timing rotated among; what they take together decides which cache could hold it.
        split: fp32 may be multiplied as three TF32 products (`may_split_fp32`).
    """
    num_bytes, flops = op.num_bytes(problem), op.flops(problem)
    speed = ceilings.read_ceiling(num_copies * sum(spec.num_bytes for spec in problem.inputs))
    peak = ceilings.peak_tflops(compute_dtype(op, problem), split=split)
    least_us = max(num_bytes / (speed * 1e3), flops / (peak * 1e6))
    ratio = least_us / measurement.median_us
    note = (
        f"least possible {least_us:.3g} us ({num_bytes} bytes at {speed:.3g} GB/s, {flops} operations at "
        f"{peak:.3g} TFLOP/s), measured {measurement.median_us:.3g} us"
    )
    return Check(name="physics", value=ratio, limit=_MARGIN, passed=ratio <= _MARGIN, note=note)


def sound_physics_check(
    measurement: Measurement,
    problem: Problem,
    op: Op,
    ceilings: Ceilings,
    num_copies: int,
    threads: int | None,
    *,
    split: bool = False,
) -> Check:
    """`physics_check`, but before a kernel is called impossible, the ceilings themselves are measured once more.

    On a machine that was busy when they were taken, it may be they that are wrong.
    """
    check = physics_check(measurement, problem, op, ceilings, num_copies, split=split)
    if check.passed:
        return check
    dtype = compute_dtype(op, problem)
    with_sixteen = DTYPE_BYTES[dtype] == 1 or (split and (dtype, problem.device) == ("float32", "cuda"))
    deciding = (dtype, "bfloat16") if with_sixteen else (dtype,)
    again = measure_ceilings(problem.device, threads, deciding, budget_s=_SECOND_LOOK_S)
    return physics_check(measurement, problem, op, ceilings.best_with(again), num_copies, split=split)


def measure_ceilings(
    device: str, threads: int | None = None, dtypes: Iterable[str] = ("float32", "bfloat16"), budget_s: float = 3.0
) -> Ceilings:
    """Measure this machine; each ceiling is the best of everything tried, since noise only ever slows down.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads; default: what torch is set to.
        dtypes: to multiply in; those that do not run are left out.
        budget_s: about how long it may take; three runs of everything at least.
    """
    import torch

    if device == "cpu":
        pin_threads(threads)
    dtypes = list(dtypes)
    last, l2 = last_level_bytes(device), cache_bytes(device, threads)
    share_s = budget_s / (3 + len(dtypes))
    with quiet(collect=device == "cpu"):
        far = _READ_BYTES_LIMIT if device == "cuda" else min(_READ_BYTES_LIMIT, max(5 * last, 256 << 20))
        memory = max(_read_speed(device, far, share_s), _product_read_speed(far, share_s) if device == "cuda" else 0.0)
        in_cache = _read_speed(device, last // 2, share_s) if last > l2 else 0.0
        in_l2 = _read_speed(device, l2 // 2, share_s)
        peaks = {dtype: _gemm_tflops(device, dtype, share_s) for dtype in dtypes}
    return Ceilings(
        device=device,
        threads=torch.get_num_threads() if device == "cpu" else 1,
        read_gb_per_s=memory,
        tflops={dtype: peak for dtype, peak in peaks.items() if peak > 0},
        cache_gb_per_s=max(in_cache, memory),
        cache_bytes=last,
        l2_gb_per_s=max(in_l2, in_cache, memory),
        l2_bytes=l2,
    )


def _read_speed(device: str, num_bytes: int, budget_s: float) -> float:
    """GB/s of reading a buffer over and over, by the best of several kernels that only read."""
    import torch

    columns = 4096
    rows = max(8, num_bytes // (4 * columns))
    matrix = torch.randn(1, columns, device=device).repeat(rows, 1)
    vector = torch.randn(columns, device=device)
    # Small buffers are read several times in one call, so that the call itself does not count.
    again = max(1, (16 << 20) // (matrix.numel() * 4))
    repeated = matrix.reshape(1, -1).expand(again, -1)
    readers: list[tuple[Callable[[], object], int]] = [
        (lambda: torch.mv(matrix, vector), 1),
        (lambda: torch.sum(repeated, dim=1), again),
        (lambda: torch.amax(repeated, dim=1), again),
        (lambda: [torch.mv(matrix, vector) for _ in range(again)], again),
    ]
    if device == "cuda":
        target = torch.empty_like(matrix)
        readers.append((lambda: target.copy_(matrix), 2))
    size = matrix.numel() * 4
    return max(size * times / (_best_us(device, read, budget_s / len(readers)) * 1e3) for read, times in readers)


def reading_product(num_bytes: int) -> tuple[Problem, list[dict[str, ConfigValue]]]:
    """A product of one row with a bf16 matrix of so many bytes, and configs of our own kernel that read it fast."""
    shapes = (1, _READING_COLUMNS), (num_bytes // (2 * _READING_COLUMNS), _READING_COLUMNS)
    problem = Problem(
        op="generated",
        inputs=tuple(TensorSpec.contiguous(shape, "bfloat16") for shape in shapes),
        device="cuda",
        constants=(1,),
        scalars=(("program", "t0 = t(i1); o0 = mm(i0, t0)"),),
    )
    names = "block_k", "block_n", "num_warps", "num_stages"
    fixed: dict[str, ConfigValue] = {"kernel": "generated_mm", "mode": "vector", "block_m": 1, "split_k": 1}
    return problem, [{**fixed, **dict(zip(names, tile, strict=True))} for tile in _READING_TILES]


def _product_read_speed(num_bytes: int, budget_s: float) -> float:
    """GB/s at which our own kernels for one row read a matrix; 0 where Triton does not run.

    On an H200 that is 5 % more than any kernel of torch's: without it, an LM head would be faster than is possible.
    """
    import torch

    from autokernel.kernels.launch import run as launch
    from autokernel.kernels.plans import plan_of

    try:
        from triton.errors import TritonError
    except ImportError:
        return 0.0
    problem, configs = reading_product(num_bytes)
    row = torch.randn(1, _READING_COLUMNS, device="cuda").to(torch.bfloat16)
    matrix = row.expand(problem.inputs[1].shape).contiguous()
    best = 0.0
    for config in configs:
        try:
            us = _best_us("cuda", functools.partial(launch, plan_of(problem, config), row, matrix), budget_s / len(configs))
        except (TritonError, RuntimeError) as error:  # a GPU that this Triton cannot compile for
            log.warning("reading speed is measured with torch's kernels alone: %s: %s", type(error).__name__, error)
            return best
        best = max(best, problem.inputs[1].num_bytes / (us * 1e3))
    return best


def _gemm_tflops(device: str, dtype: str, budget_s: float) -> float:
    """TFLOP/s of the best of a few large products; 0 if the dtype does not multiply here."""
    import torch

    kind = getattr(torch, dtype)
    shapes = [(256, 1024, 1024), (1024, 1024, 1024), (512, 2048, 2048)]
    if device == "cuda":
        shapes = [(8192, 8192, 8192), (4096, 8192, 8192)]
    best = 0.0
    for m, n, k in shapes:
        try:
            x, w = _matrix(m, k, device, kind), _matrix(n, k, device, kind)
            share_s = budget_s / len(shapes) / 2
            for product in _products(x, w):
                us = _best_us(device, product, share_s)
                best = max(best, 2 * m * n * k / (us * 1e6))
                if us > _MUCH_TOO_LONG * share_s * 1e6:  # fp8 on some CPUs takes a quarter of a minute
                    return best
        except (RuntimeError, NotImplementedError):  # this dtype does not multiply on this device
            continue
    return best


def _matrix(rows: int, columns: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers; integers of all their bits."""
    import torch

    if dtype.is_floating_point:
        return torch.randn(rows, columns, device=device).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, (rows, columns), device=device, dtype=dtype)


def _products(x: torch.Tensor, w: torch.Tensor) -> Sequence[Callable[[], object]]:
    """Ways to compute x [M, K] times w [N, K] transposed: torch's own, and oneDNN's with prepacked weights.

    8-bit matrices are multiplied to wider results: integers exactly, floating-point ones with one scale each.
    """
    import torch

    if x.dtype == torch.int8:
        return [lambda: torch._int_mm(x, w.t())]
    if x.dtype.itemsize == 1:
        # cuBLAS multiplies no two matrices of e5m2
        scale, w = torch.ones((), device=x.device), w.to(torch.float8_e4m3fn)
        return [
            lambda: torch._scaled_mm(x, w.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True),
            lambda: torch._scaled_mm(x, w.t(), scale, scale, out_dtype=torch.bfloat16),
        ]
    ways: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, w)]
    if x.device.type == "cpu":
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0])
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        except (RuntimeError, AttributeError, NotImplementedError):  # no oneDNN in this build, or not for this dtype
            return ways
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return ways


def _best_us(device: str, function: Callable[[], object], budget_s: float) -> float:
    """Fastest of as many runs as fit, three at least, in microseconds; the first one if that takes far longer than it may."""
    calls = 1
    timed = timer(device, function)
    first = timed()
    if first > _MUCH_TOO_LONG * max(budget_s, 0.01) * 1e6:
        return first
    if device == "cuda":  # a graph of many calls, as kernels are timed: reading L2 takes less than a launch
        calls = max(1, min(_MAX_GRAPH_CALLS, round(_GRAPH_US / timed())))
        graph, _ = graph_of(function, calls)
        timed = timer(device, graph.replay, head_start=True)
        timed()
    best, deadline, count = math.inf, time.monotonic() + budget_s, 0
    while count < 3 or time.monotonic() < deadline:
        best, count = min(best, timed() / calls), count + 1
    return max(best, 1e-3)
