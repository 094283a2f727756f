"""Which entry belongs to a GEMM that the compiler is looking at. Pure.

Inside Inductor a GEMM has lost its epilogue and its weight may already be packed, so an entry is looked up by what
survives: dtype, sizes, and whether there is a bias. When two entries share that, the first one (the heavier hotspot) wins.
Products of 8 bits are told from plain ones, and from each other by what is done with their sums (`Gemm.kind`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from autokernel.export.bundle import Entry
from autokernel.ops.scaled_mm import has_bias, scaling_of
from autokernel.records import Problem, TensorSpec


@dataclass(frozen=True, slots=True, order=True)
class Gemm:
    """What identifies a GEMM during compilation: `ns` has one N per output (several where GEMMs share their input).

    `kind` is empty for a plain product, whose factors and result share one dtype; see `INTEGER` and `scaled_kind`.
    """

    dtype: str
    batch: int
    m: int
    ns: tuple[int, ...]
    k: int
    bias: bool
    kind: str = ""

    def __str__(self) -> str:
        shape = f"{self.batch}x" if self.batch != 1 else ""
        kind = f" {self.kind}" if self.kind else ""
        return f"{self.dtype} {shape}{self.m}x{'+'.join(map(str, self.ns))}x{self.k}{kind}{' + bias' if self.bias else ''}"


INTEGER = "-> int32"  # kind of a product of int8 matrices


def scaled_kind(right_dtype: str, scaling: str, out_dtype: str, use_fast_accum: bool) -> str:
    """The kind of a scaled product of 8-bit floating-point matrices.

    Args:
        right_dtype: of the right matrix; the left one's is the GEMM's.
        scaling: "tensor" or "row" (`ops.scaled_mm`).
        out_dtype: of the result.
        use_fast_accum: whether sums may have fewer bits than fp32 has.
    """
    return f"x {right_dtype}, scaled by {scaling} -> {out_dtype}{', fast' if use_fast_accum else ''}"


def gemm_of(problem: Problem) -> Gemm | None:
    """The GEMM of a problem, None for any other op."""
    specs = problem.inputs
    if problem.op == "mm":
        (m, k), (_, n) = specs[0].shape, specs[1].shape
        return Gemm(specs[0].dtype, 1, m, (n,), k, False)
    if problem.op == "addmm":
        (m, k), (_, n) = specs[1].shape, specs[2].shape
        # Inductor also spells mm + residual as addmm; while it packs weights, that is still an mm
        return Gemm(specs[1].dtype, 1, m, (n,), k, len(specs[0].shape) == 1)
    if problem.op in ("bmm", "baddbmm"):
        first = specs[0] if problem.op == "bmm" else specs[1]
        second = specs[1] if problem.op == "bmm" else specs[2]
        (batch, m, k), n = first.shape, second.shape[2]
        return Gemm(first.dtype, batch, m, (n,), k, problem.op == "baddbmm")
    if problem.op == "merged_mm":
        m, k = specs[0].shape
        weights = weights_of_merged(problem)
        return Gemm(specs[0].dtype, 1, m, tuple(spec.shape[1] for spec in weights), k, len(weights) < len(specs) - 1)
    if problem.op == "int_mm":
        (m, k), (_, n) = specs[0].shape, specs[1].shape
        return Gemm(specs[0].dtype, 1, m, (n,), k, False, INTEGER)
    if problem.op == "scaled_mm":
        (m, k), (_, n) = specs[0].shape, specs[1].shape
        scalars = dict(problem.scalars)
        scaling, out_dtype, fast = scaling_of(*specs[:4]), str(scalars["out_dtype"]), bool(scalars["use_fast_accum"])
        kind = scaled_kind(specs[1].dtype, str(scaling), out_dtype, fast)
        return Gemm(specs[0].dtype, 1, m, (n,), k, has_bias(problem), kind)
    return None


def with_rows(problem: Problem, m: int) -> Problem:
    """The problem of an `mm`, `addmm` or `merged_mm` with another number of rows.

    Matrices that have its rows keep the distance between them where they are dense along the columns, if there was more than
    one row to tell it.

    Raises:
        ValueError: the op is none of these.
    """
    gemm = gemm_of(problem)
    if gemm is None or problem.op not in ("mm", "addmm", "merged_mm"):
        raise ValueError(f"only plain products have rows to change; this is {problem.key}")
    weights = {"mm": (1,), "addmm": (2,), "merged_mm": range(1, len(problem.inputs))}[problem.op]
    inputs = tuple(
        spec if i in weights or len(spec.shape) != 2 else _with_rows(spec, m) for i, spec in enumerate(problem.inputs)
    )
    return replace(problem, inputs=inputs)


def _with_rows(spec: TensorSpec, m: int) -> TensorSpec:
    (rows, columns), (step, inner) = spec.shape, spec.stride
    if rows > 1 and inner == 1 and (step >= columns or step == 0):
        return replace(spec, shape=(m, columns), stride=(step, 1))
    return TensorSpec.contiguous((m, columns), spec.dtype)


def weights_of_merged(problem: Problem) -> tuple[TensorSpec, ...]:
    """The weights of a `merged_mm`; behind them its inputs may hold one bias for each."""
    return tuple(spec for spec in problem.inputs[1:] if len(spec.shape) == 2)


def parts_of_merged(problem: Problem) -> tuple[Problem, ...]:
    """The `mm` or `addmm` problems that a `merged_mm` stands for, in order."""
    x, *_ = problem.inputs
    weights = weights_of_merged(problem)
    biases = problem.inputs[1 + len(weights) :]
    if biases:
        pairs = zip(biases, weights, strict=True)
        single = replace(problem, op="addmm", epilogue=())
        return tuple(replace(single, inputs=(bias, x, weight), constants=(0, 2)) for bias, weight in pairs)
    return tuple(replace(problem, op="mm", inputs=(x, weight), constants=(1,), epilogue=()) for weight in weights)


def is_transposed(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the last two dimensions are column-major: the first of them is the one that is contiguous."""
    if len(shape) < 2 or stride[-1] == 1:
        return False
    return stride[-2] == 1


def index_entries(entries: Iterable[Entry]) -> dict[Gemm, Entry]:
    """Entries by GEMM, first come first."""
    index: dict[Gemm, Entry] = {}
    for entry in entries:
        gemm = gemm_of(entry.problem)
        if gemm is not None:
            index.setdefault(gemm, entry)
    return index
