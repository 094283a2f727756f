"""A matrix product: `[M, K] @ [K, N]`; what a linear layer without bias becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.gemm import Gemm
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


class Mm(Gemm):
    """`aten.mm`. Inputs: the left and the right matrix, then the epilogue's operands."""

    name = "mm"
    num_operands = 2

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        import torch

        return self._finish(problem, torch.mm(inputs[0], inputs[1]), inputs)
