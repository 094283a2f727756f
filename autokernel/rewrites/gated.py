"""Gated activations by other functions: a sigmoid, or a hyperbolic tangent, which GPUs have an instruction for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import wide
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


def by_sigmoid(problem: Problem, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """silu(a) * b as a * sigmoid(a) * b, in float32 and rounded once."""
    import torch

    value = wide(a)
    return ((value * torch.sigmoid(value) * wide(b)).to(a.dtype),)


def by_tanh(problem: Problem, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """silu(a) * b as (1 + tanh(a / 2)) * a / 2 * b, in float32 and rounded once."""
    import torch

    value = wide(a) * 0.5
    return (((torch.tanh(value) + 1) * value * wide(b)).to(a.dtype),)


GATED: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {"by_sigmoid": by_sigmoid, "by_tanh": by_tanh}
