"""Norms and gates are found as real models spell them, in every dtype and rank, and again in what their references become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.function_module import Fn
from torch.nn import functional

from autokernel.export.plan import region_key
from autokernel.ops import FusionOp, get_op
from autokernel.records import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def found(post_grad: Any, op: str, function: Callable[..., Any], *inputs: torch.Tensor) -> list[Problem]:
    graph, _ = post_grad(Fn(function), *inputs)
    fusion = get_op(op)
    assert isinstance(fusion, FusionOp)
    return [region.problem for region in fusion.match(graph, frozenset(), "cpu")]


def assert_found_in_its_reference(post_grad: Any, problem: Problem) -> None:
    """Production looks for the problem in graphs that candidates were not built from."""
    inputs = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in problem.inputs]
    again = found(post_grad, problem.op, lambda *x: get_op(problem.op).reference(problem, *x), *inputs)
    assert [region_key(p) for p in again] == [region_key(problem)]


def llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    dtype, x = x.dtype, x.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * x.to(dtype)


def t5(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Chronos-2's too: the product promotes what was never converted."""
    normed = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(weight.dtype)


def diffusers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weight on the right."""
    normed = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(weight.dtype) * weight


def by_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)).type_as(x)


def from_zero(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of weights around 0, all of it in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).type_as(x)


@pytest.mark.parametrize("spelling", [llama, t5, diffusers, by_product])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spellings_of_a_norm(post_grad: Any, spelling: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    shapes = {torch.float32: (6, 16), torch.bfloat16: (2, 3, 16), torch.float16: (2, 3, 4, 16)}
    x, weight = torch.randn(shapes[dtype]).to(dtype), torch.randn(16).to(dtype)
    name = str(dtype).removeprefix("torch.")
    (problem,) = found(post_grad, "rms_norm", lambda x, w: spelling(x.relu(), w) * 2, x, weight)
    shape = "x".join(map(str, shapes[dtype]))
    assert problem.key == f"cpu: rms_norm({name}[{shape}], {name}[16], eps=1e-06)"


def test_torchs_own_norm_rounds_behind_the_weight(post_grad: Any) -> None:
    x, weight = torch.randn(6, 16).bfloat16(), torch.randn(16).bfloat16()
    (problem,) = found(post_grad, "rms_norm", lambda x, w: functional.rms_norm(x, (16,), w, 1e-5), x, weight)
    scalars = dict(problem.scalars)
    assert scalars["rounded"] == "late"
    assert scalars["eps"] == pytest.approx(1e-5)
    assert_found_in_its_reference(post_grad, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_one_is_added_to(post_grad: Any, dtype: torch.dtype) -> None:
    """The sum is part of the norm, in float32 too, where `1 + weight` could as well be a weight."""
    x, weight = torch.randn(2, 3, 16).to(dtype), torch.randn(16).to(dtype)
    (problem,) = found(post_grad, "rms_norm", lambda x, w: from_zero(x.relu(), w) * 2, x, weight)
    name = str(dtype).removeprefix("torch.")
    assert problem.key == f"cpu: rms_norm({name}[2x3x16], {name}[16], offset=1.0, rounded=late, eps=1e-06)"
    assert_found_in_its_reference(post_grad, problem)
    exact = from_zero(x.double(), weight.double())  # in float32, of the same numbers
    torch.testing.assert_close(get_op("rms_norm").reference(problem, x, weight)[0], exact.to(dtype))


def test_a_sum_that_was_rounded_is_a_weight_of_its_own(post_grad: Any) -> None:
    x, weight = torch.randn(6, 16).bfloat16(), torch.randn(16).bfloat16()
    (problem,) = found(post_grad, "rms_norm", lambda x, w: functional.rms_norm(x, (16,), 1 + w, 1e-5), x, weight)
    assert dict(problem.scalars) == {"rounded": "late", "eps": pytest.approx(1e-5)}


def test_a_permuted_view_keeps_its_strides(post_grad: Any) -> None:
    x, weight = torch.randn(3, 5, 16), torch.randn(16)
    (problem,) = found(post_grad, "rms_norm", lambda x, w: t5(x.transpose(0, 1), w), x, weight)
    assert (problem.inputs[0].shape, problem.inputs[0].stride) == ((5, 3, 16), (16, 80, 1))
    assert_found_in_its_reference(post_grad, problem)


AROUND: dict[str, Callable[..., Any]] = {
    "add_rms_norm": lambda x, r, w, s, g, norm=llama: ((r + x) * 2, norm(r + x, w)),
    "adaln_rms_norm": lambda x, r, w, s, g, norm=diffusers: norm(x, w) * (1 + s),
    "gated_rms_norm": lambda x, r, w, s, g, norm=diffusers: r + g.tanh() * norm(x, w),
}


@pytest.mark.parametrize("op", AROUND)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_is_fused_with_a_norm_from_zero(post_grad: Any, op: str, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 3, 16).to(dtype), torch.randn(2, 3, 16).to(dtype)
    weight, chunks = torch.randn(16).to(dtype), torch.randn(2, 1, 32).to(dtype)

    def around(*inputs: torch.Tensor) -> Any:
        return AROUND[op](*inputs, norm=from_zero)

    (problem,) = found(post_grad, op, around, x, residual, weight, *chunks.chunk(2, -1))
    assert dict(problem.scalars) == {"offset": 1.0, "rounded": "late", "eps": 1e-6}
    assert (16,) in [spec.shape for spec in problem.inputs]
    assert {spec.dtype for spec in problem.inputs} == {str(dtype).removeprefix("torch.")}
    assert_found_in_its_reference(post_grad, problem)


@pytest.mark.parametrize("op", AROUND)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_is_fused_with_a_norm(post_grad: Any, op: str, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 3, 16).to(dtype), torch.randn(2, 3, 16).to(dtype)
    weight, chunks = torch.randn(16).to(dtype), torch.randn(2, 1, 32).to(dtype)
    (problem,) = found(post_grad, op, AROUND[op], x, residual, weight, *chunks.chunk(2, -1))
    shapes = [spec.shape for spec in problem.inputs]
    row, gain, condition = (2, 3, 16), (16,), (2, 1, 16)
    by_op = {
        "add_rms_norm": [row, row, gain],
        "adaln_rms_norm": [row, gain, condition],
        "gated_rms_norm": [row, gain, condition, row],
    }
    assert shapes == by_op[op]
    assert_found_in_its_reference(post_grad, problem)
    fusion, size = get_op(op), dtype.itemsize
    outputs = 2 if op == "add_rms_norm" else 1
    assert fusion.num_bytes(problem) == sum(s.num_bytes for s in problem.inputs) + outputs * 96 * size
    assert (fusion.dims(problem)["num_rows"], fusion.dims(problem)["cols"]) == (6, 16)
    assert fusion.flops(problem) >= 4 * 96


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu", functional.silu),
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
    ],
)
def test_gated_activations(post_grad: Any, name: str, activation: Callable[..., Any], dtype: torch.dtype) -> None:
    a, b = torch.randn(6, 16).to(dtype), torch.randn(6, 16).to(dtype)
    (problem,) = found(post_grad, "gated", lambda a, b: b.relu() * activation(a), a, b)
    assert dict(problem.scalars) == {"activation": name}
    dims = get_op("gated").dims(problem)
    assert (dims["silu"], dims["gelu_tanh"]) == (name == "silu", name == "gelu_tanh")
    assert_found_in_its_reference(post_grad, problem)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_embedding_of_q_and_k(post_grad: Any, dtype: torch.dtype) -> None:
    def forward(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = (x.view(2, 3, -1, 8).transpose(1, 2) for x in (q, k))
        return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)

    tensors = [torch.randn(2, 3, n).to(dtype) for n in (32, 16)] + [torch.randn(1, 3, 8).to(dtype) for _ in range(2)]
    problems = found(post_grad, "rotary", forward, *tensors)
    assert [(p.inputs[0].shape, p.inputs[0].stride) for p in problems] == [
        ((2, 4, 3, 8), (96, 8, 32, 1)), ((2, 2, 3, 8), (48, 8, 16, 1)),
    ]  # fmt: skip
    assert problems[0].inputs[1].shape == (1, 1, 3, 8)
    assert get_op("rotary").dims(problems[0])["rows"] == 24
    assert get_op("rotary").flops(problems[0]) == 3 * 192
    assert_found_in_its_reference(post_grad, problems[0])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_language_model_of_transformers(post_grad: Any, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    graph, constants = post_grad(Fn(lambda ids: model(ids, use_cache=False).logits), torch.arange(12).view(2, 6))
    counts = {
        name: len(get_op(name).find(graph, constants, "cpu")) for name in ("rms_norm", "add_rms_norm", "rotary", "gated")
    }  # fmt: skip
    assert counts == {"rms_norm": 5, "add_rms_norm": 4, "rotary": 4, "gated": 2}
