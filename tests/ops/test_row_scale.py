"""Which programs multiply rows by a number that can be taken out of their products."""

from __future__ import annotations

import pytest

from autokernel.ops.program import Program, results_of
from autokernel.ops.row_scale import row_scale
from autokernel.records import Problem, TensorSpec

M, K, N = 1, 64, 32
RMS = "t0 = convert(i0, float32); t1 = pow(t0, 2); t2 = mean(t1); t3 = add(t2, 1e-05); t4 = rsqrt(t3); "
SCALED = "t5 = mul(t0, t4); t6 = convert(t5, bfloat16); t7 = mul(i1, t6); t8 = reshape(t7, [1, 64]); t9 = t(i2); "
X, GAIN, W, B, COLUMN = (TensorSpec.contiguous(shape, "bfloat16") for shape in ((M, 1, K), (K,), (N, K), (N,), (M, 1)))


def found(text: str, *more: TensorSpec) -> tuple[str, str, str, set[str]] | None:
    problem = Problem(op="generated", inputs=(X, GAIN, W, *more), device="cuda", scalars=(("program", text),))
    scale = row_scale(Program.parse(text), results_of(problem))
    return None if scale is None else (scale.line, scale.kept, scale.number, set(scale.path))


def test_the_scale_of_a_norm() -> None:
    assert found(f"{RMS}{SCALED}o0 = mm(t8, t9)") == ("t5", "t0", "t4", {"t5", "t6", "t7", "t8"})
    two = f"{RMS}{SCALED}t10 = mm(t8, t9); t11 = t(i3); o0 = mm(t8, t11); o1 = silu(t10)"
    assert found(two, W) is not None, "products that share it"
    assert found(f"{RMS}{SCALED}t10 = mm(t8, t9); o0 = mul(t10, 2.0)") is not None
    largest = f"{RMS}{SCALED}o0 = mm(t8, t9)".replace("mean(t1)", "amax(t1)")
    assert found(largest) is not None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"{RMS}{SCALED}o0 = mm(t8, t9)".replace("mul(i1, t6)", "add(i1, t6)"), "a shift is not multiplied"),
        (f"{RMS}{SCALED}o0 = mm(t8, t9)".replace("mul(i1, t6)", "tanh(t6)"), "nor goes it through other functions"),
        (f"{RMS}{SCALED}o0 = mm(t8, t9)".replace("mul(t0, t4)", "div(t0, t4)"), "a divisor is left alone"),
        (f"{RMS}{SCALED}o0 = mm(t8, t9)".replace("mul(t0, t4)", "mul(t4, t4)"), "the number by itself"),
        (f"{RMS}{SCALED}o0 = mm(t8, t9); o1 = neg(t7)", "what is multiplied is read by others"),
        (f"{RMS}{SCALED}o0 = mm(t8, t9)".replace("t6 =", "o1 =").replace("t6)", "o1)"), "or is a result"),
        (f"{RMS}{SCALED}o0 = mm(t8, t9); t10 = t(i3); o1 = mm(i4, t10)", "products of another matrix as well"),
        (f"{RMS}t20 = mul(t0, t4); t21 = sum(t20); {SCALED}o0 = mm(t8, t9)".replace("mul(t0, t4); t6", "mul(t0, t21); t6"),
         "a statistic of what another one is in"),
        ("t0 = t(i2); t1 = reshape(i0, [1, 64]); o0 = mm(t1, t0)", "no statistics"),
        ("t0 = reshape(i0, [1, 64]); t1 = mul(t0, i1); t2 = t(i2); o0 = mm(t1, t2)", "a product without them"),
    ],
)  # fmt: skip
def test_what_stays_where_it_is(text: str, why: str) -> None:
    assert found(text, W, TensorSpec.contiguous((M, K), "bfloat16")) is None, why


def test_a_layer_norm_needs_its_mean_first() -> None:
    text = (
        "t0 = convert(i0, float32); t1 = var_mean(t0, 0); t2 = getitem(t1, 0); t3 = getitem(t1, 1); t4 = sub(t0, t3); "
        "t5 = add(t2, 1e-06); t6 = rsqrt(t5); t7 = mul(t4, t6); t8 = convert(t7, bfloat16); t9 = reshape(t8, [1, 64]); "
        "t10 = t(i2); o0 = mm(t9, t10)"
    )
    assert found(text) is None
