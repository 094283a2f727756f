"""Entries for the LM head with greedy sampling in Inductor's code for a GPU that is not there."""

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
    "kernel": "lm_head_argmax", "mode": "swap", "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 4,
}  # fmt: skip


def code_of(function: Any, **change: ConfigValue) -> tuple[str, Plan]:
    problem = Problem(op="lm_head_argmax", inputs=(HIDDEN, HEAD), device="cuda", scalars=(("keepdim", False),))
    entry = Entry(problem=problem, backend="triton", config={**CONFIG, **change})
    plan = plan_with((entry,))
    options = {"post_grad_custom_post_pass": RegionPass(plan), "joint_graph_constant_folding": False}
    return generated_code(function, [HIDDEN, HEAD], options), plan


def next_tokens(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.nn.functional.linear(x.relu(), weight).float().argmax(-1),)


def test_the_last_program_joins_and_one_counter_is_zeroed() -> None:
    code, plan = code_of(next_tokens)
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(1, [])]
    assert len(re.findall(r"lm_head_argmax_kernel_\d+\.run\(", code)) == 1
    assert "extern_kernels.mm" not in code, "nobody computes the logits"
    assert "(16, 1000)" not in code
    assert re.search(r"empty_strided_cuda\(\(16, 16\), \(16, 1\), torch\.int64\)", code), "one number a row and tile"


def test_joining_can_be_a_launch_of_its_own() -> None:
    code, plan = code_of(next_tokens, join="launch", mode="rows")
    assert next(iter(plan.usage.values())).hits == 1
    assert re.findall(r"lm_head_(argmax|join)_kernel_\d+\.run\(", code) == ["argmax", "join"]


def test_what_the_kernel_does_not_take_stays_inductors() -> None:
    code, plan = code_of(next_tokens, block_k=256)
    (usage,) = plan.usage.values()
    assert usage.hits == 0
    assert "block_k must divide K; they are 256 and 128" in usage.reasons[0]
    assert "lm_head_argmax_kernel" not in code
    assert "extern_kernels.mm" in code


def test_logits_that_are_wanted_are_made() -> None:
    def both(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(x.relu(), weight)
        return logits.argmax(-1), logits

    code, plan = code_of(both)
    assert next(iter(plan.usage.values())).hits == 0
    assert "extern_kernels.mm" in code
