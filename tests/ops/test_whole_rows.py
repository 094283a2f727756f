"""Regions of products whose epilogue reduces rows: which are found, with which results, and why others are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops.generated_graphs import OP, K, N, V, W, found, graph_of, only, ops_of, rms, rows
from torch.nn import functional

from autokernel.backends.compiled import Copies
from autokernel.ops import Region
from autokernel.ops.generated import explain
from autokernel.ops.legality import MAX_ROW_BYTES, Rule, row_bytes
from autokernel.ops.matching import tensor_spec
from autokernel.ops.program import Program

LAYER_NORM = "var_mean sub add rsqrt mul"
RMS = "pow mean add rsqrt mul"
GAIN = torch.randn(N)


def whole(regions: list[Region]) -> list[Region]:
    """Those that reduce rows behind a product."""
    return [region for region in regions if OP.dims(region.problem)["whole_rows"]]


def linear_norm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Half a layer: the sum goes on beside its norm."""
    y = r + functional.linear(x.relu(), w)
    return y.cumsum(0), functional.linear(gain * rms(y), w.t())


def test_a_sum_and_its_norm_are_results_of_the_product(post_grad: Any) -> None:
    graph = graph_of(post_grad, linear_norm, rows(2, 5, K), rows(2, 5, N), weights=(W, GAIN))
    large, small = whole(found(graph))
    assert (ops_of(large), ops_of(small)) == (f"relu mm add {RMS} mul", f"mm add {RMS} mul")
    assert [tensor_spec(node).shape for node in small.outputs] == [(2, 5, N), (2, 5, N)]  # type: ignore[union-attr]
    assert OP.dims(large.problem)["num_outputs"] == 2
    assert OP.dims(large.problem)["num_reductions"] == 0, "none in front of the product"
    product = next(item for item in explain(graph) if item.op == "aten.mm")
    assert product.num_regions == 5, "with the norm, with and without relu; without the norm the same; relu and the product"
    assert Rule.BEHIND_PRODUCT not in [broken.rule for broken in product.behind]
    assert only(graph, "aten.mean").num_regions == 3, "two with the product, and the rows"


@pytest.mark.parametrize(
    ("behind", "ops"),
    [
        (lambda y: y.softmax(-1), "mm amax sub exp sum div"),
        (lambda y: functional.layer_norm(functional.gelu(y), (N,)), f"mm mul mul erf add mul {LAYER_NORM}"),
        (lambda y: y.amax(-1, keepdim=True), "mm amax"),
        (lambda y: rms(rms(y) + y).exp(), f"mm {RMS} add {RMS} exp"),
    ],
)
def test_norms_softmax_and_single_reductions_are_epilogues(post_grad: Any, behind: Any, ops: str) -> None:
    regions = whole(found(graph_of(post_grad, lambda x, w: behind(functional.linear(x, w)), rows(6, K), weights=(W,))))
    assert [sorted(ops_of(region).split()) for region in regions] == [sorted(ops.split())]


def test_products_together_and_the_norm_of_what_comes_of_them(post_grad: Any) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return rms(torch.sigmoid(functional.linear(x, w)) * functional.linear(x, v))

    (region,) = whole(found(graph_of(post_grad, function, rows(6, K), weights=(W, V))))
    assert ops_of(region) == f"mm sigmoid mm mul {RMS}"


