"""Adaptive norm of diffusion transformers: a norm whose result is scaled by what a condition says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.rms_norm import Norm, RowFusion, example, norm_patterns
from autokernel.ops.spelling import Spelling

if TYPE_CHECKING:
    import torch


def _around(norm: Norm) -> Spelling:
    def adaln_rms_norm(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, eps: float, rounded: str = "early", offset: float = 0.0
    ) -> tuple[torch.Tensor, ...]:
        return (norm(x, weight, eps) * (scale + 1.0),)

    return adaln_rms_norm


class AdalnRmsNorm(RowFusion):
    """norm(x) * weight * (1 + scale).

    Inputs: x, the weight `[cols]`, and the scale, which broadcasts to x (one row for each sequence). Scalars as of `rms_norm`.
    """

    name = "adaln_rms_norm"
    flops_per_element = 6
    patterns = norm_patterns(name, _around, lambda dtype: example(dtype, (2, 3, 8), (8,), (2, 1, 8)))
