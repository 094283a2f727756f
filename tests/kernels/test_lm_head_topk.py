"""The kernels for the LM head with top-k sampling in Triton's interpreter and through its compiler for Hopper; no GPU."""

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
    "kernel": "lm_head_topk", "mode": "swap", "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 4, "width": 2048,
}  # fmt: skip


def problem(
    x: tuple[int, ...] = (16, 4096), vocabulary: int = 128256, top: int = 50, *, dtype: str = "bfloat16", cast: bool = True
) -> Problem:
    specs = (TensorSpec.contiguous(x, dtype), TensorSpec.contiguous((vocabulary, x[-1]), dtype))
    return Problem(op="lm_head_topk", inputs=specs, device="cuda", constants=(1,), scalars=(("cast", cast), ("top", top)))


def test_every_mode_finds_what_is_largest() -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, str(FOLDER / "interpreted_topk.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr[-2000:]


def test_a_few_rows_swap_and_parts_are_merged_until_one_group_is_left() -> None:
    case = problem()
    plan = plan_of(case, CONFIG)
    assert [launch.grid for launch in plan.launches] == [(1002, 1, 1), (16, 32, 1), (16, 1, 1)]
    assert [(buffer.shape, buffer.zeroed) for buffer in plan.scratch] == [((16, 64128), False), ((16, 2048), False)]
    assert [(spec.shape, spec.dtype) for spec in plan.outputs] == [((16, 50), "float32"), ((16, 50), "int64")]
    few = problem(top=8)
    plan = plan_of(few, {**CONFIG, "block_n": 64, "width": 128})
    assert [launch.grid for launch in plan.launches] == [(2004, 1, 1), (16, 126, 1), (16, 8, 1), (16, 1, 1)]
    assert "wgmma" in ptx_of(few, plan, 0)
    assert all("shfl" in ptx_of(few, plan, which) for which in (2, 3))


def test_many_rows_in_the_order_of_the_instruction() -> None:
    case = problem((128, 4096), top=8, cast=False)
    plan = plan_of(case, {**CONFIG, "mode": "rows", "block_n": 16, "num_warps": 4, "width": 16384})
    assert [launch.grid for launch in plan.launches] == [(8016, 1, 1), (128, 4, 1), (128, 1, 1)]
    assert "wgmma" in ptx_of(case, plan, 0)


def test_one_row_reads_sixteen_bytes_at_a_time_and_leaves_small_tiles_whole() -> None:
    vector: dict[str, ConfigValue] = {**CONFIG, "mode": "vector", "block_n": 4, "block_k": 1024, "num_stages": 2}
    case = problem((1, 1, 4096))
    plan = plan_of(case, vector)
    assert plan.scratch[0].shape == (1, 128256)
    ptx = ptx_of(case, plan, 0)
    assert "v4.b32" in ptx or "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize("top", [1, 8, 50, 64])
@pytest.mark.parametrize("rows", [1, 16, 64, 128])
def test_the_default_is_legal(rows: int, top: int) -> None:
    case = problem((rows, 4096), top=top)
    space = load_space("lm_head_topk")["triton"]
    facts = DeviceFacts(device="cuda", threads=1, l2_bytes=60 << 20, smem_bytes=232448, num_units=132)
    config = space.default(names_for(get_op(case.op).dims(case), facts))
    assert config is not None
    assert config["mode"] == ("rows" if rows > 64 else "swap")
    assert plan_of(case, config).launches


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (problem((129, 4096)), {}, "is for 1 to 128 rows; there are 129"),
        (problem(top=65), {}, "is for the 1 to 64 largest; top is 65"),
        (problem(), {"width": 64}, "width is a power of two, no less than 128 where top is 50; it is 64"),
        (problem(), {"width": 3000}, "width is a power of two, no less than 128 where top is 50; it is 3000"),
        (problem(), {"block_n": 48}, "block_n is a power of two; it is 48"),
        (problem(), {"mode": "columns"}, "mode is one of rows, swap, vector; it is columns"),
        (problem((128, 16), 1 << 25), {"block_k": 16}, "32-bit offsets; there are 2147483648 parts"),
        (problem((2, 64), 100, dtype="float32"), {}, "takes bfloat16 or float16, both alike; these are float32"),
        (problem(), {"join": "last"}, "unknown: join"),
    ],
)
def test_what_is_not_legal_is_refused(case: Problem, change: dict[str, ConfigValue], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(case, {**CONFIG, **change})
