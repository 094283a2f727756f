"""Entries for norms and rotary embeddings in Inductor's code for a GPU that is not there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from export.pretended_h200 import generated_code, plan_with

from autokernel.export.bundle import Entry
from autokernel.export.plan import Plan
from autokernel.export.regions import RegionPass
from autokernel.records import ConfigValue, Problem, TensorSpec

ROW_NORM: dict[str, ConfigValue] = {"kernel": "row_norm", "rows": 1, "repeat": 1, "num_warps": 1}
ROW, GAIN, CONDITION = ((2, 9, 64), (64,), (2, 1, 64))


def problem(op: str, *shapes: tuple[int, ...]) -> Problem:
    specs = tuple(TensorSpec.contiguous(shape, "bfloat16") for shape in shapes)
    return Problem(op=op, inputs=specs, device="cuda", scalars=(("eps", 1e-6),))


def code_of(function: Callable[..., Any], specs: list[TensorSpec], *entries: Entry) -> tuple[str, Plan]:
    plan = plan_with(entries)
    options = {"post_grad_custom_post_pass": RegionPass(plan), "joint_graph_constant_folding": False}
    return generated_code(function, specs, options), plan


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def norm_from_zero(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).to(x.dtype)


def block(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, *gains: torch.Tensor) -> Any:
    """What is around the layers of a diffusion transformer, then of a language model."""
    x = x + gate * norm(branch, gains[0])
    scaled = norm(x, gains[1]) * (1 + scale)
    x = x + scaled.exp()
    return x, norm(x, gains[2]).exp()


def test_the_row_kernel_takes_the_place_of_every_norm() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    entries = [
        Entry(problem=found, backend="triton", config=ROW_NORM)
        for found in (
            problem("gated_rms_norm", ROW, GAIN, CONDITION, ROW),
            problem("adaln_rms_norm", ROW, GAIN, CONDITION),
            problem("add_rms_norm", ROW, ROW, GAIN),
        )
    ]
    specs = [TensorSpec.contiguous(shape, "bfloat16") for shape in (ROW, ROW, CONDITION, CONDITION, GAIN, GAIN, GAIN)]
    code, plan = code_of(block, specs, *entries)
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(1, [])] * 3
    assert len(re.findall(r"row_norm_kernel_\d+\.run\(", code)) == 3
    assert "rsqrt" not in re.sub(r"def row_norm_kernel.*?'''", "", code, flags=re.DOTALL), "no norm of Inductor's own is left"


def test_the_row_kernel_adds_one_to_the_weight() -> None:
    """A model's weights go into the kernel as they are: no kernel of Inductor's computes `1 + weight`."""
    pytest.importorskip("triton", reason="Triton is not installed")

    def half_layer(x: torch.Tensor, branch: torch.Tensor, *gains: torch.Tensor) -> Any:
        total = x + norm_from_zero(branch, gains[0])
        return total, norm_from_zero(total, gains[1])

    scalars: tuple[tuple[str, ConfigValue], ...] = (("offset", 1.0), ("rounded", "late"), ("eps", 1e-6))
    entries = [
        Entry(problem=replace(found, scalars=scalars), backend="triton", config=ROW_NORM)
        for found in (problem("add_rms_norm", ROW, ROW, GAIN), problem("rms_norm", ROW, GAIN))
    ]
    code, plan = code_of(half_layer, [TensorSpec.contiguous(s, "bfloat16") for s in (ROW, ROW, GAIN, GAIN)], *entries)
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(1, [])] * 2
    assert len(re.findall(r"row_norm_kernel_\d+\.run\(", code)) == 2
    assert "async_compile.triton('triton_" not in code, "nothing is left for Inductor"


def test_what_the_kernel_does_not_take_stays_inductors() -> None:
    entry = Entry(problem=problem("rms_norm", ROW, GAIN), backend="triton", config={**ROW_NORM, "num_warps": 4})
    code, plan = code_of(lambda x, w: (norm(x, w),), list(entry.problem.inputs), entry)
    (usage,) = plan.usage.values()
    assert usage.hits == 0
    assert "1 rows of 64 columns with 4 warps are 0.5" in usage.reasons[0]
    assert "row_norm_kernel" not in code


def test_rotary_embedding_needs_no_complex_kernels() -> None:
    x, turns = TensorSpec.contiguous((1, 9, 4, 16), "bfloat16"), TensorSpec.contiguous((1, 9, 8), "complex64")

    def rotate(x: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor]:
        numbers = torch.view_as_complex(x.float().reshape(1, 9, 4, -1, 2))
        return (torch.view_as_real(numbers * turns.unsqueeze(2)).flatten(3).type_as(x),)

    found = Problem(op="rotary_complex", inputs=(x, turns), device="cuda")
    code, plan = code_of(rotate, [x, turns], Entry(problem=found, backend="inductor", config={"implementation": "real"}))
    assert next(iter(plan.usage.values())).hits == 1
    assert "aten.mul.Tensor(" not in code
    assert "view_as_complex" not in code.split("def call(")[1]
    stock, _ = code_of(rotate, [x, turns])
    assert "aten.mul.Tensor(" in stock
