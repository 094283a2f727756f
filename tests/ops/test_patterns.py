"""What the matcher may take for a pattern, and what it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph

from autokernel.ops.base import Region
from autokernel.ops.fusion import pattern_of, wide
from autokernel.ops.gated import Gated
from autokernel.ops.patterns import Pattern
from autokernel.ops.spelling import arguments_of, trace
from autokernel.records import Problem, TensorSpec


def scaled(x: torch.Tensor, y: torch.Tensor, *, by: float) -> tuple[torch.Tensor, ...]:
    return ((wide(x) * by + torch.sqrt(wide(y))).to(x.dtype),)


def inputs(dtype: str) -> tuple[TensorSpec, ...]:
    return TensorSpec.contiguous((2, 3), dtype), TensorSpec.contiguous((2, 3), dtype)


PATTERN = Pattern(op="scaled", spellings=(scaled,), inputs=inputs, scalars=("by",))
X, Y = torch.rand(4, 5), torch.rand(4, 5)


def captured(function: Callable[..., Any], *tensors: torch.Tensor) -> Graph:
    """A function's graph with fake tensors, as a compiler sees it; writes stay in it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode() as mode:
        return make_fx(function)(*(mode.from_tensor(x) for x in tensors)).graph


def match(function: Callable[..., Any], *tensors: torch.Tensor, pattern: Pattern = PATTERN) -> list[Region]:
    return pattern.match(captured(function, *(tensors or (X, Y))), "cpu")


def names(region: Region) -> list[str]:
    return [node.name for node in region.inputs]


def test_scalars_are_read_from_the_graph() -> None:
    (region,) = match(lambda x, y: x * 0.25 + torch.sqrt(y))
    assert region.problem.key == "cpu: scaled(float32[4x5], float32[4x5], by=0.25)"
    assert names(region) == ["x_1", "y_1"]
    assert [node.name for node in region.outputs] == ["add"]
    (region,) = match(lambda x, y: x * 2 + torch.sqrt(y))
    assert region.problem.scalars == (("by", 2.0),)


def test_operands_come_in_either_order() -> None:
    (region,) = match(lambda x, y: torch.sqrt(y) + 0.25 * x)
    assert names(region) == ["x_1", "y_1"]
    assert match(lambda x, y: torch.sqrt(y) - x * 0.25) == []


def test_a_factor_of_a_sum_is_not_overlooked() -> None:
    assert match(lambda x, y: torch.add(x * 0.25, torch.sqrt(y), alpha=2)) == []


def test_exact_conversions_may_be_there_or_not() -> None:
    x, y = X.bfloat16(), Y.bfloat16()
    (region,) = match(lambda x, y: (x.float() * 0.5 + y.float().sqrt()).bfloat16(), x, y)
    assert [spec.dtype for spec in region.problem.inputs] == ["bfloat16", "bfloat16"]
    twice = Pattern(op="sum", spellings=(lambda x, y: ((wide(x).sqrt() + y).to(x.dtype),),), inputs=inputs)
    for function in (
        lambda x, y: (x.float().sqrt() + y).bfloat16(),  # the sum promotes y
        lambda x, y: (x.float().sqrt() + y.float()).bfloat16(),
    ):
        (region,) = match(function, x, y, pattern=twice)
        assert names(region) == ["x_1", "y_1"]


def test_conversions_that_round_are_not_skipped() -> None:
    x, y = X.bfloat16(), Y.bfloat16()
    assert match(lambda x, y: ((x.float() * 0.5).bfloat16() + y.float().sqrt()).bfloat16(), x, y) == []
    assert match(lambda x, y: x * 0.5 + y.sqrt(), x, y) == [], "arithmetic in 16 bits rounds at each step"
    (region,) = match(lambda x, y: (x.float() * 0.5 + y.float().sqrt()).half(), x, y)  # rounded to another dtype
    assert {spec.dtype for spec in region.problem.inputs} == {"float32"}, "the arithmetic alone, behind the conversions"
    assert [node.name for node in region.outputs] == ["add"]


def test_only_whole_regions_are_taken() -> None:
    def used_elsewhere(x: torch.Tensor, y: torch.Tensor) -> Any:
        root = torch.sqrt(y)
        return x * 0.25 + root, root

    assert match(used_elsewhere) == []


