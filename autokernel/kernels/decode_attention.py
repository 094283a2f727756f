"""A Triton kernel for attention of few rows over a long cache of keys and values, whose time is the reading of the cache.

One program serves all heads of q that share a head of k and v, over one part of the sequence: keys and values are read once,
whatever the heads of q. Rows of its tile are (head, position of q), padded to what a matrix instruction takes.

Parts are put together inside the kernel: each program stores what its rows have seen (fp32) and counts itself; the one that
completes the count combines all parts, always in the same order. It also sets the counter back to zero, as `skinny_mm` does.
"""

# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

from autokernel.kernels.online_softmax import absorb, divided, load_tile, mask_tile, row_products
from autokernel.kernels.prefetch import prefetch

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def _what_is_seen(mask_at, row_offsets, row_there, first, end, KV_LEN: tl.constexpr, MASK: tl.constexpr, MASK_S: tl.constexpr,
                  BLOCK_S: tl.constexpr):  # fmt: skip
    """The first tile, and the number of tiles, that hold all that the mask lets any row see within [first, end)."""
    earliest = tl.full((BLOCK_S,), KV_LEN, dtype=tl.int32)
    latest = tl.zeros((BLOCK_S,), dtype=tl.int32)
    for start in range(first, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        tile = tl.load(mask_at + row_offsets + s[None, :] * MASK_S, mask=row_there & (s < end)[None, :], other=0)
        if MASK == 1:
            seen = tile.to(tl.int32)
        else:
            seen = (~(tile == float("-inf"))).to(tl.int32)
            seen = tl.where(row_there & (s < end)[None, :], seen, 0)
        any_row = tl.max(seen, 0) > 0
        earliest = tl.minimum(earliest, tl.where(any_row, s, KV_LEN))
        latest = tl.maximum(latest, tl.where(any_row, s + 1, 0))
    tile = tl.min(earliest, 0) // BLOCK_S
    return tile, (tl.max(latest, 0) + BLOCK_S - 1) // BLOCK_S - tile


@triton.jit
def _rows_of_mask(head, position, there, MASK_H: tl.constexpr, MASK_Q: tl.constexpr, ONE_MASK: tl.constexpr):
    """Offsets of the mask's rows and whether there are such rows, [rows, 1]; one row where all have the same."""
    if ONE_MASK:
        offsets = tl.zeros((1, 1), dtype=tl.int32)
        exists = offsets == 0
    else:
        offsets = (head * MASK_H + position * MASK_Q)[:, None]
        exists = there[:, None]
    return offsets, exists


@triton.jit
def _add_parts(parts, states, first, left, r, e, top, total, rows, ROWS: tl.constexpr, V_DIM: tl.constexpr,
               CHUNK: tl.constexpr):  # fmt: skip
    """The state of rows [R], [R], [R, E] with that of up to CHUNK splits added, of which `left` are there from `first` on.

    A thread has the same rows and columns of every part, so that nothing goes from one to another.
    """
    inside = (r < ROWS)[:, None] & (e < V_DIM)[None, :]
    highest = top
    for i in tl.static_range(CHUNK):
        place = (first + i) * ROWS + r
        there = (r < ROWS) & (i < left)
        highest = tl.maximum(highest, tl.load(states + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg"))
    level = tl.where(highest == float("-inf"), 0.0, highest)
    shrink = tl.exp2((top - level) * 1.4426950408889634)
    total *= shrink
    rows *= shrink[:, None]
    for i in tl.static_range(CHUNK):
        place = (first + i) * ROWS + r
        there = (r < ROWS) & (i < left)
        part_at = parts + place[:, None] * V_DIM + e[None, :]
        part = tl.load(part_at, mask=inside & (i < left), other=0.0, cache_modifier=".cg")
        seen = tl.load(states + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        weight = tl.exp2((seen - level) * 1.4426950408889634)
        total += weight * tl.load(states + place * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        rows += weight[:, None] * part
    return highest, total, rows


@triton.jit
def _combine(parts, states, rows_at, pair, e, HEADS: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr,
             V_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
             GUARDED: tl.constexpr):  # fmt: skip
    """All rows that share a head of k, BLOCK at a time; the first one lies at `rows_at`."""
    for start in range(0, ROWS, BLOCK):
        r = start + tl.arange(0, BLOCK)
        top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        rows = tl.zeros((BLOCK, e.shape[0]), dtype=tl.float32)
        for split in range(0, SPLITS, CHUNK):
            top, total, rows = _add_parts(
                parts, states, pair * SPLITS + split, SPLITS - split, r, e, top, total, rows, ROWS, V_DIM, CHUNK
            )
        row_at = rows_at + (r % Q_LEN * HEADS + r // Q_LEN)[:, None] * V_DIM + e[None, :]
        inside = (r < ROWS)[:, None] & (e < V_DIM)[None, :]
        tl.store(row_at, divided(rows, total, GUARDED).to(rows_at.dtype.element_ty), mask=inside)


@triton.jit
def _ask_for(at, start, KV_LEN: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, D_STRIDE: tl.constexpr,
             BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Bring a tile of keys or values to the L2 cache: one element in every 128 bytes."""
    STEP: tl.constexpr = 128 * 8 // at.dtype.element_ty.primitive_bitwidth
    s = tl.minimum(start + tl.arange(0, BLOCK_S), KV_LEN - 1)
    d = tl.minimum(tl.arange(0, (BLOCK + STEP - 1) // STEP) * STEP, DIM - 1)
    prefetch(at + s[:, None] * STRIDE + d[None, :] * D_STRIDE)


@triton.jit
def _ask_and_wait(k_at, v_at, tile, count, KV_LEN: tl.constexpr, K_S: tl.constexpr, HEAD_DIM: tl.constexpr,
                  K_D: tl.constexpr, V_S: tl.constexpr, V_DIM: tl.constexpr, V_D: tl.constexpr, BLOCK_S: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PREFETCH: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """With either: ask for the keys and values of `count` tiles. With AHEAD: then wait for the kernel in front."""
    if PREFETCH or AHEAD:
        for block in range(0, count):
            _ask_for(k_at, (tile + block) * BLOCK_S, KV_LEN, K_S, HEAD_DIM, K_D, BLOCK_S, BLOCK_D)
            _ask_for(v_at, (tile + block) * BLOCK_S, KV_LEN, V_S, V_DIM, V_D, BLOCK_S, BLOCK_E)
    if AHEAD:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _join(parts, states, counters, rows_at, rows, top, total, pair, split, r, e, HEADS: tl.constexpr,
          ROWS: tl.constexpr, Q_LEN: tl.constexpr, V_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
          CHUNK: tl.constexpr, GUARDED: tl.constexpr):  # fmt: skip
    """Store what the rows of one split have seen; the last one of them to come combines all."""
    place = (pair * SPLITS + split) * ROWS + r
    tl.store(parts + place[:, None] * V_DIM + e[None, :], rows, mask=(r < ROWS)[:, None] & (e < V_DIM)[None, :])
    tl.store(states + place * 2, top, mask=r < ROWS)
    tl.store(states + place * 2 + 1, total, mask=r < ROWS)
    tl.debug_barrier()  # every thread's part is stored before the one atomic that publishes it
    if tl.atomic_add(counters + pair, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(counters + pair, 0)
        _combine(parts, states, rows_at, pair, e, HEADS, ROWS, Q_LEN, V_DIM, SPLITS, BLOCK, CHUNK, GUARDED)


@triton.jit
def decode_attention_kernel(
    q, k, v, mask, out, parts, states, counters,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, REPEAT: tl.constexpr, Q_LEN: tl.constexpr, KV_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    Q_B: tl.constexpr, Q_H: tl.constexpr, Q_S: tl.constexpr, Q_D: tl.constexpr,
    K_B: tl.constexpr, K_H: tl.constexpr, K_S: tl.constexpr, K_D: tl.constexpr,
    V_B: tl.constexpr, V_H: tl.constexpr, V_S: tl.constexpr, V_D: tl.constexpr,
    MASK: tl.constexpr, MASK_B: tl.constexpr, MASK_H: tl.constexpr, MASK_Q: tl.constexpr, MASK_S: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr, COMBINE_R: tl.constexpr, COMBINE_S: tl.constexpr, SKIP: tl.constexpr, TF32X3: tl.constexpr,
    PREFETCH: tl.constexpr, AHEAD: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """softmax(q k' * SCALE + mask) v; grid: [batch * GROUPS * SPLITS].

    Args:
        q: [B, GROUPS * REPEAT, Q_LEN, HEAD_DIM]; strides in elements are Q_B, Q_H, Q_S, Q_D. k, v and mask likewise.
        k: [B, GROUPS, KV_LEN, HEAD_DIM].
        v: [B, GROUPS, KV_LEN, V_DIM].
        mask: broadcasts to [B, heads, Q_LEN, KV_LEN] with strides of 0; not read where MASK is 0 (see `mask_tile`).
        out: [B, Q_LEN, heads, V_DIM] row-major.
        parts: fp32 scratch, [B * GROUPS * SPLITS, REPEAT * Q_LEN, V_DIM]; not used without splits, like states and counters.
        states: fp32 scratch, [B * GROUPS * SPLITS, REPEAT * Q_LEN, 2]: largest score and sum of weights.
        counters: int32 zeros, one for each batch and head of k.
        COMBINE_R, COMBINE_S: rows and parts that are put together at a time.
        TF32X3: whether products in fp32 are three of the matrix instruction's. GUARDED: who sees nothing gets zeros, not NaN.
        PREFETCH, AHEAD: keys and values are asked for before q is read; and before the kernel in front has ended.
    """
    ROWS: tl.constexpr = REPEAT * Q_LEN
    HEADS: tl.constexpr = GROUPS * REPEAT
    ALL_S: tl.constexpr = KV_LEN % BLOCK_S == 0
    ALL_D: tl.constexpr = HEAD_DIM == BLOCK_D
    ALL_E: tl.constexpr = V_DIM == BLOCK_E
    BLOCKS: tl.constexpr = (KV_LEN + BLOCK_S - 1) // BLOCK_S
    PER_SPLIT: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    ONE_MASK: tl.constexpr = MASK_H == 0 and (MASK_Q == 0 or Q_LEN == 1)  # all rows of the tile have the same

    pair = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    batch = (pair // GROUPS).to(tl.int64)
    group = pair % GROUPS

    tile, count = split * PER_SPLIT, tl.minimum(PER_SPLIT, BLOCKS - split * PER_SPLIT)
    k_at = k + batch * K_B + group * K_H
    v_at = v + batch * V_B + group * V_H
    _ask_and_wait(k_at, v_at, tile, count, KV_LEN, K_S, HEAD_DIM, K_D, V_S, V_DIM, V_D, BLOCK_S, BLOCK_D, BLOCK_E,
                  PREFETCH, AHEAD)  # fmt: skip
    r = tl.arange(0, BLOCK_R)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    r_head = group * REPEAT + r // Q_LEN
    r_position = r % Q_LEN
    q_at = q + batch * Q_B + r_head[:, None] * Q_H + r_position[:, None] * Q_S + d[None, :] * Q_D
    queries = load_tile(q_at, r[:, None], d[None, :], ROWS, HEAD_DIM, ROWS == BLOCK_R, ALL_D)
    mask_at = mask + batch * MASK_B
    mask_rows, mask_there = _rows_of_mask(r_head, r_position, r < ROWS, MASK_H, MASK_Q, ONE_MASK)

    if SKIP:
        end = tl.minimum((tile + PER_SPLIT) * BLOCK_S, KV_LEN)
        tile, count = _what_is_seen(mask_at, mask_rows, mask_there, tile * BLOCK_S, end, KV_LEN, MASK, MASK_S, BLOCK_S)

    top = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    rows = tl.zeros((BLOCK_R, BLOCK_E), dtype=tl.float32)
    for block in tl.range(0, count):
        s = (tile + block) * BLOCK_S + tl.arange(0, BLOCK_S)
        # asked for first, so that it comes while the keys are multiplied
        added = mask_tile(mask_at + mask_rows + s[None, :] * MASK_S, mask_there & (s < KV_LEN)[None, :], MASK)
        keys = load_tile(k_at + d[:, None] * K_D + s[None, :] * K_S, d[:, None], s[None, :], HEAD_DIM, KV_LEN, ALL_D, ALL_S)
        scores = row_products(queries, keys, TF32X3) * SCALE + added
        if not ALL_S:
            scores = tl.where((s < KV_LEN)[None, :], scores, float("-inf"))
        values = load_tile(v_at + s[:, None] * V_S + e[None, :] * V_D, s[:, None], e[None, :], KV_LEN, V_DIM, ALL_S, ALL_E)
        top, total, rows = absorb(scores, values, top, total, rows, TF32X3)

    out_at = out + batch * (Q_LEN * HEADS * V_DIM)
    if SPLITS == 1:
        at = out_at + (r_position * HEADS + r_head)[:, None] * V_DIM + e[None, :]
        tl.store(at, divided(rows, total, GUARDED).to(out.dtype.element_ty), mask=(r < ROWS)[:, None] & (e < V_DIM)[None, :])
    else:
        _join(parts, states, counters, out_at + group * REPEAT * V_DIM, rows, top, total, pair, split, r, e, HEADS, ROWS,
              Q_LEN, V_DIM, SPLITS, COMBINE_R, COMBINE_S, GUARDED)  # fmt: skip
