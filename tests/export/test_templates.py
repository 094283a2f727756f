"""Triton templates with an entry's tile: Inductor's own code generation, for an H200 that is pretended."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from autokernel.export.apply import inductor_options
from autokernel.export.bundle import Entry
from autokernel.export.plan import Usage, minor
from autokernel.export.templates import template_of
from autokernel.records import ConfigValue, Problem, TensorSpec

pytest.importorskip("triton", reason="Inductor's templates are Triton's")
if minor(torch.__version__) != "2.13":
    pytest.skip("the pretended device is made for torch 2.13", allow_module_level=True)

from export.pretended_h200 import generated_code, plan_with

F = torch.nn.functional
M, N, K = 64, 6144, 4096
TILE: dict[str, ConfigValue] = {
    "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 256, "num_stages": 3, "num_warps": 4, "GROUP_M": 4,
}  # fmt: skip


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def weight(k: int, n: int) -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))


MM = Problem(op="mm", inputs=(spec(M, K), weight(K, N)), device="cuda", constants=(1,))
ADDMM = Problem(op="addmm", inputs=(spec(N), spec(M, K), weight(K, N)), device="cuda", constants=(0, 2))
BMM = Problem(op="bmm", inputs=(spec(8, M, K), spec(8, K, N)), device="cuda")
BADDBMM = Problem(op="baddbmm", inputs=(spec(8, M, N), spec(8, M, K), spec(8, K, N)), device="cuda")
MERGED = Problem(op="merged_mm", inputs=(spec(M, K), weight(K, N), weight(K, 1024)), device="cuda", constants=(1, 2))


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w.t())


def gated(x: torch.Tensor, w: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(torch.mm(x, w.t())) * up


def residual(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w.t()) + r


def biased(b: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.addmm(b, x, w.t())


def both(x: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.mm(x, v.t()), torch.mm(x, w.t())


# FX traces Python functions alone
def row_major(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w)


def batched(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, y)


def batched_sum(b: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(b, x, y)


def generate(
    function: Callable[..., Any], specs: list[TensorSpec], problem: Problem, **config: ConfigValue
) -> tuple[str, Usage]:
    counters.clear()
    entry = Entry(problem=problem, backend="inductor", config=config)
    plan = plan_with((entry,))
    code = generated_code(function, specs, inductor_options(plan, {}, frozen=False, merges=True))
    assert counters["inductor"]["select_algorithm_autotune"] == 0
    return code, plan.usage[entry.key]


def constants(code: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+) : tl\.constexpr = (\S+)", code))


@pytest.mark.parametrize(
    ("function", "specs", "problem", "template"),
    [
        (linear, [spec(M, K), spec(N, K)], MM, "mm"),
        (linear, [spec(M, K), spec(N, K)], MM, "mm_persistent_tma"),
        (gated, [spec(M, K), spec(N, K), spec(M, N)], MM, "mm_persistent_tma"),
        (residual, [spec(M, K), spec(N, K), spec(M, N)], MM, "mm"),
        (biased, [spec(N), spec(M, K), spec(N, K)], ADDMM, "mm"),
        (biased, [spec(N), spec(M, K), spec(N, K)], ADDMM, "mm_persistent_tma"),
        (batched, [spec(8, M, K), spec(8, K, N)], BMM, "bmm"),
        (batched_sum, [spec(8, M, N), spec(8, M, K), spec(8, K, N)], BADDBMM, "bmm"),
    ],
    ids=["mm", "TMA", "gated", "residual", "bias", "bias TMA", "bmm", "baddbmm"],
)
def test_the_tile_is_built_and_nothing_else(
    function: Callable[..., Any], specs: list[TensorSpec], problem: Problem, template: str
) -> None:
    code, usage = generate(function, specs, problem, template=template, **TILE)
    assert (usage.hits, usage.reasons) == (1, [])
    assert len(re.findall(r"^def triton_", code, re.MULTILINE)) == 1  # the epilogue is in it
    assert "extern_kernels." not in code
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"):
        assert constants(code)[name] == str(TILE[name])
    assert re.search(r"num_stages=3,\s*num_warps=4,", code)
    assert ("make_tensor_descriptor" in code) == (template == "mm_persistent_tma")
    if template == "mm_persistent_tma":
        assert {name: constants(code)[name] for name in ("A_ROW_MAJOR", "B_ROW_MAJOR", "NUM_SMS")} == {
            "A_ROW_MAJOR": "True",
            "B_ROW_MAJOR": "False",
            "NUM_SMS": "132",
        }


def test_one_row_is_no_transposed_matrix() -> None:
    """Inductor took it for one: the kernel read A as [K, 1], and its results were wrong."""
    problem = Problem(op="mm", inputs=(spec(1, K), weight(K, N)), device="cuda", constants=(1,))
    code, usage = generate(linear, [spec(1, K), spec(N, K)], problem, template="mm_persistent_tma", **{**TILE, "BLOCK_M": 16})
    assert (usage.hits, usage.reasons) == (1, [])
    assert (constants(code)["A_ROW_MAJOR"], constants(code)["B_ROW_MAJOR"]) == ("True", "False")


@pytest.mark.parametrize(("k", "even"), [(4096, "True"), (4224, "False")])
def test_whether_blocks_divide_k_is_derived(k: int, even: str) -> None:
    problem = Problem(op="mm", inputs=(spec(M, k), weight(k, N)), device="cuda", constants=(1,))
    code, usage = generate(linear, [spec(M, k), spec(N, k)], problem, template="mm", **TILE)
    assert usage.hits == 1
    assert constants(code)["EVEN_K"] == even


def test_k_is_decomposed_where_inductor_would_not() -> None:
    code, usage = generate(linear, [spec(M, K), spec(N, K)], MM, template="decompose_k", k_split=4)
    assert (usage.hits, usage.reasons) == (1, [])
    assert "extern_kernels.bmm_dtype" in code


def test_a_template_that_inductor_would_not_offer_for_so_long_a_k() -> None:
    problem = Problem(op="mm", inputs=(spec(M, K), weight(K, 8)), device="cuda", constants=(1,))
    _, usage = generate(linear, [spec(M, K), spec(8, K)], problem, template="mm", **TILE)
    assert (usage.hits, usage.reasons) == (1, [])


def test_weights_side_by_side_are_one_template() -> None:
    specs = [spec(M, K), spec(N, K), spec(1024, K)]
    code, usage = generate(both, specs, MERGED, template="mm", merge="concat", **TILE)
    assert (usage.hits, usage.reasons) == (1, [])
    assert len(re.findall(r"^def triton_tem_", code, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("function", "specs", "reason"),
    [
        (linear, [spec(M + 1, K), spec(N, K)], None),
        (row_major, [spec(M, K), spec(K, N)], "laid out in another way"),
    ],
    ids=["other rows", "row-major weight"],
)
def test_what_has_no_entry_is_what_inductor_does_by_default(
    function: Callable[..., Any], specs: list[TensorSpec], reason: str | None
) -> None:
    code, usage = generate(function, specs, MM, template="mm", **TILE)
    assert usage.hits == 0
    assert bool(usage.reasons) == bool(reason)
    assert reason is None or reason in usage.reasons[0]
    stock = generated_code(function, specs, {})
    body = code.split("class Runner")[1]
    assert "extern_kernels.mm(" in body
    assert body == stock.split("class Runner")[1]


@pytest.mark.parametrize(
    ("problem", "config", "reason"),
    [
        (
            Problem(op="mm", inputs=(spec(M, 4100), weight(4100, N)), device="cuda", constants=(1,)),
            {"template": "mm_persistent_tma", **TILE},
            "does not offer the template mm_persistent_tma",
        ),
        (MM, {"template": "decompose_k", "k_split": 3}, "multiple of k_split"),
    ],
    ids=["unaligned for TMA", "split that does not divide"],
)
def test_what_cannot_be_built_is_stock_and_says_why(problem: Problem, config: dict[str, ConfigValue], reason: str) -> None:
    specs = [problem.inputs[0], spec(*reversed(problem.inputs[1].shape))]
    code, usage = generate(linear, specs, problem, **config)
    assert usage.hits == 0
    assert reason in usage.reasons[0]
    assert "extern_kernels.mm(" in code


def test_the_installed_torch_has_every_template() -> None:
    assert all(template_of(name) is not None for name in ("mm", "mm_persistent_tma", "bmm", "decompose_k"))


@pytest.mark.parametrize("merge", ["none", "concat"])
@pytest.mark.parametrize("backend", ["inductor", "triton"])
def test_code_from_the_graph_cache_is_never_taken_where_its_entries_must_be_counted(merge: str, backend: str) -> None:
    """A second process found the merged GEMM's code in Inductor's cache, and its entry unused."""
    config: dict[str, ConfigValue] = {"template": "mm"} if backend == "inductor" else {"kernel": "skinny_mm"}
    problem = Problem(op="mm", inputs=(spec(16, 256), weight(256, 512)), device="cuda", constants=(1,))
    entry = Entry(problem=problem, backend=backend, config={**config, "merge": merge})
    plan = plan_with((entry,))
    assert inductor_options(plan, {}, frozen=merge == "concat")["fx_graph_cache"] is False
