"""Entries of the op `generated` in Inductor's code for a GPU that is not there: the kernel, what it reads, what is left."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export.pretended_h200 import generated_code, plan_with
from torch.nn import functional

from autokernel.export.apply import inductor_options
from autokernel.export.bundle import Entry
from autokernel.export.regions import RegionPass
from autokernel.ops import Region
from autokernel.ops.generated import Generated
from autokernel.records import ConfigValue, Problem, TensorSpec

M, D, F = 16, 256, 512
MM: dict[str, ConfigValue] = {
    "kernel": "generated_mm", "mode": "swap", "block_m": 16, "block_n": 64, "block_k": 64, "block_s": 256, "split_k": 1,
    "num_warps": 4, "num_stages": 3,
}  # fmt: skip
ROWS: dict[str, ConfigValue] = {"kernel": "generated_rows", "block_m": 1, "block_k": 0, "num_warps": 4, "num_stages": 2}


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


SPECS = [spec(M, 1, D), spec(D), spec(F, D), spec(F, D), spec(D, F)]


def layer(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor]:
    """What follows attention in a Llama, and the sum of squares of the result."""
    wide = x.float()
    scaled = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    normed = weight * scaled
    x = x + functional.linear(functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up), down)
    return (x,)


@pytest.fixture(scope="module")
def regions() -> list[Region]:
    """As the pass finds them where the layer is compiled for a GPU."""
    found: list[Region] = []

    def keep(graph: torch.fx.Graph) -> None:
        found.extend(Generated().match(graph, frozenset(), "cuda"))

    generated_code(layer, SPECS, {"post_grad_custom_post_pass": keep})
    return found


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("AUTOKERNEL_CACHE_DIR", str(tmp_path))


def region_with(regions: list[Region], *inner: str, num_outputs: int = 1) -> Region:
    """The smallest region that has these ops in it."""
    fitting = [
        r for r in regions if len(r.outputs) == num_outputs and all(f" {op}(" in str(r.problem.scalars) for op in inner)
    ]  # fmt: skip
    return min(fitting, key=lambda r: len(r.inner))


def code_with(*entries: tuple[Region, dict[str, ConfigValue]]) -> tuple[str, list[tuple[int, list[str]]]]:
    made = tuple(Entry(problem=region.problem, backend="triton", config=config) for region, config in entries)
    plan = plan_with(made)
    code = generated_code(layer, SPECS, {"post_grad_custom_post_pass": RegionPass(plan)})
    return code, [(usage.hits, usage.reasons) for usage in plan.usage.values()]


def test_a_layer_is_two_kernels_that_share_a_buffer_of_counters(regions: list[Region]) -> None:
    whole = region_with(regions, "rsqrt", "exp", "mm")
    down = next(r for r in regions if "add(" in str(r.problem) and not r.inner & whole.inner)
    code, usage = code_with((whole, {**MM, "split_k": 2}), (down, {**MM, "split_k": 4}))
    assert usage == [(1, []), (1, [])]
    assert len(re.findall(r"generated_\w+\.run\((.*)", code)) == 2
    assert "extern_kernels." not in code.split("def call(")[1]
    assert len(re.findall(r"triton_\w+\.run\(", code)) == 1, "what fills the counters with zeros"
    assert len(re.findall(r"= empty_strided_cuda\(\(8, \), \(1, \), torch.int32\)", code)) == 1, "as many as tiles"


def test_rows_are_one_kernel(regions: list[Region]) -> None:
    rows = next(r for r in regions if "mm(" not in str(r.problem))
    code, usage = code_with((rows, ROWS))
    assert usage == [(1, [])]
    assert len(re.findall(r"generated_\w+\.run\((.*)", code)) == 1
    assert len(re.findall(r"extern_kernels\.\w+\(", code)) == 3
    assert "triton_red" not in code, "no kernel for the norm is left"
    assert "triton_per" not in code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_softmax_is_what_the_profiler_saw_of_it(dtype: str) -> None:
    """The profiler looks at the graph where the pass of production does: behind the one that makes two reductions one."""
    specs, seen = [TensorSpec.contiguous((M, 12, 197), dtype)], []

    def softmax(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.sin(x).softmax(-1),)

    def keep(graph: torch.fx.Graph) -> None:
        seen.extend(Generated().find(graph, frozenset(), "cuda"))

    generated_code(softmax, specs, {"post_grad_custom_post_pass": keep})
    (site,) = seen
    assert "prepare_softmax_online" in str(site.problem)
    plan = plan_with([Entry(problem=site.problem, backend="triton", config=ROWS)])
    code = generated_code(softmax, specs, inductor_options(plan, {}, frozen=False))
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(1, [])]
    assert len(re.findall(r"generated_\w+\.run\((.*)", code)) == 1
    assert "triton_per" not in code, "nothing of the softmax is left"


def test_stock_code_stays_where_sizes_differ_or_the_kernel_does_not_take_the_config(regions: list[Region]) -> None:
    region = region_with(regions, "rsqrt", "exp", "mm")
    wider = tuple(spec(*(2 * n for n in s.shape)) for s in region.problem.inputs)
    other = replace(region, problem=replace(region.problem, inputs=wider))
    code, usage = code_with((region, {**MM, "block_k": 48}), (other, MM))
    assert usage == [(0, ["block_k must be a power of two; it is 48"]), (0, [])]
    assert "generated_" not in code


def between_two_norms(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor]:
    """The layer, and its norm once more behind it."""
    (x,) = layer(x, weight, gate, up, down)
    wide = x.float()
    scaled = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    return (weight * scaled,)


@pytest.mark.parametrize(("order", "hits"), [((0, 1), [1, 1]), ((1, 0), [2, 0])])
def test_whose_entry_comes_first_in_the_bundle_has_the_nodes(
    regions: list[Region], order: tuple[int, ...], hits: list[int]
) -> None:
    whole = region_with(regions, "rsqrt", "exp", "mm").problem
    norm = Problem(
        op="rms_norm", inputs=(SPECS[0], SPECS[1]), device="cuda", constants=(1,), scalars=(("eps", 1e-5),)
    )  # fmt: skip
    row_norm: dict[str, ConfigValue] = {"kernel": "row_norm", "num_warps": 4, "repeat": 1, "rows": 1}
    both = Entry(problem=whole, backend="triton", config=MM), Entry(problem=norm, backend="triton", config=row_norm)
    plan = plan_with(tuple(both[i] for i in order))
    generated_code(between_two_norms, SPECS, {"post_grad_custom_post_pass": RegionPass(plan)})
    assert [plan.usage[both[i].key].hits for i in order] == hits
