"""The kernels for MLPs in Triton's interpreter and through its compiler for Hopper; no GPU is needed for either."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernels.for_hopper import bytes_of_stack, compiled

from autokernel.kernels.launch import KernelPlan
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).resolve().parent
H200 = DeviceFacts(device="cuda", isa="sm_90", device_name="NVIDIA H200", smem_bytes=232448, num_units=132, l2_bytes=50 << 20)


def problem(
    rows: tuple[int, ...] = (1, 37), dtype: str = "float32", activation: str = "relu", bias: str = "none", residual: bool = True
) -> Problem:
    """Chronos-2's, unless something else is asked for."""
    k, hidden = 768, 3072
    inputs = [TensorSpec.contiguous((*rows, k), dtype), TensorSpec(shape=(k, hidden), dtype=dtype, stride=(1, k))]
    inputs += [TensorSpec.contiguous((hidden,), dtype)] if bias in ("first", "both") else []
    inputs += [TensorSpec(shape=(hidden, k), dtype=dtype, stride=(1, hidden))]
    inputs += [TensorSpec.contiguous((k,), dtype)] if bias in ("second", "both") else []
    inputs += [TensorSpec.contiguous((*rows, k), dtype)] if residual else []
    scalars = (("activation", activation), ("bias", bias), ("residual", residual))
    return Problem(op="mlp", inputs=tuple(inputs), device="cuda", scalars=scalars)


def default(case: Problem) -> dict[str, ConfigValue]:
    config = load_space("mlp")["triton"].default(names_for(get_op("mlp").dims(case), H200))
    assert config is not None
    return config


def compiled_for_hopper(case: Problem, plan: KernelPlan, which: int) -> Any:
    kernel = compiled(case, plan, which)
    assert kernel.metadata.shared <= H200.smem_bytes
    return kernel


def test_the_kernels_compute_what_the_reference_does() -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, str(FOLDER / "interpreted_mlp.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr[-2000:]


def test_chronos_2s_default_keeps_the_tensor_cores_and_the_memory_busy(tmp_path: Path) -> None:
    case = problem()
    plan = plan_of(case, default(case))
    assert [launch.grid for launch in plan.launches] == [(96, 1, 1), (222, 1, 1)]
    assert plan.scratch[0].shape == (96 * 37 * 768,)
    kernel = compiled_for_hopper(case, plan, 0)
    ptx = str(kernel.asm["ptx"])
    assert bytes_of_stack(ptx, tmp_path) == 0
    # three products of Hopper's instruction for each 8 of the depth, 64 in the first loop and 32 in the second
    assert ptx.count("wgmma.mma_async") == 3 * (64 // 8 + 32 // 8)
    assert "prefetch.global.L2" in ptx
    copies = [line for line in str(kernel.asm["ttgir"]).splitlines() if "async_copy_global_to_local" in line]
    assert copies
    assert all("contiguity = 4" in line for line in copies), "every tile comes ahead, 16 bytes at a time"
    products = [line for line in str(kernel.asm["ttir"]).splitlines() if "tt.dot " in line]
    assert all("%cst" in line.split("tt.dot ")[1].split(",")[2] for line in products), "each block's sum starts at zero"
    total = str(compiled_for_hopper(case, plan, 1).asm["ptx"])
    assert "ld.global.v4" in total
    assert "atom" not in total + ptx


@pytest.mark.parametrize(
    ("rows", "dtype", "bias", "change", "instruction"),
    [
        ((2, 64), "bfloat16", "both", {}, "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16"),
        ((4,), "bfloat16", "both", {}, "m64n16k16.f32.bf16"),
        ((37,), "float32", "first", {"swap_in": True, "swap_out": True, "prefetch": False}, "tf32"),
        ((5,), "float32", "second", {"precision": "ieee", "BLOCK_H": 32}, "fma.rn.f32"),
    ],
)
def test_other_sizes_compile_for_hopper(
    rows: tuple[int, ...], dtype: str, bias: str, change: dict[str, ConfigValue], instruction: str, tmp_path: Path
) -> None:
    case = problem(rows, dtype, "gelu", bias)
    ptx = str(compiled_for_hopper(case, plan_of(case, {**default(case), **change}), 0).asm["ptx"])
    assert instruction in ptx
    assert bytes_of_stack(ptx, tmp_path) == 0
    assert ("prefetch.global" in ptx) == change.get("prefetch", True)


def test_the_space_has_configs_for_few_rows_alone() -> None:
    triton_space = load_space("mlp")["triton"]
    for rows in (1, 16, 37, 100, 128):
        for dtype in ("float32", "bfloat16"):
            plan_of(problem((rows,), dtype), default(problem((rows,), dtype)))
    assert triton_space.default(names_for(get_op("mlp").dims(problem((129,))), H200)) is None


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (problem((129,)), {}, "for at most 128 rows, of which each program has a block; there are 129"),
        (problem((1, 1, 1, 2)), {}, "takes x of 2 to 4 dimensions"),
        (problem((0,)), {}, "no empty tensors"),
        (problem(), {"BLOCK_H": 24}, "block_h is a power of two; it is 24"),
        (problem(), {"BLOCK_K": 8}, "at least 16; block_m, block_h, block_k, block_n are"),
        (problem(), {"num_stages": 0}, "num_stages is at least 1; it is 0"),
        (problem(), {"precision": "tf32"}, "precision must be one of"),
        (problem(dtype="float64"), {}, "inputs of one dtype, bfloat16, float16, float32; these are float64"),
        (problem(), {"split_n": 2}, "unknown: split_n"),
    ],
)
def test_what_is_not_legal_is_refused(case: Problem, change: dict[str, ConfigValue], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(case, {**default(problem()), **change})