def test_of_products_of_different_matrices_the_last_one_is_in(post_grad: Any) -> None:
    def function(x: torch.Tensor, z: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return rms(functional.linear(x, w) + functional.linear(z, v))

    graph = graph_of(post_grad, function, rows(2, 3, K), rows(2, 3, K), weights=(W, V))
    (region,) = whole(found(graph))
    assert ops_of(region) == f"mm add {RMS}"
    assert region.name_of is [node for node in graph.nodes if str(node.target) == "aten.mm.default"][-1]
    first = next(item for item in explain(graph) if item.op == "aten.mm")
    assert f"mean (they are with {region.name_of.name})" in str(first.behind[-1])


def test_what_comes_of_no_product_and_serves_others_is_an_operand(post_grad: Any) -> None:
    def function(x: torch.Tensor, r: torch.Tensor, s: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = r * s  # others want it
        return rms(functional.linear(x, w) + q + torch.tanh(s)), q.cumsum(0)

    (region,) = whole(found(graph_of(post_grad, function, rows(2, 3, K), rows(2, 3, N), rows(2, 3, N), weights=(W,))))
    assert ops_of(region) == f"mm add tanh add {RMS}"
    assert len(region.outputs) == 1


def test_one_number_for_each_row_may_be_a_result(post_grad: Any) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = functional.linear(x, w)
        largest = y.amax(-1, keepdim=True)
        return (y - largest).exp(), largest.cumsum(0)

    (region,) = whole(found(graph_of(post_grad, function, rows(6, K), weights=(W,))))
    assert {tensor_spec(node).shape for node in region.outputs} == {(6, N), (6, 1)}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("dtype", "columns", "products", "fits"),
    [
        (torch.bfloat16, 2048, 1, True),
        (torch.bfloat16, 2049, 1, False),
        (torch.float32, 768, 1, True),
        (torch.float32, 1025, 1, False),
        (torch.bfloat16, 768, 2, True),
        (torch.float32, 768, 2, False),
    ],
)
def test_rows_have_to_fit_into_a_block(post_grad: Any, dtype: torch.dtype, columns: int, products: int, fits: bool) -> None:
    assert (row_bytes(columns, products, dtype.itemsize) <= MAX_ROW_BYTES) is fits
    weights = tuple(torch.randn(columns, K, dtype=dtype) for _ in range(products))

    def function(x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, w[0]).sigmoid()
        return rms(y * functional.linear(x, w[-1]) if len(w) > 1 else y)

    graph = graph_of(post_grad, function, rows(6, K, dtype=dtype), weights=weights)
    assert bool(whole(found(graph))) is fits
    several = f" of {products} products" if products > 1 else ""
    said = [str(broken) for item in explain(graph) if item.is_product for broken in item.behind]
    assert any(f"(rows of {columns}{several} do not fit into a block)" in text for text in said) is not fits, said


def test_a_product_that_others_need_before_the_rest_is_there_keeps_its_rows_apart(post_grad: Any) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, square: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = functional.linear(x, w)
        late = (y @ square).cumsum(0)
        return y, rms(y + late)

    graph = graph_of(post_grad, function, rows(6, K), weights=(W, torch.randn(N, N)))
    assert [ops_of(region) for region in whole(found(graph))] == []
    first = next(item for item in explain(graph) if item.op == "aten.mm")
    assert str(first.behind[-1]).startswith(f"{Rule.BEHIND_PRODUCT}: mean ({Rule.LATE}: cumsum")


def test_nothing_is_written_between_that_it_reads(post_grad: Any) -> None:
    graph = graph_of(post_grad, linear_norm, rows(2, 5, K), rows(2, 5, N), weights=(W, GAIN))
    assert whole(found(graph))
    mean = next(node for node in graph.nodes if str(node.target) == "aten.mean.dim")
    residual = next(node for node in graph.nodes if node.op == "placeholder" and tensor_spec(node).shape == (2, 5, N))  # type: ignore[union-attr]
    with graph.inserting_after(mean):
        write = graph.call_function(torch.ops.aten.zero_.default, (residual,))
        write.meta["val"] = residual.meta["val"]
    assert whole(found(graph)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_compiled_alone_is_the_same_region(post_grad: Any, dtype: torch.dtype) -> None:
    weights = (W.to(dtype), GAIN.to(dtype))
    graph = graph_of(post_grad, linear_norm, rows(2, 5, K, dtype=dtype), rows(2, 5, N, dtype=dtype), weights=weights)
    problems = [region.problem for region in whole(found(graph))]
    assert len(problems) == 2
    for problem in problems:
        copies = Copies(replace(problem, constants=()), [[], []])
        examples = [torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in problem.inputs * 2]
        again = found(post_grad(copies, *examples)[0])
        assert [region.problem.key for region in again].count(problem.key) == 2, problem.key


def test_a_program_says_which_reductions_follow_its_products() -> None:
    text = "t0 = sum(i0); t1 = mul(i0, t0); t2 = mm(t1, i1); t3 = amax(t2); o0 = sub(t2, t3); t4 = add(o0, t0); o1 = mean(t4)"
    assert [line.op for line in Program.parse(text).row_epilogue] == ["amax", "mean"]
    assert Program.parse("t0 = sum(i0); o0 = mul(i0, t0)").row_epilogue == ()
