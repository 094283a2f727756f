"""A norm of every head, turned by complex numbers: what Z-Image does to queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.rms_norm import Norm, norm_patterns
from autokernel.ops.rotary_complex import RotaryComplex, rotate
from autokernel.ops.spelling import Spelling
from autokernel.records import Problem, TensorSpec

if TYPE_CHECKING:
    import torch


def _around(norm: Norm) -> Spelling:
    def norm_rotary_complex(
        x: torch.Tensor, weight: torch.Tensor, turns: torch.Tensor, *, eps: float, rounded: str = "early", offset: float = 0.0
    ) -> tuple[torch.Tensor, ...]:
        return rotate(norm(x, weight, eps), turns)

    return norm_rotary_complex


def _inputs(dtype: str) -> tuple[TensorSpec, ...]:
    x, weight = (TensorSpec.contiguous(shape, dtype) for shape in ((2, 3, 5, 8), (8,)))
    return x, weight, TensorSpec.contiguous((2, 3, 4), "complex64")


class NormRotaryComplex(RotaryComplex):
    """rms_norm(x) * turns, in complex numbers.

    Inputs: x of `[B, T, H, D]`, the weight `[D]` and turns of `[B, T, D / 2]` (complex64). One output like x, contiguous.
    Scalars as of `rms_norm`.
    """

    name = "norm_rotary_complex"
    patterns = norm_patterns(name, _around, _inputs)

    def flops(self, problem: Problem) -> int:
        """Four of the norm, three of the rotation, for each element."""
        return 7 * problem.inputs[0].num_elements
