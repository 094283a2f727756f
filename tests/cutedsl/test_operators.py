"""What nvidia-cutlass-operators offers for SM90, and that a config reaches each of its kernels."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest

from autokernel.cutedsl.compiler import refusal
from autokernel.cutedsl.config import FAMILIES, OPERATORS_TILES, SWIZZLES, TENSOROP_TILES, CuteConfig
from autokernel.cutedsl.spec import KernelSpec
from autokernel.records import ConfigValue

SM90, AMPERE, OURS = "Sm90StaticPersistentGemmOperator", "Sm80TensorOpGemmOperator", "TunedSm90Operator"
MAJORS = (("k", "k"), ("k", "n"), ("m", "k"), ("m", "n"))
HALVES = ("bfloat16", "float16")
CASES: list[tuple[str, str, str, str, bool]] = [
    *((a, out, *majors, batched) for a, out, majors, batched in itertools.product(
        HALVES, (*HALVES, "float32"), MAJORS, (False, True)
    )),
    *((dtype, out, "k", "k", batched) for dtype, outs in (
        ("float8_e4m3fn", (*HALVES, "float32", "float8_e4m3fn")), ("float8_e5m2", ("bfloat16",)), ("int8", ("int32", "float32"))
    ) for out in outs for batched in (False, True)),
]  # fmt: skip


def configs() -> list[dict[str, ConfigValue]]:
    """Every legal config of the source that is not swapped."""
    found = []
    for family, (m, n), *rest in itertools.product(FAMILIES, OPERATORS_TILES, (1, 2), (1, 2), SWIZZLES, ("rows", "columns")):
        names = ("source", "family", "tile_m", "tile_n", "cluster_m", "cluster_n", "swizzle", "raster")
        config: dict[str, ConfigValue] = dict(zip(names, ("operators", family, m, n, *rest), strict=True))
        if CuteConfig(**config).problem() is None:  # type: ignore[arg-type]
            found.append(config)
    return found


@pytest.fixture(scope="module")
def answer(child: Any) -> dict[str, Any]:
    done = child("operators", given={"cases": CASES, "configs": configs()})
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_two_classes_are_offered_and_ampere_s_for_nothing_that_hoppers_refuses(answer: dict[str, Any]) -> None:
    for case, offered in zip(CASES, answer["alone"], strict=True):
        assert offered == ({SM90: 24, AMPERE: 4} if case[0] in HALVES else {SM90: 24}), case
    assert answer["unaligned"] == {}, "both read 16 bytes at a time"


@pytest.mark.slow
def test_our_operators_are_added_and_nothing_else_changes(answer: dict[str, Any]) -> None:
    assert answer["added"] == ["autokernel"]
    assert answer["together"] == [{**alone, OURS: 24 * 7} for alone in answer["alone"]]
    assert len(answer["ours"]) == len(set(answer["ours"])) == 24 * 7, "of a provider of their own"
    assert all(name.startswith(f"autokernel.{OURS}_") for name in answer["ours"])
    assert OURS not in answer["on_sm100"]
    assert answer["on_sm100"][AMPERE] == 4


@pytest.mark.slow
def test_every_operator_is_reached_by_one_config(answer: dict[str, Any]) -> None:
    """But for names of Ampere's kernel, whose machine code is the same."""
    assert Counter(map(len, answer["chosen"])) == {1: 24 * 8 + 1}
    reached = [name for (name,) in answer["chosen"]]
    assert len(set(reached)) == len(reached)
    left = set(answer["names"]) - set(reached)
    assert sorted(name.rsplit("_", 1)[1] for name in left) == ["tile128x64x32", "tile64x128x32", "tile64x64x32"]
    assert left < set(answer["code"])
    assert len(answer["code"]) == 4
    assert len(set(answer["code"].values())) == 1
    for config, name in zip(configs(), reached, strict=True):
        tile, cluster = f"_tile{config['tile_m']}x{config['tile_n']}", f"_cluster{config['cluster_m']}x{config['cluster_n']}x1"
        order = f"_swizzle{config['swizzle']}_raster_{config['raster']}"
        plain = (config["swizzle"], config["raster"]) == (1, "rows")
        assert name.endswith(f"{tile}x32" if config["family"] == "tensorop" else f"{cluster}{tile}x64{'' if plain else order}")


@pytest.mark.slow
def test_the_order_of_tiles_is_in_the_machine_code(compile_all: Any) -> None:
    base = {"source": "operators", "tile_m": 64, "tile_n": 64}
    orders = [{"swizzle": 1}, {"swizzle": 2}, {"swizzle": 2, "raster": "columns"}]
    given = {"dtype": "bfloat16", "out_dtype": "bfloat16", "a_major": "k", "b_major": "k"}
    found = compile_all([KernelSpec(config={**base, **order}, **given) for order in orders])
    assert len({info.sha256 for info, _ in found}) == 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": "float8_e4m3fn"}, "tensorop multiplies matrices of 16 bits, not float8_e4m3fn"),
        ({"dtype": "int8", "out_dtype": "int32"}, "not int8: leave family out"),
        ({"out_dtype": "float8_e4m3fn"}, "operators makes bfloat16, float16, float32 of bfloat16"),
        ({"epilogue": ("relu",)}, "operators computes no epilogue"),
        ({"pdl": True}, "no programmatic dependent launch"),
    ],
)
def test_what_amperes_kernel_does_not_take(changed: dict[str, Any], words: str) -> None:
    (tile_m, tile_n), *others = TENSOROP_TILES
    assert not others
    config = {"source": "operators", "family": "tensorop", "tile_m": tile_m, "tile_n": tile_n}
    given = {"dtype": "bfloat16", "out_dtype": "bfloat16", "a_major": "m", "b_major": "n"}
    assert refusal(KernelSpec(config=config, **given)) is None
    majors = {"a_major": "k", "b_major": "k"}
    assert words in (refusal(KernelSpec(config=config, **{**given, **majors, **changed})) or "")
