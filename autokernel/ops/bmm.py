"""A batch of matrix products: `[B, M, K] @ [B, K, N]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.gemm import Gemm
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


class Bmm(Gemm):
    """`aten.bmm`. Inputs: the left and the right matrix, then the epilogue's operands."""

    name = "bmm"
    num_operands = 2

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        import torch

        return self._finish(problem, torch.bmm(inputs[0], inputs[1]), inputs)
