"""The other half of an adaptive norm: a branch's result is normalised, gated, and added to the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.rms_norm import Norm, RowFusion, example, norm_patterns
from autokernel.ops.spelling import Spelling

if TYPE_CHECKING:
    import torch


def _around(norm: Norm) -> Spelling:
    def gated_rms_norm(
        x: torch.Tensor,
        weight: torch.Tensor,
        gate: torch.Tensor,
        residual: torch.Tensor,
        *,
        eps: float,
        rounded: str = "early",
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, ...]:
        return (residual + gate * norm(x, weight, eps),)

    return gated_rms_norm


class GatedRmsNorm(RowFusion):
    """residual + gate * norm(x) * weight.

    Inputs: x, the weight `[cols]`, the gate, which broadcasts to x, and the residual, of the shape of x. Scalars as of
    `rms_norm`.
    """

    name = "gated_rms_norm"
    flops_per_element = 6
    patterns = norm_patterns(name, _around, lambda dtype: example(dtype, (2, 3, 8), (8,), (2, 1, 8), (2, 3, 8)))
