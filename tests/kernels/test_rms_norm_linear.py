"""The kernel for a norm and linear layers in Triton's interpreter and through its compiler for Hopper; neither needs a GPU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernels.for_hopper import bytes_of_stack, compiled, ptx_of, read_before_and_after

from autokernel.kernels.launch import AHEAD, KernelPlan
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).resolve().parent
H200 = DeviceFacts(device="cuda", isa="sm_90", device_name="NVIDIA H200", smem_bytes=232448, num_units=132, l2_bytes=50 << 20)


def problem(
    rows: tuple[int, ...] = (16, 1),
    k: int = 4096,
    columns: tuple[int, ...] = (4096, 1024, 1024),
    dtype: str = "bfloat16",
    bias: str = "000",
) -> Problem:
    """Llama-3.1-8B's, unless something else is asked for."""
    inputs = [TensorSpec.contiguous((*rows, k), dtype), TensorSpec.contiguous((k,), dtype)]
    inputs += [TensorSpec(shape=(k, n), dtype=dtype, stride=(1, k)) for n in columns]
    inputs += [TensorSpec.contiguous((n,), dtype) for n, there in zip(columns, bias, strict=False) if there == "1"]
    several = len(columns) > 1
    said: ConfigValue = bias[: len(columns)] if several else bias[0] == "1"
    return Problem(
        op="rms_norm_qkv" if several else "rms_norm_linear",
        inputs=tuple(inputs),
        device="cuda",
        scalars=(("bias", said), ("eps", 1e-5)),
    )


def default(case: Problem) -> dict[str, ConfigValue]:
    config = load_space(case.op)["triton"].default(names_for(get_op(case.op).dims(case), H200))
    assert config is not None
    return config


def with_ahead(plan: KernelPlan) -> KernelPlan:
    (launch,) = plan.launches
    return dataclasses.replace(
        plan, launches=(dataclasses.replace(launch, arguments={**launch.arguments, AHEAD: 1}),)
    )  # fmt: skip


def test_the_kernel_computes_what_the_reference_does() -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, str(FOLDER / "interpreted_rms_norm_linear.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("case", "change", "instruction"),
    [
        (problem(), {}, "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16"),
        (problem(), {"one_pass": False, "block_s": 256}, "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16"),
        (problem((64,), columns=(14336, 14336)), {}, "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16"),
        (problem((2, 5), columns=(4096,), dtype="float16", bias="1"), {"split_k": 4}, "m64n16k16.f32.f16"),
        (problem((1, 37), 768, (768, 768, 768), "float32"), {}, "tf32"),
        (problem((7,), 768, (768,), "float32"), {"precision": "ieee", "mode": "rows"}, "fma.rn.f32"),
        (problem((1, 1)), {}, "fma.rn.f32"),
        (problem((1, 1)), {"one_pass": False, "split_k": 2}, "fma.rn.f32"),
    ],
)
def test_sizes_compile_for_hopper(case: Problem, change: dict[str, ConfigValue], instruction: str, tmp_path: Path) -> None:
    plan = plan_of(case, {**default(case), **change})
    kernel = compiled(case, plan)
    assert kernel.metadata.shared <= H200.smem_bytes
    ptx = str(kernel.asm["ptx"])
    assert instruction in ptx
    assert ("cp.async" in ptx) == (plan.launches[0].num_stages > 1), "weights are on their way ahead"
    assert bytes_of_stack(ptx, tmp_path) == 0


def test_one_launch_has_the_tiles_of_all_products() -> None:
    plan = plan_of(problem(), {**default(problem()), "BLOCK_N": 64, "split_k": 2})
    (launch,) = plan.launches
    assert launch.grid == (2 * (64 + 16 + 16), 1, 1)
    assert [spec.shape for spec in plan.outputs] == [(16, 4096), (16, 1024), (16, 1024)]
    assert [buffer.shape for buffer in plan.scratch] == [(2 * 96 * (16 * 64 + 2 * 16),), (96,)]
    assert "atom" in ptx_of(problem(), plan)
    alone = plan_of(problem(), {**default(problem()), "split_k": 1})
    assert not alone.scratch
    assert "atom" not in ptx_of(problem(), alone)


