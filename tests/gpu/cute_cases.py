"""Every kind of product that CuTe DSL kernels are proposed for, with a config of each source that takes it.

test_cutedsl_evaluated_cuda.py evaluates `EVALUATED` on a card; tests/cutedsl/test_evaluated.py holds it against what the
backend and its search spaces propose, and compiles its kernels without a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from autokernel.cutedsl.config import CLUSTER, OPERATORS, QUACK, TENSOROP, CuteConfig
from autokernel.ops.epilogue import BINARY_EPILOGUES, PER_COLUMN, PER_ROW, operand_kind
from autokernel.ops.scaled_mm import ROW_WISE, TENSOR_WISE
from autokernel.records import ConfigValue, Problem, TensorSpec

Config = dict[str, ConfigValue]
Case = tuple[Problem, Config]

N, K = 2048, 1024
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
PINGPONG: Config = {"source": QUACK, "tile_m": 128, "tile_n": 128, "cluster_n": 2, "pingpong": True}
SWAP: Config = {"source": QUACK, "tile_m": 128, "tile_n": 128, "cluster_n": 2, "swap": True}
CONFIGS: dict[str, Config] = {
    QUACK: PINGPONG,
    OPERATORS: {"source": OPERATORS, "tile_m": 128, "tile_n": 128, "cluster_m": 2},
    TENSOROP: {"source": OPERATORS, "family": TENSOROP, "tile_m": 128, "tile_n": 128},
    CLUSTER: {"source": CLUSTER, "tile_m": 128, "tile_n": 16, "split_k": 2, "swap": True},
}
# none is steep near zero, where the order of a product's sums would decide the result
STEPS: dict[str, tuple[str, ...]] = {
    "numbers": ("add(-1.0)", "neg", "div_by(3.0)", "clamp_min(-0.5)", "clamp_max(2.0)"),
    "functions": ("abs", "sqrt", "exp", "square"),
    "matrices": ("sub", "maximum", "rsub", "minimum"),
    "rows and columns": ("mul_per_row", "sub_per_column", "maximum_per_row", "add_per_column"),
}
EPS = (("eps", 1e-5),)


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """What a kernel is evaluated for: another one of these is another path of code."""

    op: str
    left: str
    right: str
    scaling: str  # of `scaled_mm`
    source: str
    family: str  # of `operators`
    fused: bool


def kind_of(problem: Problem, config: Config) -> Kind:
    first = 1 if problem.op == "addmm" else 0
    left, right = (spec.dtype for spec in problem.inputs[first : first + 2])
    rows = problem.op == "scaled_mm" and problem.inputs[2].shape != ()
    scaling = "" if problem.op != "scaled_mm" else ROW_WISE if rows else TENSOR_WISE
    source, fused = str(config["source"]), bool(config.get("fuse", False))
    family = CuteConfig.from_entry(config).family if source == OPERATORS else ""
    return Kind(problem.op, left, right, scaling, source, family, fused)


def weight(dtype: str = "bfloat16", n: int = N, k: int = K) -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype=dtype, stride=(1, k))


def product(
    op: str, dtype: str = "bfloat16", right: str = "", *, m: int = 64, n: int = N, follows: tuple[str, ...] = (),
    rows: bool = False, bias: bool = False, out: str = "bfloat16", fast: bool = False,
) -> Problem:  # fmt: skip
    """A problem of an op of these dtypes.

    Args:
        op: its name.
        dtype: of the left matrix, and of all else that is not said.
        right: of the right one.
        m: rows.
        n: columns.
        follows: names of `ops.epilogue`.
        rows: of `scaled_mm`: a scale for each row and column.
        bias: of `scaled_mm`: with one. `addmm` always has one.
        out: of `scaled_mm`: the result's dtype.
        fast: of `scaled_mm`: `use_fast_accum`.
    """
    right, wide = right or dtype, out if op == "scaled_mm" else dtype
    x, w, vector = TensorSpec.contiguous((m, K), dtype), weight(right, n), TensorSpec.contiguous((n,), wide)
    shapes = {PER_ROW: (m, 1), PER_COLUMN: (n,), "": (m, n)}
    behind = [TensorSpec.contiguous(shapes[operand_kind(name)], wide) for name in follows if name in BINARY_EPILOGUES]
    if op == "addmm":
        return Problem(op=op, inputs=(vector, x, w, *behind), device="cuda", constants=(0, 2), epilogue=follows)
    if op == "bmm":
        lead = [TensorSpec.contiguous((3, *s.shape), s.dtype) if len(s.shape) == 2 else s for s in behind]
        left, stack = TensorSpec.contiguous((3, m, K), dtype), TensorSpec(shape=(3, K, n), dtype=right, stride=(n * K, 1, K))
        return Problem(op=op, inputs=(left, stack, *lead), device="cuda", epilogue=follows)
    if op == "merged_mm":
        return Problem(op=op, inputs=(x, w, w), device="cuda", constants=(1, 2), epilogue=follows)
    if op == "linear_rms_norm":
        inputs = (x, w, vector, TensorSpec.contiguous((m, n), dtype))
        return Problem(op=op, inputs=inputs, device="cuda", constants=(1, 2), scalars=(("residual", True), *EPS))
    if op == "scaled_mm":
        scales = [TensorSpec.contiguous(shape, "float32") for shape in (((m, 1), (1, n)) if rows else ((), ()))]
        return Problem(
            op=op,
            inputs=(x, w, *scales, *[vector] * bias, *behind),
            device="cuda",
            constants=(1, 3, 4) if bias else (1, 3),
            scalars=(("out_dtype", out), ("use_fast_accum", fast)),
            epilogue=follows,
        )
    return Problem(op=op, inputs=(x, w, *behind), device="cuda", constants=(1,), epilogue=follows)


def _sixteen_bits(dtype: str) -> Iterator[tuple[str, Case]]:
    """Of one dtype: each op by each source and family that has it, and with what follows in the kernel, which quack's have."""
    for source, config in CONFIGS.items():
        yield f"mm, {dtype}, {source}", (product("mm", dtype), config)
        merged = (product("merged_mm", dtype), {**config, "merge": "concat"})
        yield f"merged_mm, {dtype}, {source}", merged
        if source != CLUSTER:
            yield f"linear with bias, {dtype}, {source}", (product("addmm", dtype), config)
            yield f"bmm, {dtype}, {source}", (product("bmm", dtype), config)
    fused: Config = {**PINGPONG, "fuse": True}
    yield f"mm, {dtype}, fused", (product("mm", dtype, follows=("silu", "mul")), fused)
    yield f"linear with bias, {dtype}, fused", (product("addmm", dtype, follows=("gelu_tanh",)), fused)
    yield f"bmm, {dtype}, fused", (product("bmm", dtype, follows=("mul(0.125)", "add")), fused)
    gated = (product("merged_mm", dtype, follows=("gated_silu",)), {**fused, "merge": "concat"})
    yield f"merged_mm, {dtype}, fused", gated
    yield f"linear_rms_norm, {dtype}", (product("linear_rms_norm", dtype), PINGPONG)


