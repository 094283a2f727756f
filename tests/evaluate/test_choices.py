"""Indices of the largest of some scores are judged by their exact scores: another token is right where it is as likely."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from autokernel.evaluate.budget import errors_of, expectation_bytes, expected_outputs
from autokernel.evaluate.numerics import check, expect, num_references
from autokernel.evaluate.outputs import Trio, compare_outputs, missing_of_tokens
from autokernel.evaluate.probes import make_constants
from autokernel.ops import get_op
from autokernel.profiling.language import likeliest, top
from autokernel.records import Problem, TensorSpec, Verdict

OP = get_op("lm_head_argmax")
VOCABULARY = 4000


def problem(dtype: str = "bfloat16", rows: int = 24) -> Problem:
    specs = (TensorSpec.contiguous((rows, 64), dtype), TensorSpec.contiguous((VOCABULARY, 64), dtype))
    return Problem(op=OP.name, inputs=specs, device="cpu", constants=(1,), scalars=(("keepdim", False),))


def verdict(wrap: Any, kernel: Any, dtype: str = "bfloat16") -> Verdict:
    case = problem(dtype)
    constants = make_constants(case, 7, 2)
    return check(OP, case, wrap(case, constants, kernel), constants, seed=11)


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.float() @ weight.float().t()


def last_of_equals(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return VOCABULARY - 1 - (x @ weight.t()).flip(-1).argmax(-1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "kernel",
    [lambda x, w: (x @ w.t()).argmax(-1), lambda x, w: logits(x, w).argmax(-1), last_of_equals],
    ids=["eager", "without rounding", "another of equals"],
)
def test_honest_choices_pass(wrap: Any, kernel: Any, dtype: str) -> None:
    found = verdict(wrap, kernel, dtype)
    assert found.passed, found.failures


def second_best(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return logits(x, weight).topk(2).indices[:, 1].contiguous()


def half_the_vocabulary(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return logits(x, weight[: VOCABULARY // 2]).argmax(-1)


def coarse(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Products of what is rounded to five bits."""
    return (x.to(torch.float8_e5m2).float() @ weight.to(torch.float8_e5m2).float().t()).argmax(-1)


