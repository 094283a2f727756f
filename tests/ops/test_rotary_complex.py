"""Rotary embedding by complex numbers is found where Z-Image's transformer has it, and can do without complex numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.ops import get_op
from autokernel.records import Candidate, Problem, Status, TensorSpec
from autokernel.rewrites import find_rewrite


class Attend(torch.nn.Module):
    """As the processor of its attention spells it: a projection, heads, rotary embedding."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 64, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        heads = self.fc(x).unflatten(-1, (4, -1))
        numbers = torch.view_as_complex(heads.float().reshape(*heads.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * turns.unsqueeze(2)).flatten(3).type_as(heads).transpose(1, 2) * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_found_in_a_compiled_module(post_grad: Any, dtype: str) -> None:
    kind = getattr(torch, dtype)
    graph, constants = post_grad(Attend(kind), torch.randn(2, 7, 8, dtype=kind), torch.randn(2, 7, 8, dtype=torch.complex64))
    op = get_op("rotary_complex")
    (site,) = op.find(graph, constants, "cpu")
    assert site.problem.key == f"cpu: rotary_complex({dtype}[2x7x4x16], complex64[2x7x8])"
    assert site.producers == ("aten.mm", "input")
    assert site.consumers == ("aten.mul",)
    dims = op.dims(site.problem)
    assert (dims["batch"], dims["length"], dims["heads"], dims["head_dim"]) == (2, 7, 4, 16)
    size = 4 if dtype == "float32" else 2
    assert op.num_bytes(site.problem) == 2 * 2 * 7 * 4 * 16 * size + 2 * 7 * 8 * 8
    assert op.flops(site.problem) == 6 * 2 * 7 * 4 * 8


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 6), (1, 33, 2, 64)])
def test_the_same_as_the_reference(shape: tuple[int, ...]) -> None:
    x, turns = torch.randn(shape), torch.randn(*shape[:2], shape[3] // 2, dtype=torch.complex64)
    problem = Problem(
        op="rotary_complex",
        inputs=(TensorSpec.contiguous(shape, "float32"), TensorSpec.contiguous(tuple(turns.shape), "complex64")),
        device="cpu",
    )
    (expected,) = get_op("rotary_complex").reference(problem, x, turns)
    (out,) = find_rewrite("rotary_complex", "real")(problem, x, turns)
    torch.testing.assert_close(out, expected)


def test_evaluated_like_any_candidate() -> None:
    strided = TensorSpec(shape=(1, 16, 2, 8), dtype="bfloat16", stride=(768, 48, 24, 1))  # a part of what lies in memory
    problem = Problem(
        op="rotary_complex", inputs=(strided, TensorSpec.contiguous((1, 16, 4), "complex64")), device="cpu"
    )  # fmt: skip
    candidate = Candidate(problem=problem, backend="inductor", config={"implementation": "real"})
    evaluation = EvaluateCandidate(candidate=candidate, max_copies=2)()
    assert evaluation.status is Status.OK, evaluation.message
