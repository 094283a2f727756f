"""The kernel for norms in Triton's interpreter and through its compiler for Hopper; no GPU is needed for either."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from kernels.for_hopper import ptx_of, read_before_and_after

from autokernel.kernels.plans import plan_of
from autokernel.records import ConfigValue, Problem, TensorSpec

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).resolve().parent
CONFIG: dict[str, ConfigValue] = {"kernel": "row_norm", "rows": 1, "repeat": 1, "num_warps": 4}


def problem(shape: tuple[int, ...] = (64, 4096), op: str = "rms_norm", factor: tuple[int, ...] = (4096,)) -> Problem:
    shapes = {
        "rms_norm": (shape, shape[-1:]),
        "gated_rms_norm": (shape, shape[-1:], factor, shape),
        "add_rms_norm": (shape, factor, shape[-1:]),
    }
    specs = tuple(TensorSpec.contiguous(s, "bfloat16") for s in shapes[op])
    return Problem(op=op, inputs=specs, device="cuda", scalars=(("eps", 1e-5),))


def test_every_fusion_computes_what_its_reference_does() -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, str(FOLDER / "interpreted_row_norm.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr[-2000:]


def test_rows_are_read_sixteen_bytes_at_a_time() -> None:
    case = problem()
    ptx = ptx_of(case, plan_of(case, CONFIG))
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert "rsqrt.approx.ftz.f32" in ptx or "rsqrt.approx.f32" in ptx
    case = problem((2, 32, 4096), "gated_rms_norm", (2, 1, 4096))
    plan = plan_of(case, {**CONFIG, "repeat": 4})
    assert [launch.grid for launch in plan.launches] == [(16, 1, 1)]
    assert "ld.global.v4.b32" in ptx_of(case, plan)


def test_the_weight_and_nothing_else_is_read_before_the_wait() -> None:
    """4,096 elements by 128 threads: four reads of 16 bytes each for the weight, the row and the residual."""
    case = problem((1, 4096), "add_rms_norm", (1, 4096))
    plan = plan_of(case, CONFIG)
    (launch,) = plan.launches
    assert (launch.weights, launch.arguments["AHEAD"]) == (("weight",), 0)
    assert "griddepcontrol" not in ptx_of(case, plan)
    ahead = replace(plan, launches=(replace(launch, arguments={**launch.arguments, "AHEAD": 1}),))
    ptx = ptx_of(case, ahead)
    before, behind = ptx.split("griddepcontrol.wait")
    assert (before.count("ld.global"), before.count("st.global")) == (4, 0)
    assert (behind.count("ld.global"), behind.count("st.global")) == (8, 8)
    assert read_before_and_after(ptx, launch.kernel.arg_names.index("weight")) == ({True}, {False})


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (problem(), {"rows": 3}, "rows is a power of two; it is 3"),
        (problem(), {"rows": 8}, "8 rows of 4096 columns with 4 warps are 256"),
        (problem((64, 40)), {"num_warps": 4}, "1 rows of 40 columns with 4 warps are 0.5"),
        (problem((4, 4096)), {"repeat": 8}, "repeat is 1 to the number of blocks of rows, 4; it is 8"),
        (problem((4, 65536)), {"num_warps": 32}, "at most 32768 columns; there are 65536"),
        (problem((1, 1, 1, 4, 64)), {"num_warps": 1}, "takes 2 to 4 dimensions"),
        (problem(op="add_rms_norm"), {}, r"the residual has the shape of x, \[64, 4096\]; its own is \[4096\]"),
        (problem(op="gated_rms_norm", factor=(3, 4096)), {}, r"broadcasts to x, \[64, 4096\]; its shape is \[3, 4096\]"),
        (problem(), {"stages": 2}, "row_norm takes rows, repeat, num_warps; the config has"),
    ],
)
def test_what_is_not_legal_is_refused(case: Problem, change: dict[str, ConfigValue], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(case, {**CONFIG, **change})
