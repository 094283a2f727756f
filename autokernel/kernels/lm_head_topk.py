"""Triton kernels for the LM head with top-k sampling: each row's largest of x[M, K] @ w[N, K]^T and their indices, M up to 128.

A logit is a number of 64 bits: in the upper half an integer of the same order as the logit, and in the lower half what is the
larger the sooner the token comes. No two are equal, so results are the same bits every time in whatever order they are looked
for; of equal logits the first one has precedence, and a NaN is larger than all, as in eager PyTorch.

A program of the first launch leaves the best of its tile; others find the best of groups of these, until one group is left.
"""

# Triton compiles statements: it takes no conditional expressions over tensors.
# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

from autokernel.kernels.lm_head import as_values, ordered, tile_logits
from autokernel.kernels.selection import largest

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def lm_head_topk_kernel(
    x, w, parts,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, X_START: tl.constexpr, X_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, KEPT: tl.constexpr,
    ROW_BITS: tl.constexpr, WIDTH_BITS: tl.constexpr, COUNT_BITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The best of a tile; all of it, where it has no more than are wanted.

    Args:
        x: M rows of K, the first one X_START elements behind the pointer, X_ROW elements apart.
        w: [N, K] row-major.
        parts: int64 scratch, [M, tiles * KEPT]; KEPT is the less of BLOCK_N and 2 ** COUNT_BITS.
    """
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    logits = tile_logits(x + X_START, w, tile, M, N, K, X_ROW, BLOCK_M, BLOCK_N, BLOCK_K, MODE, STAGES)
    if MODE == 1:
        logits = tl.trans(logits)
    n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    best = (ordered(logits).to(tl.int64) << 32) | (N - 1 - n).to(tl.int64)
    best = tl.where(n < N, best, -0x8000000000000000)  # below every logit
    if COUNT_BITS < WIDTH_BITS:
        best = largest(best, ROW_BITS, WIDTH_BITS, COUNT_BITS)
    m = tl.arange(0, BLOCK_M)[:, None]
    at = tile * KEPT + tl.arange(0, KEPT)[None, :]
    tl.store(parts + m * (TILES * KEPT) + at, best, mask=m < M)


@triton.jit
def _best_of_group(parts, CANDIDATES: tl.constexpr, WIDTH_BITS: tl.constexpr, COUNT_BITS: tl.constexpr):
    """Of a program's row and group of WIDTH parts: [1, COUNT]."""
    at = tl.program_id(1) * (1 << WIDTH_BITS) + tl.arange(0, 1 << WIDTH_BITS)[None, :]
    numbers = tl.load(parts + tl.program_id(0) * CANDIDATES + at, mask=at < CANDIDATES, other=-0x8000000000000000)
    return largest(numbers, 0, WIDTH_BITS, COUNT_BITS)


@triton.jit
def lm_head_merge_kernel(
    parts, fewer, CANDIDATES: tl.constexpr, GROUPS: tl.constexpr, WIDTH_BITS: tl.constexpr, COUNT_BITS: tl.constexpr
):  # fmt: skip
    """[rows, CANDIDATES] -> [rows, GROUPS * COUNT]; a program has one group of a row."""
    best = _best_of_group(parts, CANDIDATES, WIDTH_BITS, COUNT_BITS)
    first = (tl.program_id(0) * GROUPS + tl.program_id(1)) * (1 << COUNT_BITS)
    tl.store(fewer + first + tl.arange(0, 1 << COUNT_BITS)[None, :], best)


@triton.jit
def lm_head_best_kernel(
    parts, values, indices,
    N: tl.constexpr, TOP: tl.constexpr, CANDIDATES: tl.constexpr, WIDTH_BITS: tl.constexpr, COUNT_BITS: tl.constexpr,
):  # fmt: skip
    """A row's TOP values and indices from the one group that is left, one row per program."""
    best = _best_of_group(parts, CANDIDATES, WIDTH_BITS, COUNT_BITS)
    place = tl.arange(0, 1 << COUNT_BITS)[None, :]
    at = tl.program_id(0) * TOP + place
    found = as_values((best >> 32).to(tl.int32))
    tl.store(values + at, found.to(values.dtype.element_ty), mask=place < TOP)
    tl.store(indices + at, N - 1 - (best & 0xFFFFFFFF), mask=place < TOP)
