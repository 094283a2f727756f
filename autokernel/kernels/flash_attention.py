"""A Triton kernel for attention of many rows: tiles of q, each against all keys that it may see; scores stay in registers.

It takes what the library's fast kernels do not: masks that are added, of any broadcast strides, fp32, and any scale.

Keys come in tiles. Those that every row of q sees as a whole need neither mask nor bounds, and those that no row sees need
nothing. What a mask says of its tiles is found by a kernel of its own that goes first: it reads the mask once, where each
head would have to read all of it.
"""

# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

from autokernel.kernels.online_softmax import absorb, absorb_products, divided, load_tile, mask_tile, row_products

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def mask_tiles_kernel(
    mask, tiles,
    Q_LEN: tl.constexpr, KV_LEN: tl.constexpr, MASK: tl.constexpr, MASK_HEADS: tl.constexpr, MASK_ROWS: tl.constexpr,
    MASK_B: tl.constexpr, MASK_H: tl.constexpr, MASK_Q: tl.constexpr, MASK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What is seen in each tile of a mask: 0 nothing, 1 something, 2 everything (which changes no score); grid: [tiles].

    Args:
        mask: broadcasts to [B, heads, Q_LEN, KV_LEN] with strides of 0.
        tiles: int32, [B or 1, MASK_HEADS, MASK_ROWS, blocks of keys] row-major; 1 where all have the same.
    """
    TILES: tl.constexpr = (KV_LEN + BLOCK_N - 1) // BLOCK_N
    ROWS: tl.constexpr = BLOCK_M if MASK_Q != 0 else 1
    program = tl.program_id(0)
    n = program % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    m = program // TILES % MASK_ROWS * BLOCK_M + tl.arange(0, ROWS)
    head = program // (TILES * MASK_ROWS) % MASK_HEADS
    batch = (program // (TILES * MASK_ROWS * MASK_HEADS)).to(tl.int64)
    inside = (m < Q_LEN)[:, None] & (n < KV_LEN)[None, :]
    tile = tl.load(mask + batch * MASK_B + head * MASK_H + m[:, None] * MASK_Q + n[None, :] * MASK_S, mask=inside, other=0)
    if MASK == 1:
        some = tile.to(tl.int1)
        whole = some
    else:
        some = ~(tile == float("-inf"))  # NaN is seen
        whole = tile == 0.0
    some = tl.where(inside, some.to(tl.int32), 0)
    whole = tl.where(inside, whole.to(tl.int32), 1)
    found = tl.max(tl.max(some, 1), 0)
    tl.store(tiles + program, found + found * tl.min(tl.min(whole, 1), 0))


@triton.jit
def _parts_of_mask(tiles_at, limit, whole_limit, TILES: tl.constexpr, MAX_TILES: tl.constexpr):
    """Where tiles of keys start to be seen, to be seen whole, to be seen in part again, and where they end.

    Tiles from `limit` on are not seen, and those from `whole_limit` on not whole, whatever the mask says.
    """
    at = tl.arange(0, MAX_TILES)
    seen = tl.load(tiles_at + at, mask=at < TILES, other=0)
    first = tl.min(tl.where((seen > 0) & (at < limit), at, limit), 0)
    end = tl.max(tl.where((seen > 0) & (at < limit), at + 1, first), 0)
    whole = (seen == 2) & (at < whole_limit)
    whole_first = tl.min(tl.where(whole & (at < end), at, end), 0)
    whole_end = tl.min(tl.where(~whole & (at >= whole_first), at, end), 0)
    return first, whole_first, tl.minimum(whole_end, end), end


@triton.jit
def _attend(
    queries, k_at, v_at, mask_at, mask_rows, mask_there, m, top, total, rows, first, end, CHECKED: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, KV_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    K_S: tl.constexpr, K_D: tl.constexpr, V_S: tl.constexpr, V_D: tl.constexpr, MASK: tl.constexpr, MASK_S: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TF32X3: tl.constexpr,
):  # fmt: skip
    """The state of rows with tiles [first, end) of keys; without CHECKED all of them are seen by all rows."""
    ALL_N: tl.constexpr = not CHECKED or KV_LEN % BLOCK_N == 0
    ALL_D: tl.constexpr = HEAD_DIM == BLOCK_D
    ALL_E: tl.constexpr = V_DIM == BLOCK_E
    ONE_TILE: tl.constexpr = KV_LEN <= BLOCK_N  # nothing is read ahead: values are asked for before keys are waited for
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    for tile in tl.range(first, end):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if CHECKED:  # asked for first, so that it comes while the keys are multiplied
            added = mask_tile(mask_at + mask_rows + n[None, :] * MASK_S, mask_there & (n < KV_LEN)[None, :], MASK)
        keys = load_tile(k_at + d[:, None] * K_D + n[None, :] * K_S, d[:, None], n[None, :], HEAD_DIM, KV_LEN, ALL_D, ALL_N)
        if ONE_TILE:
            values = load_tile(v_at + n[:, None] * V_S + e[None, :] * V_D, n[:, None], e[None, :], KV_LEN, V_DIM, ALL_N, ALL_E)
        scores = row_products(queries, keys, TF32X3)
        if not ONE_TILE:
            values = load_tile(v_at + n[:, None] * V_S + e[None, :] * V_D, n[:, None], e[None, :], KV_LEN, V_DIM, ALL_N, ALL_E)
        if CHECKED:
            scores = scores * SCALE + added
            if CAUSAL:
                scores = tl.where(n[None, :] <= m[:, None], scores, float("-inf"))
            if not ALL_N:
                scores = tl.where((n < KV_LEN)[None, :], scores, float("-inf"))
            top, total, rows = absorb(scores, values, top, total, rows, TF32X3)
        elif SCALE > 0:
            top, total, rows = absorb_products(scores, values, top, total, rows, SCALE, TF32X3)
        else:
            top, total, rows = absorb(scores * SCALE, values, top, total, rows, TF32X3)
    return top, total, rows


@triton.jit
def flash_attention_kernel(
    q, k, v, mask, out, tiles,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    Q_LEN: tl.constexpr, KV_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    Q_B: tl.constexpr, Q_H: tl.constexpr, Q_S: tl.constexpr, Q_D: tl.constexpr,
    K_B: tl.constexpr, K_H: tl.constexpr, K_S: tl.constexpr, K_D: tl.constexpr,
    V_B: tl.constexpr, V_H: tl.constexpr, V_S: tl.constexpr, V_D: tl.constexpr,
    MASK: tl.constexpr, MASK_B: tl.constexpr, MASK_H: tl.constexpr, MASK_Q: tl.constexpr, MASK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, GUARDED: tl.constexpr,
    SKIP: tl.constexpr, MASK_HEADS: tl.constexpr, MASK_ROWS: tl.constexpr, MAX_TILES: tl.constexpr, TF32X3: tl.constexpr,
):  # fmt: skip
    """softmax(q k' * SCALE + mask) v; grid: [blocks of q * HEADS * B].

    Args:
        q: [B, HEADS, Q_LEN, HEAD_DIM]; strides in elements are Q_B, Q_H, Q_S, Q_D. k, v and mask likewise.
        k: [B, HEADS / REPEAT, KV_LEN, HEAD_DIM].
        v: [B, HEADS / REPEAT, KV_LEN, V_DIM].
        mask: broadcasts to [B, HEADS, Q_LEN, KV_LEN] with strides of 0; not read where MASK is 0 (see `mask_tile`).
        out: [B, Q_LEN, HEADS, V_DIM] row-major.
        tiles: what `mask_tiles_kernel` found; not read without SKIP, like MASK_HEADS, MASK_ROWS and MAX_TILES.
        TF32X3: whether products in fp32 are three of the matrix instruction's. GUARDED: who sees nothing gets zeros, not NaN.
    """
    BLOCKS: tl.constexpr = (Q_LEN + BLOCK_M - 1) // BLOCK_M
    TILES: tl.constexpr = (KV_LEN + BLOCK_N - 1) // BLOCK_N
    if CAUSAL or SKIP:  # what is long with most masks comes first, of all heads: short ones fill up the end
        block = BLOCKS - 1 - tl.program_id(0) // HEADS % BLOCKS
        head = tl.program_id(0) % HEADS
    else:
        block = tl.program_id(0) % BLOCKS
        head = tl.program_id(0) // BLOCKS % HEADS
    batch = (tl.program_id(0) // (BLOCKS * HEADS)).to(tl.int64)

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    q_at = q + batch * Q_B + head * Q_H + m[:, None] * Q_S + d[None, :] * Q_D
    queries = load_tile(q_at, m[:, None], d[None, :], Q_LEN, HEAD_DIM, Q_LEN % BLOCK_M == 0, HEAD_DIM == BLOCK_D)
    k_at = k + batch * K_B + head // REPEAT * K_H
    v_at = v + batch * V_B + head // REPEAT * V_H
    mask_at = mask + batch * MASK_B + head * MASK_H
    if MASK_Q == 0:  # all rows have the same
        mask_rows = tl.zeros((1, 1), dtype=tl.int32)
        mask_there = mask_rows == 0
    else:
        mask_rows = (m * MASK_Q)[:, None]
        mask_there = (m < Q_LEN)[:, None]

    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    rows = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    first = 0
    whole_first = 0
    whole_end = KV_LEN // BLOCK_N
    end = TILES
    if CAUSAL:
        whole_end = tl.minimum((block * BLOCK_M + 1) // BLOCK_N, whole_end)
        end = tl.minimum(((block + 1) * BLOCK_M + BLOCK_N - 1) // BLOCK_N, end)
    if SKIP:
        row = (batch if MASK_B != 0 else 0) * MASK_HEADS + (head if MASK_H != 0 else 0)
        tiles_at = tiles + (row * MASK_ROWS + (block if MASK_Q != 0 else 0)) * TILES
        first, whole_first, whole_end, end = _parts_of_mask(tiles_at, end, whole_end, TILES, MAX_TILES)
    elif MASK:
        whole_first = end
    if MASK:
        top, total, rows = _attend(
            queries, k_at, v_at, mask_at, mask_rows, mask_there, m, top, total, rows, first, whole_first, True, SCALE, CAUSAL,
            KV_LEN, HEAD_DIM, V_DIM, K_S, K_D, V_S, V_D, MASK, MASK_S, BLOCK_N, BLOCK_D, BLOCK_E, TF32X3,
        )  # fmt: skip
    if SKIP or not MASK:
        top, total, rows = _attend(
            queries, k_at, v_at, mask_at, mask_rows, mask_there, m, top, total, rows, whole_first, whole_end, False, SCALE,
            CAUSAL, KV_LEN, HEAD_DIM, V_DIM, K_S, K_D, V_S, V_D, MASK, MASK_S, BLOCK_N, BLOCK_D, BLOCK_E, TF32X3,
        )  # fmt: skip
    if SKIP or (not MASK and (CAUSAL or KV_LEN % BLOCK_N != 0)):
        top, total, rows = _attend(
            queries, k_at, v_at, mask_at, mask_rows, mask_there, m, top, total, rows, whole_end, end, True, SCALE, CAUSAL,
            KV_LEN, HEAD_DIM, V_DIM, K_S, K_D, V_S, V_D, MASK, MASK_S, BLOCK_N, BLOCK_D, BLOCK_E, TF32X3,
        )  # fmt: skip
    at = out + batch * (Q_LEN * HEADS * V_DIM) + (m * HEADS + head)[:, None] * V_DIM + e[None, :]
    tl.store(at, divided(rows, total, GUARDED).to(out.dtype.element_ty), mask=(m < Q_LEN)[:, None] & (e < V_DIM)[None, :])
