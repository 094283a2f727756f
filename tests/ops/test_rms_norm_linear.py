"""Norms in front of linear layers are found as real models spell them, and again in what their references become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.function_module import Fn
from ops.test_norms import by_product, llama, t5
from torch import nn
from torch.nn import functional

from autokernel.export.plan import region_key
from autokernel.ops import FusionOp, get_op
from autokernel.ops.base import LaunchingOp
from autokernel.records import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE, SEVERAL = OPS = ("rms_norm_linear", "rms_norm_qkv")


def problems(graph: Any, op: str) -> list[Problem]:
    fusion = get_op(op)
    assert isinstance(fusion, FusionOp)
    return [region.problem for region in fusion.match(graph, frozenset(), "cuda")]


def found(post_grad: Any, op: str, function: Callable[..., Any], *inputs: torch.Tensor) -> list[Problem]:
    graph, _ = post_grad(Fn(function), *inputs)
    assert problems(graph, next(name for name in OPS if name != op)) == [], "a norm is one of the two"
    return problems(graph, op)


def assert_found_in_its_reference(post_grad: Any, problem: Problem) -> None:
    """Production looks for the problem in graphs that candidates were not built from."""
    inputs = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in problem.inputs]
    again = found(post_grad, problem.op, lambda *x: get_op(problem.op).reference(problem, *x), *inputs)
    assert [region_key(p) for p in again] == [region_key(problem)]


def torchs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, 1e-6)


def around_one(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


class Half(nn.Module):
    """What half of a layer begins with: a norm, and linear layers behind it."""

    def __init__(self, norm: Callable[..., torch.Tensor], columns: tuple[int, ...], bias: str) -> None:
        super().__init__()
        self.norm, self.weight = norm, nn.Parameter(torch.rand(16))
        self.layers = nn.ModuleList([nn.Linear(16, n, bias=b == "1") for n, b in zip(columns, bias, strict=True)])

    def forward(self, x: torch.Tensor) -> Any:
        normed = self.norm(x.exp(), self.weight)
        return tuple(layer(normed).reshape(*x.shape[:-1], -1, 4).transpose(-2, -3) for layer in self.layers)


@pytest.mark.parametrize("norm", [llama, t5, by_product, torchs, around_one])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "bias"), [((32,), "0"), ((8, 32, 8), "000")])
def test_spellings_of_a_norm(
    post_grad: Any, columns: tuple[int, ...], bias: str, dtype: torch.dtype, norm: Callable[..., torch.Tensor]
) -> None:
    shapes = {torch.float32: (6, 16), torch.bfloat16: (2, 3, 16), torch.float16: (2, 3, 4, 16)}
    x, op, other = torch.randn(shapes[dtype]).to(dtype), OPS[len(columns) > 1], OPS[len(columns) == 1]
    graph, constants = post_grad(Half(norm, columns, bias).to(dtype), x)
    (site,) = get_op(op).find(graph, constants, "cuda")
    assert get_op(other).find(graph, constants, "cuda") == []
    assert get_op(op).find(graph, constants, "cpu") == [], "there is no kernel for it"
    problem, scalars = site.problem, dict(site.problem.scalars)
    wide = sorted(columns, reverse=True)
    assert [spec.shape for spec in problem.inputs] == [tuple(x.shape), (16,), *((16, n) for n in wide)]
    assert problem.constants == tuple(range(1, 2 + len(columns)))
    assert scalars["eps"] == pytest.approx(1e-6)
    # in fp32 nothing is rounded on the way, and torch's own is as the others are
    late = norm is around_one or (norm is torchs and dtype is not torch.float32)
    assert scalars.get("rounded", "early") == ("late" if late else "early")
    assert scalars.get("offset", 0.0) == (1.0 if norm is around_one else 0.0)
    assert site.producers == ("aten.exp",)
    assert len(set(site.consumers)) == 1
    assert_found_in_its_reference(post_grad, problem)


def test_costs(post_grad: Any) -> None:
    graph, constants = post_grad(Half(llama, (8, 32, 8), "011").bfloat16(), torch.randn(2, 3, 16).bfloat16())
    (site,) = get_op(SEVERAL).find(graph, constants, "cuda")
    op, problem = get_op(SEVERAL), site.problem
    assert dict(op.dims(problem)) == {"m": 6, "k": 16, "n": 48, "min_n": 8, "num_parts": 3, "dtype_bytes": 2}
    assert op.flops(problem) == 2 * 6 * 16 * 48
    biases = sum(spec.shape[0] for spec in problem.inputs[5:])
    assert biases == 40
    assert op.num_bytes(problem) == 2 * (6 * 16 + 16 + 16 * 48 + biases + 6 * 48)
    assert isinstance(op, LaunchingOp)
    assert op.launched(problem).key == "cuda: rms_norm(bfloat16[2x3x16], bfloat16[16], eps=1e-06)"


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
@pytest.mark.parametrize(
    ("columns", "bias", "said"), [((32,), "1", True), ((32, 32), "11", "11"), ((32, 8, 8), "101", "110"), ((8, 8), "01", "10")]
)
def test_biases(
    post_grad: Any, columns: tuple[int, ...], bias: str, said: Any, rows: tuple[int, ...]
) -> None:  # fmt: skip
    """Of two or three products some may have one; what has one comes first."""
    graph, _ = post_grad(Half(llama, columns, bias), torch.randn(*rows, 16))
    (problem,) = problems(graph, OPS[len(columns) > 1])
    assert dict(problem.scalars)["bias"] == said
    assert [spec.shape for spec in problem.inputs[2 + len(columns) :]] == [
        (n,) for n, there in zip(columns, bias, strict=True) if there == "1"
    ]
    assert_found_in_its_reference(post_grad, problem)


def test_a_bias_beside_its_product(post_grad: Any) -> None:
    """As Inductor leaves them on a GPU where something pointwise follows."""

    def layer(x: torch.Tensor, weight: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (llama(x, weight) @ w + bias).sin()

    (problem,) = found(post_grad, ONE, layer, *(torch.randn(*s) for s in ((6, 16), (16,), (16, 32), (32,))))
    assert dict(problem.scalars)["bias"] is True
    assert_found_in_its_reference(post_grad, problem)


def linear(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x @ w for w in weights)


# of the normed rows, x and two matrices
OTHERS: dict[str, Callable[..., Any]] = {
    "one layer, and the norm itself": lambda y, x, a, b: (y @ a, y.sin()),
    "two layers, and the norm itself": lambda y, x, a, b: (*linear(y, a, b), y.sin()),
    "the norm is a result": lambda y, x, a, b: (*linear(y, a, b), y),
    "four layers": lambda y, x, a, b: linear(y, a, b, a.sin(), b.sin()),
    "the norm is a right matrix": lambda y, x, a, b: (y @ a, a.t().sin() @ y.t()),
    "one layer's weight comes from the other": lambda y, x, a, b: [q := y @ a, y @ (b * q.sum())],
    "a scaled product": lambda y, x, a, b: torch.addmm((x @ a).sin(), y, a, beta=0.5),
    "one of two products is scaled": lambda y, x, a, b: (torch.addmm(a[0], y, a, alpha=0.5), y @ b),
    "a residual of rows": lambda y, x, a, b: (torch.addmm((x @ a).sin(), y, a), y @ b),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_stays_as_it_is(post_grad: Any, name: str) -> None:
    """A norm with other users is computed anyway: swallowed, it would be computed twice."""
    inputs = [torch.randn(*s) for s in ((6, 16), (16,), (16, 32), (16, 24))]
    graph, _ = post_grad(Fn(lambda x, g, a, b: OTHERS[name](llama(x, g), x, a, b)), *inputs)
    assert len(problems(graph, "rms_norm")) == 1
    assert [problems(graph, op) for op in OPS] == [[], []]


def test_only_few_rows(post_grad: Any) -> None:
    for rows, count in ((128, 1), (129, 0)):
        inputs = [torch.randn(*shape) for shape in ((1, rows, 16), (16,), (16, 32), (16, 24))]
        graph, _ = post_grad(Fn(lambda x, g, a, b: linear(llama(x, g), a, b)), *inputs)
        assert len(problems(graph, SEVERAL)) == count
        graph, _ = post_grad(Fn(lambda x, g, a, b: llama(x, g) @ a), *inputs)
        assert len(problems(graph, ONE)) == count


def test_memory_that_is_written_between_the_products(post_grad: Any) -> None:
    def layer(x: torch.Tensor, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor, write: bool) -> Any:
        normed = llama(x, g)
        q = normed @ a  # written between the products, b is another matrix for the second one
        if write:
            b.copy_(q.sum(0)[:16, None].expand(16, 24))
        return q, normed @ b

    shapes = ((6, 16), (16,), (16, 32), (16, 24))
    for write in (False, True):
        graph, _ = post_grad(Fn(lambda *inputs, w=write: layer(*inputs, w)), *(torch.randn(*s) for s in shapes))
        assert len(problems(graph, SEVERAL)) == (not write)


@pytest.mark.parametrize(("kind", "bias"), [("llama", "000"), ("qwen2", "111")])
def test_a_language_model_of_transformers(post_grad: Any, kind: str, bias: str) -> None:
    """Queries, keys and values; gate and up; and the head, behind the last norm. The parts alone are found there as well."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    graph, constants = post_grad(Fn(lambda ids: model(ids, use_cache=False).logits), torch.arange(12).view(2, 6))
    sites = get_op(SEVERAL).find(graph, constants, "cuda")
    weights = [[spec.shape[1] for spec in site.problem.inputs[2:] if len(spec.shape) == 2] for site in sites]
    assert weights == [[32, 16, 16], [64, 64]] * 2
    assert [dict(site.problem.scalars)["bias"] for site in sites] == [bias, "00"] * 2
    (head,) = get_op(ONE).find(graph, constants, "cuda")
    assert [spec.shape for spec in head.problem.inputs] == [(2, 6, 32), (32,), (32, 64)]
    norms = get_op("rms_norm").find(graph, constants, "cuda")
    assert len(norms) == 5
    for norm, site in zip(norms, (*sites, head), strict=True):
        assert set(norm.nodes) < set(site.nodes), "rivals: a plan has one of them"
    merged = get_op("merged_mm").find(graph, constants, "cuda")
    for site in sites:
        assert sum(set(group.nodes) < set(site.nodes) for group in merged) == 1
    generated = {tuple(site.nodes) for site in get_op("generated").find(graph, constants, "cuda")}
    assert any(set(nodes) & set(head.nodes) for nodes in generated)
