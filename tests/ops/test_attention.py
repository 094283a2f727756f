"""Attention in the graphs of real models, and as `scaled_dot_product_attention` spells it for each kernel of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from export.pretended_h200 import Generated, pretended_h200
from ops.function_module import Fn
from torch import nn
from torch.fx import Graph
from torch.nn.functional import scaled_dot_product_attention

from autokernel.export.plan import region_key
from autokernel.ops import Region, get_op
from autokernel.ops.attention import Attention
from autokernel.ops.matching import op_name, spec_of
from autokernel.records import Problem, TensorSpec

PostGrad = Callable[..., tuple[Graph, frozenset[str]]]
B, H, G, S, D = 2, 4, 2, 37, 16
aten = torch.ops.aten


def regions(graph: Graph, device: str = "cpu") -> list[Region]:
    return Attention().match(graph, frozenset(), device)


def shapes(problem: Problem) -> list[tuple[int, ...]]:
    return [spec.shape for spec in problem.inputs]


def tensors(q_len: int = 1, dtype: torch.dtype = torch.float32, groups: int = H) -> tuple[torch.Tensor, ...]:
    q = torch.randn(B, q_len, H, D, dtype=dtype).transpose(1, 2)
    return q, torch.randn(B, groups, S, D, dtype=dtype), torch.randn(B, groups, S, D, dtype=dtype)


# ---- models on the CPU


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=H * D, intermediate_size=96, num_hidden_layers=2, num_attention_heads=H,
        num_key_value_heads=G, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


class Decode(nn.Module):
    """One step over a static cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        import transformers

        self.model = model
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=S)
        self.cache.early_initialization(
            batch_size=B, num_heads=G, head_dim=D, dtype=torch.float32, device=torch.device("cpu")
        )  # fmt: skip

    def forward(self, ids: torch.Tensor, at: torch.Tensor) -> Any:
        return self.model(
            input_ids=ids, past_key_values=self.cache, cache_position=at, position_ids=at[None], use_cache=True
        ).logits  # fmt: skip


def test_a_models_decoding_step_reads_its_cache_unrepeated_and_its_mask_as_booleans(llama: Any, post_grad: PostGrad) -> None:
    graph, _ = post_grad(Decode(llama), torch.zeros(B, 1, dtype=torch.long), torch.tensor([5]))
    found = regions(graph)
    assert len(found) == 2
    for region in found:
        assert shapes(region.problem) == [(B, H, 1, D), (B, G, S, D), (B, G, S, D), (B, 1, 1, S)]
        assert region.problem.inputs[3].dtype == "bool"
        assert region.problem.inputs[1].stride == (G * S * D, S * D, D, 1)
        assert {op_name(node) for node in region.inner} >= {"aten.clone", "aten.unsqueeze", "getitem"}
    assert region_key(found[0].problem) == region_key(found[1].problem)
    assert found[0].inputs[3] is found[1].inputs[3], "layers share the mask"
    assert not found[0].inner & found[1].inner


def test_a_models_prompt(llama: Any, post_grad: PostGrad) -> None:
    module = Fn(lambda ids: llama(input_ids=ids, use_cache=False).logits)
    graph, _ = post_grad(module, torch.zeros(B, 8, dtype=torch.long))
    found = regions(graph)
    assert len(found) == 2
    assert shapes(found[0].problem)[:3] == [(B, H, 8, D), (B, G, 8, D), (B, G, 8, D)]


def test_unscaled_attention_with_a_bias_as_t5_has_it(post_grad: PostGrad) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.T5Config(d_model=64, d_kv=D, d_ff=128, num_layers=1, num_heads=H, vocab_size=64)
    model = transformers.T5EncoderModel(config).eval().requires_grad_(False)
    graph, _ = post_grad(Fn(lambda ids: model(input_ids=ids).last_hidden_state), torch.zeros(B, 8, dtype=torch.long))
    (found,) = regions(graph)
    assert dict(found.problem.scalars)["scale"] == 1.0
    assert shapes(found.problem) == [(B, H, 8, D)] * 3 + [(1, H, 8, 8)]


