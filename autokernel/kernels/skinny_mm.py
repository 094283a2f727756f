"""A Triton kernel for GEMMs whose time is the reading of the weight: y[M, N] = x[M, K] @ w[N, K]^T + bias[N], M up to 128.

One function with compile-time switches (`config.SkinnyConfig` says what they mean). Accumulation is in fp32.

Tiles that several programs share are reduced inside the kernel: each program stores its part (fp32) and counts itself; the
one that completes the count adds all parts, always in the same order, so that results are the same bits every time. It
also sets the counter back to zero: a buffer of counters, zeroed once, serves any number of launches of one stream, but
launches that run at the same time need a buffer each.

A kernel that is launched while the one in front of it still runs (`export/dependent_launch.py`) may read weights before that
one has ended, and nothing else: with AHEAD, the first block of them is on its way when it starts to wait.
"""

# Triton compiles statements: it takes no conditional expressions over tensors, and no early returns.
# ruff: noqa: N803, N806, SIM108, PLR0915
from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def _rows_and_columns(tile, M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """Numbers of a tile's rows and columns, broadcastable to the accumulator's shape."""
    tiles_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SWAP:
        return m[None, :], n[:, None]
    else:
        return m[:, None], n[None, :]


@triton.jit
def vector_product(x, w, tile, block, count, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr = 0):  # fmt: skip
    """One row of x times BLOCK_N rows of w over `count` blocks of K, as [1, BLOCK_N]; products are added up per lane first.

    With AHEAD there is one block at least, and x is not read before its weights.
    """
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if N % BLOCK_N != 0:
        n = tl.minimum(n, N - 1)  # rows that are not there are read from the last one, and never stored
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    w_at = w + n[:, None] * K + k[None, :]
    x_at = x + k
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if AHEAD:
        first = tl.load(w_at, eviction_policy="evict_first")
        tl.extra.cuda.gdc_wait()
        total += first.to(tl.float32) * tl.load(x_at, eviction_policy="evict_last").to(tl.float32)[None, :]
        w_at += BLOCK_K
        x_at += BLOCK_K
    for _ in tl.range(AHEAD, count, num_stages=STAGES):
        weights = tl.load(w_at, eviction_policy="evict_first").to(tl.float32)
        inputs = tl.load(x_at, eviction_policy="evict_last").to(tl.float32)
        total += weights * inputs[None, :]
        w_at += BLOCK_K
        x_at += BLOCK_K
    return tl.sum(total, axis=1)[None, :]


@triton.jit
def _tma_product(x, w, tile, block, count, M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """A tile's product over `count` blocks of K; x and w are tensor descriptors, which read zeros beyond the edge."""
    tiles_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    first_m = (tile % tiles_m) * BLOCK_M
    first_n = (tile // tiles_m) * BLOCK_N
    k = block * BLOCK_K
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in tl.range(0, count):
        weights = w.load([first_n, k])
        inputs = x.load([first_m, k])
        if SWAP:
            total = tl.dot(weights, inputs.T, total)
        else:
            total = tl.dot(inputs, weights.T, total)
        k += BLOCK_K
    return total


@triton.jit
def matrix_product(x, w, tile, block, count, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """A tile's product over `count` blocks of K, loads go through pointers. Rows of x are X_ROW elements apart."""
    m, n = _rows_and_columns(tile, M, BLOCK_M, BLOCK_N, SWAP)
    if N % BLOCK_N != 0:
        n = tl.minimum(n, N - 1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    if SWAP:
        w_at = w + n * K + k[None, :]
        x_at = x + m * X_ROW + k[:, None]
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        w_at = w + n * K + k[:, None]
        x_at = x + m * X_ROW + k[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in tl.range(0, count):
        weights = tl.load(w_at, eviction_policy="evict_first")
        if M % BLOCK_M != 0:
            inputs = tl.load(x_at, mask=m < M, other=0.0, eviction_policy="evict_last")
        else:
            inputs = tl.load(x_at, eviction_policy="evict_last")
        if SWAP:
            total = tl.dot(weights, inputs, total)
        else:
            total = tl.dot(inputs, weights, total)
        w_at += BLOCK_K
        x_at += BLOCK_K
    return total


@triton.jit
def _product(x, w, tile, block, count, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr, TMA: tl.constexpr,
             STAGES: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """A tile's product over `count` blocks of K, as [BLOCK_N, BLOCK_M] with swapped operands, else as [BLOCK_M, BLOCK_N]."""
    if MODE == 2:
        total = vector_product(x, w, tile, block, count, N, K, BLOCK_N, BLOCK_K, STAGES, AHEAD)
    elif TMA:
        total = _tma_product(x, w, tile, block, count, M, BLOCK_M, BLOCK_N, BLOCK_K, MODE == 1)
    else:
        total = matrix_product(x, w, tile, block, count, M, N, K, K, BLOCK_M, BLOCK_N, BLOCK_K, MODE == 1)
    return total


@triton.jit
def _store(y, bias, total, m, n, M: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Write a finished tile."""
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit
def count_in(counter, share, whole):
    """Count this program's share of a tile, whose part it has stored; whether the tile is complete now."""
    tl.debug_barrier()  # every thread's part is stored before the one atomic that publishes it
    return tl.atomic_add(counter, share, sem="acq_rel") + share == whole


@triton.jit
def added_parts(parts, tile, place, SPLIT_K: tl.constexpr, SIZE: tl.constexpr):
    """The sum of a tile's parts, in order; `place` says where its elements lie in each, of SIZE elements."""
    whole = tl.zeros(place.shape, dtype=tl.float32)
    for other in tl.static_range(SPLIT_K):
        whole += tl.load(parts + (tile * SPLIT_K + other) * SIZE + place, cache_modifier=".cg")
    return whole


@triton.jit
def skinny_mm_kernel(
    x, w, bias, y, parts, counters,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, PROGRAMS: tl.constexpr, MODE: tl.constexpr, TMA: tl.constexpr, TILE_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = x @ w^T (+ bias).

    Args:
        x: [M, K] row-major, or its descriptor with blocks [BLOCK_M, BLOCK_K].
        w: [N, K] row-major, or its descriptor with blocks [BLOCK_N, BLOCK_K].
        bias: [N]; not read without HAS_BIAS.
        y: [M, N] row-major.
        parts: fp32 scratch, `SkinnyConfig.num_parts` elements; not used where no tile is shared.
        counters: int32 zeros, `SkinnyConfig.num_counters`; not used where no tile is shared.
        AHEAD: read the first weights, then wait for the kernel in front; only where `SkinnyConfig.reads_ahead`.
    """
    SWAP: tl.constexpr = MODE == 1
    BLOCKS: tl.constexpr = K // BLOCK_K
    TILES: tl.constexpr = ((M + BLOCK_M - 1) // BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    # where an element of a tile lies in its part
    if SWAP:
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    else:
        place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    program = tl.program_id(0)

    if PROGRAMS == 0:
        if TILE_FIRST:
            tile, split = program % TILES, program // TILES
        else:
            tile, split = program // SPLIT_K, program % SPLIT_K
        PER_SPLIT: tl.constexpr = (BLOCKS + SPLIT_K - 1) // SPLIT_K
        block = split * PER_SPLIT
        count = PER_SPLIT
        if BLOCKS % SPLIT_K != 0:
            count = tl.minimum(PER_SPLIT, tl.maximum(BLOCKS - block, 0))
        m, n = _rows_and_columns(tile, M, BLOCK_M, BLOCK_N, SWAP)
        total = _product(x, w, tile, block, count, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, MODE, TMA, STAGES, AHEAD)
        if SPLIT_K == 1:
            _store(y, bias, total, m, n, M, N, HAS_BIAS)
        else:
            tl.store(parts + (tile * SPLIT_K + split) * SIZE + place, total)
            if count_in(counters + tile, 1, SPLIT_K):
                whole = added_parts(parts, tile, place, SPLIT_K, SIZE)
                tl.store(counters + tile, 0)
                _store(y, bias, whole, m, n, M, N, HAS_BIAS)
    else:
        # all blocks of all tiles in one row, cut into equal pieces
        PER_PROGRAM: tl.constexpr = (TILES * BLOCKS + PROGRAMS - 1) // PROGRAMS
        at = program * PER_PROGRAM
        end = tl.minimum(at + PER_PROGRAM, TILES * BLOCKS)
        slot = program * 2  # a piece that is longer than a tile shares the tile at its start and the one at its end
        while at < end:
            tile, block = at // BLOCKS, at % BLOCKS
            count = tl.minimum(BLOCKS - block, end - at)
            m, n = _rows_and_columns(tile, M, BLOCK_M, BLOCK_N, SWAP)
            total = _product(x, w, tile, block, count, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, MODE, TMA, STAGES, 0)
            if count == BLOCKS:
                _store(y, bias, total, m, n, M, N, HAS_BIAS)
            else:
                tl.store(parts + slot * SIZE + place, total)
                if count_in(counters + tile, count, BLOCKS):
                    whole = tl.zeros(total.shape, dtype=tl.float32)
                    first = tile * BLOCKS // PER_PROGRAM
                    last = (tile * BLOCKS + BLOCKS - 1) // PER_PROGRAM
                    for other in range(first, last + 1):
                        other_slot = other * 2 + ((other * PER_PROGRAM) // BLOCKS != tile).to(tl.int32)
                        whole += tl.load(parts + other_slot * SIZE + place, cache_modifier=".cg")
                    tl.store(counters + tile, 0)
                    _store(y, bias, whole, m, n, M, N, HAS_BIAS)
            at += count
            slot = program * 2 + 1
