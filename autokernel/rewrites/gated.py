"""Gated activations by other functions: a sigmoid, or a hyperbolic tangent, which GPUs have an instruction for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import wide
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


def by_sigmoid(problem: Problem, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """silu(a) * b as a * sigmoid(a) * b, in float32 and rounded once; of GELU by tanh(z), which is a * sigmoid(2 z) * b.

    The latter is an exponential in place of a tanh, and more exact: 1 + tanh(z) loses digits where z is negative.
    """
    import torch

    value = wide(a)
    slope = value
    if dict(problem.scalars)["activation"] == "gelu_tanh":
        slope = (value * value * value * 0.044715 + value) * (2 * math.sqrt(2 / math.pi))
    return ((value * torch.sigmoid(slope) * wide(b)).to(a.dtype),)


def by_tanh(problem: Problem, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """silu(a) * b as (1 + tanh(a / 2)) * a / 2 * b, in float32 and rounded once."""
    import torch

    value = wide(a) * 0.5
    return (((torch.tanh(value) + 1) * value * wide(b)).to(a.dtype),)


GATED: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {"by_sigmoid": by_sigmoid, "by_tanh": by_tanh}