@pytest.mark.parametrize("masked", [False, True])
def test_spelled_out_attention_is_found_where_inductor_makes_a_library_call_of_it(masked: bool, post_grad: PostGrad) -> None:
    q, k, v = (x.contiguous() for x in tensors(q_len=3, dtype=torch.bfloat16, groups=H))
    masks = [torch.randn(1, H, 3, S).bfloat16()] if masked else []

    def spelled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
        scores = sum(mask, q @ k.transpose(-2, -1) / D**0.5)
        return (scores.softmax(-1) @ v).cos()

    (found,) = regions(post_grad(Fn(spelled), q, k, v, *masks)[0])
    assert shapes(found.problem) == [(B, H, 3, D), (B, H, S, D), (B, H, S, D), *([(1, H, 3, S)] if masked else [])]
    assert dict(found.problem.scalars)["scale"] == D**-0.5


@pytest.mark.parametrize("mask", [None, "bool", "float32"])
@pytest.mark.parametrize("gqa", [False, True])
def test_the_compiled_reference_has_the_very_same_problem(mask: str | None, gqa: bool, post_grad: PostGrad) -> None:
    q, k, v = tensors(q_len=3, groups=G if gqa else H)
    masks = [] if mask is None else [torch.zeros(B, 1, 3, S, dtype=getattr(torch, mask))]
    call = Fn(lambda q, k, v, *m: scaled_dot_product_attention(q, k, v, *m, scale=0.25, enable_gqa=gqa) + 1)
    (found,) = regions(post_grad(call, q, k, v, *masks)[0])
    problem = found.problem
    assert [spec.dtype for spec in problem.inputs[3:]] == ([mask] if mask else [])
    assert shapes(problem)[1] == (B, G if gqa else H, S, D)
    reference = Fn(lambda *inputs: get_op("attention").reference(problem, *inputs))
    (again,) = regions(post_grad(reference, q, k, v, *masks)[0])
    assert region_key(again.problem) == region_key(problem)


def test_a_mask_of_more_digits_is_not_rounded_before_it_is_added() -> None:
    q, k, v = tensors(q_len=3, dtype=torch.bfloat16, groups=H)
    mask = torch.randn(B, 1, 3, S) * 30
    problem = Problem(
        op="attention",
        inputs=tuple(spec for x in (q, k, v, mask) if (spec := spec_of(x)) is not None),
        device="cpu",
        scalars=(("scale", 0.25),),
    )
    (found,) = get_op("attention").reference(problem, q, k, v, mask)
    assert torch.equal(found, scaled_dot_product_attention(q, k, v, mask, scale=0.25))
    assert not torch.equal(found, scaled_dot_product_attention(q, k, v, mask.bfloat16(), scale=0.25))
    wide = [x.double() for x in (q, k, v, mask)]
    (exact,) = get_op("attention").reference(problem, *wide)
    assert exact.dtype is torch.float64


def test_dropout_and_other_results_in_use_are_left_alone(post_grad: PostGrad) -> None:
    q, k, v = tensors(q_len=3)
    dropped = Fn(lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert not regions(post_grad(dropped, q, k, v)[0])
    both = Fn(lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2])
    assert not regions(post_grad(both, q, k, v)[0])
    one = Fn(lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0])
    assert len(regions(post_grad(one, q, k, v)[0])) == 1


# ---- spellings on a GPU, as ATen's attention.cpp writes them


def added(mask: torch.Tensor, dtype: torch.dtype, lowest: float = float("-inf")) -> torch.Tensor:
    """convert_boolean_attn_mask"""
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(lowest, dtype=dtype, device=mask.device))


def efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """The memory-efficient kernel: masks are padded to a multiple of 8, and stretched."""
    bias = None if mask is None else added(mask, q.dtype)
    if bias is not None:
        if any(stride % 8 for stride in bias.stride()[:-1]) or bias.stride(-1) != 1:
            length = bias.shape[-1]
            bias = torch.nn.functional.pad(bias, (0, 8 - length % 8)).narrow(-1, 0, length)
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, 0.0, False, scale=scale)[0]


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    assert mask is None
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    bias = None if mask is None else added(mask, q.dtype, -65504.0)
    return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, 0.0, False, False, scale=scale)[0]


