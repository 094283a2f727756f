"""What the race of CuTe DSL kernels puts at the start: of each kind the first, and kernels that no space has."""

from __future__ import annotations

import json

import cute_kernels
import cute_race
import pytest
from gemm_kernels import llama_gemm

from autokernel.cutedsl.config import CuteConfig
from autokernel.search.cost_model import kind_of


@pytest.mark.parametrize(("name", "m"), [("o", 16), ("down", 64), ("lmhead", 128)])
def test_each_kind_is_there_with_longer_stages_and_without(name: str, m: int) -> None:
    gemm = llama_gemm(name, m)
    found = cute_race.candidates(gemm, best=3, kept=False)
    legal = [json.dumps(config) for config in cute_kernels.legal_configs(gemm)]
    assert all(json.dumps(config) in legal for config in found)
    kinds = [(kind_of(config), bool(config.get("tile_k"))) for config in found]
    expected = {(kind, longer) for kind in ("cooperative", "pingpong") for longer in (False, *([True] if m <= 64 else []))}
    assert expected <= set(kinds)
    assert (("cluster", False) in kinds) == (m <= 64)
    assert max(kinds.count(kind) for kind in kinds) == 3


def test_kernels_that_keep_x_hold_all_of_it() -> None:
    gemm = llama_gemm("gateup", 16)
    added = [c for c in cute_race.candidates(gemm, best=1, kept=True) if c.get("kept_k")]
    assert {c["split_k"] for c in added} == {1, 2, 4}
    for config in added:
        assert config["kept_k"] * config["split_k"] * 64 == gemm.k
        assert CuteConfig.from_entry(config).cluster_stages >= 2
    assert not [c for c in cute_race.keeping(llama_gemm("gateup", 128)) if c["split_k"] < 4], "there is no room"
