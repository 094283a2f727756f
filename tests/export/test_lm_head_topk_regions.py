"""Entries for the LM head with top-k sampling in Inductor's code for a GPU that is not there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from export.pretended_h200 import generated_code, plan_with

from autokernel.export.bundle import Entry
from autokernel.export.plan import Plan
from autokernel.export.regions import RegionPass
from autokernel.records import ConfigValue, Problem, TensorSpec

pytest.importorskip("triton", reason="Triton is not installed")

HIDDEN, HEAD = TensorSpec.contiguous((16, 1, 128), "bfloat16"), TensorSpec.contiguous((1000, 128), "bfloat16")
CONFIG: dict[str, ConfigValue] = {
    "kernel": "lm_head_topk", "mode": "swap", "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 4, "width": 128,
}  # fmt: skip


def code_of(function: Any, top: int, **change: ConfigValue) -> tuple[str, Plan]:
    problem = Problem(op="lm_head_topk", inputs=(HIDDEN, HEAD), device="cuda", scalars=(("cast", True), ("top", top)))
    entry = Entry(problem=problem, backend="triton", config={**CONFIG, **change})
    plan = plan_with((entry,))
    options = {"post_grad_custom_post_pass": RegionPass(plan), "joint_graph_constant_folding": False}
    return generated_code(function, [HIDDEN, HEAD], options), plan


def sampled(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    values, indices = torch.topk(torch.nn.functional.linear(x.relu(), weight).float(), 10)
    return values.softmax(-1), indices + 1


def test_tiles_are_merged_and_nobody_computes_the_logits() -> None:
    code, plan = code_of(sampled, 10)
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(1, [])]
    assert re.findall(r"lm_head_(\w+)_kernel_\d+\.run\(", code) == ["topk", "merge", "best"]
    assert "extern_kernels.mm" not in code
    assert "aten.topk.default(" not in code
    assert "(16, 1000)" not in code
    assert re.search(r"empty_strided_cuda\(\(16, 256\), \(256, 1\), torch\.int64\)", code), "sixteen numbers a row and tile"
    helpers = ("tile_logits", "matrix_product", "ordered", "largest", "_sorted_runs", "_bit", "as_values")
    assert all(f"def {name}(" in code for name in helpers), "the code stands for itself"


@pytest.mark.parametrize(
    ("top", "change", "reason"), [(10, {"block_k": 256}, "block_k must divide K; they are 256 and 128"), (12, {}, "")]
)
def test_other_numbers_stay_inductors(top: int, change: dict[str, ConfigValue], reason: str) -> None:
    code, plan = code_of(sampled, top, **change)
    (usage,) = plan.usage.values()
    assert usage.hits == 0
    assert reason in "".join(usage.reasons)
    assert "lm_head_topk_kernel" not in code
    assert "extern_kernels.mm" in code


def test_logits_that_are_wanted_are_made() -> None:
    def both(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(x.relu(), weight).float()
        values, indices = torch.topk(logits, 10)
        return values, indices, logits

    code, plan = code_of(both, 10)
    assert next(iter(plan.usage.values())).hits == 0
    assert "extern_kernels.mm" in code
