"""The k largest of some scores: each place is judged by its exact score, values by their budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autokernel.evaluate.budget import errors_of, expectation_bytes, expected_outputs
from autokernel.evaluate.numerics import check
from autokernel.evaluate.probes import make_constants
from autokernel.ops import get_op
from autokernel.records import Problem, TensorSpec, Verdict

OP = get_op("lm_head_topk")
VOCABULARY, TOP = 500, 10
Chosen = tuple[torch.Tensor, torch.Tensor]


def problem(rows: int = 12, cast: bool = True) -> Problem:
    specs = (TensorSpec.contiguous((rows, 64), "bfloat16"), TensorSpec.contiguous((VOCABULARY, 64), "bfloat16"))
    return Problem(op=OP.name, inputs=specs, device="cpu", constants=(1,), scalars=(("cast", cast), ("top", TOP)))


def verdict(wrap: Any, kernel: Any, cast: bool = True) -> Verdict:
    case = problem(cast=cast)
    constants = make_constants(case, 7, 2)
    return check(OP, case, wrap(case, constants, kernel), constants, seed=11)


def exact(x: torch.Tensor, weight: torch.Tensor, top: int = TOP) -> Chosen:
    values, indices = (x.float() @ weight.float().t()).topk(top)
    return values, indices


def eager(x: torch.Tensor, weight: torch.Tensor) -> Chosen:
    values, indices = (x @ weight.t()).float().topk(TOP)
    return values, indices


def last_of_equals(x: torch.Tensor, weight: torch.Tensor) -> Chosen:
    values, indices = torch.sort((x @ weight.t()).float().flip(-1), dim=-1, descending=True, stable=True)
    return values[:, :TOP].contiguous(), (VOCABULARY - 1 - indices[:, :TOP]).contiguous()


@pytest.mark.parametrize("kernel", [eager, exact, last_of_equals])
def test_honest_choices_pass(wrap: Any, kernel: Any) -> None:
    found = verdict(wrap, kernel)
    assert found.passed, found.failures


def test_rounded_values_pass(wrap: Any) -> None:
    found = verdict(wrap, lambda x, w: (exact(x, w)[0].bfloat16(), exact(x, w)[1]), cast=False)
    assert found.passed, found.failures


def one_is_missing(x: torch.Tensor, weight: torch.Tensor) -> Chosen:
    values, indices = exact(x, weight, TOP + 1)
    kept = [i for i in range(TOP + 1) if i != 4]
    return values[:, kept], indices[:, kept]


def wrong_order(x: torch.Tensor, weight: torch.Tensor) -> Chosen:
    values, indices = exact(x, weight)
    return values, indices.flip(-1)


def one_twice(x: torch.Tensor, weight: torch.Tensor) -> Chosen:
    values, indices = exact(x, weight)
    indices[:, 1] = indices[:, 0]
    return values, indices


@pytest.mark.parametrize(
    ("kernel", "failing"),
    [
        (one_is_missing, "error_max[model]"),
        (wrong_order, "error_max[model]"),
        (one_twice, "nonfinite_placement"),
        (lambda x, w: (exact(x, w)[0] * 1.02, exact(x, w)[1]), "error_max[model]"),
        (lambda x, w: (exact(x, w)[0], exact(x, w)[1] - VOCABULARY), "nonfinite_placement"),
    ],
    ids=["one is missing", "wrong order", "one twice", "wrong values", "no tokens"],
)
def test_wrong_choices_fail(wrap: Any, kernel: Any, failing: str) -> None:
    assert failing in [failure.name for failure in verdict(wrap, kernel).failures]


def test_each_place_is_compared_with_its_own() -> None:
    x, weight = torch.zeros(1, 64), torch.zeros(VOCABULARY, 64)
    x[0, 0], weight[:, 0] = 1.0, torch.arange(VOCABULARY) / 256  # exact in bf16 up to 1, where the largest are rounded
    inputs = (x.bfloat16(), weight.bfloat16())
    values, indices = expected_outputs(OP, problem(rows=1), inputs)
    assert values.scores is None
    assert indices.scores is not None
    ranked = indices.scores.argsort(dim=-1, descending=True, stable=True)
    assert errors_of(ranked[:, :TOP], indices).max == 0.0
    shifted = errors_of(ranked[:, 1 : TOP + 1], indices)
    assert shifted.misplaced == 0
    assert shifted.max == (indices.scores.topk(TOP + 1).values.diff().abs().max().item())
    twice = ranked[:, :TOP].clone()
    twice[0, 9] = twice[0, 0]
    assert errors_of(twice, indices).misplaced == 1
    assert expectation_bytes(OP, problem(rows=1), 3) == 3 * indices.scores.nbytes
