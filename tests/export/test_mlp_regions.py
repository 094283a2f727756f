"""Entries for MLPs in Inductor's code for a GPU that is not there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from export.pretended_h200 import generated_code, plan_with
from torch.nn import functional

from autokernel.export.bundle import Entry
from autokernel.export.plan import Plan
from autokernel.export.regions import RegionPass
from autokernel.records import ConfigValue, Problem, TensorSpec

pytest.importorskip("triton", reason="Triton is not installed")

CONFIG: dict[str, ConfigValue] = {
    "kernel": "mlp", "BLOCK_M": 64, "BLOCK_H": 32, "BLOCK_K": 64, "BLOCK_N": 64, "swap_in": False, "swap_out": False,
    "num_warps": 4, "num_stages": 3, "prefetch": True, "sum_block": 128, "sum_parts": 8,
}  # fmt: skip
K, HIDDEN = 64, 256


def weight(rows: int, columns: int, dtype: str) -> TensorSpec:
    """As the op has it, [rows, columns], of a linear layer's [columns, rows]."""
    return TensorSpec(shape=(rows, columns), dtype=dtype, stride=(1, rows))


def code_of(function: Any, specs: list[TensorSpec], *entries: Entry) -> tuple[str, Plan]:
    plan = plan_with(entries)
    options = {"post_grad_custom_post_pass": RegionPass(plan), "joint_graph_constant_folding": False}
    return generated_code(function, specs, options), plan


@pytest.mark.parametrize(("dtype", "precision"), [("float32", {"precision": "tf32x3"}), ("bfloat16", {})])
def test_the_kernels_take_the_place_of_both_layers(dtype: str, precision: dict[str, ConfigValue]) -> None:
    x = TensorSpec.contiguous((1, 37, K), dtype)
    w_in, w_out = TensorSpec.contiguous((HIDDEN, K), dtype), TensorSpec.contiguous((K, HIDDEN), dtype)
    problem = Problem(
        op="mlp",
        inputs=(x, weight(K, HIDDEN, dtype), weight(HIDDEN, K, dtype), x),
        device="cuda",
        scalars=(("activation", "relu"), ("bias", "none"), ("residual", True)),
    )

    def block(x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stream = x.exp()
        return (stream + functional.linear(torch.relu(functional.linear(stream.cos(), w_in)), w_out),)

    code, plan = code_of(block, [x, w_in, w_out], Entry(problem=problem, backend="triton", config={**CONFIG, **precision}))
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(1, [])]
    called = code.split("def call(")[1]
    assert len(re.findall(r"mlp_kernel_\d+\.run\(", called)) == 1
    assert len(re.findall(r"mlp_sum_kernel_\d+\.run\(", called)) == 1
    assert "extern_kernels" not in called, "no product of the library's is left"
    assert len(re.findall(r"triton_poi\w+\.run\(", called)) == 1, "what is in front of the layers"


def test_biases_that_inductor_takes_out_of_products() -> None:
    specs = [TensorSpec.contiguous(shape, "float32") for shape in ((9, K), (HIDDEN, K), (HIDDEN,), (K, HIDDEN), (K,))]
    problem = Problem(
        op="mlp",
        inputs=(specs[0], weight(K, HIDDEN, "float32"), specs[2], weight(HIDDEN, K, "float32"), specs[4]),
        device="cuda",
        scalars=(("activation", "gelu"), ("bias", "both"), ("residual", False)),
    )

    def block(x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor, w_out: torch.Tensor, b_out: torch.Tensor) -> Any:
        return (functional.linear(functional.gelu(functional.linear(x, w_in, b_in)), w_out, b_out).exp(),)

    stock, _ = code_of(block, specs)
    assert "extern_kernels.addmm" not in stock, "both are added by what follows"
    code, plan = code_of(block, specs, Entry(problem=problem, backend="triton", config={**CONFIG, "BLOCK_M": 16}))
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(1, [])]
    assert "extern_kernels" not in code.split("def call(")[1]


def test_more_rows_than_the_kernel_takes_stay_the_librarys() -> None:
    specs = [TensorSpec.contiguous(shape, "bfloat16") for shape in ((129, K), (HIDDEN, K), (K, HIDDEN))]
    problem = Problem(
        op="mlp",
        inputs=(specs[0], weight(K, HIDDEN, "bfloat16"), weight(HIDDEN, K, "bfloat16")),
        device="cuda",
        scalars=(("activation", "silu"), ("bias", "none"), ("residual", False)),
    )

    def block(x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (functional.linear(functional.silu(functional.linear(x, w_in)), w_out),)

    code, plan = code_of(block, specs, Entry(problem=problem, backend="triton", config=CONFIG))
    (usage,) = plan.usage.values()
    assert usage.hits == 0
    assert "for at most 128 rows" in usage.reasons[0]
    assert "extern_kernels.mm" in code