def test_one_row_reads_its_weights_before_it_waits() -> None:
    """And nothing else: x may still be written by the kernel in front."""
    case = problem((1,), columns=(4096,))
    plan = plan_of(case, default(case))
    assert plan.launches[0].weights == ("w0",)
    ptx = ptx_of(case, with_ahead(plan))
    assert ptx.count("griddepcontrol.wait") == 1
    before, _ = read_before_and_after(ptx, weight=2)
    assert before == {True}
    assert plan_of(problem((1,)), default(problem((1,)))).launches[0].weights == ("w0", "w1", "w2")
    for change in ({"split_k": 2}, {"mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}):
        (launch,) = plan_of(case, {**default(case), **change}).launches
        assert (launch.weights, launch.arguments[AHEAD]) == (None, 0)


def test_the_space_has_configs_for_few_rows_alone() -> None:
    for columns in ((768, 768, 768), (3072, 3072), (32128,)):
        for dtype in ("float32", "bfloat16", "float16"):
            for rows in (1, 2, 16, 37, 100, 128):
                case = problem((rows,), 768, columns, dtype)
                plan_of(case, default(case))
            names = names_for(get_op(case.op).dims(problem((129,), 768, columns, dtype)), H200)
            assert load_space(case.op)["triton"].default(names) is None


def row_major(case: Problem, *which: int) -> Problem:
    inputs = [
        TensorSpec.contiguous(spec.shape, spec.dtype) if i in which else spec for i, spec in enumerate(case.inputs)
    ]  # fmt: skip
    return dataclasses.replace(case, inputs=tuple(inputs))


@pytest.mark.parametrize(
    "case", [problem(), row_major(problem(columns=(4096, 4096)), 2, 3), row_major(problem(columns=(96,)), 2)]
)
def test_weights_come_ahead_16_bytes_at_a_time_whichever_way_they_lie(case: Problem) -> None:
    """Which of up to three a program reads is known when it runs, and how they lie is the same for all."""
    ragged = case.inputs[2].shape[1] % 64 > 0
    kernel = compiled(case, plan_of(case, {**default(problem()), "BLOCK_N": 64, "split_k": 1}))
    copies = [line for line in str(kernel.asm["ttgir"]).splitlines() if "async_copy_global_to_local" in line]
    assert any("64x64" in line or "memdesc<64x64" in line for line in copies) != ragged, "past the edge, one by one"
    assert ragged or "st.global.v4" in str(kernel.asm["ptx"])


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (problem((129,)), {}, "for at most 128 rows, of which each program has a block; there are 129"),
        (problem((1, 1, 1, 2)), {}, "takes x of 2 to 4 dimensions"),
        (problem((0,)), {}, "no empty tensors"),
        (problem(dtype="float64"), {}, "inputs of one dtype, bfloat16, float16, float32; these are float64"),
        (row_major(problem(), 3), {}, r"weights whose K has one stride; these have \[1, 1024\]"),
        (problem((128,), 1 << 20, (4096,)), {}, "32-bit offsets"),
        (problem(), {"BLOCK_N": 48}, "block_n is a power of two; it is 48"),
        (problem(), {"BLOCK_K": 8}, "at least 16; block_m, block_n, block_k are"),
        (problem(), {"mode": "vector"}, "mode vector is for one row and block_m of 1; there are 16 rows, block_m is 16"),
        (problem(), {"mode": "columns"}, "mode is one of rows, swap, vector; it is columns"),
        (problem(), {"split_k": 65}, "K has 64 blocks of 64; split_k is 65"),
        (problem(), {"num_stages": 0}, "num_stages is at least 1; it is 0"),
        (problem(), {"precision": "tf32"}, "precision must be one of"),
        (problem(), {"waves": 2}, "unknown: waves"),
    ],
)
def test_what_is_not_legal_is_refused(case: Problem, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(case, {**default(problem()), **change})
