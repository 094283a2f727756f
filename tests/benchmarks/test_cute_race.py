"""What the race of CuTe DSL kernels puts at the start: of each kind the first."""

from __future__ import annotations

import json

import cute_kernels
import cute_race
import pytest
from gemm_kernels import llama_gemm

from autokernel.search.cost_model import kind_of


@pytest.mark.parametrize(("name", "m"), [("o", 16), ("down", 64), ("lmhead", 128)])
def test_each_kind_is_there_with_longer_stages_and_without(name: str, m: int) -> None:
    gemm = llama_gemm(name, m)
    found = cute_race.candidates(gemm, best=3)
    legal = [json.dumps(config) for config in cute_kernels.legal_configs(gemm)]
    assert all(json.dumps(config) in legal for config in found)
    kinds = [(kind_of(config), bool(config.get("tile_k"))) for config in found]
    expected = {(kind, longer) for kind in ("cooperative", "pingpong") for longer in (False, *([True] if m <= 64 else []))}
    assert expected <= set(kinds)
    assert (("cluster", False) in kinds) == (m <= 64)
    assert max(kinds.count(kind) for kind in kinds) == 3
