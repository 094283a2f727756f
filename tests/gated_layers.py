"""Three layers, their GEMMs, and bundles made by hand for them: what production is tried with. Needs torch alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from autokernel.environment import current_environment
from autokernel.export.bundle import Bundle, Entry
from autokernel.records import ConfigValue, Problem, TensorSpec

M, K, HIDDEN = 16, 64, 96


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x)): one merged group, one GEMM with a bias."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(K, HIDDEN, bias=bias)
        self.up = nn.Linear(K, HIDDEN, bias=bias)
        self.down = nn.Linear(HIDDEN, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return down


def spec(*shape: int) -> TensorSpec:
    """A contiguous fp32 tensor."""
    return TensorSpec.contiguous(shape, "float32")


def weight(k: int, n: int) -> TensorSpec:
    """As torch.nn.Linear stores it."""
    return TensorSpec(shape=(k, n), dtype="float32", stride=(1, k))


def bf16(problem: Problem) -> Problem:
    """The same problem in bf16."""
    return replace(problem, inputs=tuple(replace(s, dtype="bfloat16") for s in problem.inputs))


GATE = Problem(op="mm", inputs=(spec(M, K), weight(K, HIDDEN)), device="cpu", constants=(1,))
DOWN = Problem(op="addmm", inputs=(spec(K), spec(M, HIDDEN), weight(HIDDEN, K)), device="cpu", constants=(0, 2))
BOTH = Problem(op="merged_mm", inputs=(spec(M, K), weight(K, HIDDEN), weight(K, HIDDEN)), device="cpu", constants=(1, 2))
BOTH_BIASED = replace(BOTH, inputs=(*BOTH.inputs, spec(HIDDEN), spec(HIDDEN)), constants=(1, 2, 3, 4))
BATCHES = Problem(op="bmm", inputs=(spec(4, 32, K), spec(4, K, 48)), device="cpu")


def entry(problem: Problem, backend: str, **config: ConfigValue) -> Entry:
    """An entry as a bundle holds it."""
    return Entry(problem=problem, backend=backend, config=config)


def bundle_of(*entries: Entry, **options: ConfigValue) -> Bundle:
    """A bundle of this machine, with graph options."""
    environment = current_environment("cpu")
    return Bundle(name="t", created="", version="", environment=environment, entries=entries, graph_options=options)