def repeated(x: torch.Tensor) -> torch.Tensor:
    """repeat_kv of transformers"""
    return x.unsqueeze(2).expand(B, G, H // G, x.shape[2], D).reshape(B, H, x.shape[2], D)


def on_gpu(function: Callable[..., Any], *specs: tuple[tuple[int, ...], str]) -> Graph:
    """The post-grad graph of a function of tensors that claim to be on an H200."""
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    found: list[Graph] = []

    def keep(graph: Graph) -> None:
        copy = Graph()
        copy.output(copy.graph_copy(graph, {}))
        found.append(copy)
        raise Generated

    # folding would compute a constant on the device, and padding would time products there
    patches = {"fx_graph_cache": False, "joint_graph_constant_folding": False, "shape_padding": False}
    patches["post_grad_custom_post_pass"] = keep
    with pretended_h200(), torch.no_grad():
        with FakeTensorMode():
            inputs = [torch.empty(shape, dtype=getattr(torch, dtype), device="cuda") for shape, dtype in specs]
            module = make_fx(function)(*inputs)
        with pytest.raises(Exception, match="Generated"):
            compile_fx(module, inputs, config_patches=patches)
    return found[0]


def specs_of(q_len: int, length: int, mask: tuple[tuple[int, ...], str] | None) -> list[tuple[tuple[int, ...], str]]:
    cache = ((B, G, length, D), "bfloat16")
    return [((B, q_len, H, D), "bfloat16"), cache, cache, *([] if mask is None else [mask])]


@pytest.mark.parametrize(
    ("spelling", "mask", "seen_as"),
    [
        (efficient, ((B, 1, 1, S), "bool"), ((B, 1, 1, S), "bool")),
        (efficient, ((B, 1, 1, S), "bfloat16"), ((B, 1, 1, S), "bfloat16")),
        (efficient, None, None),
        (flash, None, None),
        (cudnn, ((B, 1, 1, S), "bool"), ((B, 1, 1, S), "bool")),
        (cudnn, ((B, H, 1, S), "bfloat16"), ((B, H, 1, S), "bfloat16")),
    ],
)
def test_what_the_library_adds_around_its_kernels_is_seen_through(
    spelling: Callable[..., torch.Tensor], mask: Any, seen_as: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *m: torch.Tensor) -> torch.Tensor:
        return spelling(q.transpose(1, 2), repeated(k), repeated(v), m[0] if m else None, 0.25) + 1

    (found,) = regions(on_gpu(call, *specs_of(1, S, mask)), "cuda")
    problem = found.problem
    assert shapes(problem)[:3] == [(B, H, 1, D), (B, G, S, D), (B, G, S, D)]
    assert [(spec.shape, spec.dtype) for spec in problem.inputs[3:]] == ([seen_as] if seen_as else [])
    assert all(node.op == "placeholder" for node in found.inputs[1:])

    if spelling is efficient and mask is None:
        return  # asked for shared heads without a mask, the library takes another kernel than this

    # a candidate is built from the reference: with the same kernel of the library, the same problem
    def library(q: Any, k: Any, v: Any, *, attn_mask: Any, is_causal: bool, scale: float, enable_gqa: bool) -> torch.Tensor:
        assert not is_causal
        assert enable_gqa == (mask is None)
        return spelling(q, k, v, attn_mask, scale)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", library)

    def reference(q: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return get_op("attention").reference(problem, q.transpose(1, 2), *rest)

    (again,) = regions(on_gpu(reference, *specs_of(1, S, mask)), "cuda")
    assert region_key(again.problem) == region_key(problem)


def test_a_mask_of_two_dimensions_is_taken_as_it_is_stretched() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return efficient(q.transpose(1, 2), repeated(k), repeated(v), mask, 0.25) + 1

    (found,) = regions(on_gpu(call, *specs_of(3, 40, ((3, 40), "bfloat16"))), "cuda")
    assert found.problem.inputs[3] == TensorSpec(shape=(B, H, 3, 40), dtype="bfloat16", stride=(0, 0, 40, 1))


def test_a_mask_that_was_rounded_is_not_the_one_before() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return cudnn(q.transpose(1, 2), repeated(k), repeated(v), mask.bfloat16(), 0.25) + 1

    (found,) = regions(on_gpu(call, *specs_of(1, S, ((B, 1, 1, S), "float32"))), "cuda")
    assert found.problem.inputs[3].dtype == "bfloat16"
