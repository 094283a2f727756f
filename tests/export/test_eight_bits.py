"""What Inductor makes of products of 8 bits for a GPU: what it would without us, whatever entries plain products have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autokernel.export.apply import inductor_options
from autokernel.export.bundle import Entry
from autokernel.export.plan import minor
from autokernel.records import Problem, TensorSpec

pytest.importorskip("triton", reason="Inductor's templates are Triton's")
if minor(torch.__version__) != "2.13":
    pytest.skip("the pretended device is made for torch 2.13", allow_module_level=True)

from export.pretended_h200 import generated_code, plan_with

M, N, K = 64, 256, 128


def spec(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, dtype)


def scaled(x: torch.Tensor, w: torch.Tensor, scale_x: torch.Tensor, scale_w: torch.Tensor) -> torch.Tensor:
    return torch._scaled_mm(x, w.t(), scale_x, scale_w, out_dtype=torch.bfloat16, use_fast_accum=True)


def integer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(x, w.t())


E4M3 = [spec("float8_e4m3fn", M, K), spec("float8_e4m3fn", N, K)]


@pytest.mark.parametrize(
    ("function", "specs", "call"),
    [
        (scaled, [*E4M3, spec("float32", M, 1), spec("float32", 1, N)], "extern_kernels._scaled_mm("),
        (scaled, [*E4M3, spec("float32"), spec("float32")], "extern_kernels._scaled_mm("),
        (integer, [spec("int8", M, K), spec("int8", N, K)], "extern_kernels._int_mm("),
    ],
    ids=["row-wise", "tensor-wise", "integer"],
)
def test_it_calls_the_library(function: Callable[..., Any], specs: list[TensorSpec], call: str) -> None:
    dtype = specs[0].dtype
    weight = TensorSpec(shape=(K, N), dtype=dtype, stride=(1, K))
    config = {"template": "mm", "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_stages": 3, "num_warps": 4, "GROUP_M": 4}
    tuned = [Problem(op="mm", inputs=(specs[0], weight), device="cuda", constants=(1,))]
    entries = tuple(Entry(problem=problem, backend="inductor", config=config) for problem in tuned)
    plan = plan_with(entries)
    code = generated_code(function, specs, inductor_options(plan, {}, frozen=False)).split("class Runner")[1]
    assert call in code
    assert code == generated_code(function, specs, {}).split("class Runner")[1]
    assert not plan.num_hit_entries
