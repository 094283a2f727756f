"""Two linear layers are found as real models spell them, in every dtype and rank, and again in what their reference becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.function_module import Fn
from torch import nn
from torch.nn import functional

from autokernel.export.plan import region_key
from autokernel.ops import FusionOp, get_op
from autokernel.ops.matching import op_name
from autokernel.records import Problem

DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
BIASES = {"none": (False, False), "first": (True, False), "second": (False, True), "both": (True, True)}


class Layers(nn.Module):
    """An MLP between other things, with or without what is added."""

    def __init__(self, activation: str, bias: str, residual: bool) -> None:
        super().__init__()
        first, second = BIASES[bias]
        self.up, self.down = nn.Linear(16, 32, bias=first), nn.Linear(32, 16, bias=second)
        self.activation, self.residual = ACTIVATIONS[activation], residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        y = self.down(self.activation(self.up(x)))
        return (x + y if self.residual else y).cos()


def problems(graph: Any) -> list[Problem]:
    mlp = get_op("mlp")
    assert isinstance(mlp, FusionOp)
    return [region.problem for region in mlp.match(graph, frozenset(), "cpu")]


def assert_found_in_its_reference(post_grad: Any, problem: Problem) -> None:
    """Production looks for the problem in graphs that candidates were not built from."""
    inputs = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in problem.inputs]
    graph, _ = post_grad(Fn(lambda *x: get_op("mlp").reference(problem, *x)), *inputs)
    assert [region_key(p) for p in problems(graph)] == [region_key(problem)]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_what_is_added(post_grad: Any, shape: tuple[int, ...], bias: str, residual: bool) -> None:
    """Of two dimensions, Inductor makes the residual a part of the second product."""
    graph, _ = post_grad(Layers("relu", bias, residual), torch.randn(shape))
    (problem,) = problems(graph)
    assert dict(problem.scalars) == {"activation": "relu", "bias": bias, "residual": residual}
    first, second = BIASES[bias]
    expected = [shape, (16, 32), *[(32,)] * first, (32, 16), *[(16,)] * second, *[shape] * residual]
    assert [spec.shape for spec in problem.inputs] == expected
    assert problem.inputs[1].stride == (1, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(post_grad: Any, activation: str, dtype: torch.dtype) -> None:
    graph, _ = post_grad(Layers(activation, "both", True).to(dtype), torch.randn(2, 3, 16).to(dtype))
    (problem,) = problems(graph)
    assert dict(problem.scalars)["activation"] == activation
    assert {spec.dtype for spec in problem.inputs} == {str(dtype).removeprefix("torch.")}
    assert_found_in_its_reference(post_grad, problem)


def test_what_inductor_makes_of_a_bias_on_a_gpu(post_grad: Any) -> None:
    """There a bias in front of pointwise ops leaves the product."""
    graph, _ = post_grad(Layers("gelu", "both", True), torch.randn(2, 3, 16))
    for node in [node for node in graph.nodes if op_name(node) == "aten.addmm"]:
        bias, left, right = node.args
        with graph.inserting_before(node):
            product = graph.call_function(torch.ops.aten.mm.default, (left, right))
            total = graph.call_function(torch.ops.aten.add.Tensor, (bias, product))
        product.meta, total.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    (problem,) = problems(graph)
    assert dict(problem.scalars) == {"activation": "gelu", "bias": "both", "residual": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequential_model(post_grad: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype)
    graph, constants = post_grad(model, torch.randn(4, 16).to(dtype))
    (site,) = get_op("mlp").find(graph, constants, "cuda")
    assert site.problem.constants == (1, 2, 3, 4)
    mlp, size = get_op("mlp"), dtype.itemsize
    assert dict(mlp.dims(site.problem)) == {"m": 4, "k": 16, "hidden": 32, "n": 8, "dtype_bytes": size, "has_residual": 0}
    assert mlp.flops(site.problem) == 2 * 4 * 32 * (16 + 8)
    assert mlp.num_bytes(site.problem) == size * (4 * 16 + 16 * 32 + 32 + 32 * 8 + 8 + 4 * 8)
    assert mlp.find(graph, constants, "cpu") == [], "there is no kernel for it"


def test_the_residual_may_be_permuted(post_grad: Any) -> None:
    """As Chronos-2's attention over groups leaves it."""
    layers = Layers("relu", "none", True)
    graph, _ = post_grad(Fn(lambda x: layers(x.transpose(0, 1))), torch.randn(3, 2, 16))
    (problem,) = problems(graph)
    assert (problem.inputs[-1].shape, problem.inputs[-1].stride) == ((2, 3, 16), (16, 32, 1))
    assert_found_in_its_reference(post_grad, problem)


def test_hidden_values_with_another_user_stay(post_grad: Any) -> None:
    up, down = torch.randn(16, 32), torch.randn(32, 16)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = torch.relu(x @ up)
        return hidden @ down, hidden.sum(-1)

    def before(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inner = x @ up
        return torch.relu(inner) @ down, inner.sum(-1)

    def gated(x: torch.Tensor) -> torch.Tensor:
        return (torch.relu(x @ up) * (x @ up.flip(0))) @ down

    for function in (both, before, gated):
        graph, _ = post_grad(Fn(function), torch.randn(4, 16))
        assert problems(graph) == []


def test_the_result_of_the_second_layer_may_be_needed_without_the_residual(post_grad: Any) -> None:
    layers = Layers("relu", "both", False)

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = layers.down(torch.relu(layers.up(x)))
        return y.exp(), x + y

    graph, _ = post_grad(Fn(forward), torch.randn(2, 3, 16))
    (problem,) = problems(graph)
    assert dict(problem.scalars)["residual"] is False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vision_transformer(post_grad: Any, dtype: torch.dtype) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval().to(dtype)
    graph, _ = post_grad(Fn(lambda x: model(x).last_hidden_state), torch.randn(2, 3, 16, 16).to(dtype))
    found = problems(graph)
    scalars = {"activation": "gelu", "bias": "both", "residual": True}
    assert [(dict(p.scalars), p.inputs[0].shape) for p in found] == [(scalars, (2, 5, 32))] * 2


def test_the_feed_forward_layers_of_t5(post_grad: Any) -> None:
    """Chronos-2's are the same: no biases, relu, and the norm of the stream in front of them."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5LayerFF

    layer = T5LayerFF(T5Config(d_model=32, d_ff=64, feed_forward_proj="relu", dropout_rate=0.0)).eval()
    graph, _ = post_grad(layer, torch.randn(1, 37, 32))
    (problem,) = problems(graph)
    assert dict(problem.scalars) == {"activation": "relu", "bias": "none", "residual": True}
    assert [spec.shape for spec in problem.inputs] == [(1, 37, 32), (32, 64), (64, 32), (1, 37, 32)]
