"""A model small enough to tune in a test: two layers of down(silu(gate(x)) * up(x)) + x."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def make_model(width: int = 256, hidden: int = 1024, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Gated(width, hidden) for _ in range(layers)))


def make_inputs(batch: int, seed: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 256, generator=generator).to(device=device, dtype=dtype),)


def mean_square(forward: Callable[..., torch.Tensor]) -> list[float]:
    """A metric for tests: the mean square of the outputs, per batch."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(4, 256, generator=generator).to(torch.bfloat16) for _ in range(8)]
    return [forward(x).float().square().mean().item() for x in samples]
