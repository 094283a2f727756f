"""Regions around batches of products: attention that is spelled out, biases, and what keeps a batch out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops.generated_graphs import OP, Make, found, graph_of, only, ops_of, rms, rows

from autokernel.backends.compiled import Copies
from autokernel.ops.generated import explain
from autokernel.ops.legality import Rule

B, H, S, L, E = 2, 4, 9, 11, 16  # batch, heads, queries, keys, depth
SOFTMAX = "amax sub exp sum div"


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * 0.125 + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, H * E)


def heads(length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As a projection leaves them: of one position side by side."""
    return rows(B, length, H, E, dtype=dtype).transpose(1, 2)


def spelled_out(post_grad: Any, dtype: torch.dtype = torch.float32) -> Any:
    mask = rows(B, 1, S, L, dtype=dtype)
    return graph_of(post_grad, attention, heads(S, dtype), heads(L, dtype), heads(L, dtype), mask)


def test_attention_that_is_spelled_out_has_regions_around_both_products(post_grad: Any) -> None:
    graph = spelled_out(post_grad)
    programs = [ops_of(region) for region in found(graph)]
    # a transposed matrix is copied before torch's products; whole regions end where heads are put together again
    assert [text.removeprefix("clone ") for text in programs] == [
        f"bmm mul add {SOFTMAX}", "bmm mul add", f"mul add {SOFTMAX} bmm", "bmm", f"mul add {SOFTMAX}",
    ]  # fmt: skip
    scores, values = (item for item in explain(graph) if item.is_product)
    assert [broken.rule for broken in values.behind] == [Rule.VIEW], "splitting heads"
    assert scores.whole is None and values.whole is None  # noqa: PT018
    dims = OP.dims(found(graph)[0].problem)
    assert {name: dims[name] for name in ("batch", "m", "n", "k", "whole_rows", "num_reductions")} == {
        "batch": B * H, "m": S, "n": L, "k": E, "whole_rows": 1, "num_reductions": 0,
    }  # fmt: skip
    assert OP.flops(found(graph)[1].problem) >= 2 * B * H * S * L * E
    behind = OP.dims(found(graph)[2].problem)
    assert (behind["whole_rows"], behind["num_reductions"]) == (0, 2), "softmax in front of the second product"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_compiled_alone_is_the_same_region(post_grad: Any, dtype: torch.dtype) -> None:
    problems = [region.problem for region in found(spelled_out(post_grad, dtype)) if "bmm" in str(region.problem)]
    assert len(problems) == (4 if dtype == torch.float32 else 3)
    for problem in problems:
        copies = Copies(replace(problem, constants=()), [[], []])
        examples = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in problem.inputs * 2]
        again = found(post_grad(copies, *(x.zero_() for x in examples))[0])
        assert [region.problem.key for region in again].count(problem.key) == 2, problem.key


@pytest.mark.parametrize("shape", [(6, 1, L), (1, S, L), (6, S, 1), (1, 1, L), (L,)])
def test_what_is_added_to_a_batch_may_broadcast_along_it(post_grad: Any, shape: tuple[int, ...]) -> None:
    def function(bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(bias, x.exp(), y).relu()

    regions = found(graph_of(post_grad, function, rows(*shape), rows(6, S, E), rows(6, E, L)))
    assert [ops_of(region) for region in regions] == ["exp baddbmm relu", "exp baddbmm", "baddbmm relu"]


def test_batches_that_share_their_left_matrix_are_tiles_together(post_grad: Any) -> None:
    def function(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        left = rms(x)
        return torch.sigmoid(left @ y) * (left @ z)

    first = found(graph_of(post_grad, function, rows(6, S, E), rows(6, E, L), rows(6, E, L)))[0]
    assert ops_of(first) == "pow mean add rsqrt mul bmm sigmoid bmm mul"
    assert OP.dims(first.problem)["num_products"] == 2


def test_a_batch_and_a_matrix_share_no_launch(post_grad: Any) -> None:
    """The rows of one are numbered within the batch."""

    def function(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = x.exp()
        return (left @ y).cumsum(0), (left @ w).cumsum(0)

    graph = graph_of(post_grad, function, rows(6, S, E), rows(6, E, L), rows(E, L))
    assert not [region for region in found(graph) if "bmm" in (text := ops_of(region)).split() and "mm" in text.split()]
    assert Rule.USER in [broken.rule for broken in only(graph, "aten.bmm").before]


@pytest.mark.parametrize(
    ("function", "op", "rule"),
    [
        (lambda x, y: torch.baddbmm(x[:, :, :1], x, y, alpha=0.5), "aten.baddbmm", Rule.NO_CODE),
        (lambda x, y: torch.bmm(x.double(), y.double()).exp(), "aten.bmm", Rule.DTYPE),
        (lambda x, y: torch.bmm(x, x.transpose(1, 2)).exp(), "aten.bmm", Rule.NO_CODE),
    ],
)
def test_batches_without_a_region_say_why(post_grad: Any, function: Make, op: str, rule: Rule) -> None:
    item = only(graph_of(post_grad, function, rows(6, S, E), rows(6, E, L)), op)
    assert item.num_regions == 0
    assert item.whole is not None
    assert item.whole.rule is rule


@pytest.mark.parametrize(
    ("behind", "rule"),
    [
        (lambda y: y.transpose(0, 1).exp(), Rule.VIEW),
        (lambda y: y.mean(0, keepdim=True), Rule.REDUCTION),
        (lambda y: y[None] + torch.ones(5, 1, 1, 1), Rule.BROADCAST),
        (lambda y: y.cumsum(0), Rule.NO_CODE),
    ],
)
def test_an_epilogue_of_a_batch_ends(post_grad: Any, behind: Make, rule: Rule) -> None:
    graph = graph_of(post_grad, lambda x, y: behind((x @ y).sigmoid()), rows(6, S, E), rows(6, E, L))
    assert ops_of(found(graph)[0]) == "bmm sigmoid"
    assert rule in [broken.rule for broken in only(graph, "aten.bmm").behind]