def _eight_bits() -> Iterator[tuple[str, Case]]:
    for left, right in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)):
        for rows in (False, True):
            name = f"{left} x {right} by {'rows' if rows else 'tensors'}"
            yield name, (product("scaled_mm", left, right, rows=rows), PINGPONG)
            problem = product("scaled_mm", left, right, rows=rows, bias=True, follows=("silu",))
            yield f"{name}, fused", (problem, {**PINGPONG, "fuse": True})
    for rows in (False, True):
        by = "rows" if rows else "tensors"
        for out in ("float16", "float32"):
            yield f"{E4M3} by {by} -> {out}", (product("scaled_mm", E4M3, rows=rows, out=out), SWAP)
        yield f"{E4M3} by {by}, fast", (product("scaled_mm", E4M3, rows=rows, fast=True), {**PINGPONG, "fast_accum": True})
        yield f"{E4M3} by {by}, split_k", (product("scaled_mm", E4M3, rows=rows), {**SWAP, "split_k": 4})
    yield "int8", (product("int_mm", "int8"), CONFIGS[OPERATORS])
    yield "int8, swap", (product("int_mm", "int8"), {**CONFIGS[OPERATORS], "tile_m": 64, "tile_n": 64, "swap": True})


def _configs() -> Iterator[tuple[str, Case]]:
    """Parameters with code of their own, of bf16."""
    residual = product("mm", m=16, follows=("add",))
    down = product("addmm", m=16, follows=("add",))
    merged = product("merged_mm", m=16)
    gated = replace(merged, epilogue=("gated_silu",))
    matrix = Problem(
        op="addmm",
        inputs=(TensorSpec.contiguous((16, N), "bfloat16"), TensorSpec.contiguous((16, K), "bfloat16"), weight()),
        device="cuda",
        constants=(2,),
    )
    yield "operators, swapped", (product("mm", m=16), {**CONFIGS[OPERATORS], "swap": True})
    yield "tensorop, swapped", (product("mm", m=16), {**CONFIGS[TENSOROP], "swap": True})
    yield "tensorop, an odd number of rows", (product("bmm", m=129), CONFIGS[TENSOROP])
    yield "a residual behind it", (residual, PINGPONG)
    yield "fused residual", (residual, {**SWAP, "fuse": True})
    yield "bias and residual", (down, {**PINGPONG, "fuse": True})
    yield "addmm of a matrix", (matrix, {**PINGPONG, "fuse": True})
    for name, follows in STEPS.items():
        yield f"fused {name}", (product("mm", follows=follows), {**PINGPONG, "fuse": True})
        yield f"fused {name}, swapped", (product("mm", m=16, follows=follows), {**SWAP, "fuse": True})
    half = product("mm", "float16", m=17, follows=STEPS["rows and columns"])
    yield "fused rows, an odd number of them", (half, {**PINGPONG, "fuse": True})
    yield "fused columns of a batch", (product("bmm", follows=("mul_per_column", "sub")), {**PINGPONG, "fuse": True})
    yield "apart", (merged, {**SWAP, "merge": "none"})
    yield "gate and up, plain", (gated, {**PINGPONG, "merge": "concat"})
    yield "split_k", (product("mm", m=16), {**SWAP, "split_k": 4})
    yield "parts and bias", (down, {**SWAP, "split_k": 4, "separate": True})
    yield "cluster, x shared", (product("mm", m=16), {**CONFIGS[CLUSTER], "cluster_m": 2})


EVALUATED: dict[str, Case] = dict([*_sixteen_bits("bfloat16"), *_sixteen_bits("float16"), *_eight_bits(), *_configs()])

# torch has these products with a cuBLAS from 12.9 on: before that its own kernels take e4m3 on the right and make 16 bits
NEW_IN_CUBLAS = tuple(name for name in EVALUATED if name.startswith((f"{E4M3} x {E5M2} by rows", f"{E4M3} by rows -> float32")))

# kinds that the backend would take and no model has, because torch itself does not compute them on a GPU: op, left, right
NEVER: tuple[tuple[str, str, str], ...] = (
    *((op, dtype, dtype) for op in ("mm", "addmm", "bmm", "merged_mm") for dtype in (E4M3, E5M2, "int8")),
    ("scaled_mm", E5M2, E5M2),
)
