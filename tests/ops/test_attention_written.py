"""Attention that is in a graph as two products with a softmax between: found, computed the same, and replaced in production."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated_layers import bundle_of
from ops.function_module import Fn
from ops.test_attention import B, D, G, H, PostGrad, S, aten, on_gpu, regions, repeated, shapes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import autokernel
from autokernel.export.bundle import Entry
from autokernel.export.plan import region_key
from autokernel.ops import get_op
from autokernel.ops.attention import REFERENCES
from autokernel.ops.matching import op_name, spec_of
from autokernel.records import Problem
from autokernel.tracking.titles import problem_title

Q = 3
SCALARS = {"scale": 0.25, "written": "math"}


def library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
    """The library's call where it computes by products, with q as a projection leaves it."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, *mask, scale=0.25) + 1


def operands(dtype: str = "float32", mask: tuple[int, ...] | None = None, groups: int = H) -> list[torch.Tensor]:
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    found = [
        torch.randn(B, Q, H, D, dtype=kind),
        torch.randn(B, groups, S, D, dtype=kind),
        torch.randn(B, groups, S, D, dtype=kind),
    ]
    return [*found, torch.randn(mask, dtype=kind)] if mask is not None else found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", [None, (B, 1, Q, S), (1, H, 1, S)])
def test_the_librarys_products_are_one_attention(dtype: str, mask: tuple[int, ...] | None, post_grad: PostGrad) -> None:
    graph, _ = post_grad(Fn(library), *operands(dtype, mask))
    (found,) = regions(graph)
    assert shapes(found.problem) == [(B, H, Q, D), (B, H, S, D), (B, H, S, D), *([mask] if mask else [])]
    assert {spec.dtype for spec in found.problem.inputs} == {dtype}
    assert dict(found.problem.scalars) == SCALARS
    assert found.problem.inputs[0].stride == (Q * H * D, D, H * D, 1), "q as it was before it was widened"
    assert sum(op_name(node) == "aten.bmm" for node in found.inner) == 2
    left = [op_name(node) for node in graph.nodes if node not in found.inner and node.op == "call_function"]
    assert set(left) == {"aten.permute", "aten.add"}, "nothing of it stays but the view of q, and what comes behind"
    assert problem_title(found.problem).endswith(" by products (math)")


def test_booleans_are_the_mask_that_they_say(post_grad: PostGrad) -> None:
    mask = torch.ones(B, 1, Q, S, dtype=torch.bool).tril()
    (found,) = regions(post_grad(Fn(library), *operands("bfloat16"), mask)[0])
    assert found.problem.inputs[3].dtype == "bool"
    assert found.inputs[3].op == "placeholder"


def test_heads_that_share_keys_are_seen_unrepeated(post_grad: PostGrad) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return library(q, repeated(k), repeated(v))

    (found,) = regions(post_grad(Fn(call), *operands(groups=G))[0])
    assert shapes(found.problem) == [(B, H, Q, D), (B, G, S, D), (B, G, S, D)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, ((B, 1, Q, S), "bfloat16")])
def test_on_a_gpu_inductor_computes_the_softmax_in_one_pass(dtype: str, mask: Any) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *m: torch.Tensor) -> torch.Tensor:
        masks = [m[0].to(q.dtype)] if m else []
        return aten._scaled_dot_product_attention_math(q.transpose(1, 2), k, v, *masks, scale=0.25)[0] + 1

    cache = ((B, H, S, D), dtype)
    graph = on_gpu(call, ((B, Q, H, D), dtype), cache, cache, *([mask] if mask else []))
    assert any(op_name(node) == "prims.prepare_softmax_online" for node in graph.nodes)
    (found,) = regions(graph, "cuda")
    assert dict(found.problem.scalars) == SCALARS
    assert len(found.problem.inputs) == (4 if mask else 3)


@pytest.mark.parametrize("mask", [None, "float32", "bool"])
@pytest.mark.parametrize("groups", [G, H])
def test_the_compiled_reference_has_the_very_same_problem(mask: str | None, groups: int, post_grad: PostGrad) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *m: torch.Tensor) -> torch.Tensor:
        return library(q, repeated(k) if groups == G else k, repeated(v) if groups == G else v, *m)

    given = operands(groups=groups)
    given += [] if mask is None else [torch.ones(B, 1, Q, S).tril().to(getattr(torch, mask))]
    (found,) = regions(post_grad(Fn(call), *given)[0])
    problem = found.problem
    reference = Fn(lambda q, *rest: get_op("attention").reference(problem, q.transpose(1, 2), *rest)[0] + 1)
    (again,) = regions(post_grad(reference, *given)[0])
    assert region_key(again.problem) == region_key(problem)
    torch.testing.assert_close(reference(*given), call(*given))


