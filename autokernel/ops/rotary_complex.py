"""Rotary embedding by complex numbers: pairs of neighbours are one number each, and are turned by a product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import PatternFusion, wide
from autokernel.ops.patterns import Pattern
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch


def rotate(x: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, T, H, D] times [B, T, D / 2], which is the same for every head."""
    import torch

    numbers = torch.view_as_complex(wide(x).reshape(*x.shape[:-1], -1, 2))
    return (torch.view_as_real(numbers * turns.unsqueeze(2)).flatten(3).to(x.dtype),)


def _inputs(dtype: str) -> tuple[TensorSpec, ...]:
    return TensorSpec.contiguous((2, 3, 5, 8), dtype), TensorSpec.contiguous((2, 3, 4), "complex64")


class RotaryComplex(PatternFusion):
    """x * turns, in complex numbers.

    Inputs: x of `[B, T, H, D]` and turns of `[B, T, D / 2]` (complex64). One output like x, contiguous.
    """

    name = "rotary_complex"
    patterns: tuple[Pattern, ...] = (Pattern(op=name, spellings=(rotate,), inputs=_inputs),)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`batch`, `length`, `heads`, `head_dim`, `rows` (of `head_dim` elements), `dtype_bytes`."""
        batch, length, heads, head_dim = problem.inputs[0].shape
        return {
            "batch": batch,
            "length": length,
            "heads": heads,
            "head_dim": head_dim,
            "rows": batch * length * heads,
            "dtype_bytes": DTYPE_BYTES[problem.inputs[0].dtype],
        }

    def flops(self, problem: Problem) -> int:
        """Six for a product of two complex numbers."""
        return 3 * problem.inputs[0].num_elements

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, the result written once."""
        x = problem.inputs[0]
        return x.num_elements * DTYPE_BYTES[x.dtype] + sum(spec.num_bytes for spec in problem.inputs)
