"""Which kernels are timed behind others, and how they are launched."""

from __future__ import annotations

import cute_kernels
import launch_overlap
import pytest
from gemm_kernels import llama_gemm


@pytest.mark.parametrize(("name", "m", "own"), [("o", 16, ["cluster"]), ("qkv", 128, [])])
def test_quacks_best_kernels_are_there_both_ways(name: str, m: int, own: list[str]) -> None:
    gemm = llama_gemm(name, m)
    found = launch_overlap.contenders(gemm, best=2)
    assert [(config["source"], pdl) for config, pdl in found[:4]] == [("quack", True), ("quack", False)] * 2
    assert found[0][0] == found[1][0] != found[2][0] == found[3][0]
    assert [(config["source"], pdl) for config, pdl in found[4:]] == [(source, False) for source in own]
    with_pdl, without = (cute_kernels.spec_of(gemm, config, pdl=pdl) for config, pdl in found[:2])
    assert (with_pdl.pdl, without.pdl) == (True, False)
