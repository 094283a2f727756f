"""References, costs, and the list of ops."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from autokernel.ops import OPS, apply_epilogue, get_op
from autokernel.ops.epilogue import scalar_step
from autokernel.records import Problem, TensorSpec


def problem(op: str, *shapes: tuple[int, ...], epilogue: tuple[str, ...] = (), **scalars: float) -> Problem:
    specs = tuple(TensorSpec.contiguous(shape, "float32") for shape in shapes)
    return Problem(op=op, inputs=specs, device="cpu", epilogue=epilogue, scalars=tuple(scalars.items()))


def tensors(problem: Problem) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(spec.shape) for spec in problem.inputs]


CASES = {
    "mm": (problem("mm", (4, 8), (8, 6)), lambda a, b: a @ b),
    "mm + silu": (problem("mm", (4, 8), (8, 6), epilogue=("silu",)), lambda a, b: functional.silu(a @ b)),
    "mm + mul + add": (
        problem("mm", (4, 8), (8, 6), (4, 6), (4, 6), epilogue=("mul", "add")), lambda a, b, c, d: (a @ b) * c + d
    ),
    "addmm": (problem("addmm", (6,), (4, 8), (8, 6)), lambda c, a, b: c + a @ b),
    "addmm, factors": (
        problem("addmm", (6,), (4, 8), (8, 6), alpha=0.5, beta=2), lambda c, a, b: 2 * c + 0.5 * (a @ b)
    ),
    "bmm": (problem("bmm", (3, 4, 8), (3, 8, 6)), lambda a, b: a @ b),
    "baddbmm": (problem("baddbmm", (3, 4, 6), (3, 4, 8), (3, 8, 6), alpha=3), lambda c, a, b: c + 3 * (a @ b)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reference_is_eager(name: str) -> None:
    case, eager = CASES[name]
    (out,) = get_op(case.op).reference(case, *tensors(case))
    torch.testing.assert_close(out, eager(*tensors(case)))


@pytest.mark.parametrize(
    ("name", "said"), [("addmm", {}), ("addmm, factors", {"alpha": 0.5, "beta": 2}), ("baddbmm", {"alpha": 3})]
)
def test_factors_that_are_1_are_not_said(name: str, said: dict[str, float]) -> None:
    """As models have it: a graph with `alpha=1.0` in it matches no pattern of Inductor's."""
    case, _ = CASES[name]
    traced = make_fx(lambda *inputs: get_op(case.op).reference(case, *inputs))(*tensors(case))
    (product,) = traced.graph.find_nodes(op="call_function", target=getattr(torch.ops.aten, case.op).default)
    assert product.kwargs == said


@pytest.mark.parametrize("name", ["mul", "mul()", "mul(x)", "mul(inf)", "div(2)", "mul(1)(2)"])
def test_what_is_no_number_is_no_step(name: str) -> None:
    assert scalar_step(name) is None
    assert scalar_step("mul(-2e-3)") == ("mul", -0.002)
    with pytest.raises(ValueError, match="names must be of"):
        apply_epilogue((name,), torch.ones(2, 2), [])


def test_gated_products_are_one_output_of_half_the_columns() -> None:
    both = replace(problem("merged_mm", (4, 8), (8, 6), (8, 6)), epilogue=("gated_silu",))
    x, a, b = torch.randn(4, 8), torch.randn(8, 6), torch.randn(8, 6)
    (out,) = get_op("merged_mm").reference(both, x, a, b)
    assert torch.equal(out, torch.nn.functional.silu(x @ a) * (x @ b))
    assert get_op("merged_mm").num_bytes(both) == 4 * (4 * 8 + 8 * 12 + 4 * 6)
    assert get_op("merged_mm").dims(both)["num_epilogue"] == 1


def test_merged_reference_has_one_output_per_weight() -> None:
    plain = problem("merged_mm", (4, 8), (8, 6), (8, 2))
    x, a, b = tensors(plain)
    for out, expected in zip(get_op("merged_mm").reference(plain, x, a, b), (x @ a, x @ b), strict=True):
        torch.testing.assert_close(out, expected)
    biased = problem("merged_mm", (4, 8), (8, 6), (8, 2), (6,), (2,))
    x, a, b, c, d = tensors(biased)
    for out, expected in zip(get_op("merged_mm").reference(biased, x, a, b, c, d), (x @ a + c, x @ b + d), strict=True):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("case", [CASES["mm + mul + add"][0], CASES["addmm, factors"][0], CASES["baddbmm"][0],
                                  problem("merged_mm", (4, 8), (8, 6), (8, 2), (6,), (2,))], ids=lambda c: c.op)  # fmt: skip
def test_references_can_be_traced_as_one_graph(case: Problem) -> None:
    torch._dynamo.reset()
    op = get_op(case.op)
    compiled = torch.compile(lambda *inputs: op.reference(case, *inputs), backend="eager", fullgraph=True)
    for out, expected in zip(compiled(*tensors(case)), op.reference(case, *tensors(case)), strict=True):
        torch.testing.assert_close(out, expected)


def test_costs() -> None:
    mm = Problem(
        op="mm",
        inputs=(TensorSpec.contiguous((4, 8), "bfloat16"), TensorSpec(shape=(8, 6), dtype="bfloat16", stride=(1, 8))),
        device="cpu",
        constants=(1,),
    )
    op = get_op("mm")
    assert op.dims(mm) == {"batch": 1, "m": 4, "n": 6, "k": 8, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}
    assert op.flops(mm) == 2 * 4 * 6 * 8
    assert op.num_bytes(mm) == 2 * (4 * 8 + 8 * 6 + 4 * 6)
    broadcast = Problem(
        op="baddbmm",
        inputs=(
            TensorSpec(shape=(3, 4, 6), dtype="float32", stride=(0, 0, 1)),
            TensorSpec.contiguous((3, 4, 8), "float32"),
            TensorSpec.contiguous((3, 8, 6), "float32"),
        ),
        device="cpu",
    )
    assert get_op("baddbmm").flops(broadcast) == 2 * 3 * 4 * 6 * 8
    assert get_op("baddbmm").num_bytes(broadcast) == 4 * (6 + 3 * 4 * 8 + 3 * 8 * 6 + 3 * 4 * 6)
    merged = problem("merged_mm", (4, 8), (8, 6), (8, 2))
    assert get_op("merged_mm").flops(merged) == 2 * 4 * 8 * 8
    assert get_op("merged_mm").num_bytes(merged) == 4 * (4 * 8 + 8 * 8 + 4 * 8)


def test_every_op_has_a_search_space_and_a_file_of_its_name() -> None:
    for op in OPS:
        assert type(op).__module__ == f"autokernel.ops.{op.name}"
        assert get_op(op.name) is op


def test_an_unknown_op_is_told_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="no op is called 'conv'; there are merged_mm, mm"):
        get_op("conv")


def test_an_epilogue_checks_names_and_operands() -> None:
    x = torch.randn(2, 2)
    with pytest.raises(ValueError, match="names must be of relu"):
        apply_epilogue(("swish",), x, ())
    with pytest.raises(ValueError, match="takes one operand"):
        apply_epilogue(("add", "silu"), x, ())


def test_listing_the_ops_needs_no_torch() -> None:
    code = "import autokernel.ops, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
