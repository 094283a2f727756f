"""Rotary embeddings with a norm before, and of queries and keys together, are found where models of two libraries have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.function_module import Fn
from torch import nn
from torch.fx import Graph

from autokernel.export.plan import region_key
from autokernel.ops import FusionOp, Region, get_op
from autokernel.records import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ("rotary_qk", "norm_rotary", "norm_rotary_complex", "rotary", "rotary_complex")
B, T, H, G, D = 2, 3, 4, 2, 8


def regions(graph: Graph, op: str) -> list[Region]:
    fusion = get_op(op)
    assert isinstance(fusion, FusionOp)
    return fusion.match(graph, frozenset(), "cpu")


def found(graph: Graph, op: str) -> list[Problem]:
    return [region.problem for region in regions(graph, op)]


def counts(graph: Graph) -> dict[str, int]:
    return {op: len(problems) for op in OPS if (problems := found(graph, op))}


def again(post_grad: Any, problem: Problem) -> list[str]:
    """What of the op is found in the reference, compiled alone: candidates are built so."""
    inputs = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in problem.inputs]
    graph, _ = post_grad(Fn(lambda *x: get_op(problem.op).reference(problem, *x)), *inputs)
    return [region_key(p) for p in found(graph, problem.op)]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def by_numbers(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * turns.unsqueeze(2)).flatten(3).type_as(x)


def tables(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = torch.randn(1, 1, T, D), torch.randn(1, 1, T, D)
    return cos.to(dtype), sin.to(dtype)


def test_a_language_model_that_norms_its_heads(post_grad: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=H, num_key_value_heads=G,
        head_dim=D, vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    graph, _ = post_grad(Fn(lambda ids: model(ids, use_cache=False).logits), torch.arange(B * T).view(B, T))
    assert counts(graph) == {"rotary_qk": 2, "norm_rotary": 4, "rotary": 4}
    pairs, (one, *_) = found(graph, "rotary_qk"), found(graph, "norm_rotary")
    assert [spec.shape for spec in one.inputs] == [(B, T, H, D), (D,), (1, 1, T, D), (1, 1, T, D)]
    assert [spec.shape for spec in pairs[0].inputs] == [
        (B, T, H, D), (D,), (B, T, G, D), (D,), (1, 1, T, D), (1, 1, T, D),
    ]  # fmt: skip
    assert pairs[0].key == pairs[1].key
    assert {spec.dtype for spec in pairs[0].inputs} == {"bfloat16"}
    assert dict(pairs[0].scalars) == {"eps": 1e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_a_norm_before_or_behind_the_heads_order(post_grad: Any, dtype: torch.dtype, first: bool) -> None:
    def forward(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = x.view(B, T, H, D)
        normed = norm(heads.transpose(1, 2), weight) if first else norm(heads, weight).transpose(1, 2)
        return turned(normed, cos, sin).exp()

    graph, _ = post_grad(Fn(forward), torch.randn(B, T, H * D).to(dtype), torch.randn(D).to(dtype), *tables(dtype))
    (problem,) = found(graph, "norm_rotary")
    assert dict(problem.scalars) == {"eps": 1e-6, **({"heads": "first"} if first else {})}
    x = problem.inputs[0]
    expected = ((B, H, T, D), (T * H * D, D, H * D, 1)) if first else ((B, T, H, D), (T * H * D, H * D, D, 1))
    assert (x.shape, x.stride) == expected
    assert again(post_grad, problem) == [region_key(problem)]
    size, op = dtype.itemsize, get_op("norm_rotary")
    assert op.num_bytes(problem) == (2 * B * T * H * D + D + 2 * T * D) * size
    assert op.flops(problem) == 7 * B * T * H * D
    assert op.dims(problem) == {"rows": B * T * H, "head_dim": D, "dtype_bytes": size}


class ZImages(nn.Module):
    """As the processor of its attention spells it: both norms, then both rotary embeddings."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.q = nn.Linear(16, H * D, bias=False, dtype=dtype)
        self.k = nn.Linear(16, H * D, bias=False, dtype=dtype)
        self.gains = nn.Parameter(torch.randn(2, D, dtype=dtype))

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        heads = (layer(x).unflatten(-1, (H, -1)) for layer in (self.q, self.k))
        normed = [_diffusers(y, gain) for y, gain in zip(heads, self.gains, strict=True)]
        q, k = (by_numbers(y, turns).transpose(1, 2) for y in normed)
        return q @ k.transpose(2, 3)


