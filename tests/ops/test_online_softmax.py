"""A softmax as graphs of a GPU have it: Inductor finds a row's maximum and its sum of exponentials in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ops.generated_graphs import OP, only, ops_of
from ops.test_attention import on_gpu
from torch.fx import Graph
from torch.nn import functional

from autokernel.backends.compiled import Copies
from autokernel.ops import Region
from autokernel.ops.legality import Rule
from autokernel.ops.matching import op_name, tensor_spec
from autokernel.ops.program import program_of
from autokernel.records import Problem, TensorSpec

ONLINE = "prepare_softmax_online"
SOFTMAX = f"{ONLINE} sub exp div"
B, H, S, L, E = 2, 4, 9, 11, 16  # batch, heads, queries, keys, depth
Function = Callable[..., Any]


def found(graph: Graph) -> list[Region]:
    assert any(op_name(node) == f"prims.{ONLINE}" for node in graph.nodes)
    return OP.match(graph, frozenset(), "cuda")


def masked(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) * 0.125 + mask).softmax(-1)


def exponentials(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return (x - x.amax(dim, keepdim=True)).exp()


def of_exponentials(x: torch.Tensor) -> torch.Tensor:
    found = exponentials(x, 2)
    return found / found.sum(2, keepdim=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda x: x.sin().softmax(-1), f"sin {SOFTMAX}"),
        (lambda x: x.log_softmax(-1), f"{ONLINE} sub log sub"),
        (lambda x: of_exponentials(x.transpose(0, 1)), SOFTMAX),
        (lambda x: exponentials(x).sum(-1, keepdim=True).log(), f"{ONLINE} log"),
        # a norm of the same rows: both are one kernel
        (lambda x: (x + torch.rsqrt(x.square().mean(-1, True) + 1)).softmax(-1), f"pow mean add rsqrt add {SOFTMAX}"),
    ],
)
def test_a_softmax_is_a_region_of_rows(dtype: str, function: Function, ops: str) -> None:
    (region,) = found(on_gpu(function, ((3, 5, 40), dtype)))
    assert ops_of(region) == ops
    dims = OP.dims(region.problem)
    assert (dims["m"], dims["n"], dims["num_reductions"]) == (15, 40, ops.count(ONLINE) + ops.count("mean"))


def test_both_numbers_of_a_row_may_be_results() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        largest = x.amax(-1, keepdim=True)
        total = (x - largest).exp().sum(-1, keepdim=True)
        return largest.cumsum(0), total.cumsum(0), x.cumsum(0)

    (region,) = found(on_gpu(lambda x: function(x.sin()), ((6, 40), "float32")))
    assert ops_of(region) == f"sin {ONLINE}"
    assert sorted(tensor_spec(node).shape for node in region.outputs) == [(6, 1), (6, 1), (6, 40)]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_that_is_spelled_out_has_regions_around_both_products(dtype: str) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (masked(q, k, mask) @ v).transpose(1, 2).reshape(B, S, H * E)

    specs = [((B, H, S, E), dtype), ((B, H, L, E), dtype), ((B, H, L, E), dtype), ((B, 1, S, L), dtype)]
    programs = [ops_of(region).removeprefix("clone ") for region in found(on_gpu(attention, *specs))]
    assert [text for text in programs if ONLINE in text] == [
        f"bmm mul add {SOFTMAX}", f"mul add {SOFTMAX} bmm", f"mul add {SOFTMAX}",
    ]  # fmt: skip


def test_a_softmax_behind_a_product_is_its_epilogue() -> None:
    graph = on_gpu(lambda x, w: functional.linear(x, w).softmax(-1), ((6, 32), "bfloat16"), ((48, 32), "bfloat16"))
    (region,) = [region for region in found(graph) if OP.dims(region.problem)["whole_rows"]]
    assert ops_of(region) == f"mm {SOFTMAX}"
    assert only(graph, f"prims.{ONLINE}").num_regions == 2, "with the product, and the rows"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_program_compiled_alone_is_the_same_region(dtype: str) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return masked(q, k.transpose(-1, -2), mask)

    specs = [((B, H, S, E), dtype), ((B, H, E, L), dtype), ((B, 1, S, L), dtype)]
    problems = [region.problem for region in found(on_gpu(function, *specs)) if ONLINE in str(region.problem)]
    assert len(problems) == 2
    for problem in problems:
        copies = Copies(replace(problem, constants=()), [[], []])
        again = found(on_gpu(copies, *((spec.shape, spec.dtype) for spec in problem.inputs * 2)))
        assert [region.problem.key for region in again].count(problem.key) == 2, problem.key


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda x: exponentials(x.double()).sum(-1, keepdim=True) + 1, Rule.DTYPE),
        (lambda x: x.softmax(0), Rule.REDUCTION),
        (lambda x: x.reshape(-1, 1).softmax(-1), Rule.REDUCTION),
    ],
)
def test_a_softmax_without_a_region_says_why(function: Function, rule: Rule) -> None:
    graph = on_gpu(function, ((6, 40), "float32"))
    assert found(graph) == []
    whole = only(graph, f"prims.{ONLINE}").whole
    assert whole is not None
    assert whole.rule is rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_reference_is_the_softmax(dtype: torch.dtype) -> None:
    (region,) = found(on_gpu(lambda x: x.softmax(-1), ((6, 40), "float32")))
    x = torch.randn(6, 40, dtype=dtype)
    x[1, :5], x[2], x[3, 7], x[4, 7] = -torch.inf, -torch.inf, torch.inf, torch.nan
    (out,) = OP.reference(region.problem, x)
    assert out.dtype is dtype
    torch.testing.assert_close(out, x.softmax(-1), equal_nan=True)


def test_getitem_of_anything_else_is_no_result_of_rows() -> None:
    graph = on_gpu(lambda x: torch.add(*(part.sin().softmax(-1) for part in x.split(20, -1))), ((6, 40), "float32"))
    assert [ops_of(region) for region in found(graph)] == [f"sin {SOFTMAX} sin {SOFTMAX} add"]


def test_its_text_is_read_and_written() -> None:
    spec = TensorSpec.contiguous((6, 40), "bfloat16")
    text = f"t0 = {ONLINE}(i0); t1 = getitem(t0, 0); o0 = sub(i0, t1)"
    assert str(program_of(Problem(op="generated", inputs=(spec,), device="cuda", scalars=(("program", text),)))) == text
