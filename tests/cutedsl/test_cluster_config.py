"""Rules of our own CuTe DSL kernel: what one multiprocessor, and one cluster, can hold."""

from __future__ import annotations

import pytest

from autokernel.cutedsl.compiler import refusal
from autokernel.cutedsl.config import CuteConfig
from autokernel.cutedsl.spec import KernelSpec
from autokernel.records import ConfigValue

PLAIN: dict[str, ConfigValue] = {"source": "cluster", "tile_m": 128, "tile_n": 16, "split_k": 2, "swap": True}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tile_m": 96}, "has tiles 64x16"),
        ({"swap": False}, "takes swap"),
        ({"pingpong": True}, "leave the other parameters off"),
        ({"tile_k": 96}, "tile_k is one of 0, 64, 128, 256, 512, not 96"),
        ({"tile_k": 512, "tile_m": 256}, "more shared memory"),
        ({"cluster_n": 2}, "leave the other parameters off"),
        ({"split_k": 3}, "not split_k=3"),
        ({"split_k": 8, "cluster_m": 2}, "up to 8 blocks"),
        ({"tile_m": 192, "split_k": 8}, "as many of a tile's 16 rows"),
        ({"tile_m": 256, "tile_n": 128, "resident": 2}, "more shared memory than resident=2 leaves"),
        ({"resident": 0}, "resident=0"),
    ],
    ids=str,
)
def test_a_config_that_no_kernel_has_is_refused_by_its_rule(changed: dict[str, ConfigValue], reason: str) -> None:
    CuteConfig.from_entry(PLAIN)
    with pytest.raises(ValueError, match=reason):
        CuteConfig.from_entry({**PLAIN, **changed})


def test_other_sources_decide_themselves_how_many_blocks_are_resident() -> None:
    with pytest.raises(ValueError, match="leave resident at 1"):
        CuteConfig.from_entry({"source": "quack", "tile_m": 64, "tile_n": 64, "resident": 2})


def test_entries_of_earlier_versions_load_without_cache_hints_only() -> None:
    assert CuteConfig.from_entry({**PLAIN, "stream": False}) == CuteConfig.from_entry(PLAIN)
    with pytest.raises(ValueError, match="gained nothing in models and are gone: tune again"):
        CuteConfig.from_entry({**PLAIN, "stream": True})


def test_stages_fill_what_the_sums_leave() -> None:
    alone = CuteConfig.from_entry(PLAIN)
    assert alone.cluster_stages == (228 * 1024 - 2048 - 128 * 16 * 4) // (144 * 128)
    longer = CuteConfig.from_entry({**PLAIN, "tile_k": 256})
    assert longer.cluster_stages == (228 * 1024 - 2048 - 128 * 16 * 4) // (144 * 512)
    assert CuteConfig.from_entry({**PLAIN, "resident": 2}).cluster_stages == (114 * 1024 - 2048 - 128 * 16 * 4) // (144 * 128)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"a_major": "m"}, "contiguous along K"),
        ({"b_major": "n"}, "contiguous along K"),
        ({"dtype": "float8_e4m3fn"}, "matrices of 16 bits"),
        ({"epilogue": ("bias",)}, "without an epilogue"),
        ({"batched": True}, "one product"),
        ({"arch": "sm_100a"}, "on sm_90a"),
        ({"out_dtype": "float8_e4m3fn"}, "makes bfloat16, float16, float32"),
    ],
    ids=str,
)
def test_a_spec_that_it_does_not_serve_is_refused(changed: dict[str, object], reason: str) -> None:
    given: dict[str, object] = {"dtype": "bfloat16", "out_dtype": "bfloat16", "a_major": "k", "b_major": "k"}
    assert refusal(KernelSpec(config=PLAIN, **given)) is None  # type: ignore[arg-type]
    wrong = refusal(KernelSpec(config=PLAIN, **{**given, **changed}))  # type: ignore[arg-type]
    assert wrong is not None
    assert reason in wrong
