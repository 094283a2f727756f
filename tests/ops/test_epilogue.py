"""What follows a product, as steps: each name, what it computes, and why there are no more of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from ops.test_sites import Fn, linear, sites
from torch.nn import functional

from autokernel.ops import get_op
from autokernel.ops.epilogue import find_epilogue
from autokernel.ops.matching import op_name


def given(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


STEPS: dict[str, tuple[Any, tuple[torch.Tensor, ...], tuple[str, ...]]] = {
    "minus": (lambda y, r: y - r, (given(32, 64),), ("sub",)),
    "from": (lambda y, r: r - y, (given(32, 64),), ("rsub",)),
    "over": (lambda y, r: y / r, (given(32, 64),), ("div",)),
    "under": (lambda y, r: r / y, (given(32, 64),), ("rdiv",)),
    "larger, smaller": (lambda y, r: torch.minimum(torch.maximum(y, r), r), (given(32, 64),), ("maximum", "minimum")),
    "functions": (lambda y: torch.sqrt(torch.abs(-y).exp()), (), ("neg", "abs", "exp", "sqrt")),
    "powers": (lambda y: ((y**2) ** -0.5) ** 3, (), ("square", "rsqrt", "cube")),
    "relu squared": (lambda y: functional.relu(y).square(), (), ("relu", "square")),
    "with itself": (lambda y: (z := y + 1) * z, (), ("add(1.0)", "square")),
    "one over": (lambda y: 2 / y, (), ("reciprocal", "mul(2.0)")),
    "numbers": (lambda y: (3 - (y - 2)) / 6, (), ("add(-2.0)", "neg", "add(3.0)", "div_by(6.0)")),
    "clamped in fp32": (lambda y: y.clamp(-1, 2) * 0.5, (), ("clamp_min(-1.0)", "clamp_max(2.0)", "mul(0.5)")),
    "clamped below": (lambda y: y.clamp_min(0.25), (), ("clamp_min(0.25)",)),
    "wide": (lambda y: ((y.float().exp() + 1) / 3).bfloat16(), (), ("exp", "add(1.0)", "div_by(3.0)")),
    "rows": (lambda y, r: y * r, (given(32, 1),), ("mul_per_row",)),
    "columns": (lambda y, r: r - y, (given(64),), ("rsub_per_column",)),
    "rows of a batch": (lambda y, r: y.view(4, 8, 64) / r, (given(4, 8, 1),), ("div_per_row",)),
    "columns of a batch": (lambda y, r: y.view(4, 8, 64) * r, (given(1, 1, 64),), ("mul_per_column",)),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_what_follows_is_named_and_its_reference_is_what_the_model_does(post_grad: Any, name: str) -> None:
    forward, operands, names = STEPS[name]
    module = Fn(lambda m, x, *rest: forward(m.fc(x), *rest).sin(), fc=linear(32, 64))
    (site,) = sites(post_grad, module, given(32, 32), *operands)["mm"]
    assert site.problem.epilogue == names
    assert site.consumers == ("aten.sin",)
    x, w = torch.randn(32, 32, dtype=torch.float64), torch.randn(32, 64, dtype=torch.float64)
    rest = [operand.double().reshape(spec.shape) for operand, spec in zip(operands * 2, site.problem.inputs[2:], strict=False)]
    assert [tuple(spec.shape) for spec in site.problem.inputs[2:]] == [tuple(operand.shape) for operand in rest]
    plain = (lambda y, *given: forward(y, *given).double()) if name != "wide" else (lambda y: (y.exp() + 1) / 3)
    (got,) = get_op("mm").reference(site.problem, x, w, *rest)
    wanted = plain(x @ w, *(operand.double() for operand in operands)).reshape(32, 64)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


ENDS: dict[str, tuple[Any, tuple[torch.Tensor, ...], str]] = {
    "no step": (lambda y: y.cos(), (), "aten.cos is no step"),
    "two users": (lambda y: (y.cos(), y.sin()), (), "read by 2 nodes"),
    "a result": (lambda y: y, (), "result of the graph"),
    "a factor": (lambda y, r: torch.sub(y, r, alpha=2), (given(32, 64),), "says alpha"),
    "dtype": (lambda y, r: y * r, (torch.randn(32, 64),), "changes dtype"),
    "size": (lambda y, r: y.unsqueeze(0) * r, (given(2, 32, 64),), "changes dtype or size"),
    "computed later": (lambda y, r: y * (r @ r.t()).sum(), (given(32, 32),), "behind the product"),
    "a number on the device": (lambda y, r: y * r, (given(1, 1),), "neither a matrix like the result"),
    "heads": (lambda y, r: y.view(32, 8, 8) * r, (given(8),), "neither a matrix like the result"),
    "another power": (lambda y: y**5, (), "numbers that no step has"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_why_no_more_is_fused_is_said(post_grad: Any, name: str) -> None:
    forward, operands, reason = ENDS[name]
    graph, _ = post_grad(Fn(lambda m, x, *rest: forward(m.fc(x), *rest), fc=linear(32, 64)), given(32, 32), *operands)
    (product, *_) = [node for node in graph.nodes if op_name(node) == "aten.mm" and node.meta["val"].shape == (32, 64)]
    found = find_epilogue(product, {node: position for position, node in enumerate(graph.nodes)})
    assert found.names == ()
    assert re.search(reason, found.end), found.end
