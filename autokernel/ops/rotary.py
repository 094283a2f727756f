"""Rotary embedding by halves: the first half of a head's dimensions and the second are turned against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import PatternFusion
from autokernel.ops.patterns import Pattern
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x * cos + (-second half, first half) * sin."""
    import torch

    half = x.shape[-1] // 2
    return (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin,)


def _inputs(dtype: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.contiguous(shape, dtype) for shape in ((2, 5, 3, 8), (1, 1, 3, 8), (1, 1, 3, 8)))


class Rotary(PatternFusion):
    """x * cos + rotate_half(x) * sin.

    Inputs: x of four dimensions, `[B, H, T, D]` or `[B, T, H, D]`, and cos and sin, which broadcast to it. One output like x.
    """

    name = "rotary"
    patterns: tuple[Pattern, ...] = (Pattern(op=name, spellings=(rotate,), inputs=_inputs),)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`rows` (of `head_dim` elements), `head_dim`, `dtype_bytes`."""
        x = problem.inputs[0]
        rows = x.num_elements // x.shape[-1]
        return {"rows": rows, "head_dim": x.shape[-1], "dtype_bytes": DTYPE_BYTES[x.dtype]}

    def flops(self, problem: Problem) -> int:
        """Two products and a sum for each element."""
        return 3 * problem.inputs[0].num_elements

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, the result written once."""
        x = problem.inputs[0]
        return x.num_elements * DTYPE_BYTES[x.dtype] + sum(spec.num_bytes for spec in problem.inputs)
