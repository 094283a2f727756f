"""A Triton kernel for linear layers that read the RMS norm of few rows: y_i = norm(x) @ w_i [+ b_i], i up to three.

Tiles of all products are one launch; no normed row is ever stored. With ONE_PASS a program multiplies x * g, sums the squares
of x on the way, and scales its sums at the end. Otherwise it reads its rows twice: their squares first, then the products of
values that are normed and rounded as the model spells it.

What x * g is rounded to may not hold what the norm would: products beyond the largest number of their dtype, or below where
fp16 is exact; nor says a scale that is infinite what becomes of each element. Such rows are known by their sums, and multiplied
once more as spelled; the others of their tile keep what they have.

Parts of K are added in the kernel, as in `skinny_mm.py`. Sums are in fp32.
"""

# Triton compiles statements: it takes no conditional expressions over tensors.
# ruff: noqa: N803, N806, SIM102, SIM108
from __future__ import annotations

import triton
import triton.language as tl

from autokernel.kernels.online_softmax import added_product
from autokernel.kernels.row_norm import row_places
from autokernel.kernels.skinny_mm import added_parts, count_in

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def _tile_along_k(at, k, K: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of a matrix at these numbers of K [1, BLOCK_K]; zeros where K has ended."""
    if K % BLOCK_K == 0:
        tile = tl.load(at + k * STEP)
    else:
        tile = tl.load(at + k * STEP, mask=k < K, other=0.0)
    return tile


@triton.jit
def _weights(at, k, K: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr):
    """As `_tile_along_k`, of a matrix that nobody reads again."""
    if K % BLOCK_K == 0:
        tile = tl.load(at + k * STEP, eviction_policy="evict_first")
    else:
        tile = tl.load(at + k * STEP, mask=k < K, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _gains(at, k, K: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr, BLOCK_K: tl.constexpr):
    """The norm's weight, with what is added to it, in fp32."""
    gains = _tile_along_k(at, k, K, STEP, BLOCK_K).to(tl.float32)
    if OFFSET != 0.0:
        gains += OFFSET
    return gains


@triton.jit
def _left(rows, gains, scale, dtype: tl.constexpr, SPELLED: tl.constexpr, LATE: tl.constexpr, EXACT: tl.constexpr):
    """What is multiplied by the weights: x * g; or, SPELLED, the normed values, which are rounded once (LATE) or twice.

    EXACT: x * g stays in fp32.
    """
    if SPELLED:
        normed = rows * scale[:, None]
        if LATE:
            left = (normed * gains).to(dtype)
        else:
            left = (normed.to(dtype).to(tl.float32) * gains).to(dtype)
    elif EXACT:
        left = rows * gains
    else:
        left = (rows * gains).to(dtype)
    return left


@triton.jit
def _added(weights, left, total, MODE: tl.constexpr, TF32X3: tl.constexpr):
    """The sums with one more block of K, [BLOCK_N, BLOCK_K] of weights."""
    if MODE == 2:
        total += weights.to(tl.float32) * left.to(tl.float32)
    elif MODE == 1:
        total = added_product(weights, tl.trans(left), total, TF32X3)
    else:
        total = added_product(left, tl.trans(weights), total, TF32X3)
    return total


@triton.jit
def _squares(x_at, K: tl.constexpr, X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """Sums of the squares of rows, [BLOCK_M]."""
    total = tl.zeros((BLOCK_M, BLOCK_S), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_S):
        rows = _tile_along_k(x_at, start + tl.arange(0, BLOCK_S)[None, :], K, X, BLOCK_S).to(tl.float32)
        total += rows * rows
    return tl.sum(total, axis=1)


@triton.jit
def _products(
    x_at, gain, w_at, ahead, scale, first, end,
    K: tl.constexpr, X: tl.constexpr, G: tl.constexpr, OFFSET: tl.constexpr, W_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    MODE: tl.constexpr, SPELLED: tl.constexpr, LATE: tl.constexpr, TF32X3: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Products from one number of K to another, [BLOCK_M, BLOCK_N]; sums of squares of x and of x * g, [BLOCK_M] each.

    Args:
        x_at: pointers to rows, [BLOCK_M, 1].
        w_at: pointers to columns of the right matrix, [BLOCK_N, 1].
        ahead: with AHEAD, the weights at the first block of K, which is there.
        scale: of the rows, [BLOCK_M]; read if SPELLED. Squares are summed if not.
    """
    dtype: tl.constexpr = x_at.dtype.element_ty
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    of_left = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # one row: squares are kept as the products are, and added up at the end
    apart = tl.zeros((BLOCK_M, BLOCK_K if MODE == 2 else 1), dtype=tl.float32)
    if MODE == 2:
        total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    elif MODE == 1:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if AHEAD:
        k = first + tl.arange(0, BLOCK_K)[None, :]
        rows = _tile_along_k(x_at, k, K, X, BLOCK_K).to(tl.float32)
        gains = _gains(gain, k, K, G, OFFSET, BLOCK_K)
        if not SPELLED:
            apart += rows * rows
        total = _added(ahead, _left(rows, gains, scale, dtype, SPELLED, LATE, True), total, MODE, TF32X3)
        first += BLOCK_K
    for start in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        weights = _weights(w_at, k, K, W_K, BLOCK_K)
        rows = _tile_along_k(x_at, k, K, X, BLOCK_K).to(tl.float32)
        gains = _gains(gain, k, K, G, OFFSET, BLOCK_K)
        left = _left(rows, gains, scale, dtype, SPELLED, LATE, MODE == 2)
        if not SPELLED and MODE == 2:
            apart += rows * rows
        elif not SPELLED:
            squares += tl.sum(rows * rows, axis=1)
            if dtype == tl.float16:
                of_left += tl.sum((rows * gains) * (rows * gains), axis=1)
        total = _added(weights, left, total, MODE, TF32X3)
    if MODE == 2:
        squares = tl.sum(apart, axis=1)
        total = tl.sum(total, axis=1)[None, :]
    elif MODE == 1:
        total = tl.trans(total)
    return total, squares, of_left


@triton.jit
def _scaled(
    total, squares, of_left, x_at, gain, w_at,
    K: tl.constexpr, EPS: tl.constexpr, X: tl.constexpr, G: tl.constexpr, OFFSET: tl.constexpr, W_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    MODE: tl.constexpr, LATE: tl.constexpr, TF32X3: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What `_products` gave for all of K, times the rows' scales.

    Rows whose sums say that x * g did not hold what the norm would are multiplied once more, as spelled.
    """
    scale = tl.rsqrt(squares / K + EPS)
    held = (tl.abs(total) < float("inf")).to(tl.int32)  # 0 for NaN
    wrong = (tl.min(held, axis=1) == 0) | (scale == float("inf"))
    if MODE != 2 and x_at.dtype.element_ty == tl.float16:
        # 2^-26, the square of 2^-13: fp16 numbers are as exact as any from 2^-14 on
        wrong = wrong | ((squares > 0.0) & (of_left / K < 1.4901161193847656e-08))
    total *= scale[:, None]
    if tl.max(wrong.to(tl.int32), axis=0) > 0:
        spelled, _, _ = _products(
            x_at, gain, w_at, 0.0, scale, 0, K, K, X, G, OFFSET, W_K, BLOCK_M, BLOCK_N, BLOCK_K, MODE, True, LATE, TF32X3,
            STAGES, False,
        )  # fmt: skip
        total = tl.where(wrong[:, None], spelled, total)
    return total


@triton.jit
def _left_for_others(parts, counters, tile, total, squares, of_left, TILES: tl.constexpr, SPLIT_K: tl.constexpr):
    """Store a program's part of a tile; whether it was the last one."""
    BLOCK_M: tl.constexpr = total.shape[0]
    BLOCK_N: tl.constexpr = total.shape[1]
    row = tl.arange(0, BLOCK_M)
    program = tl.program_id(0)
    tl.store(parts + program * (BLOCK_M * BLOCK_N) + row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], total)
    sums = parts + TILES * SPLIT_K * (BLOCK_M * BLOCK_N) + program * (2 * BLOCK_M)
    tl.store(sums + row, squares)
    tl.store(sums + BLOCK_M + row, of_left)
    return count_in(counters + tile, 1, SPLIT_K)


@triton.jit
def _joined(parts, counters, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, SPLIT_K: tl.constexpr):
    """The sums of all programs of a tile, whose counter is zero again."""
    row = tl.arange(0, BLOCK_M)
    place = row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    sums = parts + TILES * SPLIT_K * (BLOCK_M * BLOCK_N)
    total = added_parts(parts, tile, place, SPLIT_K, BLOCK_M * BLOCK_N)
    squares = added_parts(sums, tile, row, SPLIT_K, 2 * BLOCK_M)
    of_left = added_parts(sums + BLOCK_M, tile, row, SPLIT_K, 2 * BLOCK_M)
    tl.store(counters + tile, 0)
    return total, squares, of_left


@triton.jit
def rms_norm_linear_kernel(
    x, gain, w0, w1, w2, b0, b1, b2, y0, y1, y2, parts, counters,
    ROWS: tl.constexpr, K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, EPS: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr, G: tl.constexpr, OFFSET: tl.constexpr,
    W_K: tl.constexpr, W0_N: tl.constexpr, W1_N: tl.constexpr, W2_N: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, LATE: tl.constexpr,
    MODE: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLIT_K: tl.constexpr, TF32X3: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A part of K of a tile of one of the products.

    Args:
        x: [ROWS, K], its rows counted through three dimensions with strides X0, X1 and X2; columns have stride X3.
        gain: [K], stride G: the norm's weight, to which OFFSET is added.
        w0, w1, w2: [K, N0], ..., with strides W_K and W0_N, ...; N1 or N2 of 0: there is none.
        b0, b1, b2: [N0], ..., with strides B0, ...; not read without BIAS0, ...
        y0, y1, y2: [ROWS, N0], ..., row-major; written.
        parts: fp32 scratch, for each program a tile, and behind all of them two numbers per row of each; not used with
            SPLIT_K of 1.
        counters: int32 zeros, one a tile; not used with SPLIT_K of 1.
        MODE: 0: rows of x are those of the matrix instruction; 1: columns of the weights are; 2: one row, vector units.
        AHEAD: read the first weights, then wait for the kernel in front; mode 2 alone, with SPLIT_K of 1 and whole blocks of K.
    """
    TILES_M: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    TILES_0: tl.constexpr = TILES_M * ((N0 + BLOCK_N - 1) // BLOCK_N)
    TILES_1: tl.constexpr = TILES_M * ((N1 + BLOCK_N - 1) // BLOCK_N)
    TILES: tl.constexpr = TILES_0 + TILES_1 + TILES_M * ((N2 + BLOCK_N - 1) // BLOCK_N)
    whole, split = tl.program_id(0) // SPLIT_K, tl.program_id(0) % SPLIT_K
    # which product, and which of its tiles
    tile = whole
    w, bias, y, n_size, w_n, b_step, has_bias = w0, b0, y0, N0, W0_N, B0, BIAS0
    if N1 > 0:
        if whole >= TILES_0:
            tile = whole - TILES_0
            w, bias, y, n_size, w_n, b_step, has_bias = w1, b1, y1, N1, W1_N, B1, BIAS1
    if N2 > 0:
        if whole >= TILES_0 + TILES_1:
            tile = whole - (TILES_0 + TILES_1)
            w, bias, y, n_size, w_n, b_step, has_bias = w2, b2, y2, N2, W2_N, B2, BIAS2
    m = (tile % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // TILES_M) * BLOCK_N + tl.arange(0, BLOCK_N)
    # what is not there is read from the last row or column, and never stored
    x_at = x + row_places(tl.minimum(m, ROWS - 1), SIZE_1, SIZE_2, X0, X1, X2)[:, None]
    if N0 % BLOCK_N == 0 and N1 % BLOCK_N == 0 and N2 % BLOCK_N == 0:
        w_at = w + n[:, None] * w_n
    else:
        w_at = w + tl.minimum(n, n_size - 1)[:, None] * w_n
    PER_SPLIT: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    first = split * PER_SPLIT
    end = tl.minimum(first + PER_SPLIT, K)
    ahead = 0.0
    if AHEAD:
        ahead = _weights(w_at, tl.arange(0, BLOCK_K)[None, :], K, W_K, BLOCK_K)
        tl.extra.cuda.gdc_wait()

    scale = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if not ONE_PASS:
        scale = tl.rsqrt(_squares(x_at, K, X3, BLOCK_M, BLOCK_S) / K + EPS)
    total, squares, of_left = _products(
        x_at, gain, w_at, ahead, scale, first, end, K, X3, G, OFFSET, W_K, BLOCK_M, BLOCK_N, BLOCK_K, MODE, not ONE_PASS,
        LATE, TF32X3, STAGES, AHEAD,
    )  # fmt: skip
    last = True
    if SPLIT_K > 1:
        last = _left_for_others(parts, counters, whole, total, squares, of_left, TILES, SPLIT_K)
    if last:
        if SPLIT_K > 1:
            total, squares, of_left = _joined(parts, counters, whole, BLOCK_M, BLOCK_N, TILES, SPLIT_K)
        if ONE_PASS:
            total = _scaled(
                total, squares, of_left, x_at, gain, w_at, K, EPS, X3, G, OFFSET, W_K, BLOCK_M, BLOCK_N, BLOCK_K, MODE, LATE,
                TF32X3, STAGES,
            )  # fmt: skip
        if BIAS0 or BIAS1 or BIAS2:
            there = (n < n_size) & has_bias
            total += tl.load(bias + n * b_step, mask=there, other=0.0).to(tl.float32)[None, :]
        at = y + m[:, None] * n_size + n[None, :]
        tl.store(at, total.to(y.dtype.element_ty), mask=(m < ROWS)[:, None] & (n < n_size)[None, :])
