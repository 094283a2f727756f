"""What kernels of the LM head share: a tile of logits, and fp32 numbers as integers of the same order.

A program has all rows and a tile of the vocabulary; its logits stay in registers, in fp32, and are not rounded.
"""

# Triton compiles statements: it takes no conditional expressions over tensors.
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

from autokernel.kernels.skinny_mm import matrix_product, vector_product

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def tile_logits(
    x, w, tile, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x[M, K] @ w[N, K]^T for a tile of BLOCK_N tokens: [BLOCK_N, BLOCK_M] in mode 1, else [BLOCK_M, BLOCK_N].

    Behind the last token that one is read again.
    """
    if MODE == 2:
        logits = vector_product(x, w, tile, 0, K // BLOCK_K, N, K, BLOCK_N, BLOCK_K, STAGES)
    else:
        logits = matrix_product(x, w, tile, 0, K // BLOCK_K, M, N, K, X_ROW, BLOCK_M, BLOCK_N, BLOCK_K, MODE == 1)
    return logits


@triton.jit
def ordered(values):
    """int32 numbers in the order of fp32 ones: -0 as 0, all NaN as the largest."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values == values, bits, 0x7FFFFFFF)  # noqa: PLR0124


@triton.jit
def as_values(numbers):
    """The fp32 numbers that `ordered` made these of; its NaN is one."""
    return tl.where(numbers < 0, numbers ^ 0x7FFFFFFF, numbers).to(tl.float32, bitcast=True)
