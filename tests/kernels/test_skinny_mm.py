"""The kernel in Triton's interpreter and through its compiler for Hopper; no GPU is needed for either."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autokernel.kernels.config import SkinnyConfig

triton = pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent


def test_every_mode_computes_the_product_and_leaves_zero_counters() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "interpreted.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.splitlines() == ["done"], done.stdout + done.stderr[-2000:]


def ptx_of(config: SkinnyConfig, m: int, n: int = 4096, k: int = 4096) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from autokernel.kernels.skinny_mm import skinny_mm_kernel

    names = skinny_mm_kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    signature |= {"x": "*bf16", "w": "*bf16", "bias": "*bf16", "y": "*bf16", "parts": "*fp32", "counters": "*i32"}
    if config.tma:
        signature |= {"x": f"tensordesc<bf16[{config.block_m}, {config.block_k}]>"}
        signature |= {"w": f"tensordesc<bf16[{config.block_n}, {config.block_k}]>"}
    constants = config.constants(m, n, k, bias=True, num_units=132)
    source = ASTSource(
        fn=skinny_mm_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


@pytest.mark.parametrize("tma", [False, True])
def test_swapped_operands_use_hoppers_matrix_instruction_for_few_rows(tma: bool) -> None:
    ptx = ptx_of(SkinnyConfig(mode="swap", block_m=16, block_n=64, block_k=128, split_k=4, tma=tma, num_stages=4), m=5)
    assert "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16" in ptx
    assert ("cp.async.bulk.tensor" in ptx) == tma
    assert "atom.global.gpu.acq_rel.add" in ptx


def test_the_vector_path_reads_sixteen_bytes_at_a_time_and_keeps_nothing_in_l2() -> None:
    ptx = ptx_of(SkinnyConfig(mode="vector", block_m=1, block_n=4, block_k=1024, num_stages=1), m=1)
    assert "wgmma" not in ptx
    assert "evict_first" in ptx
    assert ".v4.b32" in ptx


def test_stream_k_compiles() -> None:
    assert "wgmma" in ptx_of(SkinnyConfig(mode="rows", block_m=64, block_n=128, block_k=64, waves=1, num_stages=3), m=64)
