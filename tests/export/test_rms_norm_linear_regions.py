"""Entries for a norm and linear layers in Inductor's code for a GPU that is not there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from export.pretended_h200 import generated_code, plan_with
from torch.nn import functional

from autokernel.export.bundle import Entry
from autokernel.export.dependent_launch import dependent_launches
from autokernel.export.plan import Plan
from autokernel.export.regions import RegionPass
from autokernel.records import ConfigValue, Problem, TensorSpec

pytest.importorskip("triton", reason="Triton is not installed")

CONFIG: dict[str, ConfigValue] = {
    "kernel": "rms_norm_linear", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "one_pass": True, "split_k": 2,
    "num_warps": 4, "num_stages": 3,
}  # fmt: skip
VECTOR: dict[str, ConfigValue] = {**CONFIG, "mode": "vector", "BLOCK_M": 1, "BLOCK_N": 8, "BLOCK_K": 128, "split_k": 1}
K, COLUMNS = 256, (512, 128, 128)


def problem(rows: tuple[int, ...], columns: tuple[int, ...], dtype: str = "bfloat16") -> Problem:
    inputs = [TensorSpec.contiguous((*rows, K), dtype), TensorSpec.contiguous((K,), dtype)]
    inputs += [TensorSpec(shape=(K, n), dtype=dtype, stride=(1, K)) for n in columns]
    said: ConfigValue = "0" * len(columns) if len(columns) > 1 else False
    op = "rms_norm_qkv" if len(columns) > 1 else "rms_norm_linear"
    return Problem(op=op, inputs=tuple(inputs), device="cuda", scalars=(("bias", said), ("eps", 1e-5)))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def used(normed: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In an order that is not the problem's, for its widest comes first; each is used by something of its own."""
    uses = (torch.sin, torch.cos, torch.tanh)
    return tuple(use(functional.linear(normed, w)) for use, w in zip(uses, reversed(weights), strict=False))


LAYERS: dict[int, Callable[..., Any]] = {
    1: lambda x, weight, a: used(norm(x.exp(), weight), a),
    2: lambda x, weight, a, b: used(norm(x.exp(), weight), a, b),
    3: lambda x, weight, a, b, c: used(norm(x.exp(), weight), a, b, c),
}


def code_of(
    function: Callable[..., Any], rows: tuple[int, ...], columns: tuple[int, ...], *entries: Entry, dtype: str = "bfloat16"
) -> tuple[str, Plan]:
    shapes = [(*rows, K), (K,), *((n, K) for n in columns)]
    plan = plan_with(entries)
    options = {"post_grad_custom_post_pass": RegionPass(plan), "joint_graph_constant_folding": False}
    return generated_code(function, [TensorSpec.contiguous(shape, dtype) for shape in shapes], options), plan


@pytest.mark.parametrize("columns", [COLUMNS, (384, 384), (512,)])
@pytest.mark.parametrize(("rows", "dtype"), [((6,), "bfloat16"), ((2, 3), "float32")])
def test_one_kernel_takes_the_place_of_the_norm_and_all_products(
    rows: tuple[int, ...], dtype: str, columns: tuple[int, ...]
) -> None:  # fmt: skip
    entry = Entry(problem=problem(rows, columns, dtype), backend="triton", config=CONFIG)
    stock, _ = code_of(LAYERS[len(columns)], rows, columns, dtype=dtype)
    assert stock.count("extern_kernels.mm(") == len(columns)
    assert "triton_per" in stock or "triton_red" in stock
    code, plan = code_of(LAYERS[len(columns)], rows, columns, entry, dtype=dtype)
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(1, [])]
    called = code.split("def call(")[1]
    assert len(re.findall(r"rms_norm_linear_kernel_\d+\.run\(", called)) == 1
    assert "extern_kernels" not in called
    assert not re.search(r"triton_(per|red)", called), "no row is reduced by a kernel of its own"
    assert all(f"empty_strided_cuda((6, {n}), ({n}, 1)" in called for n in columns), "as the products left them"


def test_results_go_where_each_product_went() -> None:
    """The widest product is the problem's first, and the graph's last."""
    entry = Entry(problem=problem((6,), (512, 128)), backend="triton", config=CONFIG)
    code, _ = code_of(LAYERS[2], (6,), (512, 128), entry)
    (call,) = re.findall(r"rms_norm_linear_kernel_\d+\.run\((.*?)\)\n", code)
    shapes = dict(re.findall(r"(buf\d+) = empty_strided_cuda\((\(\d+, \d+\))", code))
    written = [shapes[name] for name in re.findall(r"buf\d+", call) if name in shapes]
    assert "(6, 512)" in written
    assert "(6, 128)" in written
    outputs = re.findall(r"return \((.*)\)", code)[-1]
    assert [shapes.get(name) for name in re.findall(r"buf\d+", outputs)] == ["(6, 128)", "(6, 512)"]


@pytest.mark.parametrize("pdl", [False, True])
def test_one_row_with_launches_that_overlap(pdl: bool) -> None:
    """Its weights are no parameters of a model here, and so may be what the kernel in front writes: nothing is read ahead."""
    entry = Entry(problem=problem((1, 1), COLUMNS), backend="triton", config=VECTOR)
    with dependent_launches(pdl, []):
        code, plan = code_of(LAYERS[3], (1, 1), COLUMNS, entry)
    assert [usage.hits for usage in plan.usage.values()] == [1]
    assert re.search(r"'AHEAD': 0\b", code)
    assert ("'launch_pdl': True" in code) == pdl


FALL_BACKS: dict[str, tuple[tuple[int, ...], dict[str, ConfigValue], str]] = {
    "a config of another version": ((6,), {**CONFIG, "waves": 2}, "unknown: waves"),
    "a tile that is none": ((6,), {**CONFIG, "BLOCK_N": 48}, "block_n is a power of two; it is 48"),
    "one row's config": ((6,), VECTOR, "mode vector is for one row"),
    "another kernel": ((6,), {**CONFIG, "kernel": "skinny_mm"}, "no Triton kernel 'skinny_mm'"),
}


@pytest.mark.parametrize("name", FALL_BACKS)
def test_what_the_kernel_does_not_take_stays_stock_and_says_why(name: str) -> None:
    rows, config, reason = FALL_BACKS[name]
    code, plan = code_of(LAYERS[3], rows, COLUMNS, Entry(problem=problem(rows, COLUMNS), backend="triton", config=config))
    (usage,) = plan.usage.values()
    assert usage.hits == 0
    assert reason in usage.reasons[0]
    assert code.count("extern_kernels.mm(") == len(COLUMNS)


def test_a_norm_that_others_read_stays_stock() -> None:
    def shared(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Any:
        normed = norm(x.exp(), weight)
        return (*used(normed, a, b, c), normed.sin())

    entry = Entry(problem=problem((6,), COLUMNS), backend="triton", config=CONFIG)
    code, plan = code_of(shared, (6,), COLUMNS, entry)
    assert [usage.hits for usage in plan.usage.values()] == [0]
    assert code.count("extern_kernels.mm(") == len(COLUMNS)


def test_other_sizes_stay_stock() -> None:
    entry = Entry(problem=problem((6,), COLUMNS), backend="triton", config=CONFIG)
    code, plan = code_of(LAYERS[3], (7,), COLUMNS, entry)
    assert [usage.hits for usage in plan.usage.values()] == [0]
    assert "rms_norm_linear_kernel" not in code
