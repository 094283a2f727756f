"""Kernels for SM100, compiled without one: no card of that kind has run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autokernel.cutedsl.cache import ObjectCache
from autokernel.cutedsl.spec import KernelSpec

DENSE = {
    "PersistentDenseGemmOperator": 400, "PersistentDenseGemmEFCOperator": 200, "TgvGemmOperator": 3,
    "PersistentDenseGemmPreferredClusterOperator": 288,
}  # fmt: skip
AMPERE = {"Sm80TensorOpGemmOperator": 4}
SCALED, GROUPED = "PersistentDenseBlockScaledGemmOperator", "ContiguousOffset2D3DGemmDenseOperator"
QUACK = {"source": "quack", "tile_m": 256, "tile_n": 128, "cluster_m": 2, "cluster_n": 1}
TENSOROP = {"source": "operators", "family": "tensorop", "tile_m": 128, "tile_n": 128}
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
    KernelSpec(config=TENSOROP, **GIVEN),
]


@pytest.fixture(scope="module")
def answer(child: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = child("blackwell", str(tmp_path_factory.mktemp("kernels")), given=[spec.to_json() for spec in SPECS])
    assert done.returncode == 0, done.stderr[-3000:]
    *kernels, found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {**found, "kernels": kernels}


@pytest.mark.slow
def test_operators_of_every_kind_compile(answer: dict[str, Any]) -> None:
    """Of each class that is offered for a problem, the last at least."""
    compiled = {(problem, name.split(".")[1].split("_")[0]) for problem, name, _ in answer["compiled"]}
    assert compiled == {(problem, kind) for problem, kinds in answer["offered"].items() for kind in kinds}
    assert len(compiled) == 27
    assert all(10_000 < num_bytes < 400_000 for *_, num_bytes in answer["compiled"])


@pytest.mark.slow
def test_all_operators_are_offered_by_name(answer: dict[str, Any]) -> None:
    """Of a release of the package: another one may have others, which are to be looked at."""
    for problem in ("dense", "batched", "float16"):
        assert answer["offered"].pop(problem) == {**DENSE, **AMPERE}
    assert answer["offered"].pop("float8") == DENSE
    assert answer["offered"].pop("int8") == {kind: num for kind, num in DENSE.items() if kind != "TgvGemmOperator"}
    assert answer["offered"].pop("mixed") == {"MixedInputGemmOperator": 136}
    assert answer["offered"].pop("fused") == {"PersistentDenseGemmEFCOperator": 200}
    assert {problem: list(kinds) for problem, kinds in answer["offered"].items()} == {
        "mxfp8": [SCALED], "nvfp4": [SCALED], "grouped": [GROUPED],
    }  # fmt: skip
    assert min(num for kinds in answer["offered"].values() for num in kinds.values()) >= 36


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
    assert [name for _, name, _ in answer["compiled"][:3]] == [named[p][0] for p in ("mxfp8", "nvfp4", "grouped")]


@pytest.mark.slow
def test_both_sources_compile_our_configs_for_it(answer: dict[str, Any]) -> None:
    assert [sorted(kernel) for kernel in answer["kernels"]] == [["compile_s", "path"]] * len(SPECS)
    paths = [Path(kernel["path"]) for kernel in answer["kernels"]]
    split = ObjectCache(paths[2].parent).get(paths[2].stem)
    assert split is not None
    assert split[0].launch.scratch_tile == (128, 128, 2, 1), "two blocks share a tile of 256 rows"
    assert all(b"sm_100a" in path.read_bytes() for path in paths)
