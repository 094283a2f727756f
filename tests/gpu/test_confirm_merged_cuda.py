"""GEMMs that share an input, confirmed merged against separate: every backend's way of merging them survives its checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autokernel.evaluate.confirm import ConfirmCandidates
from autokernel.records import Candidate, ConfigValue, Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

if torch.cuda.is_available():
    from gpu.cuda_problems import TILE, merged_problem, weight

SKINNY: dict[str, ConfigValue] = {
    "kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "split_k": 1, "waves": 0,
    "tma": False, "num_warps": 4, "num_stages": 4,
}  # fmt: skip


def qkv(m: int) -> Problem:
    base = merged_problem(m=m, k=4096)
    return replace(
        base, inputs=(base.inputs[0], weight(4096, 4096), weight(4096, 1024), weight(4096, 1024)), constants=(1, 2, 3)
    )


@pytest.mark.parametrize("m", [1, 16])
def test_merged_gemms_are_confirmed(m: int) -> None:
    problem = qkv(m)
    stock = Candidate(problem=problem, backend="aten", config={"prepack": False, "merge": "none"})
    finalists = (
        Candidate(problem=problem, backend="aten", config={"prepack": False, "merge": "concat"}),
        Candidate(problem=problem, backend="inductor", config={**TILE, "merge": "concat"}),
        Candidate(problem=problem, backend="triton", config={**SKINNY, "merge": "concat"}),
    )
    result = ConfirmCandidates(problem=problem, finalists=finalists, baselines=(stock,), rounds=15, max_copies=8)()
    assert [(f.candidate.label, f.message) for f in result.failures] == []
    assert result.baseline == stock
    assert {c.candidate for c in result.finalists} == set(finalists)
    assert all(c.speedup is not None and c.speedup.low > 1.1 for c in result.finalists), "one kernel instead of three"
