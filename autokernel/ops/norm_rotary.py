"""A norm of every head, turned by its position: what Qwen3 and models after it do to queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.rms_norm import Norm, example, norm_patterns
from autokernel.ops.rotary import Rotary, rotate
from autokernel.ops.spelling import Spelling
from autokernel.records import Problem, TensorSpec

if TYPE_CHECKING:
    import torch

HEADS_FIRST = (("heads", "first"),)  # x has its heads before the positions already


def _around(norm: Norm) -> Spelling:
    def norm_rotary(
        x: torch.Tensor,
        weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        eps: float,
        rounded: str = "early",
        offset: float = 0.0,
        heads: str = "behind",
    ) -> tuple[torch.Tensor, ...]:
        normed = norm(x, weight, eps)
        return rotate(normed if heads == "first" else normed.permute(0, 2, 1, 3), cos, sin)

    return norm_rotary


def _behind(dtype: str) -> tuple[TensorSpec, ...]:
    return example(dtype, (2, 3, 5, 8), (8,), (1, 1, 3, 8), (1, 1, 3, 8))


def _first(dtype: str) -> tuple[TensorSpec, ...]:
    return example(dtype, (2, 5, 3, 8), (8,), (1, 1, 3, 8), (1, 1, 3, 8))


class NormRotary(Rotary):
    """rotate(rms_norm(x)), by halves.

    Inputs: x `[B, T, H, D]`, the weight `[D]`, cos and sin, which broadcast to `[B, H, T, D]`. Output: `[B, H, T, D]`. With
    the scalar `heads` ("first") x has the output's order. Other scalars as of `rms_norm`.
    """

    name = "norm_rotary"
    patterns = (*norm_patterns(name, _around, _behind), *norm_patterns(name, _around, _first, HEADS_FIRST))

    def flops(self, problem: Problem) -> int:
        """Four of the norm, three of the rotation, for each element."""
        return 7 * problem.inputs[0].num_elements
