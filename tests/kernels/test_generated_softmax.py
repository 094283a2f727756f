"""Kernels of a softmax whose two numbers come of one walk, compiled for Hopper. What they compute: `interpreted_*.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernels import for_hopper

from autokernel.kernels.plans import plan_of
from autokernel.records import Problem, TensorSpec

pytest.importorskip("triton", reason="Triton is not installed")

ROWS = (
    "t0 = convert(i0, float32); t1 = prepare_softmax_online(t0); t2 = getitem(t1, 0); t3 = sub(t0, t2); t4 = exp(t3); "
    "t5 = getitem(t1, 1); t6 = div(t4, t5); o0 = convert(t6, bfloat16)"
)


@pytest.mark.parametrize(("block_k", "walks", "exponentials"), [(1024, 2, 3), (0, 0, 1)])
def test_long_rows_are_walked_over_twice(
    block_k: int, walks: int, exponentials: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once for both numbers and once for the result; a row that is held whole needs each exponential once."""
    monkeypatch.setenv("AUTOKERNEL_CACHE_DIR", str(tmp_path))
    specs = (TensorSpec.contiguous((64, 8192), "bfloat16"),)
    problem = Problem(op="generated", inputs=specs, device="cuda", scalars=(("program", ROWS),))
    config = {"kernel": "generated_rows", "block_m": 1, "block_k": block_k, "num_warps": 4, "num_stages": 2}
    ttir = str(for_hopper.compiled(problem, plan_of(problem, config)).asm["ttir"])
    body = ttir.partition("tt.func public")[2]
    assert body.count("scf.for") == walks
    assert body.count("math.exp ") + body.count("math.exp2 ") == exponentials, "in each walk one, and one for each lane"