def test_what_others_need_is_no_obstacle_where_it_is_an_output() -> None:
    def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        root = torch.sqrt(y)
        return root, x + root

    pattern = Pattern(op="both", spellings=(both,), inputs=inputs)

    def model(x: torch.Tensor, y: torch.Tensor) -> Any:
        root = torch.sqrt(y)
        return x + root, root * 3

    (region,) = match(model, pattern=pattern)
    assert [node.name for node in region.outputs] == ["sqrt", "add"]
    assert {node.name for node in region.inner} == {"sqrt", "add"}


def test_views_and_exact_conversions_stay_for_others() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> Any:
        wider = x.float()
        return (wider * 0.5 + y.float().sqrt()).bfloat16(), wider.exp()

    (region,) = match(model, X.bfloat16(), Y.bfloat16())
    assert names(region) == ["x_1", "y_1"]
    assert "_to_copy" not in {node.name for node in region.inner}


def rows(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.exp(x.reshape(*x.shape[:-1], -1, 2)) + y,)


def test_reshapes_are_the_same_in_any_spelling() -> None:
    pattern = Pattern(
        op="rows",
        spellings=(rows,),
        inputs=lambda dtype: (TensorSpec.contiguous((2, 3, 4), dtype), TensorSpec.contiguous((2,), dtype)),
    )
    x, y = torch.rand(2, 3, 4), torch.rand(2)
    for spelled in (
        lambda x, y: x.view(2, 3, -1, 2).exp() + y,
        lambda x, y: y + torch.exp(x.reshape(6, 2, 2).view(2, 3, 2, 2)),
        lambda x, y: x.unsqueeze(3).view(2, 3, 2, 2).clone().exp() + y,
    ):
        (region,) = match(spelled, x, y, pattern=pattern)
        assert names(region) == ["x_1", "y_1"]
        assert region.problem.inputs[0].shape == (2, 3, 4)
    assert match(lambda x, y: x.view(2, 3, 2, 2).transpose(2, 3).exp() + y, x, y, pattern=pattern) == []


def test_positions_and_sizes_must_be_those_of_the_reference() -> None:
    def first_half(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.exp(x[..., : x.shape[-1] // 2]).sum(-1, keepdim=True) + y,)

    pattern = Pattern(op="half", spellings=(first_half,), inputs=inputs)
    x, y = torch.rand(4, 6), torch.rand(4, 1)
    (region,) = match(lambda x, y: torch.exp(x[:, 0:3]).sum(1, keepdim=True) + y, x, y, pattern=pattern)
    assert region.problem.inputs[0].shape == (4, 6)
    for other in (
        lambda x, y: torch.exp(x[:, 1:4]).sum(1, keepdim=True) + y,
        lambda x, y: torch.exp(x[:, :2]).sum(1, keepdim=True) + y,
        lambda x, y: torch.exp(x[:, :3]).sum(0, keepdim=True) + y,
    ):
        assert match(other, x, y, pattern=pattern) == []


def test_an_input_that_is_written_meanwhile() -> None:
    """A fusion reads all its inputs at one place, so they must hold the same from its first read to its last."""

    def written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        part = x * 0.25
        x.view(20).add_(1)  # through a view
        return part + torch.sqrt(y)

    def written_before(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 0.25 + torch.sqrt(y)

    def another(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        part = x * 0.25
        z.add_(1)
        return part + torch.sqrt(y)

    assert match(written) == []
    assert len(match(another, X, Y, torch.rand(3))) == 1
    assert len(match(written_before)) == 1


def test_regions_do_not_overlap() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first = x * 0.25 + torch.sqrt(y)
        return first * 0.5 + torch.sqrt(y)

    regions = match(model)
    assert [region.problem.scalars[0][1] for region in regions] == [0.25, 0.5]
    assert not regions[0].inner & regions[1].inner


def test_traces_are_kept() -> None:
    match(lambda x, y: x * 0.25 + torch.sqrt(y))
    before = trace.cache_info().misses
    match(lambda x, y: (x * 0.25 + torch.sqrt(y)) * 2)
    assert trace.cache_info().misses == before


def test_arguments_are_read_alike() -> None:
    graph = captured(lambda x: (x[:, -3:], x[:, 2:5], torch.cumsum(x, -1), torch.cumsum(x, 1)), X)
    first, second, third, fourth = (node for node in graph.nodes if node.op == "call_function" and node.args[1] != 0)
    assert arguments_of(first) == arguments_of(second)
    assert arguments_of(third) == arguments_of(fourth)


def test_a_problem_of_no_pattern() -> None:
    problem = Problem(op="gated", inputs=inputs("float32"), device="cpu", scalars=(("activation", "sinus"),))
    with pytest.raises(ValueError, match="no pattern of gated has the scalars activation"):
        pattern_of(Gated.patterns, problem)
