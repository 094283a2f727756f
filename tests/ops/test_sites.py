"""What the ops find in real post-grad graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from autokernel.ops import OPS, Site, get_op
from autokernel.records import TensorSpec

ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class Fn(nn.Module):
    """A function of layers; what is called in `forward` decides the graph."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._forward(self, *inputs)


def sites(post_grad: Any, module: nn.Module, *inputs: torch.Tensor, device: str = "cpu") -> dict[str, list[Site]]:
    graph, constants = post_grad(module, *inputs)
    return {op.name: op.find(graph, constants, device) for op in OPS}


def linear(k: int, n: int, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(k, n, bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_behind_a_linear_layer_is_its_epilogue(post_grad: Any, name: str, dtype: torch.dtype) -> None:
    module = Fn(lambda m, x: ACTIVATIONS[name](m.fc(x)).sin(), fc=linear(32, 64, dtype=dtype))
    (site,) = sites(post_grad, module, torch.randn(4, 8, 32, dtype=dtype))["mm"]
    assert site.problem.epilogue == (name,)
    assert site.problem.inputs[0].shape == (32, 32)
    assert site.consumers == ("aten.sin",)


def test_numbers_are_steps_of_an_epilogue(post_grad: Any) -> None:
    module = Fn(lambda m, x, r: functional.silu((m.fc(x) * 0.125).view(4, 8, 64)) * r - 2 + 1.5, fc=linear(32, 64))
    (site,) = sites(post_grad, module, torch.randn(32, 32).bfloat16(), torch.randn(4, 8, 64).bfloat16())["mm"]
    assert site.problem.epilogue[:3] == ("mul(0.125)", "silu", "mul")
    assert len(site.problem.inputs) == 3
    for other in (lambda m, x: m.fc(x) * float("inf"), lambda m, x: m.fc(x) * torch.full((), 2.0)):
        (site,) = sites(post_grad, Fn(other, fc=linear(32, 64)), torch.randn(32, 32).bfloat16())["mm"]
        assert "inf" not in str(site.problem.epilogue)


def test_a_linear_layer_is_an_mm_with_a_constant_transposed_weight(post_grad: Any) -> None:
    found = sites(post_grad, Fn(lambda m, x: m.fc(x.sin()), fc=linear(32, 64)), torch.randn(4, 8, 32).bfloat16())
    (site,) = found["mm"]
    assert site.problem.inputs[0] == TensorSpec.contiguous((32, 32), "bfloat16")
    assert site.problem.inputs[1] == TensorSpec(shape=(32, 64), dtype="bfloat16", stride=(1, 32))
    assert site.problem.constants == (1,)
    assert site.problem.epilogue == ()
    assert site.name == "fc (mm)"
    assert (site.producers, site.consumers) == (("aten.sin",), ("output",))
    assert not found["addmm"]
    assert not found["merged_mm"]


def test_a_bias_makes_an_addmm(post_grad: Any) -> None:
    (site,) = sites(post_grad, Fn(lambda m, x: m.fc(x), fc=linear(32, 64, bias=True)), torch.randn(8, 32).bfloat16())["addmm"]
    assert [spec.shape for spec in site.problem.inputs] == [(64,), (8, 32), (32, 64)]
    assert site.problem.constants == (0, 2)
    assert site.problem.scalars == ()
    assert site.producers == ("input",)


def test_factors_other_than_one_are_scalars(post_grad: Any) -> None:
    module = Fn(lambda m, c, x, w: torch.addmm(c, x, w, alpha=0.5, beta=2))
    (site,) = sites(post_grad, module, torch.randn(8, 8), torch.randn(8, 4), torch.randn(4, 8))["addmm"]
    assert dict(site.problem.scalars) == {"alpha": 0.5, "beta": 2}
    assert site.problem.constants == ()


def test_batched_products_keep_their_strides(post_grad: Any) -> None:
    module = Fn(lambda m, q, k, c: (torch.bmm(q, k.transpose(1, 2)).sin(), torch.baddbmm(c, q, k.transpose(1, 2))))
    q, k, c = torch.randn(3, 16, 8), torch.randn(3, 32, 8), torch.randn(3, 16, 32)
    found = sites(post_grad, module, q, k, c)
    (bmm,), (baddbmm,) = found["bmm"], found["baddbmm"]
    assert bmm.problem.inputs[1] == TensorSpec(shape=(3, 8, 32), dtype="float32", stride=(256, 1, 8))
    assert [spec.shape for spec in baddbmm.problem.inputs] == [(3, 16, 32), (3, 16, 8), (3, 8, 32)]
    assert bmm.consumers == ("aten.sin",)


def test_a_residual_is_an_operand_of_the_epilogue(post_grad: Any) -> None:
    module = Fn(lambda m, x, r: r + m.fc(x), fc=linear(32, 64))
    (site,) = sites(post_grad, module, torch.randn(2, 4, 32).bfloat16(), torch.randn(2, 4, 64).bfloat16())["mm"]
    assert site.problem.epilogue == ("add",)
    assert site.problem.inputs[2] == TensorSpec.contiguous((8, 64), "bfloat16")
    assert site.producers == ("input", "input")


@pytest.mark.parametrize("residual", [torch.randn(8, 64), torch.randn(1, 1).bfloat16(), torch.randn(64, 8).bfloat16().t()])
def test_an_operand_of_another_dtype_or_shape_is_no_epilogue_and_a_strided_one_keeps_its_strides(
    post_grad: Any, residual: torch.Tensor
) -> None:
    module = Fn(lambda m, x, r: (m.fc(x) * r).cos(), fc=linear(32, 64))
    (site,) = sites(post_grad, module, torch.randn(8, 32).bfloat16(), residual)["mm"]
    if residual.dtype == torch.bfloat16 and residual.shape == (8, 64):
        assert site.problem.epilogue == ("mul",)
        assert site.problem.inputs[2].stride == (1, 8)
    else:
        assert site.problem.epilogue == ()
        assert len(site.problem.inputs) == 2


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x, r: r.sin().unsqueeze(1) * m.fc(x).unsqueeze(2), id="of two"),
        pytest.param(lambda m, x, r: (y := m.fc(x)).unsqueeze(2) * torch.sigmoid(y).unsqueeze(1), id="of one, as silu"),
    ],
)
def test_an_outer_product_is_no_epilogue(post_grad: Any, forward: Any) -> None:
    module = Fn(forward, fc=linear(32, 16, dtype=torch.float32))
    (site,) = sites(post_grad, module, torch.randn(4, 32), torch.randn(4, 16))["mm"]
    assert site.problem.epilogue == ()


