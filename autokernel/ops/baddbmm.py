"""A batch of matrix products plus what is added: `beta * C + alpha * [B, M, K] @ [B, K, N]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.gemm import Gemm, factors_of
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


class Baddbmm(Gemm):
    """`aten.baddbmm`. Inputs: what is added (broadcast), the left and the right matrix, then the epilogue's operands."""

    name = "baddbmm"
    num_operands = 3

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        import torch

        value = torch.baddbmm(inputs[0], inputs[1], inputs[2], **factors_of(problem))
        return self._finish(problem, value, inputs)
