"""A model of 8-bit layers: weights and their scales are buffers, activations are scaled by their rows as they come."""

from __future__ import annotations

import torch
from torch import nn

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Float8Linear(nn.Module):
    """A linear layer in e4m3, with a scale for each row of its input and each of its outputs, or one for each matrix."""

    def __init__(self, k: int, n: int, row_wise: bool) -> None:
        super().__init__()
        weight = torch.randn(n, k) / k**0.5
        largest = weight.abs().amax(dim=1, keepdim=True) if row_wise else weight.abs().amax()
        self.row_wise = row_wise
        self.register_buffer("weight", (weight * (LARGEST / largest)).to(torch.float8_e4m3fn))
        self.register_buffer("scale", (largest / LARGEST).reshape((1, n) if row_wise else ()))
        self.register_buffer("bias", torch.randn(n).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        largest = wide.abs().amax(dim=1, keepdim=True) if self.row_wise else wide.abs().amax()
        scale = largest.clamp(min=1e-6) / LARGEST
        quantized = (wide / scale).to(torch.float8_e4m3fn)
        result = torch._scaled_mm(quantized, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=torch.bfloat16)
        return result.to(x.dtype)


class Int8Linear(nn.Module):
    """A linear layer in int8."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        weight = torch.randn(n, k) / k**0.5
        self.scale = float(weight.abs().amax() / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.float().abs().amax().clamp(min=1e-6) / 127
        quantized = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(quantized, self.weight.t()).float() * (scale * self.scale)).to(x.dtype)


def make_model(width: int = 64) -> nn.Module:
    """Row-wise, then tensor-wise in float8; then int8; then a plain layer."""
    return nn.Sequential(
        Float8Linear(width, 2 * width, row_wise=True),
        nn.SiLU(),
        Float8Linear(2 * width, width, row_wise=False),
        Int8Linear(width, 2 * width),
        nn.Linear(2 * width, width, bias=False),
    )


def make_inputs(batch: int, seed: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 64, generator=generator).to(device=device, dtype=dtype),)