def _diffusers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    normed = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-5)
    return normed.to(weight.dtype) * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_normed_and_turned_by_complex_numbers(post_grad: Any, dtype: torch.dtype) -> None:
    inputs = torch.randn(B, T, 16, dtype=dtype), torch.randn(B, T, D // 2, dtype=torch.complex64)
    graph, _ = post_grad(ZImages(dtype), *inputs)
    assert counts(graph) == {"rotary_qk": 1, "norm_rotary_complex": 2, "rotary_complex": 2}
    (pair,) = found(graph, "rotary_qk")
    assert [spec.shape for spec in pair.inputs] == [(B, T, H, D), (D,), (B, T, H, D), (D,), (B, T, D // 2)]
    for problem in (pair, found(graph, "norm_rotary_complex")[0]):
        assert again(post_grad, problem) == [region_key(problem)]
    op, one = get_op("rotary_qk"), found(graph, "norm_rotary_complex")[0]
    assert op.flops(pair) == 2 * get_op(one.op).flops(one) == 2 * 7 * B * T * H * D
    assert op.num_bytes(pair) == (4 * B * T * H * D + 2 * D) * dtype.itemsize + B * T * D // 2 * 8
    assert op.dims(pair) == {"rows": 2 * B * T * H, "head_dim": D, "dtype_bytes": dtype.itemsize}


def test_queries_and_keys_without_a_norm_are_one_region(post_grad: Any) -> None:
    def forward(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        k, q = (turned(x.view(B, T, -1, D).transpose(1, 2), cos, sin) for x in (k, q))
        return k.relu(), q.relu()

    tensors = torch.randn(B, T, H * D), torch.randn(B, T, G * D)
    graph, _ = post_grad(Fn(forward), *tensors, *tables(torch.float32))
    (region,) = regions(graph, "rotary_qk")
    problem = region.problem
    assert [spec.shape[1] for spec in problem.inputs[:2]] == [H, G], "the larger one first, whatever the graph's order is"
    assert [node.meta["val"].shape[1] for node in region.outputs] == [H, G]
    assert again(post_grad, problem) == [region_key(problem)]
    q, k, *both = (torch.randn(spec.shape) for spec in problem.inputs)
    results = get_op("rotary_qk").reference(problem, q, k, *both)
    for result, expected in zip(results, (turned(q, *both), turned(k, *both)), strict=True):
        torch.testing.assert_close(result, expected)


APART: dict[str, Callable[..., Any]] = {
    "other tables": lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, sin, cos)),
    "one after the other": lambda q, k, cos, sin: turned(turned(q, cos, sin).exp() + k, cos, sin),
    "other norms": lambda q, k, cos, sin: tuple(
        turned(norm(x, cos[0, 0, 0], eps), cos, sin) for x, eps in ((q, 1e-6), (k, 1e-5))
    ),
    "normed and not": lambda q, k, cos, sin: (turned(norm(q, cos[0, 0, 0]), cos, sin), turned(k, cos, sin)),
}


@pytest.mark.parametrize("name", APART)
def test_what_one_call_cannot_do(post_grad: Any, name: str) -> None:
    tensors = torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    graph, _ = post_grad(Fn(APART[name]), *tensors, *tables(torch.float32))
    assert found(graph, "rotary_qk") == []
    assert len(found(graph, "rotary")) == 2


def test_a_cache_that_is_written_between_keeps_them_apart() -> None:
    """What the second one reads is written behind the first one's result, and that before the second one's."""
    graph = Graph()
    values = {name: graph.placeholder(name) for name in ("q", "k", "cos", "sin")}
    aten = torch.ops.aten
    for name, node in values.items():
        node.meta["val"] = torch.empty((B, H, T, D) if name in "qk" else (1, 1, T, D), device="meta")

    def call(target: Any, *arguments: Any) -> Any:
        node = graph.call_function(target, arguments)
        node.meta["val"] = target(*torch.fx.node.map_arg(arguments, lambda operand: operand.meta["val"]))
        return node

    def rotated(x: Any) -> Any:
        behind, before = (call(aten.slice.Tensor, x, 3, *ends) for ends in ((D // 2, D), (0, D // 2)))
        swapped = call(aten.cat.default, [call(aten.neg.default, behind), before], -1)
        return call(aten.add.Tensor, call(aten.mul.Tensor, x, values["cos"]), call(aten.mul.Tensor, swapped, values["sin"]))

    first = rotated(values["q"])
    write = call(aten.zero_.default, values["k"])
    second = rotated(values["k"])
    graph.output((first, second))
    assert len(found(graph, "rotary")) == 2
    assert found(graph, "rotary_qk") == []
    graph.erase_node(write)
    assert len(found(graph, "rotary_qk")) == 1
