"""Programs of regions: text and back, the plain torch that they are, and what is said of text that is none."""

from __future__ import annotations

import pytest
import torch

from autokernel.ops.program import Program, contracted_input, program_of, results_of, run
from autokernel.records import Problem, TensorSpec

NORM = (
    "t0 = convert(i0, float32); t1 = var_mean(t0, 0); t2 = getitem(t1, 0); t3 = getitem(t1, 1); t4 = sub(t0, t3); "
    "t5 = add(t2, 1e-06); t6 = rsqrt(t5); t7 = mul(t4, t6); t8 = gt(i0, -inf); t9 = full([], 0.5, float32); "
    "t10 = where(t8, t7, t9); o0 = convert(t10, bfloat16); t11 = reshape(o0, [6, 8]); t12 = t(i1); o1 = mm(t11, t12)"
)


def problem(text: str, *specs: TensorSpec) -> Problem:
    return Problem(op="generated", inputs=specs, device="cpu", scalars=(("program", text),))


def spec(*shape: int, dtype: str = "bfloat16") -> TensorSpec:
    return TensorSpec.contiguous(shape, dtype)


def test_text_is_read_and_written_without_loss() -> None:
    program = Program.parse(NORM)
    assert str(program) == NORM
    assert Program.parse(str(program)) == program
    assert program.inputs == ("i0", "i1")
    assert program.outputs == ("o0", "o1")
    assert [line.name for line in program.behind("t5")] == ["t0", "t1", "t2", "t5"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("o0 = mul(i0, ", "separated by"),
        ("o0 = mul(i0)", "mul takes 2 arguments"),
        ("o0 = fft(i0)", "by a known op"),
        ("x = mul(i0, i1)", "makes t0, t1"),
        ("o0 = mul(i0, t1); t1 = exp(i0)", "reads what lines before it made"),
        ("t0 = exp(i0); t0 = exp(t0); o0 = exp(t0)", "makes one new value"),
        ("t0 = exp(i0)", "has an output"),
        ("o0 = pow(i0, __import__('os'))", "a value, a number, a dtype or a shape"),
        ("import os", "name = op"),
    ],
)
def test_what_is_no_program_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Program.parse(text)


def test_it_runs_as_the_graphs_own_calls_do() -> None:
    case = problem(NORM, spec(2, 3, 8), spec(5, 8))
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    normed, product = run(case, x, w)
    wide = x.float()
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    expected = ((wide - mean) * torch.rsqrt(variance + 1e-6)).bfloat16()
    assert torch.equal(normed, expected)
    assert torch.equal(product, torch.mm(expected.view(6, 8), w.t()))


def test_wide_inputs_stay_wide() -> None:
    case = problem(NORM, spec(2, 3, 8), spec(5, 8))
    x, w = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    normed, product = run(case, x, w)
    assert normed.dtype is torch.float64
    assert product.dtype is torch.float64
    assert (normed - normed.bfloat16().double()).abs().max() > 0, "it was rounded on the way"


def test_a_number_that_fills_stays_what_it_is_where_the_first_input_is_a_mask() -> None:
    program = "t0 = full([], -inf, float32); t1 = where(i0, t0, i1); t2 = amax(t1); t3 = sub(t1, t2); o0 = exp(t3)"
    case = problem(program, TensorSpec.contiguous((2, 4), "bool"), spec(2, 4, dtype="float32"))
    mask, x = torch.tensor([[True, False, False, True], [False, True, False, False]]), torch.randn(2, 4, dtype=torch.float64)
    (found,) = run(case, mask, x)
    seen = x.masked_fill(mask, -torch.inf)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, (seen - seen.amax(-1, True)).exp())


@pytest.mark.parametrize(
    ("program", "shapes", "expected"),
    [
        ("t0 = mm(i1, i2); o0 = add(i0, t0)", [(4, 6), (4, 8), (8, 6)], 1),
        ("t0 = mm(i0, i1); o0 = add(t0, i2)", [(4, 8), (8, 6), (4, 6)], 0),
        ("t0 = reshape(i1, [4, 8]); t1 = mm(t0, i2); o0 = add(i0, t1)", [(4, 6), (2, 2, 8), (8, 6)], 1),
        ("t0 = mul(i0, i1); t1 = mm(t0, i2); o0 = relu(t1)", [(8,), (4, 8), (8, 6)], 1),
        ("t0 = mean(i2); t1 = sub(i2, t0); t2 = mm(t1, i0); o0 = add(t2, i1)", [(8, 6), (4, 6), (4, 8)], 2),
        ("t0 = t(i1); t1 = mm(t0, i2); o0 = add(i0, t1)", [(4, 6), (8, 4), (8, 6)], None),
        ("t0 = sum(i0); o0 = div(i0, t0)", [(4, 8)], None),
    ],
)
def test_which_input_a_product_sums_over(program: str, shapes: list[tuple[int, ...]], expected: int | None) -> None:
    assert contracted_input(problem(program, *(spec(*shape) for shape in shapes))) == expected


def test_what_lines_make_is_known_without_running_them() -> None:
    case = problem(NORM, TensorSpec(shape=(2, 3, 8), dtype="bfloat16", stride=(8, 16, 1)), spec(5, 8))
    results = results_of(case)
    assert results["t0"].dtype == "float32"
    assert results["t2"].shape == (2, 3, 1)
    assert results["o0"] == TensorSpec(shape=(2, 3, 8), dtype="bfloat16", stride=(8, 16, 1)), "laid out as what it is of"
    assert results["o1"] == spec(6, 5)
    assert str(program_of(case)) == NORM
