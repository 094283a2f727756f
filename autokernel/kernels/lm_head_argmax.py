"""A Triton kernel for the LM head with greedy sampling: the index of each row's largest x[M, K] @ w[N, K]^T, M up to 128.

A program has all rows and a tile of the vocabulary; its logits stay in registers, in fp32, and are not rounded. It leaves one
number per row: the largest logit in the upper half of 64 bits, as an integer of the same order, and in the lower half what is
the larger the sooner the token comes. The largest of these is the answer in whatever order it is looked for, so results are
the same bits every time; of equal logits the first one has it, and a NaN is larger than all, as in eager PyTorch.
"""

# Triton compiles statements: it takes no conditional expressions over tensors.
# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

from autokernel.kernels.lm_head import ordered, tile_logits

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def _finish(parts, y, first, M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Indices of ROWS rows, from the first one on. What lies beyond an edge is read from the last row or tile there is."""
    m = first + tl.arange(0, ROWS)
    row = parts + tl.minimum(m, M - 1)[:, None] * TILES
    tile = tl.arange(0, WIDTH)[None, :]
    # other programs have just written them: past the multiprocessor's own cache
    best = tl.load(row + tl.minimum(tile, TILES - 1), cache_modifier=".cg")
    for start in range(WIDTH, TILES, WIDTH):
        best = tl.maximum(best, tl.load(row + tl.minimum(start + tile, TILES - 1), cache_modifier=".cg"))
    place = tl.max(best, axis=1).to(tl.int32)  # the lower half
    tl.store(y + m, (N - 1 - place).to(tl.int64), mask=m < M)


@triton.jit
def lm_head_argmax_kernel(
    x, w, parts, counter, y,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, X_START: tl.constexpr, X_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, JOIN: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile's part; with JOIN the last program to arrive finishes.

    Args:
        x: M rows of K, the first one X_START elements behind the pointer, X_ROW elements apart.
        w: [N, K] row-major.
        parts: int64 scratch, [M, tiles].
        counter: with JOIN an int32 zero, which is zero again behind the launch.
        y: with JOIN [M] int64; written.
    """
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    x += X_START
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # behind the last token it is read again, and counts as that one: as 0 below
    m = tl.arange(0, BLOCK_M)
    scores = ordered(tile_logits(x, w, tile, M, N, K, X_ROW, BLOCK_M, BLOCK_N, BLOCK_K, MODE, STAGES))
    if MODE == 1:
        best = tl.max(scores, axis=0)
        place = tl.max(tl.where(scores == best[None, :], N - 1 - n[:, None], 0), axis=0)
    else:
        best = tl.max(scores, axis=1)
        place = tl.max(tl.where(scores == best[:, None], N - 1 - n[None, :], 0), axis=1)
    tl.store(parts + m * TILES + tile, (best.to(tl.int64) << 32) | place.to(tl.int64), mask=m < M)
    if JOIN:
        tl.debug_barrier()  # every thread's part is stored before the one atomic that publishes it
        if tl.atomic_add(counter, 1, sem="acq_rel") + 1 == TILES:
            tl.store(counter, 0)
            for first in range(0, M, ROWS):
                _finish(parts, y, first, M, N, TILES, ROWS, WIDTH)


@triton.jit
def lm_head_join_kernel(parts, y, M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """A row's index from the parts of all tiles, one row per program."""
    _finish(parts, y, tl.program_id(0), M, N, TILES, 1, WIDTH)
