"""A small model with the GEMMs of a Llama's feed-forward layers, and entries for them. For the tests of this folder."""

from __future__ import annotations

import copy

import torch
from torch import nn

from autokernel.environment import current_environment
from autokernel.export.bundle import Bundle, Entry
from autokernel.records import ConfigValue, Problem, TensorSpec

M, D, HIDDEN = 16, 1024, 2816
# Neither is in Inductor's own list of configs.
MERGED_TILE: dict[str, ConfigValue] = {
    "template": "mm", "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256, "num_stages": 3, "num_warps": 2, "GROUP_M": 4,
}  # fmt: skip
DOWN_TILE: dict[str, ConfigValue] = {
    "template": "mm", "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256, "num_stages": 4, "num_warps": 1, "GROUP_M": 1,
}  # fmt: skip


class Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(D, HIDDEN, bias=False)
        self.up = nn.Linear(D, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, D, bias=bias)
        self.norm = nn.RMSNorm(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


def make_model(seed: int = 0, bias: bool = False) -> nn.Module:
    """Two layers, [M, D] -> [M, D], bfloat16 on the GPU, without gradients; their last GEMMs with a bias or without."""
    torch.manual_seed(seed)
    return nn.Sequential(Layer(bias), Layer(bias)).to("cuda", torch.bfloat16).eval().requires_grad_(False)


def make_input(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(M, D, generator=generator, device="cuda").bfloat16()


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def weight(k: int, n: int) -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))


GATE_UP = Problem(op="merged_mm", inputs=(spec(M, D), weight(D, HIDDEN), weight(D, HIDDEN)), device="cuda", constants=(1, 2))
GATE = Problem(op="mm", inputs=GATE_UP.inputs[:2], device="cuda", constants=(1,))
DOWN = Problem(op="mm", inputs=(spec(M, HIDDEN), weight(HIDDEN, D)), device="cuda", constants=(1,))
DOWN_BIASED = Problem(op="addmm", inputs=(spec(D), *DOWN.inputs), device="cuda", constants=(0, 2))


def bundle_of(*entries: Entry) -> Bundle:
    return Bundle(name="gpu", created="", version="", environment=current_environment("cuda"), entries=entries)


def template_bundle() -> Bundle:
    """Gate and up merged in one Triton template, down in another."""
    return bundle_of(
        Entry(problem=GATE_UP, backend="inductor", config={**MERGED_TILE, "merge": "concat"}),
        Entry(problem=DOWN, backend="inductor", config=DOWN_TILE),
    )


def check_error(model: nn.Module, x: torch.Tensor, out: torch.Tensor) -> None:
    """The error budget: twice eager's own error against float32, and a rounding's worth."""
    exact = copy.deepcopy(model).float()(x.float())
    scale = exact.norm()
    eager, mine = ((value.float() - exact).norm() / scale for value in (model(x), out))
    assert torch.isfinite(out).all()
    assert mine <= 2 * eager + torch.finfo(torch.bfloat16).eps / 8, f"error {mine:.2e}, eager's own {eager:.2e}"