@pytest.mark.parametrize("scale", [0.125, 128**-0.5, 0.3])
def test_a_scale_whose_root_is_no_number_is_the_same_when_it_is_compiled_again(scale: float, post_grad: PostGrad) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, scale=scale) + 1

    given = operands()
    given[0] = given[0].transpose(1, 2)
    (found,) = regions(post_grad(Fn(call), *given)[0])
    assert dict(found.problem.scalars)["scale"] == pytest.approx(scale, rel=1e-11)
    reference = Fn(lambda *x: get_op("attention").reference(found.problem, *x)[0] + 1)
    (again,) = regions(post_grad(reference, *given)[0])
    assert region_key(again.problem) == region_key(found.problem)


def _rounded_between(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scores that are rounded to 16 bits: not what the library computes, and not what its reference would."""
    scores = (q.transpose(1, 2).float() @ k.float().transpose(-1, -2)).bfloat16().float()
    return torch.softmax(scores, -1) @ v.float()


def _of_columns(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q.transpose(1, 2) @ k.transpose(-1, -2)
    return aten._safe_softmax(scores, -2) @ v


def _changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax((q.transpose(1, 2) @ k.transpose(-1, -2)).cos(), -1) @ v


def _widened(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Products in fp32 of 16-bit operands, without the library's guard: neither style rounds like this."""
    q, k, v = q.transpose(1, 2).bfloat16().float(), k.bfloat16().float(), v.bfloat16().float()
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def _other_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The rows that are zero are not those of the scores."""
    scores = q.transpose(1, 2) @ k.transpose(-1, -2)
    nothing = ~(scores.sin() != -torch.inf).any(-1, keepdim=True)
    return torch.where(nothing, 0.0, torch.softmax(scores, -1)) @ v


def _added_booleans(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """True is one more, not "is seen"."""
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) + (k[:, :, :1, :1] > 0)
    return aten._safe_softmax(scores, -1) @ v


@pytest.mark.parametrize("call", [_rounded_between, _of_columns, _changed, _widened, _other_scores, _added_booleans])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_computes_something_else_is_left_alone(call: Callable[..., Any], dtype: str, post_grad: PostGrad) -> None:
    assert regions(post_grad(Fn(call), *operands(dtype))[0]) == []


def test_weights_that_others_use_are_computed_for_them(post_grad: PostGrad) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return aten._scaled_dot_product_attention_math(q.transpose(1, 2), k, v, scale=0.25)

    (found,) = regions(post_grad(Fn(call), *operands())[0])
    assert sum(op_name(node) == "aten.bmm" for node in found.inner) == 1, "the first product serves the weights, too"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bundle_replaces_it(dtype: str, post_grad: PostGrad) -> None:
    model, given = Fn(library), operands(dtype, (B, 1, Q, S))
    given[3][:, :, 0] = -torch.inf  # sees nothing
    (found,) = regions(post_grad(model, *given)[0])
    bundled = autokernel.backend(
        bundle_of(Entry(problem=found.problem, backend="inductor", config={"implementation": "reduction"}))
    )
    torch._dynamo.reset()
    with torch.no_grad():
        _, (stock,) = torch._inductor.utils.run_and_get_code(torch.compile(model, fullgraph=True), *given)
        torch._dynamo.reset()
        out, (code,) = torch._inductor.utils.run_and_get_code(torch.compile(model, backend=bundled, fullgraph=True), *given)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, model(*given), **tolerance)
    (usage,) = bundled.usage().values()
    assert (usage.hits, usage.reasons) == (1, [])
    assert "extern_kernels.bmm" in stock
    assert "extern_kernels.bmm" not in code


# ---- as models write it


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor, scale: float = 0.25) -> torch.Tensor:
    """`eager_attention_forward` of transformers."""
    weights = torch.matmul(q.transpose(1, 2), k.transpose(2, 3)) * scale
    weights = weights + mask[0] if mask else weights
    weights = torch.softmax(weights, -1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2) + 1


def mask_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(mask + torch.matmul(q.transpose(1, 2), k.transpose(2, 3)) / 4, -1)
    return torch.matmul(weights, v).transpose(1, 2) + 1


def unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
    return eager(q * 0.5, k, v, *mask, scale=1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", [None, (B, 1, Q, S)])
def test_on_a_gpu_what_models_write_is_one_attention(dtype: str, mask: tuple[int, ...] | None) -> None:
    cache = ((B, H, S, D), dtype)
    graph = on_gpu(eager, ((B, Q, H, D), dtype), cache, cache, *([(mask, dtype)] if mask else []))
    (found,) = regions(graph, "cuda")
    assert shapes(found.problem) == [(B, H, Q, D), (B, H, S, D), (B, H, S, D), *([mask] if mask else [])]
    assert dict(found.problem.scalars) == {"scale": 0.25, "written": "eager"}
    left = [op_name(node) for node in graph.nodes if node not in found.inner and node.op == "call_function"]
    assert set(left) == {"aten.permute", "aten.add"}, "nothing of it stays but views, and what comes behind"

    problem = found.problem

    def reference(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        q = torch.ops.aten.permute.default(q, [0, 2, 1, 3])
        return aten.permute.default(REFERENCES["eager"](q, *rest[:2], rest[2] if mask else None, 0.25), [0, 2, 1, 3]) + 1

    again = on_gpu(reference, ((B, Q, H, D), dtype), cache, cache, *([(mask, dtype)] if mask else []))
    assert [region_key(region.problem) for region in regions(again, "cuda")] == [region_key(problem)]


@pytest.mark.parametrize("call", [mask_first, unscaled])
def test_other_ways_to_write_it(call: Callable[..., Any]) -> None:
    cache = ((B, H, S, D), "bfloat16")
    (found,) = regions(on_gpu(call, ((B, Q, H, D), "bfloat16"), cache, cache, ((B, 1, Q, S), "bfloat16")), "cuda")
    assert dict(found.problem.scalars) == {"scale": 1.0 if call is unscaled else 0.25, "written": "eager"}


@pytest.mark.parametrize("mask", [None, "float32", "bool"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_what_models_write(mask: str | None, dtype: str) -> None:
    given = operands(dtype)
    seen = torch.ones(B, 1, Q, S, dtype=torch.bool).tril()
    masks = [] if mask is None else [seen if mask == "bool" else torch.where(seen, 0.0, -torch.inf).to(given[0].dtype)]
    specs = [spec_of(x) for x in (given[0].transpose(1, 2), *given[1:], *masks)]
    scalars = (("scale", 0.25), ("written", "eager"))
    problem = Problem(op="attention", inputs=tuple(s for s in specs if s), device="cpu", scalars=scalars)
    (out,) = get_op("attention").reference(problem, given[0].transpose(1, 2), *given[1:], *masks)
    numbers = [torch.where(seen, 0.0, -torch.inf).to(given[0].dtype)] if mask else []
    torch.testing.assert_close(out.transpose(1, 2) + 1, eager(*given, *numbers), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bundle_replaces_what_models_write(dtype: str, post_grad: PostGrad) -> None:
    model, given = Fn(eager), operands(dtype, (B, 1, Q, S))
    (found,) = regions(post_grad(model, *given)[0])
    assert dict(found.problem.scalars)["written"] == "eager", "Inductor has no pattern for a mask behind a scale"
    bundled = autokernel.backend(
        bundle_of(Entry(problem=found.problem, backend="inductor", config={"implementation": "reduction"}))
    )
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, backend=bundled, fullgraph=True)(*given)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, model(*given), **tolerance)
    (usage,) = bundled.usage().values()
    assert (usage.hits, usage.reasons) == (1, [])


def test_a_model_that_writes_its_attention_out(post_grad: PostGrad) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=H * D, intermediate_size=96, num_hidden_layers=2, num_attention_heads=H,
        num_key_value_heads=G, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    call = Fn(lambda ids: model(input_ids=ids, use_cache=False).logits)
    found = regions(post_grad(call, torch.zeros(B, 8, dtype=torch.long))[0])
    assert [shapes(region.problem)[:3] for region in found] == [[(B, H, 8, D), (B, G, 8, D), (B, G, 8, D)]] * 2
    assert {dict(region.problem.scalars)["written"] for region in found} == {"eager"}
