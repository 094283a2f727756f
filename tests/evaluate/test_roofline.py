"""Ceilings are measured, and what beats them is called impossible."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from kernels.for_hopper import ptx_of

from autokernel.evaluate.roofline import (
    Ceilings,
    MeasureCeilings,
    may_split_fp32,
    measure_ceilings,
    physics_check,
    reading_product,
    roofline_us,
    sound_physics_check,
)
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import Candidate, Measurement, Problem, TensorSpec
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

pytestmark = pytest.mark.clock

H200 = DeviceFacts(device="cuda", isa="sm_90", device_name="NVIDIA H200", smem_bytes=232448, num_units=132, l2_bytes=50 << 20)

CEILINGS = Ceilings(
    threads=1, read_gb_per_s=10, tflops={"float32": 0.1, "bfloat16": 0.4}, cache_gb_per_s=100, cache_bytes=1 << 20,
    l2_gb_per_s=1000, l2_bytes=1 << 14,
)  # fmt: skip


def taking(us: float) -> Measurement:
    return Measurement(median_us=us, spread_us=0, num_samples=9, regime="test")


def test_roofline_is_the_slower_of_reading_and_computing() -> None:
    assert roofline_us(0, 10_000_000, "float32", CEILINGS) == pytest.approx(1000)
    assert roofline_us(10**9, 10, "float32", CEILINGS) == pytest.approx(10_000)
    assert roofline_us(10**9, 10, "bfloat16", CEILINGS) == pytest.approx(2_500)
    assert roofline_us(10**9, 10, "float16", CEILINGS) == pytest.approx(2_500)  # unknown: the best there is


def test_a_dtype_that_was_not_measured_is_as_fast_as_those_as_wide() -> None:
    gpu = dataclasses.replace(CEILINGS, device="cuda", tflops={**CEILINGS.tflops, "float8_e4m3fn": 0.9, "int8": 0.5})
    assert [gpu.peak_tflops(dtype) for dtype in ("bfloat16", "float16", "float32")] == [0.4, 0.4, 0.1]
    assert gpu.peak_tflops("float64") == 0.9
    # a CPU that emulates 8-bit floating point does better in 16 bits
    cpu = dataclasses.replace(CEILINGS, tflops={**CEILINGS.tflops, "float8_e4m3fn": 0.05})
    assert cpu.peak_tflops("float8_e4m3fn") == 0.4


def test_8_bits_have_one_peak_on_a_gpu_and_twice_that_of_16() -> None:
    """torch's product of int8 has half of it on an H200: 959 TFLOP/s, and kernels of CUTLASS 1,490."""
    measured = {**CEILINGS.tflops, "float8_e4m3fn": 0.9, "int8": 0.5}
    gpu = dataclasses.replace(CEILINGS, device="cuda", tflops=measured)
    assert [gpu.peak_tflops(dtype) for dtype in ("float8_e4m3fn", "int8", "float8_e5m2")] == [0.9, 0.9, 0.9]
    slow = dataclasses.replace(gpu, tflops={**measured, "float8_e4m3fn": 0.7})
    assert [slow.peak_tflops(dtype) for dtype in ("float8_e4m3fn", "int8")] == [0.8, 0.8]
    problem = Problem(
        op="int_mm",
        inputs=(TensorSpec.contiguous((512, 1024), "int8"), TensorSpec.contiguous((1024, 1024), "int8")),
        device="cuda",
    )  # 1.07 GFLOP
    check = physics_check(taking(1_300), problem, get_op("int_mm"), gpu)
    assert check.passed, check.note
    assert not physics_check(taking(1_000), problem, get_op("int_mm"), gpu).passed


def product(dtype: str) -> Problem:
    """1.07 GFLOP."""
    shapes = (512, 1024), (1024, 1024)
    return Problem(op="mm", inputs=tuple(TensorSpec.contiguous(shape, dtype) for shape in shapes), device="cuda")


GPU = dataclasses.replace(CEILINGS, device="cuda", read_gb_per_s=1000, tflops={"float32": 0.06, "bfloat16": 0.9})


def test_fp32_may_be_three_products_of_tf32_on_a_gpu() -> None:
    """On an H200 these are faster than fp32 itself; no more than that is possible."""
    op, problem = get_op("mm"), product("float32")
    check = physics_check(taking(7_200), problem, op, GPU, split=True)
    assert check.passed
    assert "0.15 TFLOP/s" in check.note
    assert not physics_check(taking(6_000), problem, op, GPU, split=True).passed, "one product of tf32 is no fp32"
    assert not physics_check(taking(7_200), problem, op, GPU).passed, "nor are these for what multiplies in fp32"
    # where models are of fp32, 16 bits are not measured
    wide = dataclasses.replace(GPU, tflops={"float32": 0.06, "int8": 1.2, "float8_e4m3fn": 1.8})
    assert wide.peak_tflops("float32", split=True) == pytest.approx(0.15)
    # where torch itself may multiply in tf32, that is what was measured
    allowed = dataclasses.replace(GPU, tflops={"float32": 0.45, "bfloat16": 0.9})
    for split in (False, True):
        assert physics_check(taking(2_400), problem, op, allowed, split=split).passed
        assert not physics_check(taking(2_000), problem, op, allowed, split=split).passed
    assert dataclasses.replace(GPU, device="cpu").peak_tflops("float32", split=True) == 0.06
    assert GPU.peak_tflops("bfloat16", split=True) == 0.9


