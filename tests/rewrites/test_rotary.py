"""Rotary embedding and gated activations written in other ways: what the reference computes, and fit for a bundle."""

from __future__ import annotations

import pytest
import torch

from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.ops import get_op
from autokernel.records import Candidate, Problem, Status, TensorSpec
from autokernel.rewrites import REWRITES, find_rewrite
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space


def rotary(shape: tuple[int, ...], table: tuple[int, ...], stride: tuple[int, ...] | None = None) -> Problem:
    x = TensorSpec.contiguous(shape, "float32")
    x = x if stride is None else TensorSpec(shape=shape, dtype="float32", stride=stride)
    return Problem(op="rotary", inputs=(x, *(TensorSpec.contiguous(table, "float32"),) * 2), device="cpu")


def gated(shape: tuple[int, ...], activation: str = "silu") -> Problem:
    specs = (TensorSpec.contiguous(shape, "float32"),) * 2
    return Problem(op="gated", inputs=specs, device="cpu", scalars=(("activation", activation),))


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (rotary((1, 1, 1, 2), (1, 1, 1, 2)), "halves"),
        (rotary((2, 3, 5, 8), (1, 1, 5, 8)), "halves"),
        (rotary((2, 5, 3, 6), (2, 5, 1, 6)), "halves"),
        (gated((7, 33)), "by_sigmoid"),
        (gated((2, 3, 5)), "by_tanh"),
        (gated((7, 33), "gelu_tanh"), "by_sigmoid"),
    ],
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_same_as_the_reference(problem: Problem, name: str, scale: float) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(spec.shape) * scale for spec in problem.inputs]
    (expected,) = get_op(problem.op).reference(problem, *inputs)
    (out,) = find_rewrite(problem.op, name)(problem, *inputs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6 * scale * scale)


def test_every_rewriting_is_tried() -> None:
    assert {name: set(REWRITES[name]) for name in ("rotary", "gated")} == {
        "rotary": {"halves"}, "gated": {"by_sigmoid", "by_tanh"},
    }  # fmt: skip


def test_a_gate_by_the_error_function_has_no_other_way() -> None:
    """Of the others the space knows which way is whose."""
    space, cpu = load_space("gated")["inductor"], DeviceFacts(device="cpu", threads=2)
    found = {}
    for activation in ("silu", "gelu", "gelu_tanh"):
        names = names_for(get_op("gated").dims(gated((4, 8), activation)), cpu)
        found[activation] = [config["implementation"] for config in space.enumerate(names)]
    assert found == {"silu": ["by_sigmoid", "by_tanh"], "gelu": [], "gelu_tanh": ["by_sigmoid"]}


def test_heads_that_are_permuted_keep_their_layout() -> None:
    problem = rotary((1, 2, 9, 8), (1, 1, 9, 8), stride=(144, 8, 16, 1))
    candidate = Candidate(problem=problem, backend="inductor", config={"implementation": "halves"})
    evaluation = EvaluateCandidate(candidate=candidate, max_copies=2)()
    assert evaluation.status is Status.OK, evaluation.message
