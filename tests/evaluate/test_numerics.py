"""Honest kernels pass, whatever their order of summation; the budget is twice eager's error and no more."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch

from autokernel.evaluate import budget, poison
from autokernel.evaluate.budget import errors_of, expected_outputs, run_reference
from autokernel.evaluate.numerics import Checker, check, expect, num_references
from autokernel.evaluate.probes import DRAWS, draw_scale, make_constants, make_inputs
from autokernel.records import Problem, TensorSpec

linear_of = torch.nn.functional.linear

EVERY_CHECK = {
    *(f"error_max[{draw}]" for draw in DRAWS), *(f"error_norm[{draw}]" for draw in DRAWS), "nonfinite_placement",
    "plain_tensors", "metadata", "finished_on_return", "inputs_unchanged", "no_alias", "outputs_written", "follows_inputs",
    "fresh_buffers", "repeat_fresh", "deterministic",
}  # fmt: skip


def split_sum(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Another order of summation, in float32."""
    parts = [linear_of(x[:, k : k + 64].float(), w[:, k : k + 64].float()) for k in range(0, x.shape[1], 64)]
    return torch.stack(parts).sum(0).to(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_copies", [2, 7])
def test_honest_kernel_passes_every_check(dtype: str, num_copies: int, linear: Any, ops: Any, wrap: Any) -> None:
    problem = linear(dtype, k=256)
    constants = make_constants(problem, 1, num_copies)
    verdict = check(ops["linear"], problem, wrap(problem, constants, split_sum), constants, seed=num_copies)
    assert verdict.passed, verdict.failures
    assert {c.name for c in verdict.checks} == EVERY_CHECK


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8"])
def test_integers_are_exact(dtype: str, ops: Any, wrap: Any) -> None:
    problem = Problem(op="affine", inputs=(TensorSpec.contiguous((33, 17), dtype),), device="cpu")
    constants: list[list[torch.Tensor]] = [[], [], []]
    assert check(ops["affine"], problem, wrap(problem, constants, lambda x: x + x + 1), constants, seed=0).passed

    def off_by_one(x: torch.Tensor) -> torch.Tensor:
        out = x * 2 + 1
        out[-1, -1] += 1
        return out

    verdict = check(ops["affine"], problem, wrap(problem, constants, off_by_one), constants, seed=0)
    assert "error_max[model]" in {c.name for c in verdict.failures}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_outputs_and_strange_strides(dtype: str, ops: Any, wrap: Any) -> None:
    spec = TensorSpec(shape=(6, 5, 40), dtype=dtype, stride=(40, 0, 1))
    problem = Problem(op="softmax", inputs=(spec,), device="cpu")
    constants: list[list[torch.Tensor]] = [[], []]
    kernel = lambda x: ops["softmax"].reference(problem, x)  # noqa: E731
    assert check(ops["softmax"], problem, wrap(problem, constants, kernel), constants, seed=0).passed
    flipped = lambda x: tuple(reversed(ops["softmax"].reference(problem, x)))  # noqa: E731
    assert not check(ops["softmax"], problem, wrap(problem, constants, flipped), constants, seed=0).passed


def test_zeros_do_not_pass_for_a_softmax(ops: Any, wrap: Any) -> None:
    """Of 4,096 elements each is below any fixed tolerance of 1e-2."""
    problem = Problem(op="softmax", inputs=(TensorSpec.contiguous((4, 4096), "float16"),), device="cpu")
    constants: list[list[torch.Tensor]] = [[], []]

    def kernel(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.zeros_like(x), x.log_softmax(-1)

    assert not check(ops["softmax"], problem, wrap(problem, constants, kernel), constants, seed=0).passed


def test_lost_accumulation_of_a_16_bit_problem_is_caught_by_cancellation(linear: Any, ops: Any, wrap: Any) -> None:
    """On the model's draw, two bfloat16 partial sums are within eager's own rounding; where they cancel they are not."""
    problem = linear("bfloat16", m=16, k=128, n=64)

    def halves(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_of(x[:, :64], w[:, :64]) + linear_of(x[:, 64:], w[:, 64:])

    constants = make_constants(problem, 1, 6)
    verdict = check(ops["linear"], problem, wrap(problem, constants, halves), constants, seed=0)
    failed = {c.name for c in verdict.failures}
    assert {"error_max[cancellation]", "error_norm[cancellation]"} <= failed
    assert "error_norm[model]" not in failed


def test_budget_is_twice_eagers_error_and_a_rounding(linear: Any, ops: Any) -> None:
    problem = linear("bfloat16")
    inputs = make_inputs(problem, 0)
    (expected,) = expected_outputs(ops["linear"], problem, inputs)
    (exact,) = run_reference(ops["linear"], problem, inputs)
    (eager,) = ops["linear"].reference(problem, *inputs)
    assert exact.dtype == torch.float64
    error = (eager.double() - exact).abs().max().item()
    half_ulp = torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max().item()
    assert expected.limit_max == pytest.approx(2 * error + half_ulp, rel=1e-3)
    assert errors_of(eager, expected).max == pytest.approx(error, rel=1e-3)
    worse = eager.clone()
    worse[3, 4] += 3 * half_ulp + 2 * error
    assert errors_of(worse, expected).max > expected.limit_max
    worse[3, 4] = float("nan")
    assert errors_of(worse, expected).misplaced == 1


def test_reference_falls_back_to_float32() -> None:
    class NoDouble:
        def reference(self, problem: Problem, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if x.dtype == torch.float64:
                raise NotImplementedError("no float64")
            return (x * 2,)

    problem = Problem(op="x", inputs=(TensorSpec.contiguous((3,), "bfloat16"),), device="cpu")
    (out,) = run_reference(NoDouble(), problem, make_inputs(problem, 0))  # type: ignore[arg-type]
    assert out.dtype == torch.float32


def test_overflow_of_eager_itself_is_not_what_large_tests(linear: Any, ops: Any, wrap: Any) -> None:
    problem = linear("float16", k=64)
    constants = [[c[0] * 2048] for c in make_constants(problem, 1, 2)]
    expectation = expect(ops["linear"], problem, constants, seed=0)
    large = [
        (slot, expected[0])
        for call in expectation.probes
        for slot, expected in zip(call.slots, call.expected, strict=True)
        if slot.draw == "large"
    ]
    assert large
    for slot, expected in large:
        assert 1 <= slot.scale < draw_scale(problem, "large")
        assert expected.classes is None


def test_every_draw_is_checked_and_fresh_seeds_differ(linear: Any, ops: Any) -> None:
    problem = linear()
    for num_copies in (2, 3, 8):
        constants = make_constants(problem, 1, num_copies)
        expectation = expect(ops["linear"], problem, constants, seed=1)
        drawn = {slot.draw for call in (expectation.model, *expectation.probes) for slot in call.slots}
        assert drawn == set(DRAWS)
        assert expectation.probes[0].slots[0].draw == "cancellation"
        seeds = [s.seed for call in (expectation.model, *expectation.probes, expectation.fresh) for s in call.slots]
        assert len(set(seeds)) == len(seeds)
        other = expect(ops["linear"], problem, constants, seed=2)
        assert not {s.seed for s in other.model.slots} & {s.seed for s in expectation.model.slots}


def test_audit_puts_the_contents_back(linear: Any, ops: Any, wrap: Any) -> None:
    problem = linear()
    constants = make_constants(problem, 1, 2)
    built = wrap(problem, constants, linear_of)
    checker = Checker(problem, built, constants, expect(ops["linear"], problem, constants, seed=1))
    buffers = checker.timing_inputs()
    before = [x.clone() for copy in buffers for x in copy]
    checker.audit(buffers, lambda: built.run(*[x for copy in buffers for x in copy]))
    assert all(torch.equal(x, y) for x, y in zip([x for copy in buffers for x in copy], before, strict=True))
    audited = next(c for c in checker.verdict().checks if c.name == "audit_while_timing")
    assert audited.passed
    assert 0 < audited.value < 1


def test_nan_swallowed_after_timing_is_caught(linear: Any, ops: Any, wrap: Any) -> None:
    problem = linear()
    constants = make_constants(problem, 1, 7)
    kernel = lambda x, w: torch.nan_to_num(linear_of(x, w), nan=0.0)  # noqa: E731
    checker = Checker(problem, wrap(problem, constants, kernel), constants, expect(ops["linear"], problem, constants, seed=1))
    checker.after_timing()
    assert [c.name for c in checker.verdict().failures] == ["repeat_fresh"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's mallopt")
def test_allocator_poison_covers_fresh_and_freed_memory_and_ends() -> None:
    assert poison.can_perturb()
    for byte in poison.PERTURB_BYTES:
        with poison.poisoned("cpu", byte, []):
            for size in (2_000, 70_000, 3_000_000):  # smaller ones hold the allocator's own links
                assert int((torch.empty(size, dtype=torch.uint8) != byte).sum()) == 0
                assert int(poison.looks_poisoned(torch.empty(size), byte).sum()) == size
    # Scalars only: pytest would print every element of a tensor in a failed assertion.
    afterwards = [bool((torch.empty(3_000_000, dtype=torch.uint8) == byte).all()) for byte in poison.PERTURB_BYTES]
    assert afterwards == [False, False]


def test_poison_without_the_allocators_help(linear: Any, ops: Any, wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poison, "_mallopt", lambda: None)
    assert not poison.can_perturb()
    problem = linear(m=64, n=256)
    constants = make_constants(problem, 1, 2)

    def forgetful(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.shape[0], w.shape[0])

    verdict = check(ops["linear"], problem, wrap(problem, constants, forgetful), constants, seed=0)
    assert "outputs_written" in {c.name for c in verdict.failures}
    assert check(ops["linear"], problem, wrap(problem, constants, linear_of), constants, seed=0).passed


def test_errors_do_not_depend_on_how_many_rows_are_looked_at_together(
    linear: Any, ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = linear(dtype="bfloat16", m=33)
    whole, parts = [], []
    for found, size in ((whole, 1 << 25), (parts, 200)):
        monkeypatch.setattr(budget, "_BLOCK_ELEMENTS", size)
        for draw in ("model", "nonfinite"):
            inputs = make_inputs(problem, 3, draw)
            (expected,) = budget.expected_outputs(ops["linear"], problem, inputs)
            out = ops["linear"].reference(problem, *inputs)[0].clone()
            out[-1, -1] += 1
            out[5, 5] = math.nan
            errors = budget.errors_of(out, expected)
            found.append((expected.limit_max, expected.limit_norm, errors.max, errors.norm, errors.misplaced))
    assert [x for row in parts for x in row] == pytest.approx([x for row in whole for x in row], rel=1e-9)
    assert whole[0][2] == math.inf  # the NaN
    assert whole[0][4] == 1


def test_references_are_as_many_and_as_large_as_foretold(linear: Any, ops: Any) -> None:
    for dtype, num_copies in (("bfloat16", 1), ("float32", 2), ("bfloat16", 4)):
        problem = linear(dtype=dtype)
        expectation = expect(ops["linear"], problem, make_constants(problem, 0, num_copies), 0)
        calls = (expectation.model, *expectation.probes, expectation.fresh)
        references = [e.reference for call in calls for copy in call.expected for e in copy]
        assert len(references) == num_references(ops["linear"], num_copies)
        size = sum(r.numel() * r.element_size() for r in references)
        assert size == budget.expectation_bytes(ops["linear"], problem, len(references))
