"""A product of two 8-bit integer matrices, exact in 32 bits: `[M, K] @ [K, N]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.gemm import Gemm, k_major
from autokernel.ops.matching import tensor_spec
from autokernel.records import DTYPE_BYTES, Problem

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

DTYPE, OUT_DTYPE = "int8", "int32"


class IntMm(Gemm):
    """`aten._int_mm`. Inputs: the left and the right matrix, then the epilogue's operands.

    What turns the sums back into floating point follows as a kernel of its own: it changes the dtype, and so is no epilogue.
    """

    name = "int_mm"
    num_operands = 2

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        import torch

        return self._finish(problem, torch._int_mm(inputs[0], inputs[1]), inputs)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """As of any product; `out_bytes` has an element of the result, `k_major` is 1 if K is contiguous in both matrices."""
        return {
            **super().dims(problem),
            "out_bytes": DTYPE_BYTES[OUT_DTYPE],
            "k_major": int(k_major(*problem.inputs[:2])),
        }

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, the result written once in its own dtype."""
        dims = self.dims(problem)
        return dims["m"] * dims["n"] * dims["out_bytes"] + sum(spec.num_bytes for spec in problem.inputs)

    @property
    def target(self) -> str:
        """See `Gemm.target`."""
        return "aten._int_mm"

    def _fits(self, node: Node) -> bool:
        dtypes = [getattr(tensor_spec(value), "dtype", None) for value in (node, *node.all_input_nodes)]
        return dtypes == [OUT_DTYPE, DTYPE, DTYPE]
