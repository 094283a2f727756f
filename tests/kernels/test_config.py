"""What a skinny GEMM is launched with: pure arithmetic, and rules that are said in a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autokernel.kernels.config import SkinnyConfig

BASE = SkinnyConfig(mode="swap", block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4)
SPLIT = replace(BASE, split_k=4, tma=True)
STREAM = replace(BASE, waves=2)
ENTRY = {"kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}


@pytest.mark.parametrize("config", [BASE, SPLIT, STREAM, replace(SPLIT, mode="rows", tile_first=True)])
def test_the_operators_integers_are_the_config(config: SkinnyConfig) -> None:
    assert SkinnyConfig.from_ints(config.to_ints()) == config


def test_an_entry_names_the_parameters_as_the_search_space_does() -> None:
    assert SkinnyConfig.from_entry(ENTRY) == BASE
    assert SkinnyConfig.from_entry({**ENTRY, "merge": "concat", "m_min": 1, "m_max": 16, "split_k": 4, "tma": True}) == SPLIT


@pytest.mark.parametrize(
    "entry", [{**ENTRY, "GROUP_M": 8}, {k: v for k, v in ENTRY.items() if k != "BLOCK_K"}, {**ENTRY, "mode": "x"}]
)
def test_an_entry_that_is_not_the_kernels_is_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"GROUP_M|block_k|mode: x"):
        SkinnyConfig.from_entry(entry)


def test_programs_and_scratch_of_split_k() -> None:
    assert SPLIT.programs(16, 4096, 4096, 132) == 64 * 4
    assert SPLIT.num_parts(16, 4096, 4096, 132) == 64 * 4 * 16 * 64
    assert SPLIT.num_counters(16, 4096) == 64
    assert not BASE.reduces
    assert BASE.num_parts(16, 4096, 4096, 132) == BASE.num_counters(16, 4096) == 0


def test_stream_k_has_two_parts_for_each_program_and_no_more_programs_than_blocks() -> None:
    assert STREAM.programs(16, 4096, 4096, 132) == 264
    assert STREAM.programs(1, 64, 256, 132) == 2
    assert STREAM.num_parts(16, 4096, 4096, 132) == 2 * 264 * 16 * 64


@pytest.mark.parametrize(
    ("config", "mnk", "rule"),
    [
        (BASE, (129, 64, 128), "M is 129"),
        (BASE, (16, 2**20, 2**12), "32-bit"),
        (BASE, (16, 64, 192), "must divide K"),
        (replace(BASE, mode="vector"), (1, 64, 128), "block_m 16"),
        (replace(BASE, mode="vector", block_m=1, tma=True), (1, 64, 128), "tma to false"),
        (replace(BASE, block_m=8), (8, 64, 128), "at least 16"),
        (replace(BASE, split_k=2, waves=1), (8, 64, 256), "split_k of 1"),
        (replace(BASE, split_k=3), (8, 64, 256), "split_k is 3"),
    ],
)
def test_a_problem_that_it_does_not_take_is_said(config: SkinnyConfig, mnk: tuple[int, int, int], rule: str) -> None:
    assert rule in (config.problem(*mnk) or "")
    assert BASE.problem(16, 4096, 4096) is None
