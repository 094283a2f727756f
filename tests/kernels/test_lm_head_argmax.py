"""The kernel for the LM head with greedy sampling in Triton's interpreter and through its compiler for Hopper; no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.for_hopper import ptx_of

from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).resolve().parent
CONFIG: dict[str, ConfigValue] = {
    "kernel": "lm_head_argmax", "mode": "swap", "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 4,
}  # fmt: skip


def problem(
    x: tuple[int, ...] = (16, 4096),
    weight: tuple[int, ...] = (128256, 4096),
    *,
    stride: tuple[int, ...] | None = None,
    transposed: bool = False,
    dtype: str = "bfloat16",
    **scalars: ConfigValue,
) -> Problem:
    first = TensorSpec.contiguous(x, dtype)
    second = TensorSpec.contiguous(weight, dtype)
    if stride is not None:
        first = TensorSpec(shape=x, dtype=dtype, stride=stride)
    if transposed:
        second = TensorSpec(shape=weight, dtype=dtype, stride=(1, weight[0]))
    named = (("keepdim", False), *scalars.items())
    return Problem(op="lm_head_argmax", inputs=(first, second), device="cuda", constants=(1,), scalars=named)


def test_every_mode_finds_what_is_largest() -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, str(FOLDER / "interpreted_lm_head.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr[-2000:]


def test_a_few_rows_swap_and_the_last_program_joins() -> None:
    case = problem()
    plan = plan_of(case, CONFIG)
    (launch,) = plan.launches
    assert launch.grid == (2004, 1, 1)
    assert [(buffer.shape, buffer.zeroed) for buffer in plan.scratch] == [((16, 2004), False), ((1,), True)]
    ptx = ptx_of(case, plan)
    assert "wgmma" in ptx
    assert "atom." in ptx


def test_many_rows_leave_the_rest_to_a_launch() -> None:
    case = problem((128, 4096))
    plan = plan_of(case, {**CONFIG, "mode": "rows", "join": "launch"})
    first, second = plan.launches
    assert (first.grid, second.grid) == ((2004, 1, 1), (128, 1, 1))
    assert [buffer.zeroed for buffer in plan.scratch] == [False]
    assert "atom." not in ptx_of(case, plan, 0)
    assert "ld.global.cg" in ptx_of(case, plan, 1)


def test_one_row_reads_sixteen_bytes_at_a_time() -> None:
    vector: dict[str, ConfigValue] = {**CONFIG, "mode": "vector", "block_n": 4, "block_k": 1024, "num_stages": 2}
    case = problem((1, 1, 4096), keepdim=True)
    plan = plan_of(case, vector)
    assert plan.outputs == (TensorSpec.contiguous((1, 1, 1), "int64"),)
    ptx = ptx_of(case, plan, 0)
    assert "v4.b32" in ptx or "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize("rows", [1, 16, 64, 128])
def test_the_default_is_legal(rows: int) -> None:
    case = problem((rows, 4096))
    space = load_space("lm_head_argmax")["triton"]
    facts = DeviceFacts(device="cuda", threads=1, l2_bytes=60 << 20, smem_bytes=232448, num_units=132)
    config = space.default(names_for(get_op(case.op).dims(case), facts))
    assert config is not None
    assert (config["mode"], config["block_n"], config["join"]) == (
        "rows" if rows > 64 else "swap", 64, "last" if rows <= 16 else "launch",
    )  # fmt: skip
    assert plan_of(case, config).launches


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (problem((129, 4096)), {}, "is for 1 to 128 rows; there are 129"),
        (problem((2, 4096)), {"mode": "vector"}, "mode vector is for one row; there are 2"),
        (problem(), {"mode": "columns"}, "mode is one of rows, swap, vector; it is columns"),
        (problem(), {"join": "first"}, "join is one of last, launch; it is first"),
        (problem(), {"block_n": 48}, "block_n is a power of two; it is 48"),
        (problem(), {"block_n": 8}, "at least 16; this is 8x64"),
        (problem((1, 96), (1000, 96)), {}, "block_k must divide K; they are 64 and 96"),
        (problem((1, 8192), (300000, 8192)), {}, "32-bit offsets; the weight has 2457600000 elements"),
        (problem((128, 8192, 4096), (9, 4096), position="last"), {}, "32-bit offsets; x reaches 4294967295 elements"),
        (problem((2, 3, 64), (100, 64), stride=(512, 64, 1)), {}, "evenly apart; x is .2, 3, 64. with strides .512, 64, 1."),
        (problem((2, 64), (100, 64), stride=(1, 2)), {}, r"lie next to each other; strides of x are \[1, 2\]"),
        (problem((2, 64), (100, 64), transposed=True), {}, r"row by row; its strides are \[1, 100\]"),
        (problem((2, 64), (100, 64), dtype="float32"), {}, "takes bfloat16 or float16, both alike; these are float32"),
        (problem((0, 64), (100, 64)), {}, "takes nothing empty"),
        (problem(), {"split_k": 2}, "unknown: split_k"),
    ],
)
def test_what_is_not_legal_is_refused(case: Problem, change: dict[str, ConfigValue], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(case, {**CONFIG, **change})
