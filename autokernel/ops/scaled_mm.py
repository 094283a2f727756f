"""A product of two 8-bit floating-point matrices, scaled back: `(scale_a * [M, K]) @ (scale_b * [K, N])`, plus a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.ops.base import Site
from autokernel.ops.epilogue import BINARY_EPILOGUES, apply_epilogue
from autokernel.ops.gemm import k_major, make_site
from autokernel.ops.matching import op_name, tensor_spec
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node

TENSOR_WISE, ROW_WISE = "tensor", "row"  # one scale for each matrix; or one for each row of A and each column of B
DTYPES = ("float8_e4m3fn", "float8_e5m2")
OUT_DTYPES = ("bfloat16", "float16", "float32")
_SCALES = (2, 3)  # positions among the inputs
_BIAS = 4
# of aten._scaled_mm, in order
_ARGUMENTS = ("self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum")


class ScaledMm:
    """`aten._scaled_mm`. Inputs: A, B, their scales, the bias if there is one, then the epilogue's operands.

    `scalars` of its problems hold `out_dtype`, and `use_fast_accum`: whether sums may be kept in fewer bits than fp32 has.
    """

    name = "scaled_mm"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`. In 8 bits ATen's own product; in wider dtypes, which hold 8 bits exactly, its definition."""
        import torch

        a, b, scale_a, scale_b = inputs[:_BIAS]
        bias = inputs[_BIAS] if has_bias(problem) else None
        operands = inputs[_BIAS:] if bias is None else inputs[_BIAS + 1 :]
        if a.dtype.itemsize == 1:
            scalars = dict(problem.scalars)
            value = torch._scaled_mm(
                a,
                b,
                scale_a,
                scale_b,
                bias=bias,
                out_dtype=getattr(torch, str(scalars["out_dtype"])),
                use_fast_accum=bool(scalars["use_fast_accum"]),
            )
        else:
            value = torch.mm(a * scale_a, b * scale_b)
            value = value if bias is None else value + bias
        return (apply_epilogue(problem.epilogue, value, operands),)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """As of any product, and what decides which kernels there are for it.

        `out_bytes` has an element of the result; `k_major` is 1 if K is contiguous in both matrices; `row_scaled` is 1 with a
        scale for each row and column, 0 with one for each matrix; `fast_sums` is 1 where sums may have fewer bits than fp32
        has. `num_epilogue` steps follow, the bias included.
        """
        left, right = problem.inputs[:2]
        return {
            "batch": 1,
            "m": left.shape[0],
            "n": right.shape[1],
            "k": left.shape[1],
            "dtype_bytes": DTYPE_BYTES[left.dtype],
            "out_bytes": DTYPE_BYTES[str(dict(problem.scalars)["out_dtype"])],
            "has_constant_weight": int(1 in problem.constants),
            "k_major": int(k_major(left, right)),
            "num_epilogue": int(has_bias(problem)) + len(problem.epilogue),
            "row_scaled": int(scaling_of(*problem.inputs[:_BIAS]) == ROW_WISE),
            "fast_sums": int(bool(dict(problem.scalars)["use_fast_accum"])),
        }

    def flops(self, problem: Problem) -> int:
        """Of the multiplication; scales, bias and epilogue are not counted."""
        dims = self.dims(problem)
        return 2 * dims["m"] * dims["n"] * dims["k"]

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, the result written once in its own dtype."""
        dims = self.dims(problem)
        return dims["m"] * dims["n"] * dims["out_bytes"] + sum(spec.num_bytes for spec in problem.inputs)

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """Sites of this op, each with the longest epilogue that can be fused (see `Op.find`)."""
        order = {node: position for position, node in enumerate(graph.nodes)}
        calls = ((node, ScaledCall.of(node)) for node in graph.nodes)
        sites = (
            make_site(self.name, node, call.operands, call.scalars, order, constants, device)
            for node, call in calls
            if call is not None
        )
        return [site for site in sites if site is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledCall:
    """One `aten._scaled_mm` of a graph, of those that are tuned."""

    operands: tuple[Node, ...]  # in the order of a problem's inputs
    scaling: str  # TENSOR_WISE or ROW_WISE
    out_dtype: str
    use_fast_accum: bool

    @property
    def scalars(self) -> tuple[tuple[str, str | bool], ...]:
        """Of its problem."""
        return (("out_dtype", self.out_dtype), ("use_fast_accum", self.use_fast_accum))

    @property
    def has_bias(self) -> bool:
        return len(self.operands) > _BIAS

    @classmethod
    def of(cls, node: Node) -> ScaledCall | None:
        """The call of a node; None for anything else, scales of blocks, results in 8 bits and unknown sizes included."""
        if op_name(node) != "aten._scaled_mm":
            return None
        given: dict[str, Any] = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        bias = given.get("bias")
        operands = (*(given[name] for name in _ARGUMENTS[:_BIAS]), *(() if bias is None else (bias,)))
        known = [spec for spec in map(tensor_spec, operands) if spec is not None]
        result = tensor_spec(node)
        if len(known) != len(operands) or result is None or given.get("scale_result") is not None:
            return None
        scaling = scaling_of(*known[:_BIAS])
        if scaling is None or result.dtype not in OUT_DTYPES or any(spec.dtype not in DTYPES for spec in known[:2]):
            return None
        if bias is not None and known[_BIAS].shape != (known[1].shape[1],):
            return None
        fast = bool(given.get("use_fast_accum", False))
        return cls(operands=operands, scaling=scaling, out_dtype=result.dtype, use_fast_accum=fast)


def scaling_of(a: TensorSpec, b: TensorSpec, scale_a: TensorSpec, scale_b: TensorSpec) -> str | None:
    """`TENSOR_WISE` or `ROW_WISE`; None for any other scales: those of blocks, and those that are not float32."""
    if {scale_a.dtype, scale_b.dtype} != {"float32"}:
        return None
    if scale_a.num_elements == scale_b.num_elements == 1:
        return TENSOR_WISE
    rows_and_columns = ((a.shape[0], 1), (1, b.shape[1]))
    return ROW_WISE if (scale_a.shape, scale_b.shape) == rows_and_columns else None


def has_bias(problem: Problem) -> bool:
    """Whether a bias is among the inputs: behind it there are only the epilogue's operands."""
    return len(problem.inputs) - _BIAS > sum(name in BINARY_EPILOGUES for name in problem.epilogue)


def scales_of(problem: Problem) -> tuple[int, ...]:
    """Positions of the inputs that are scales: positive numbers, which values of any other input need not be."""
    return _SCALES if problem.op == ScaledMm.name else ()
