"""A residual sum and the norm of it: the stream goes on, and the next layer gets it normalised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.rms_norm import Norm, RowFusion, example, norm_patterns
from autokernel.ops.spelling import Spelling

if TYPE_CHECKING:
    import torch


def _around(norm: Norm) -> Spelling:
    def add_rms_norm(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        *,
        eps: float,
        rounded: str = "early",
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, ...]:
        total = x + residual
        return total, norm(total, weight, eps)

    return add_rms_norm


class AddRmsNorm(RowFusion):
    """x + residual, and its root-mean-square norm.

    Inputs: x and residual of one shape, and the weight `[cols]`. Outputs: the sum, and its norm. Scalars as of `rms_norm`.
    """

    name = "add_rms_norm"
    num_outputs = 2
    flops_per_element = 5
    patterns = norm_patterns(name, _around, lambda dtype: example(dtype, (2, 3, 8), (2, 3, 8), (8,)))
