"""A matrix product plus what is added to it: `beta * C + alpha * [M, K] @ [K, N]`; a linear layer with bias becomes this."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.gemm import Gemm, factors_of
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


class Addmm(Gemm):
    """`aten.addmm`. Inputs: what is added (broadcast), the left and the right matrix, then the epilogue's operands."""

    name = "addmm"
    num_operands = 3

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        import torch

        value = torch.addmm(inputs[0], inputs[1], inputs[2], **factors_of(problem))
        return self._finish(problem, value, inputs)
