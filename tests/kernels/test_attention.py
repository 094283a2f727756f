"""The attention kernels in Triton's interpreter and through its compiler for Hopper, and what their configs refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from kernels import for_hopper
from kernels.for_hopper import bytes_of_stack

from autokernel.kernels.attention_config import DecodeConfig, FlashConfig, broadcast_strides
from autokernel.kernels.launch import Buffer, KernelPlan, Launch
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec
from autokernel.search.space import DeviceFacts, Names, names_for
from autokernel.search.space_file import load_space

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
DECODE: dict[str, ConfigValue] = {
    "kernel": "decode_attention", "BLOCK_S": 64, "num_splits": 4, "skip": False, "num_warps": 4, "num_stages": 3,
}  # fmt: skip
FLASH: dict[str, ConfigValue] = {"kernel": "flash_attention", "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


def problem(
    heads: tuple[int, int] = (32, 8), q_len: int = 1, kv_len: int = 2048, dtype: str = "bfloat16", mask: str | None = "bool",
    causal: bool = False,
) -> Problem:  # fmt: skip
    """Attention of 64 sequences over a static cache, q as the projection leaves it."""
    q = TensorSpec(shape=(64, heads[0], q_len, 128), dtype=dtype, stride=(q_len * heads[0] * 128, 128, heads[0] * 128, 1))
    kv = TensorSpec.contiguous((64, heads[1], kv_len, 128), dtype)
    masks = () if mask is None else (TensorSpec.contiguous((64, 1, q_len, kv_len), mask),)
    scalars: tuple[tuple[str, float | bool], ...] = (("scale", 0.1),)
    return Problem(
        op="attention", inputs=(q, kv, kv, *masks), device="cuda", scalars=(("causal", True), *scalars) if causal else scalars
    )  # fmt: skip


def ptx_of(case: Problem, config: dict[str, ConfigValue], which: int = -1) -> str:
    return for_hopper.ptx_of(case, plan_of(case, config), which)


pytest.importorskip("triton", reason="Triton is not installed")


def test_the_kernels_compute_attention_with_masks_shared_heads_and_ragged_sizes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "interpreted_attention.py")], capture_output=True, text=True, env=environment, check=False
    )  # fmt: skip
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("skip", [False, True])
def test_keys_and_values_come_by_asynchronous_copies_of_16_bytes(skip: bool) -> None:
    ptx = ptx_of(problem(), {**DECODE, "skip": skip})
    assert ptx.count("cp.async.cg.shared.global") >= 32
    assert "mma.sync.aligned.m16n8k16" in ptx
    assert "atom.global.gpu.acq_rel.add" in ptx
    assert "atom.global" not in ptx_of(problem(), {**DECODE, "num_splits": 1, "skip": skip})


def one_sequence(kv_len: int = 2080) -> Problem:
    many = problem(kv_len=kv_len)
    return replace(many, inputs=tuple(replace(spec, shape=(1, *spec.shape[1:])) for spec in many.inputs))


def test_keys_and_values_are_asked_for_before_the_wait_and_nothing_is_read_there() -> None:
    """Two tiles of 64 rows of 256 bytes each, of keys and of values, by two warps."""
    case, config = one_sequence(), {**DECODE, "num_splits": 17, "num_warps": 2, "num_stages": 4}
    plan = plan_of(case, config)
    (launch,) = plan.launches
    assert (launch.weights, launch.arguments["AHEAD"]) == ((), 0)
    plain, asking = (for_hopper.ptx_of(case, plan_of(case, {**config, "prefetch": asks})) for asks in (False, True))
    assert "prefetch.global" not in plain
    assert "griddepcontrol" not in plain + asking
    assert asking.count("prefetch.global.L2") == 2 * 64 * 2 // 64
    assert asking.rindex("prefetch.global.L2") < asking.index("ld.global"), "before q is read"
    ahead = replace(plan, launches=(replace(launch, arguments={**launch.arguments, "AHEAD": 1}),))
    ptx = for_hopper.ptx_of(case, ahead)
    before, behind = ptx.split("griddepcontrol.wait")
    assert before.count("prefetch.global.L2") == 2 * 64 * 2 // 64, "lines of 128 bytes of a tile, keys and values, a thread"
    assert "prefetch.global" not in behind
    assert not re.search(r"\b(ld|st|atom|red|cp)\.(async\.)?\S*global", before.replace("prefetch.global.L2", ""))
    assert "cp.async" in behind


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (one_sequence(), {"skip": True}),
        (problem(), {}),
        (
            replace(one_sequence(64), inputs=tuple(replace(s, stride=(*s.stride[:2], 1, 64)) for s in one_sequence(64).inputs)),
            {},
        ),
    ],
    ids=["nobody knows yet what is read", "more than a cache holds", "rows are not contiguous"],
)
def test_what_is_not_asked_for_early(case: Problem, change: dict[str, ConfigValue]) -> None:
    config = {**DECODE, "num_splits": 1, **change}
    (launch,) = plan_of(case, config).launches
    assert launch.weights is None
    with pytest.raises(ValueError, match="prefetch is for contiguous keys and values of 16 MiB together at most, without skip"):
        plan_of(case, {**config, "prefetch": True})


@pytest.mark.parametrize(("num_splits", "num_warps", "at_once"), [(17, 2, 17), (26, 1, 9), (33, 8, 17), (2, 1, 2), (33, 2, 17)])
def test_as_many_parts_are_put_together_at_once_as_registers_hold(
    num_splits: int, num_warps: int, at_once: int, tmp_path: Path
) -> None:
    case, config = one_sequence(), {**DECODE, "BLOCK_S": 16, "num_splits": num_splits, "num_warps": num_warps}
    (launch,) = plan_of(case, config).launches
    assert launch.arguments["COMBINE_S"] == at_once
    assert bytes_of_stack(ptx_of(case, config), tmp_path) == 0


def test_tiles_of_64_rows_use_hoppers_matrix_instruction() -> None:
    ptx = ptx_of(problem(q_len=256, kv_len=256, mask=None, causal=True), FLASH)
    assert "wgmma.mma_async" in ptx
    assert "cp.async" in ptx


def time_series(kv_len: int = 37, mask: bool = True) -> Problem:
    """Attention of Chronos-2: fp32, short, scores that are not scaled."""
    q = TensorSpec(shape=(1, 12, 37, 64), dtype="float32", stride=(37 * 768, 64, 768, 1))
    kv = TensorSpec(shape=(1, 12, kv_len, 64), dtype="float32", stride=(kv_len * 768, 64, 768, 1))
    masks = (TensorSpec.contiguous((1, 1, 1, kv_len), "float32"),) if mask else ()
    return Problem(op="attention", inputs=(q, kv, kv, *masks), device="cuda", scalars=(("scale", 1.0),))


def names_of(case: Problem) -> Names:
    device = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232448, l2_bytes=50 << 20)
    return names_for(get_op("attention").dims(case), device)


def default(case: Problem) -> dict[str, ConfigValue]:
    config = load_space("attention")["triton"].default(names_of(case))
    assert config is not None
    return config


def test_a_cache_of_one_row_may_be_asked_for_and_is_left_alone_by_default() -> None:
    chosen = default(one_sequence())
    assert chosen["prefetch"] is False
    asking = {**chosen, "prefetch": True}
    assert load_space("attention")["triton"].violations(asking, names_of(one_sequence())) == []
    assert [plan_of(one_sequence(), c).launches[0].arguments["PREFETCH"] for c in (chosen, asking)] == [0, 1]
    assert "prefetch" not in default(problem()), "64 sequences are more than a cache holds"
    assert "prefetch" not in default(problem(q_len=2))


def test_short_attention_in_fp32_is_one_tile_by_matrix_instructions(tmp_path: Path) -> None:
    case = time_series()
    config = default(case)
    assert config == {**FLASH, "skip": False, "BLOCK_M": 16, "num_stages": 1, "precision": "tf32x3"}
    (launch,) = plan_of(case, config).launches
    assert launch.grid == (3 * 12, 1, 1)
    ptx = ptx_of(case, config)
    assert bytes_of_stack(ptx, tmp_path) == 0
    assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" in ptx
    assert ptx.rindex("ld.global") < ptx.index("mma.sync"), "all loads are under way before the first product"
    assert "tf32" not in ptx_of(case, {**config, "precision": "ieee"})


def test_fp32_uses_hoppers_matrix_instruction_where_a_tile_has_64_rows(tmp_path: Path) -> None:
    case = time_series(kv_len=512, mask=False)
    ptx = ptx_of(case, {**FLASH, "precision": "tf32x3", "num_stages": 2})
    assert bytes_of_stack(ptx, tmp_path) == 0
    assert "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32" in ptx
    assert "cp.async" in ptx


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_scores_of_fp32_are_added_up_in_parts(precision: str) -> None:
    case = time_series()
    compiled = for_hopper.compiled(case, plan_of(case, {**default(case), "precision": precision}))
    lines = [line for line in str(compiled.asm["ttir"]).splitlines() if "tt.dot " in line]
    assert len(lines) == 4 + 1, "four parts of the head, and the values"
    assert all(line.split("tt.dot ")[1].split(",")[2].split()[0].startswith("%cst") for line in lines), "each starts at zero"
    assert all("tensor<16x16xf32> * tensor<16x64xf32>" in line for line in lines[:4])


def test_masked_prompts_use_registers_alone_and_read_masks_and_keys_ahead(tmp_path: Path) -> None:
    case = prompt(((1, 1, 2048, 2048), "bool"))
    ptx = ptx_of(case, {**FLASH, "BLOCK_M": 128, "num_warps": 8, "skip": True})
    assert bytes_of_stack(ptx, tmp_path) == 0
    # with the mask, without it, and with it again: each of both products, 8 and 4 steps of 16
    assert ptx.count("wgmma.mma_async") == 3 * (8 + 4)
    assert ptx.count("ld.global.v4") == 128 * 128 * 2 // (256 * 16), "only q is loaded where it is waited for"
    looked = ptx_of(case, {**FLASH, "skip": True}, which=0)
    assert "ld.global.v4" in looked


@pytest.mark.parametrize(
    ("mask", "tiles"),
    [
        ((2, 1, 1, 500), (2, 1, 1, 8)),
        ((1, 4, 300, 500), (1, 4, 5, 8)),
        ((1, 1, 300, 1), (1, 1, 5, 8)),
        ((2, 4, 300, 500), (2, 4, 5, 8)),
    ],
)
def test_a_mask_is_looked_at_once_for_all_that_share_it(mask: tuple[int, ...], tiles: tuple[int, ...]) -> None:
    plan = plan_of(prompt((mask, "bool"), batch=2, heads=4, q_len=300, kv_len=500), {**FLASH, "skip": True})
    look, attend = plan.launches
    assert plan.scratch == (Buffer(tiles, "int32"),)
    assert look.grid == (prod(tiles), 1, 1)
    assert attend.grid == (2 * 4 * 5, 1, 1)
    assert plan_of(prompt((mask, "bool"), batch=2, heads=4, q_len=300, kv_len=500), FLASH).scratch == ()


def prompt(
    mask: tuple[tuple[int, ...], str] | None, batch: int = 1, heads: int = 32, q_len: int = 2048, kv_len: int = 2048
) -> Problem:  # fmt: skip
    """A prompt's attention as Llama has it: the mask is computed, so that nobody knows what it hides."""
    q = TensorSpec(shape=(batch, heads, q_len, 128), dtype="bfloat16", stride=(q_len * heads * 128, 128, heads * 128, 1))
    kv = TensorSpec.contiguous((batch, heads // 4, kv_len, 128), "bfloat16")
    masks = () if mask is None else (TensorSpec.contiguous(*mask),)
    return Problem(op="attention", inputs=(q, kv, kv, *masks), device="cuda", scalars=(("scale", 128**-0.5),))


def test_what_flash_attention_refuses_to_skip() -> None:
    with pytest.raises(ValueError, match="there is none"):
        plan_of(prompt(None), {**FLASH, "skip": True})
    long = prompt(((1, 1, 1, 70_000), "bool"), kv_len=70_000)
    with pytest.raises(ValueError, match="at most 4096 tiles of keys; there are 4375: set block_n higher"):
        plan_of(long, {**FLASH, "BLOCK_N": 16, "skip": True})
    assert plan_of(long, {**FLASH, "skip": True}).launches[1].arguments["MAX_TILES"] == 2048


@pytest.mark.parametrize(
    ("changes", "case", "reason"),
    [
        ({}, problem(causal=True, q_len=2), "no causal"),
        ({}, problem(q_len=17), "at most 64 rows of q for one head of keys; there are 68"),
        ({"num_splits": 20}, problem(), "32 blocks of 64 are too few for 20 splits"),
        ({"num_splits": 0}, problem(), "num_splits is 1 to 128"),
        ({"BLOCK_S": 48}, problem(), "power of two"),
        ({"skip": True}, problem(mask=None), "there is none"),
        ({}, problem(dtype="float64", mask=None), "they are float64"),
        ({}, problem(mask="int32"), "masks of bool"),
        ({"precision": "tf32"}, problem(dtype="float32"), "precision must be one of ieee, tf32x3; it is tf32"),
        ({"precision": "tf32x3"}, problem(), "precision is for fp32; q is bfloat16: leave it out"),
        ({"block_n": 3}, problem(), "unknown: block_n"),
        ({"kernel": "fast"}, problem(), "attention has no Triton kernel 'fast'; there are decode_attention, flash_attention"),
    ],
)
def test_what_the_kernel_of_few_rows_refuses(changes: dict[str, ConfigValue], case: Problem, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_of(case, {**DECODE, **changes})


def test_splits_share_counters_and_one_split_needs_none() -> None:
    assert plan_of(problem(), {**DECODE, "num_splits": 1}).scratch == ()
    parts, states, counters = plan_of(problem(), DECODE).scratch
    assert (parts.shape, states.shape) == ((64 * 8 * 4, 4, 128), (64 * 8 * 4, 4, 2))
    assert counters == Buffer((64 * 8,), "int32", zeroed=True)


def test_offsets_that_32_bits_do_not_hold_are_refused() -> None:
    config = FlashConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)
    q, k, v, mask = problem(q_len=64, kv_len=1 << 20, mask="bool").inputs
    assert config.problem(replace(problem(), inputs=(q, k, v, mask))) is None
    far = replace(k, stride=(1 << 40, 1 << 31, 128, 1))
    assert "k reaches" in (config.problem(replace(problem(), inputs=(q, far, v, mask))) or "")
    huge = DecodeConfig(block_s=16, num_splits=128, skip=False, num_warps=4, num_stages=2)
    assert "32-bit" in (huge.problem(replace(problem(), inputs=tuple(_batch(s, 4096) for s in problem().inputs))) or "")


def _batch(spec: TensorSpec, size: int) -> TensorSpec:
    return TensorSpec(shape=(size, *spec.shape[1:]), dtype=spec.dtype, stride=spec.stride)


def test_a_mask_is_read_with_strides_of_zero_where_it_broadcasts() -> None:
    assert broadcast_strides(TensorSpec.contiguous((2, 1, 3, 8), "bool")) == (24, 0, 8, 1)
    assert broadcast_strides(TensorSpec.contiguous((1, 1, 1, 8), "bool")) == (0, 0, 0, 1)


def test_a_launch_gives_every_parameter_of_its_kernel() -> None:
    (launch,) = plan_of(problem(), DECODE).launches
    arguments = {name: value for name, value in launch.arguments.items() if name != "SKIP"}
    with pytest.raises(ValueError, match=r"missing: \['SKIP'\], unknown: \['EXTRA'\]"):
        KernelPlan((), (), (Launch(launch.kernel, (1, 1, 1), {**arguments, "EXTRA": 1}, 4, 2),))
    with pytest.raises(ValueError, match="a zeroed buffer is a row"):
        KernelPlan((), (Buffer((2, 3), "int32", zeroed=True),), ())