@pytest.mark.parametrize(
    ("backend_name", "config", "split"),
    [
        ("triton", {"kernel": "generated_mm", "precision": "tf32x3"}, True),
        ("triton", {"kernel": "generated_mm", "precision": "ieee"}, False),
        ("triton", {"kernel": "generated_rows"}, False),
        ("aten", {}, True),
        ("inductor", {"implementation": "library"}, True),
    ],
)
def test_who_may_split_fp32(backend_name: str, config: dict[str, Any], split: bool) -> None:
    assert may_split_fp32(Candidate(problem=product("float32"), backend=backend_name, config=config)) is split


@pytest.mark.parametrize(
    ("dtype", "split", "measured"),
    [("float32", True, ("float32", "bfloat16")), ("float32", False, ("float32",)), ("bfloat16", True, ("bfloat16",))],
)
def test_what_decides_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, dtype: str, split: bool, measured: tuple[str, ...]
) -> None:
    low = dataclasses.replace(GPU, tflops={"float32": 0.06})
    asked: list[tuple[str, ...]] = []

    def measure(device: str, threads: int | None, dtypes: tuple[str, ...], budget_s: float) -> Ceilings:
        asked.append(tuple(dtypes))
        return dataclasses.replace(GPU, tflops={name: GPU.tflops[name] for name in dtypes})

    monkeypatch.setattr("autokernel.evaluate.roofline.measure_ceilings", measure)
    check = sound_physics_check(taking(7_200), product(dtype), get_op("mm"), low, 1, None, split=split)
    assert check.passed == (split or dtype == "bfloat16")
    assert asked == [measured]


def test_faster_than_possible_fails_with_a_margin(linear: Any, ops: Any) -> None:
    problem = linear(m=512, k=1024, n=1024)  # 1.07 GFLOP: 10.7 ms at 0.1 TFLOP/s
    check = physics_check(taking(10_000), problem, ops["linear"], CEILINGS)
    assert check.passed
    assert check.value == pytest.approx(1.07, abs=0.01)
    check = physics_check(taking(9_000), problem, ops["linear"], CEILINGS)
    assert not check.passed
    assert "GB/s" in check.note


def test_bandwidth_is_that_of_the_fastest_level_that_could_hold_the_working_set(linear: Any, ops: Any) -> None:
    problem = linear(m=1, k=64, n=64)  # 16.6 KB, hardly any operations
    ceilings = dataclasses.replace(CEILINGS, tflops={"float32": 100})
    op = ops["linear"]
    num_bytes = op.num_bytes(problem)
    for copies, speed in ((1, 1000), (16, 100), (1000, 10)):
        least = num_bytes / (speed * 1e3)
        assert physics_check(taking(least), problem, op, ceilings, copies).value == pytest.approx(1, rel=0.01)


def test_ceilings_that_were_taken_too_low_are_looked_at_again(linear: Any, ops: Any) -> None:
    problem = linear(m=64, k=256, n=256)
    low = Ceilings(threads=1, read_gb_per_s=1e-3, tflops={"float32": 1e-6})
    x, w = torch.randn(64, 256), torch.randn(256, 256)
    torch.nn.functional.linear(x, w)
    start = time.perf_counter_ns()
    for _ in range(50):
        torch.nn.functional.linear(x, w)
    honest = taking((time.perf_counter_ns() - start) / 50_000)
    assert not physics_check(honest, problem, ops["linear"], low).passed
    assert sound_physics_check(honest, problem, ops["linear"], low, 2, 1).passed
    assert not sound_physics_check(taking(0.01), problem, ops["linear"], low, 2, 1).passed


def test_the_higher_of_two_measurements() -> None:
    other = Ceilings(threads=1, read_gb_per_s=20, tflops={"float32": 0.05, "float16": 0.3}, cache_gb_per_s=50)
    best = CEILINGS.best_with(other)
    assert (best.read_gb_per_s, best.cache_gb_per_s) == (20, 100)
    assert best.tflops == {"float32": 0.1, "bfloat16": 0.4, "float16": 0.3}


def test_measured_ceilings_are_plausible_and_survive_json(backend: Any) -> None:
    ceilings = MeasureCeilings(device="cpu", threads=1, dtypes=("float32",), budget_s=0.5)()
    assert 0.5 < ceilings.read_gb_per_s < 2000
    assert ceilings.l2_gb_per_s >= ceilings.cache_gb_per_s >= ceilings.read_gb_per_s
    assert 0.001 < ceilings.tflops["float32"] < 50
    assert ceilings.cache_bytes >= ceilings.l2_bytes > 0
    assert Ceilings.from_json(ceilings.to_json()) == ceilings


@pytest.mark.slow
def test_8_bits_are_multiplied_by_their_own_products() -> None:
    ceilings = measure_ceilings("cpu", 1, ("int8", "float8_e4m3fn", "float8_e5m2"), budget_s=0.1)
    assert set(ceilings.tflops) == {"int8", "float8_e4m3fn", "float8_e5m2"}
    assert all(0 < peak < 100 for peak in ceilings.tflops.values()), "an Intel CPU multiplies fp8 at 0.00003"


def test_a_dtype_that_does_not_multiply_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError('"addmm" not implemented for this dtype')

    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    assert measure_ceilings("cpu", 1, ("float32",), budget_s=0.2).tflops == {}


def test_the_kernels_that_measure_reading_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    problem, configs = reading_product(1 << 30)
    assert problem.inputs[1].num_bytes == 1 << 30
    space = load_space("generated")["triton"]
    for config in configs:
        assert not space.violations(config, names_for(get_op("generated").dims(problem), H200))
        code = ptx_of(problem, plan_of(problem, config))
        assert "ld.global.L1::evict_first.L2::cache_hint.v4" in code or "cp.async.cg.shared.global" in code, "16 bytes a lane"


def test_ceilings_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Ceilings(read_gb_per_s=0)
