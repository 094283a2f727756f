"""The kernel for rotary embeddings in Triton's interpreter and through its compiler for Hopper; no GPU is needed for either."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.for_hopper import ptx_of

from autokernel.kernels.launch import KernelPlan, Launch
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).resolve().parent
H200 = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232_448, l2_bytes=60 << 20)
CONFIG: dict[str, ConfigValue] = {"kernel": "rotary", "block_rows": 4, "num_warps": 1}
EPS = (("eps", 1e-6),)


def spec(*shape: int, dtype: str = "bfloat16") -> TensorSpec:
    return TensorSpec.contiguous(shape, dtype)


def heads(batch: int, length: int, num: int, dim: int = 128) -> TensorSpec:
    """`[B, H, T, D]` as a projection leaves it."""
    row = num * dim
    return TensorSpec(shape=(batch, num, length, dim), dtype="bfloat16", stride=(length * row, dim, row, 1))


def tables(length: int, dim: int = 128) -> tuple[TensorSpec, ...]:
    return (spec(1, 1, length, dim),) * 2


def problem(op: str, *inputs: TensorSpec, scalars: tuple[tuple[str, ConfigValue], ...] = ()) -> Problem:
    return Problem(op=op, inputs=inputs, device="cuda", scalars=scalars)


def qwen3(batch: int, length: int) -> Problem:
    q, k, gain = spec(batch, length, 32, 128), spec(batch, length, 8, 128), spec(128)
    return problem("rotary_qk", q, gain, k, gain, *tables(length), scalars=EPS)


def zimage(length: int = 4352) -> Problem:
    x, gain, turns = spec(1, length, 30, 128), spec(128), spec(1, length, 64, dtype="complex64")
    return problem("rotary_qk", x, gain, x, gain, turns, scalars=EPS)


def llama(batch: int, length: int) -> Problem:
    return problem("rotary_qk", heads(batch, length, 32), heads(batch, length, 8), *tables(length))


def test_every_fusion_computes_what_its_reference_does() -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)}
    command = [sys.executable, str(FOLDER / "interpreted_rotary.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("case", [qwen3(2, 512), zimage(), llama(2, 512)], ids=["qwen3", "zimage", "llama"])
def test_rows_are_read_and_written_sixteen_bytes_at_a_time(case: Problem) -> None:
    ptx = ptx_of(case, plan_of(case, CONFIG))
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert "ld.global.b16" not in ptx
    assert "bar.sync" not in ptx, "nothing goes through shared memory"
    assert ("rsqrt" in ptx) == ("eps" in dict(case.scalars))


def launch_of(case: Problem) -> Launch:
    (launch,) = plan_of(case, CONFIG).launches
    return launch


def test_rows_of_both_are_counted_as_they_lie_in_memory() -> None:
    launch = launch_of(llama(2, 512))
    assert launch.grid == ((2 * 512 * 32 + 2 * 512 * 8) // 4, 1, 1)
    given = launch.arguments
    assert (given["Q_ROWS"], given["K_ROWS"], given["Q_BLOCKS"]) == (2 * 512 * 32, 2 * 512 * 8, 2 * 512 * 32 // 4)
    # positions, then heads: each of a head's tables serves the next head
    assert (given["Q_SIZE_1"], given["Q_SIZE_2"], given["K_SIZE_2"]) == (512, 32, 8)
    assert [given[f"Q{i}"] for i in range(4)] == [512 * 4096, 4096, 128, 1]
    assert [given[f"C{i}"] for i in range(4)] == [0, 128, 0, 1]
    assert given["WIDE"] is False
    assert launch_of(problem("rotary", heads(64, 8192, 64), *tables(8192))).arguments["WIDE"] is True


def test_normed_heads_are_turned_in_the_order_of_the_result() -> None:
    plan = plan_of(qwen3(2, 512), CONFIG)
    assert [out.shape for out in plan.outputs] == [(2, 32, 512, 128), (2, 8, 512, 128)]
    assert plan.outputs[0].stride == (512 * 4096, 128, 4096, 1)
    given = plan.launches[0].arguments
    assert [given[f"QY{i}"] for i in range(4)] == [512 * 4096, 4096, 128, 1]
    assert [given[f"KY{i}"] for i in range(4)] == [512 * 1024, 1024, 128, 1]


SINGLE = problem("norm_rotary", spec(1, 1, 32, 128), spec(128), *tables(1), scalars=EPS)


@pytest.mark.parametrize(
    ("case", "minimum"),
    [(qwen3(1, 1), 15), (qwen3(64, 1), 15), (llama(4, 512), 15), (zimage(), 15), (SINGLE, 12),
     (problem("rotary", heads(1, 1, 1, 40), *tables(1, 40)), 1), (problem("rotary", heads(2, 5, 3, 512), *tables(5, 512)), 5),
     (problem("rotary_complex", spec(1, 33, 6, 80), spec(1, 33, 40, dtype="complex64")), 10)],
)  # fmt: skip
def test_every_config_of_the_space_is_one_that_the_kernel_takes(case: Problem, minimum: int) -> None:
    bound = load_space(case.op)["triton"].bind(names_for(get_op(case.op).dims(case), H200))
    default = bound.default()
    assert default is not None
    assert not bound.violations(default)
    configs = list(bound.enumerate(200))
    assert len(configs) >= minimum
    for config in (default, *configs):
        assert isinstance(plan_of(case, config), KernelPlan)


SLANTED = TensorSpec(shape=(1, 7, 64), dtype="complex64", stride=(448, 1, 7))


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (SINGLE, {"block_rows": 3}, "block_rows is a power of two; it is 3"),
        (SINGLE, {"block_rows": 64}, "at most 64 pairs of elements; 64 rows of 128 with 1 warps are 128"),
        (SINGLE, {"stages": 2}, "RotaryConfig takes block_rows, num_warps; unknown: stages"),
        (problem("rotary", spec(1, 2, 0, 8), spec(1, 1, 1, 8), spec(1, 1, 1, 8)), {}, "none of them empty"),
        (problem("rotary", spec(1, 2, 1, 8), *tables(3, 8)), {}, r"turn, \[1, 2, 1, 8\], and not beyond it: .*\[1, 2, 3, 8\]"),
        (problem("rotary", spec(2, 4096), *(spec(2, 4096),) * 2), {}, "up to 1024; there are 4096"),
        (problem("rotary", spec(2, 4, dtype="float64"), *(spec(2, 4),) * 2), {}, "takes .*, float32, not float64"),
        (problem("rotary_complex", spec(1, 7, 4, 128), SLANTED), {}, r"next to each other; their strides are \[448, 1, 7\]"),
        (problem("norm_rotary", spec(1, 1, 4, 8), spec(1, 8), *tables(1, 8), scalars=EPS), {}, r"its shape is \[1, 8\]"),
    ],
)  # fmt: skip
def test_what_is_not_legal_is_refused(case: Problem, change: dict[str, ConfigValue], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(case, {**CONFIG, **change})
