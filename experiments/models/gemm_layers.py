"""GEMMs of a Llama-3.1-8B's layer by themselves, each with what follows it: for measuring kernels, not a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, KEY_VALUE, HIDDEN, VOCABULARY = 4096, 1024, 14336, 128256
QKV = WIDTH + 2 * KEY_VALUE
LARGEST = torch.finfo(torch.float8_e4m3fn).max
LARGEST_INT8 = 127  # -128 has no counterpart


class PlainGemms(nn.Module):
    """q/k/v, o, gate/up and down of a layer, and the LM head; nothing before, between and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, KEY_VALUE, bias=False)
        self.v = nn.Linear(WIDTH, KEY_VALUE, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(
        self, x: torch.Tensor, attended: torch.Tensor, normed: torch.Tensor, hidden: torch.Tensor, last: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """x, attended, normed [M, 4096], hidden [M, 14336], last [rows of logits, 4096] -> eight products."""
        return (
            *(self.q(x), self.k(x), self.v(x), self.o(attended)),
            *(self.gate(normed), self.up(normed), self.down(hidden), self.head(last)),
        )


class FusedGemms(nn.Module):
    """SwiGLU behind gate and up, residuals behind the projections of attention and MLP, bias and GELU behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.fc = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x and residual [M, 4096], hidden [M, 14336] -> [M, 14336], [M, 4096], [M, 4096], [M, 14336]."""
        gated = F.silu(self.gate(x)) * self.up(x)
        return gated, residual + self.o(x), residual + self.down(hidden), F.gelu(self.fc(x), approximate="tanh")


class Float8Linear(nn.Module):
    """y[M, N] = x[M, K] @ w[N, K]^T in e4m3, with a scale for each row of both; x is scaled as it comes."""

    def __init__(self, k: int, n: int, use_fast_accum: bool) -> None:
        super().__init__()
        self.use_fast_accum = use_fast_accum
        weight = torch.randn(n, k) / k**0.5
        largest = weight.abs().amax(dim=1, keepdim=True)
        self.register_buffer("weight", (weight * (LARGEST / largest)).to(torch.float8_e4m3fn))
        self.register_buffer("scale", (largest / LARGEST).reshape(1, n).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-6) / LARGEST
        quantized = (wide / scale).to(torch.float8_e4m3fn)
        scales = (scale, self.scale)
        y = torch._scaled_mm(quantized, self.weight.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=self.use_fast_accum)
        return y.to(x.dtype)


class Int8Linear(nn.Module):
    """y[M, N] = x[M, K] @ w[N, K]^T in int8, exact in 32 bits, with a scale for each row of both; x is scaled as it comes."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        weight = torch.randn(n, k) / k**0.5
        scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST_INT8
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.reshape(1, n).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-6) / LARGEST_INT8
        quantized = (wide / scale).round().to(torch.int8)
        return (torch._int_mm(quantized, self.weight.t()) * scale * self.scale).to(x.dtype)


class EightBitGemms(nn.Module):
    """q/k/v, o, gate/up and down, each by a layer that `linear` makes of K and N."""

    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        sizes = {"qkv": (WIDTH, QKV), "o": (WIDTH, WIDTH), "gate_up": (WIDTH, 2 * HIDDEN), "down": (HIDDEN, WIDTH)}
        for name, (k, n) in sizes.items():
            self.add_module(name, linear(k, n))

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [M, 4096], hidden [M, 14336] -> [M, 6144], [M, 4096], [M, 28672], [M, 4096]."""
        return self.qkv(x), self.o(x), self.gate_up(x), self.down(hidden)


def plain_gemms() -> nn.Module:
    return PlainGemms()


def fused_gemms() -> nn.Module:
    return FusedGemms()


def float8_gemms(use_fast_accum: bool = False) -> nn.Module:
    return EightBitGemms(lambda k, n: Float8Linear(k, n, use_fast_accum))


def int8_gemms() -> nn.Module:
    return EightBitGemms(Int8Linear)
