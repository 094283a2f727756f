"""Operations are held against the peak of the dtype that they are computed in, whatever comes first among the inputs."""

from __future__ import annotations

from typing import Any

import pytest

from autokernel.evaluate import roofline
from autokernel.evaluate.roofline import Ceilings, physics_check, sound_physics_check
from autokernel.ops import Site, get_op
from autokernel.profiling.capture import CapturedScenario
from autokernel.profiling.hotspots import rank
from autokernel.records import Measurement, Problem, TensorSpec
from autokernel.stages.confirm import slack_of

H200 = Ceilings(device="cuda", read_gb_per_s=4260.0, tflops={"float32": 52.0, "bfloat16": 760.0, "float8_e4m3fn": 1490.0})
AUTOCAST = (
    "t0 = pow(i0, 2); t1 = mean(t0); t2 = add(t1, 1e-06); t3 = rsqrt(t2); t4 = mul(i0, t3); t5 = mul(t4, i1); "
    "t6 = convert(t5, bfloat16); t7 = t(i2); t8 = mm(t6, t7); o0 = relu(t8)"
)
SOFTMAX = "t0 = where(i0, i1, i2); t1 = amax(t0); t2 = sub(t0, t1); t3 = exp(t2); t4 = sum(t3); o0 = div(t3, t4)"


def tensor(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, dtype)


def problem_of(op: str, *inputs: TensorSpec, **scalars: Any) -> Problem:
    return Problem(op=op, inputs=inputs, device="cuda", scalars=tuple(sorted(scalars.items())))


def autocast(m: int) -> Problem:
    """RMSNorm -> Linear -> relu, whose norm is in fp32 and whose product in bf16."""
    inputs = tensor("float32", m, 4096), tensor("float32", 4096), tensor("bfloat16", 8192, 4096)
    return problem_of("generated", *inputs, program=AUTOCAST)


MASKED = problem_of(
    "generated", tensor("bool", 1, 256), tensor("float32", 1 << 16, 256), tensor("float32", 1), program=SOFTMAX
)  # fmt: skip


def taking(us: float) -> Measurement:
    return Measurement(median_us=us, spread_us=0, num_samples=9, regime="test")


@pytest.mark.parametrize(("m", "us"), [(16, 18), (64, 25), (128, 30), (256, 60)])
def test_a_bf16_product_behind_an_fp32_norm_may_be_faster_than_fp32(m: int, us: float) -> None:
    check = physics_check(taking(us), autocast(m), get_op("generated"), H200)
    assert check.passed, check.note
    assert "at 760 TFLOP/s" in check.note
    assert not physics_check(taking(us / 4), autocast(m), get_op("generated"), H200).passed


@pytest.mark.parametrize(("problem", "peak"), [(autocast(64), "bfloat16"), (MASKED, "float32")])
def test_the_second_look_is_at_the_dtype_that_decides(
    problem: Problem, peak: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked: list[tuple[str, ...]] = []

    def measure(device: str, threads: int | None, dtypes: tuple[str, ...], budget_s: float) -> Ceilings:
        asked.append(dtypes)
        return H200

    monkeypatch.setattr(roofline, "measure_ceilings", measure)
    assert not sound_physics_check(taking(0.01), problem, get_op("generated"), H200, 1, None).passed
    assert asked == [(peak,)]


def test_a_mask_that_comes_first_is_no_8_bit_product() -> None:
    check = physics_check(taking(1000), MASKED, get_op("generated"), H200)
    assert "at 52 TFLOP/s" in check.note


def test_slack_is_for_products_that_take_longer_than_reading_in_their_own_dtype() -> None:
    assert slack_of(autocast(64), H200) == 0, "it reads"
    assert slack_of(autocast(2048), H200) == 0.05


@pytest.mark.parametrize("problem", [autocast(4096), MASKED])
def test_hotspots_are_ranked_by_the_same_limit(problem: Problem) -> None:
    captured = CapturedScenario(
        scenario="s",
        step_us=1e4,
        step_spread_us=0,
        kernel_us=0,
        sites=(Site(problem=problem, name="a"),),
        call_us={problem.key: 1e3},
        graph="",
        compile_s=0,
    )
    ceilings = Ceilings(device="cuda", read_gb_per_s=1e6, tflops=H200.tflops)
    (hotspot,) = rank([captured], ceilings)
    peak = 52 if problem is MASKED else 760
    assert hotspot.roofline_us == pytest.approx(get_op("generated").flops(problem) / (peak * 1e6))


X, W = tensor("bfloat16", 2048, 4096), tensor("bfloat16", 4096, 4096)
SCALE = tensor("float32", 1)


@pytest.mark.parametrize(
    ("problem", "peak"),
    [
        (problem_of("mm", X, W), 760),
        (problem_of("mm", tensor("float32", 64, 64), tensor("float32", 64, 64)), 52),
        (problem_of("merged_mm", X, W, W), 760),
        (problem_of("addmm", tensor("bfloat16", 4096), X, W), 760),
        (
            problem_of(
                "scaled_mm", tensor("float8_e4m3fn", 2048, 4096), tensor("float8_e4m3fn", 4096, 4096), SCALE, SCALE,
                out_dtype="bfloat16", use_fast_accum=True,
            ),
            1520,
        ),
        (problem_of("int_mm", tensor("int8", 2048, 4096), tensor("int8", 4096, 4096)), 1520),
        (problem_of("attention", *[tensor("bfloat16", 1, 8, 512, 64)] * 3, scale=0.125), 760),
        (problem_of("attention", *[tensor("float32", 1, 8, 512, 64)] * 3, scale=0.125), 52),
    ],
    ids=lambda value: f"{value.op}-{value.inputs[0].dtype}" if isinstance(value, Problem) else str(value),
)  # fmt: skip
def test_ordinary_problems_are_held_against_what_they_were(problem: Problem, peak: float) -> None:
    note = physics_check(taking(1), problem, get_op(problem.op), H200).note
    assert f"at {peak:.3g} TFLOP/s" in note
