"""Every way to write attention gives what the library gives: shared heads, masks of both kinds, rows that see nothing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autokernel.ops import get_op
from autokernel.ops.attention import Attention
from autokernel.records import Problem, TensorSpec
from autokernel.rewrites import REWRITES, find_rewrite

ON_ANY_DEVICE = ("matmul", "matmul_fp32", "reduction", "grouped", "library_fp32")
SHAPES = {
    "plain": ((2, 4, 3, 16), (2, 4, 9, 16)),
    "shared": ((2, 6, 1, 8), (2, 2, 33, 8)),
    "several": ((2, 6, 3, 8), (2, 2, 9, 8)),
    "square": ((1, 2, 7, 16), (1, 2, 7, 16)),
}


def problem(shapes: str, mask: str | None, causal: bool = False) -> Problem:
    q, kv = SHAPES[shapes]
    specs = [TensorSpec.contiguous(shape, "float32") for shape in (q, kv, kv)]
    if mask is not None:
        specs.append(TensorSpec.contiguous((q[0], 1, q[2], kv[2]), mask))
    scalars: tuple[tuple[str, float | bool], ...] = (("scale", 0.3),)
    return Problem(
        op="attention", inputs=tuple(specs), device="cpu", scalars=(("causal", True), *scalars) if causal else scalars
    )  # fmt: skip


def inputs_of(problem: Problem) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(spec.shape) for spec in problem.inputs]
    if len(tensors) == 4:
        tensors[3][..., 1] = -torch.inf
        tensors[3][0, 0, 0] = -torch.inf  # sees nothing
        if problem.inputs[3].dtype == "bool":
            tensors[3] = tensors[3] > -0.5
    return tensors


@pytest.mark.parametrize("name", ON_ANY_DEVICE)
@pytest.mark.parametrize(
    ("shapes", "mask", "causal"),
    [
        ("plain", None, False),
        ("shared", None, False),
        ("square", None, True),
        ("plain", "float32", False),
        ("shared", "bool", False),
        ("several", "bool", False),
        ("several", "float32", False),
        ("several", None, True),
    ],
)
def test_the_same_as_the_reference(name: str, shapes: str, mask: str | None, causal: bool) -> None:
    case = problem(shapes, mask, causal)
    inputs = inputs_of(case)
    (expected,) = get_op("attention").reference(case, *inputs)
    (out,) = find_rewrite("attention", name)(case, *inputs)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    if mask is not None:
        assert not expected[0, :, 0].any(), "a row that sees nothing is zero"


@pytest.mark.parametrize("name", ["flash", "cudnn", "grouped"])
@pytest.mark.parametrize("mask", [None, "bool", "float32"])
def test_the_librarys_kernels_on_a_gpu_take_what_they_are_given(name: str, mask: str | None) -> None:
    if name == "flash" and mask is not None:
        return
    case = problem("several", mask)
    with FakeTensorMode():
        inputs = [torch.empty(spec.shape, dtype=torch.bfloat16, device="cuda") for spec in case.inputs]
        if mask == "bool":
            inputs[3] = inputs[3].bool()
        (out,) = find_rewrite("attention", name)(case, *inputs)
    assert (out.shape, out.dtype) == (inputs[0].shape, torch.bfloat16)


def test_what_it_costs() -> None:
    op = Attention()
    case = problem("shared", "bool")
    assert op.flops(case) == 2 * 2 * 6 * 33 * (8 + 8)
    assert op.num_bytes(case) == 4 * (2 * 6 * 8 + 2 * (2 * 2 * 33 * 8) + 2 * 6 * 8) + 2 * 33
    assert op.flops(problem("square", None, True)) * 2 == op.flops(problem("square", None))
    dims = op.dims(case)
    assert (dims["group"], dims["has_mask"], dims["causal"], dims["kv_len"]) == (3, 1, 0, 33)


def test_unknown_names_are_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="attention has no implementation 'fast'; there are stock, matmul, "):
        find_rewrite("attention", "fast")
    with pytest.raises(ValueError, match="mm has no implementation"):
        find_rewrite("mm", "matmul")
    assert set(ON_ANY_DEVICE) <= set(REWRITES["attention"])
