"""Rules of our own CuTe DSL kernel that keeps x in registers: what a warp, and a multiprocessor, can hold."""

from __future__ import annotations

import pytest

from autokernel.cutedsl.compiler import refusal
from autokernel.cutedsl.config import CuteConfig
from autokernel.cutedsl.spec import KernelSpec
from autokernel.records import ConfigValue

PLAIN: dict[str, ConfigValue] = {"source": "stationary", "tile_m": 16, "tile_n": 16, "tile_k": 4096, "swap": True}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tile_m": 24}, "has tiles 8x16, 16x16, 32x16, 64x16"),
        ({"tile_n": 32}, "not 16x32"),
        ({"tile_k": 0}, "tile_k=0"),
        ({"tile_k": 4608}, "keeps 512, 1024"),
        ({"tile_m": 64, "tile_k": 2560}, "more registers than a warp has"),
        ({"swap": False}, "takes swap"),
        ({"split_k": 2}, "leave the other parameters off"),
        ({"cluster_m": 2}, "leave the other parameters off"),
        ({"resident": 2}, "leave the other parameters off"),
        ({"fuse": True}, "leave the other parameters off"),
    ],
    ids=str,
)
def test_a_config_that_no_kernel_has_is_refused_by_its_rule(changed: dict[str, ConfigValue], reason: str) -> None:
    assert CuteConfig.from_entry(PLAIN).deterministic
    with pytest.raises(ValueError, match=reason):
        CuteConfig.from_entry({**PLAIN, **changed})


@pytest.mark.parametrize(("tile_m", "tile_k", "slots"), [(8, 4096, 3), (16, 4096, 3), (16, 2048, 6), (64, 1024, 11)])
def test_slots_fill_what_the_sums_leave(tile_m: int, tile_k: int, slots: int) -> None:
    config = CuteConfig.from_entry({**PLAIN, "tile_m": tile_m, "tile_k": tile_k})
    assert config.stationary_slots == slots
    ring, sums = slots * 16 * (8 * tile_k // 16 + 64) * 2, 16 * min(tile_m // 8, 2) * 128 * 4
    assert ring + sums <= 227 * 1024 - 1024 < ring + sums + ring // slots


def test_a_spec_that_it_does_not_serve_is_refused_in_its_name() -> None:
    given = {"dtype": "bfloat16", "out_dtype": "bfloat16", "a_major": "k", "b_major": "k"}
    assert refusal(KernelSpec(config=PLAIN, **given)) is None
    for changed in ({"b_major": "n"}, {"dtype": "float8_e4m3fn"}):
        wrong = refusal(KernelSpec(config=PLAIN, **{**given, **changed}))
        assert wrong is not None
        assert "stationary multiplies matrices of 16 bits that are contiguous along K" in wrong
