"""Kernels for SM100, compiled without one: no card of that kind has run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autokernel.cutedsl.cache import ObjectCache
from autokernel.cutedsl.spec import KernelSpec

ASKED = [["dense", 0], ["dense", -1], ["mxfp8", 0], ["nvfp4", -1], ["grouped", 0]]
QUACK = {"source": "quack", "tile_m": 256, "tile_n": 128, "cluster_m": 2, "cluster_n": 1}
OPERATORS = {"source": "operators", "tile_m": 128, "tile_n": 128, "cluster_m": 2, "cluster_n": 1}


GIVEN: dict[str, Any] = {
    "dtype": "bfloat16",
    "out_dtype": "bfloat16",
    "a_major": "k",
    "b_major": "k",
    "arch": "sm_100a",
    "num_units": 148,
}
_STEPS = (
    *("bias", "gelu", "gelu_tanh", "silu", "tanh", "relu", "add", "neg", "abs", "exp", "sqrt", "rsqrt", "reciprocal", "square"),
    *("cube", "clamp_min(-1.0)", "clamp_max(6.0)", "div_by(3.0)", "sub", "rsub", "div", "rdiv", "maximum", "minimum_per_row"),
    *("mul_per_column", "div_per_row"),
)
SPECS = [
    KernelSpec(config=OPERATORS, **GIVEN),
    KernelSpec(config={**QUACK, "swap": True}, epilogue=_STEPS, **GIVEN),
    KernelSpec(config={**QUACK, "split_k": 2}, **GIVEN),
]


@pytest.fixture(scope="module")
def answer(child: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = child("blackwell", str(tmp_path_factory.mktemp("kernels")), given=[ASKED, [spec.to_json() for spec in SPECS]])
    assert done.returncode == 0, done.stderr[-3000:]
    *kernels, found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {**found, "kernels": kernels}


@pytest.mark.slow
def test_operators_of_every_kind_compile(answer: dict[str, Any]) -> None:
    names = [name for name, _ in answer["compiled"][: len(ASKED)]]
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
def test_scaled_and_grouped_problems_have_seeds_that_compile(answer: dict[str, Any]) -> None:
    named = answer["named"]
    assert sorted(named) == ["dense", "grouped", "mxfp8", "nvfp4"]
    kinds = {"dense": "DenseGemm", "mxfp8": "AFloat8E4M3FN", "nvfp4": "AFloat4E2M1FN", "grouped": "ContiguousOffset2D3D"}
    for problem, names in named.items():
        assert 2 <= len(names) == len(set(names)) <= 8
        assert all(kinds[problem] in name and "sm100" in name for name in names), names
    assert all("tile256x192" in named[problem][0] for problem in ("mxfp8", "nvfp4")), named
    assert "tile256x256" in named["grouped"][0]
    assert [name for name, _ in answer["compiled"][len(ASKED) :]] == [named[p][0] for p in ("mxfp8", "nvfp4", "grouped")]


@pytest.mark.slow
def test_both_sources_compile_our_configs_for_it(answer: dict[str, Any]) -> None:
    assert [sorted(kernel) for kernel in answer["kernels"]] == [["compile_s", "path"]] * len(SPECS)
    paths = [Path(kernel["path"]) for kernel in answer["kernels"]]
    split = ObjectCache(paths[2].parent).get(paths[2].stem)
    assert split is not None
    assert split[0].launch.scratch_tile == (128, 128, 2, 1), "two blocks share a tile of 256 rows"
    assert all(b"sm_100a" in path.read_bytes() for path in paths)
