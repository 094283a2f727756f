"""Rotary embedding in halves: each half of the result reads both halves of x, and nothing is put together in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import wide
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


def halves(problem: Problem, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Computed in float32 and rounded once."""
    import torch

    (a, b), (c, d), (s, t) = ((wide(half) for half in y.chunk(2, -1)) for y in (x, cos, sin))
    return (torch.cat(((a * c - b * s).to(x.dtype), (b * d + a * t).to(x.dtype)), -1),)


ROTARY: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {"halves": halves}
