"""Rotary embedding without complex numbers, for which Inductor has no code: each of its calls would be the library's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import wide
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


def real(problem: Problem, x: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The product spelled out; the real and imaginary parts of `turns` are views of its memory."""
    import torch

    pairs = wide(x).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs.unbind(-1)
    parts = torch.view_as_real(turns).unsqueeze(2)
    c, d = parts.unbind(-1)
    return (torch.stack((a * c - b * d, a * d + b * c), -1).flatten(3).to(x.dtype),)


ROTARY_COMPLEX: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {"real": real}