def test_a_result_with_two_users_has_no_epilogue(post_grad: Any) -> None:
    module = Fn(lambda m, x: ((y := m.fc(x)).relu(), y), fc=linear(32, 64))
    (site,) = sites(post_grad, module, torch.randn(8, 32).bfloat16())["mm"]
    assert site.problem.epilogue == ()
    assert site.consumers == ("aten.relu", "output")


def test_gate_and_up_share_no_epilogue_and_can_be_merged(post_grad: Any) -> None:
    module = Fn(
        lambda m, x: m.down(functional.silu(m.gate(x)) * m.up(x)), gate=linear(32, 96), up=linear(32, 96), down=linear(96, 32)
    )
    found = sites(post_grad, module, torch.randn(2, 8, 32).bfloat16())
    assert [site.problem.epilogue for site in found["mm"]] == [("silu",), ("mul",), ()]
    assert [len(site.problem.inputs) for site in found["mm"]] == [2, 3, 2]
    (merged,) = found["merged_mm"]
    assert [spec.shape for spec in merged.problem.inputs] == [(16, 32), (32, 96), (32, 96)]
    assert merged.problem.constants == (1, 2)
    assert merged.name == "gate (mm) + up (mm_1)"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_on_a_gpu_gate_and_up_may_become_one_output(post_grad: Any, name: str) -> None:
    module = Fn(lambda m, x: ACTIVATIONS[name](m.gate(x)) * m.up(x) + 1, gate=linear(32, 96), up=linear(32, 96))
    x = torch.randn(2, 8, 32).bfloat16()
    (merged,) = sites(post_grad, module, x, device="cuda")["merged_mm"]
    assert merged.problem.epilogue == (f"gated_{name}",)
    assert merged.consumers == ("aten.add",)
    (on_cpu,) = sites(post_grad, module, x)["merged_mm"]  # where no kernel computes it
    assert on_cpu.problem.epilogue == ()


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: functional.silu(m.gate(x)) * (u := m.up(x)) + u, id="up is used twice"),
        pytest.param(lambda m, x: functional.silu(g := m.gate(x)) * m.up(x) + g, id="gate is used twice"),
        pytest.param(lambda m, x: functional.silu(m.gate(x)) - m.up(x), id="a difference"),
        pytest.param(lambda m, x: m.gate(x) * m.up(x), id="no function"),
        pytest.param(lambda m, x: m.gate(x) * functional.silu(m.up(x)), id="of the second"),
        pytest.param(lambda m, x: functional.silu(m.gate(x)).unsqueeze(2) * m.up(x).unsqueeze(1), id="an outer product"),
    ],
)
def test_other_uses_of_gate_and_up_stay_two_outputs(post_grad: Any, forward: Any) -> None:
    module = Fn(forward, gate=linear(32, 96), up=linear(32, 96))
    (merged,) = sites(post_grad, module, torch.randn(16, 32).bfloat16(), device="cuda")["merged_mm"]
    assert merged.problem.epilogue == ()


def test_biased_products_merge_with_their_biases_and_not_with_others(post_grad: Any) -> None:
    layers = {"q": linear(32, 64, bias=True), "k": linear(32, 16, bias=True), "g": linear(32, 8)}
    module = Fn(lambda m, x, y: (m.q(x), m.k(x), m.g(x), m.q(y)), **layers)
    (merged,) = sites(post_grad, module, torch.randn(4, 32).bfloat16(), torch.randn(4, 32).bfloat16())["merged_mm"]
    assert [spec.shape for spec in merged.problem.inputs] == [(4, 32), (32, 64), (32, 16), (64,), (16,)]
    assert merged.problem.constants == (1, 2, 3, 4)
    assert get_op("merged_mm").dims(merged.problem) | {"min_n": 16} == {
        "batch": 1, "m": 4, "n": 80, "k": 32, "dtype_bytes": 2, "has_constant_weight": 1, "num_parts": 2, "min_n": 16,
        "num_epilogue": 0,
    }  # fmt: skip


def test_weights_that_change_are_not_merged(post_grad: Any) -> None:
    module = Fn(lambda m, x, a, b: (x @ a, x @ b))
    found = sites(post_grad, module, torch.randn(4, 8), torch.randn(8, 4), torch.randn(8, 6))
    assert len(found["mm"]) == 2
    assert not found["merged_mm"]
