"""Kernels for SM100, compiled without one: no card of that kind has run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autokernel.cutedsl.spec import KernelSpec

ASKED = [["dense", 0], ["dense", -1], ["mxfp8", 0], ["nvfp4", -1], ["grouped", 0]]
QUACK = {"source": "quack", "tile_m": 256, "tile_n": 128, "cluster_m": 2, "cluster_n": 1}
OPERATORS = {"source": "operators", "tile_m": 128, "tile_n": 128, "cluster_m": 2, "cluster_n": 1}


@pytest.fixture(scope="module")
def answer(child: Any) -> dict[str, Any]:
    done = child("blackwell", given=ASKED)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_operators_of_every_kind_compile(answer: dict[str, Any]) -> None:
    names = [name for name, _ in answer["compiled"]]
    assert all("sm100" in name for name in names)
    assert ["BlockScaled" in name for name in names] == [False, False, True, True, False]
    assert "ContiguousOffset2D3D" in names[-1]
    assert all(10_000 < num_bytes < 400_000 for _, num_bytes in answer["compiled"])


@pytest.mark.slow
def test_all_operators_are_offered_by_name(answer: dict[str, Any]) -> None:
    assert answer["offered"]["dense"] > 800
    assert min(answer["offered"].values()) >= 36


@pytest.mark.slow
def test_nvmatmulheuristics_ranks_them_for_a_b200(answer: dict[str, Any]) -> None:
    assert len(answer["seeded"]) == 5
    assert all("tile256x256" in name for name in answer["seeded"][:2])


@pytest.mark.slow
def test_both_sources_compile_our_configs_for_it(compile_all: Any) -> None:
    common = {"dtype": "bfloat16", "out_dtype": "bfloat16", "a_major": "k", "b_major": "k", "arch": "sm_100a", "num_units": 148}
    epilogue = ("bias", "gelu", "gelu_tanh", "silu", "tanh", "relu", "add")
    found = compile_all(
        [
            KernelSpec(config=OPERATORS, **common),
            KernelSpec(config={**QUACK, "swap": True}, epilogue=epilogue, **common),
            KernelSpec(config={**QUACK, "split_k": 2}, **common),
        ]
    )
    assert [isinstance(answer, str) for answer in found] == [False] * 3
    assert found[2][0].launch.scratch_tile == (128, 128, 2, 1), "two blocks share a tile of 256 rows"
    assert all(b"sm_100a" in Path(path).read_bytes() for _, path in found)