def finite_alone(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return logits(x, weight).nan_to_num(nan=0.0, posinf=-1.0, neginf=0.0).argmax(-1)


@pytest.mark.parametrize(
    ("kernel", "failing"),
    [
        (second_best, "error_max[model]"),
        (half_the_vocabulary, "error_max[model]"),
        (coarse, "error_max[model]"),
        (finite_alone, "nonfinite_placement"),
        (lambda x, w: logits(x, w).argmax(-1) + VOCABULARY, "nonfinite_placement"),
        (lambda x, w: torch.zeros(len(x), dtype=torch.int64), "error_max[model]"),
        (lambda x, w: logits(x, w).argmax(-1).int(), "metadata"),
        (lambda x, w: logits(x, w[:-1]).argmax(-1), "error_max[edges]"),
        (lambda x, w: logits(x, w[1:]).argmax(-1) + 1, "error_max[edges]"),
    ],
)
def test_wrong_choices_fail(wrap: Any, kernel: Any, failing: str) -> None:
    assert failing in [failure.name for failure in verdict(wrap, kernel).failures]


def test_the_budget_is_that_of_two_scores() -> None:
    """The largest may be too low and the one that is taken too high, each by twice what eager errs and a rounding."""
    case = problem(rows=2)
    x, weight = torch.zeros(2, 64), torch.zeros(VOCABULARY, 64)
    x[:, 0], weight[:, 0] = torch.tensor([1.0, 64.0]), torch.linspace(0, 1, VOCABULARY)
    inputs = (x.bfloat16(), weight.bfloat16())
    (expected,) = expected_outputs(OP, case, inputs)
    exact = inputs[0].double() @ inputs[1].double().t()
    eager = ((inputs[0] @ inputs[1].t()).double() - exact).abs().max().item()
    assert expected.limit_max == pytest.approx(2 * (2 * eager + 2**-8 * 64))
    assert not expected.exact
    best = exact.argmax(-1)
    assert errors_of(best, expected).max == 0.0
    first = errors_of(torch.tensor([int(best[0]), 0]), expected)
    assert (first.max, first.misplaced) == (64.0, 0)
    assert errors_of(torch.tensor([-1, 0]), expected).misplaced == 1


def test_what_falls_on_the_edges_of_the_vocabulary_is_known() -> None:
    """In each copy the last token of every other row, and the first one of those between: the same each time."""
    case = problem(rows=5)
    constants = make_constants(case, 7, 2)
    edges = expect(OP, case, constants, 11).probes[-1]
    for (x,), (again,), (weight,) in zip(edges.contents(case), edges.contents(case), constants, strict=True):
        assert logits(x, weight).argmax(-1).tolist() == [VOCABULARY - 1, 0] * 2 + [VOCABULARY - 1]
        assert torch.equal(x, again)
        assert x.data_ptr() != again.data_ptr()
        assert not x.requires_grad
    found = expect(OP, case, constants, 11)
    calls = (found.model, *found.probes, found.fresh)
    assert sum(len(call.expected) for call in calls) == num_references(OP, 2)


def test_what_the_scores_take_is_foretold() -> None:
    case = problem()
    (expected,) = expected_outputs(OP, case, [torch.randn(s.shape).bfloat16() for s in case.inputs])
    assert expected.scores is not None
    assert expectation_bytes(OP, case, 3) == 3 * expected.scores.nbytes


def greedy_trio(tokens: Any, noise: float = 0.01) -> Trio:
    """Logits of eight positions; stock's are a little wrong."""
    draws = [(torch.randn(8, 1, 50, generator=torch.Generator().manual_seed(seed)),) for seed in range(4)]

    def stock(x: torch.Tensor) -> torch.Tensor:
        return x + noise * torch.sin(100 * x)

    return Trio(name="g", contender=tokens, stock=stock, reference=lambda x: x, draws=draws, is_language=True, choose=likeliest)


def test_a_scenario_that_returns_tokens_is_judged_by_their_logits() -> None:
    names = ("g: chosen logits", "top-1 disagreement")
    verdict = compare_outputs([greedy_trio(lambda x: x.argmax(-1))], 0.99)
    assert verdict.passed, verdict.failures
    assert tuple(check.name for check in verdict.checks) == names
    (chosen, _) = verdict.checks
    assert chosen.limit == pytest.approx(4 * 0.01, rel=0.05)
    assert compare_outputs([greedy_trio(lambda x: (x + 0.005 * x.cos()).argmax(-1))], 0.5).passed
    second = compare_outputs([greedy_trio(lambda x: x.topk(2).indices[..., 1])], 0.0)
    assert [check.name for check in second.failures] == [names[0]]
    assert compare_outputs([greedy_trio(lambda x: x.topk(2).indices[..., 1])], 0.99).failures[1].name == names[1]
    outside = compare_outputs([greedy_trio(lambda x: x.argmax(-1) + 50)], 0.0)
    assert [check.value for check in outside.failures] == [math.inf]
    logits = compare_outputs([greedy_trio(lambda x: x)], 0.0)
    assert "output 0 is" in logits.failures[0].note


def test_tokens_that_eager_has_as_likely_are_no_difference() -> None:
    logits = torch.tensor([[[0.0, 2.0, 2.0, 1.5]]])
    first, second, third = (([torch.tensor([[i]])], [logits]) for i in (1, 2, 3))
    assert missing_of_tokens([first, second], likeliest) == (0.0, "")
    assert missing_of_tokens([first, third], likeliest) == (0.5, "")
    assert missing_of_tokens([([torch.tensor([[4]])], [logits])], likeliest)[1].startswith("tokens are none of the vocabulary")
    assert missing_of_tokens([([torch.tensor([1])], [logits])], likeliest)[0] == math.inf


FIVE = partial(top, count=5)


def top_trio(contender: Any) -> Trio:
    return replace(greedy_trio(contender), choose=FIVE)


def test_a_scenario_that_returns_the_likeliest_tokens_is_judged_by_their_logits_and_those_it_returns() -> None:
    names = ("g: chosen logits", "g: returned logits", "top-1 disagreement")
    verdict = compare_outputs([top_trio(lambda x: FIVE(x + 0.005 * x.cos()))], 0.5)
    assert verdict.passed, verdict.failures
    assert tuple(check.name for check in verdict.checks) == names
    chosen, returned, _ = verdict.checks
    assert chosen.limit == pytest.approx(2 * returned.limit)

    def failures(contender: Any, agreement: float = 0.0) -> list[str]:
        return [check.name for check in compare_outputs([top_trio(contender)], agreement).failures]

    off = failures(lambda x: ((x + 0.03).topk(5).values, x.topk(5).indices))
    assert off == [names[1]], "more than stock's error and half a unit; the tokens are right"
    assert failures(lambda x: (x.topk(5).values, x.topk(6).indices[..., 1:])) == list(names[:2])
    assert names[2] in failures(lambda x: tuple(part.flip(-1) for part in FIVE(x)), 0.99), "the largest comes first"
    assert failures(lambda x: (x.topk(5).values, x.topk(5).indices[..., [0, 1, 2, 3, 3]])) == [names[0]], "no token twice"
    assert failures(lambda x: FIVE(x)[1]) == ["g: outputs"]
    assert failures(lambda x: top(x, 4)) == ["g: outputs"]


def test_how_far_the_likeliest_tokens_are_from_eagers() -> None:
    logits = torch.tensor([[[0.0, 2.0, 2.25, 1.5]]])
    two = partial(top, count=2)

    def found(values: list[float], tokens: list[int]) -> tuple[float, str]:
        return missing_of_tokens([([torch.tensor([[values]]), torch.tensor([[tokens]])], [logits])], two)

    assert found([2.25, 2.0], [2, 1]) == (0.0, "")
    assert found([2.25, 1.5], [2, 3]) == (0.5, "")
    assert found([2.25, 2.75], [2, 1]) == (0.75, "")
    assert found([2.25, math.inf], [2, 1]) == (math.inf, "NaN or infinities are not where eager has them")
    assert found([2.25, 2.0], [2, 2])[1].startswith("tokens are none of the vocabulary")
    assert found([2.25], [2])[1] == "outputs have other shapes or dtypes than eager's"
