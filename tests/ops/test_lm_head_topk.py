"""The LM head with top-k sampling is found where values and indices are all that is wanted of the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.function_module import Fn

from autokernel.export.plan import region_key
from autokernel.ops import ChoosingOp, FusionOp, get_op
from autokernel.records import ConfigValue, Problem

OP = "lm_head_topk"
Scalars = tuple[tuple[str, ConfigValue], ...]
# how it is written, scalars in bf16; float32 has nothing to cast
SPELLINGS: dict[str, tuple[Callable[[torch.Tensor], Any], Scalars]] = {
    "as they are": (lambda logits: logits.topk(5), (("cast", False), ("top", 5))),
    "in float32": (lambda logits: torch.topk(logits.float(), 64, dim=-1), (("cast", True), ("top", 64))),
    "the last position": (
        lambda logits: logits[:, -1, :].to(torch.float32, copy=True).topk(1, dim=1),
        (("cast", True), ("position", "last"), ("top", 1)),
    ),
}


def found(post_grad: Any, function: Callable[..., Any], *inputs: torch.Tensor) -> list[Problem]:
    graph, _ = post_grad(Fn(function), *inputs)
    op = get_op(OP)
    assert isinstance(op, FusionOp)
    return [region.problem for region in op.match(graph, frozenset(), "cpu")]


def sampled(values: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What follows: probabilities, and tokens."""
    return values.float().softmax(-1), indices + 1


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_spellings(post_grad: Any, name: str, dtype: torch.dtype) -> None:
    choose, scalars = SPELLINGS[name]
    if dtype is torch.float32:
        scalars = tuple((key, False if key == "cast" else value) for key, value in scalars)
    x, weight = torch.randn(2, 3, 32).to(dtype), torch.randn(100, 32).to(dtype)

    def function(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sampled(*choose(torch.nn.functional.linear(x.relu(), weight)))

    (problem,) = found(post_grad, function, x, weight)
    assert [spec.shape for spec in problem.inputs] == [(2, 3, 32), (100, 32)]
    assert problem.scalars == scalars
    op, top = get_op(OP), int(dict(scalars)["top"])
    rows = 2 if "position" in dict(scalars) else 6
    kept = {1: 2, 5: 8, 64: 64}[top]
    assert op.dims(problem) == {"m": rows, "n": 100, "k": 32, "dtype_bytes": dtype.itemsize, "top": top, "kept": kept}
    assert op.flops(problem) == 2 * rows * 100 * 32
    values, indices = op.reference(problem, x, weight)
    written = values.nbytes + indices.nbytes
    assert (values.shape[-1], values.dtype) == (top, torch.float32 if dict(scalars)["cast"] else dtype)
    assert op.num_bytes(problem) == dtype.itemsize * (rows * 32 + 100 * 32) + written
    assert isinstance(op, ChoosingOp)
    (scores,) = op.scores(problem, x, weight)
    assert torch.equal(scores.to(values.dtype).gather(-1, indices), values)
    # production looks for the problem in graphs that candidates were not built from
    again = found(post_grad, lambda *inputs: op.reference(problem, *inputs), x, weight)
    assert [region_key(p) for p in again] == [region_key(problem)]


OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "logits are returned": lambda logits: (*logits.topk(5), logits),
    "values are a threshold": lambda logits: logits.masked_fill(logits < logits.topk(5).values[..., -1:], -torch.inf),
    "values alone": lambda logits: logits.topk(5).values,
    "of the smallest": lambda logits: tuple(logits.topk(5, largest=False)),
    "in any order": lambda logits: tuple(logits.topk(5, sorted=False)),
    "along the rows": lambda logits: tuple(logits.topk(2, dim=0)),
    "scaled": lambda logits: tuple((logits * 2).topk(5)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(post_grad: Any, name: str) -> None:
    x, weight = torch.randn(2, 3, 32), torch.randn(100, 32)
    assert found(post_grad, lambda x, w: OTHERS[name](torch.nn.functional.linear(x.relu(), w)), x, weight) == []


def test_several_heads_of_one_graph_have_their_own_numbers(post_grad: Any) -> None:
    def two(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*torch.topk(torch.nn.functional.linear(x, first), 7), *torch.topk(torch.nn.functional.linear(x, second), 9))

    problems = found(post_grad, two, torch.randn(4, 32), torch.randn(100, 32), torch.randn(60, 32))
    assert [(p.inputs[1].shape[0], dict(p.scalars)["top"]) for p in problems] == [(100, 7), (60, 9)]
