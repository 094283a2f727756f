"""Root-mean-square norm along the last dimension, its variance in float32; and what the fusions around it share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import PatternFusion, wide
from autokernel.ops.patterns import Pattern
from autokernel.ops.spelling import Spelling
from autokernel.records import DTYPE_BYTES, ConfigValue, Problem, TensorSpec

if TYPE_CHECKING:
    import torch

# How the graph spells a norm: norm(x, weight, eps)
Norm = Callable[["torch.Tensor", "torch.Tensor", float], "torch.Tensor"]
LATE = (("rounded", "late"),)  # the weight is multiplied before rounding to 16 bits, not behind it
OFFSET = (("offset", 1.0),)  # is added to the weight, in float32: such weights are trained around 0


def norm_early(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Rounded to the dtype of x, then multiplied by the weight: Llama's, T5's and what came from them."""
    import torch

    y = wide(x)
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def norm_late(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Rounded at the end: `torch.nn.RMSNorm`."""
    import torch

    y = wide(x)
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def norm_by_product(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `norm_early`, squared by a product."""
    import torch

    y = wide(x)
    return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def norm_offset(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `norm_late`, by 1 + weight."""
    import torch

    y = wide(x)
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * (wide(weight) + 1.0)).to(x.dtype)


# What tells them apart -> how they are spelled. In float32 the second sees `1 + weight` as a weight: the first comes before.
_NORMS: tuple[tuple[tuple[tuple[str, ConfigValue], ...], tuple[Norm, ...]], ...] = (
    ((*OFFSET, *LATE), (norm_offset,)),
    ((), (norm_early, norm_by_product)),
    (LATE, (norm_late,)),
)


def norm_of(scalars: Mapping[str, ConfigValue]) -> Norm:
    """How the norm of a problem with these scalars is spelled."""
    told = ("offset", "rounded")
    found = {name: scalars[name] for name in told if name in scalars}
    return next(spellings[0] for kind, spellings in _NORMS if dict(kind) == found)


def norm_patterns(
    op: str,
    around: Callable[[Norm], Spelling],
    inputs: Callable[[str], tuple[TensorSpec, ...]],
    fixed: tuple[tuple[str, ConfigValue], ...] = (),
) -> tuple[Pattern, ...]:
    """Patterns of a fusion around a norm.

    Args:
        op: its name.
        around: for a norm, the function of the inputs and of `eps` that has it in it.
        inputs, fixed: see `Pattern`.
    """
    return tuple(
        Pattern(op=op, spellings=tuple(map(around, norms)), inputs=inputs, scalars=("eps",), fixed=(*kind, *fixed))
        for kind, norms in _NORMS
    )


class RowFusion(PatternFusion):
    """A fusion of rows: the last dimension is normalised, the others are rows. The first input has the size of each output."""

    num_outputs = 1
    flops_per_element = 0

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`num_rows`, `cols`, `dtype_bytes`."""
        *rows, cols = problem.inputs[0].shape
        return {"num_rows": math.prod(rows), "cols": cols, "dtype_bytes": DTYPE_BYTES[problem.inputs[0].dtype]}

    def flops(self, problem: Problem) -> int:
        """Additions and products of each element; what is done once a row is not counted."""
        return self.flops_per_element * problem.inputs[0].num_elements

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, every output written once."""
        x = problem.inputs[0]
        written = self.num_outputs * x.num_elements * DTYPE_BYTES[x.dtype]
        return written + sum(spec.num_bytes for spec in problem.inputs)


def example(dtype: str, *shapes: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    """Contiguous inputs of these shapes."""
    return tuple(TensorSpec.contiguous(shape, dtype) for shape in shapes)


def _alone(norm: Norm) -> Spelling:
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, *, eps: float, rounded: str = "early", offset: float = 0.0
    ) -> tuple[torch.Tensor, ...]:
        return (norm(x, weight, eps),)

    return rms_norm


class RmsNorm(RowFusion):
    """x / sqrt(mean(x^2) + eps) * weight.

    Inputs: x of any rank, and the weight `[cols]`. Scalars: `eps`; `rounded` where the weight comes before the rounding;
    `offset` where something is added to the weight.
    """

    name = "rms_norm"
    flops_per_element = 4
    patterns = norm_patterns(name, _alone, lambda dtype: example(dtype, (2, 3, 8), (8,)))
