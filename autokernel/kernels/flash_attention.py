"""A Triton kernel for attention of many rows: tiles of q, each against all keys that it may see; scores stay in registers.

It takes what the library's fast kernels do not: masks that are added, of any broadcast strides, fp32, and any scale.
"""

# ruff: noqa: N803, N806, SIM108
from __future__ import annotations

import triton
import triton.language as tl

from autokernel.kernels.online_softmax import absorb, divided, load_tile, mask_tile

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def flash_attention_kernel(
    q, k, v, mask, out,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr,
    Q_LEN: tl.constexpr, KV_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    Q_B: tl.constexpr, Q_H: tl.constexpr, Q_S: tl.constexpr, Q_D: tl.constexpr,
    K_B: tl.constexpr, K_H: tl.constexpr, K_S: tl.constexpr, K_D: tl.constexpr,
    V_B: tl.constexpr, V_H: tl.constexpr, V_S: tl.constexpr, V_D: tl.constexpr,
    MASK: tl.constexpr, MASK_B: tl.constexpr, MASK_H: tl.constexpr, MASK_Q: tl.constexpr, MASK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """softmax(q k' * SCALE + mask) v; grid: [blocks of q * HEADS * B], those of one head next to each other.

    Args:
        q: [B, HEADS, Q_LEN, HEAD_DIM]; strides in elements are Q_B, Q_H, Q_S, Q_D. k, v and mask likewise.
        k: [B, HEADS / REPEAT, KV_LEN, HEAD_DIM].
        v: [B, HEADS / REPEAT, KV_LEN, V_DIM].
        mask: broadcasts to [B, HEADS, Q_LEN, KV_LEN] with strides of 0; not read where MASK is 0 (see `mask_tile`).
        out: [B, Q_LEN, HEADS, V_DIM] row-major.
    """
    BLOCKS: tl.constexpr = (Q_LEN + BLOCK_M - 1) // BLOCK_M
    ALL_M: tl.constexpr = Q_LEN % BLOCK_M == 0
    ALL_N: tl.constexpr = KV_LEN % BLOCK_N == 0
    ALL_D: tl.constexpr = HEAD_DIM == BLOCK_D
    ALL_E: tl.constexpr = V_DIM == BLOCK_E
    if CAUSAL:
        block = BLOCKS - 1 - tl.program_id(0) % BLOCKS  # the longest first: short ones fill up the end
    else:
        block = tl.program_id(0) % BLOCKS
    head = tl.program_id(0) // BLOCKS % HEADS
    batch = (tl.program_id(0) // (BLOCKS * HEADS)).to(tl.int64)

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    q_at = q + batch * Q_B + head * Q_H + m[:, None] * Q_S + d[None, :] * Q_D
    queries = load_tile(q_at, m[:, None], d[None, :], Q_LEN, HEAD_DIM, ALL_M, ALL_D)
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
    end = KV_LEN
    if CAUSAL:
        end = tl.minimum((block + 1) * BLOCK_M, KV_LEN)
    for start in tl.range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        # asked for first, so that it comes while the keys are multiplied
        added = mask_tile(mask_at + mask_rows + n[None, :] * MASK_S, mask_there & (n < KV_LEN)[None, :], MASK)
        keys = load_tile(k_at + d[:, None] * K_D + n[None, :] * K_S, d[:, None], n[None, :], HEAD_DIM, KV_LEN, ALL_D, ALL_N)
        scores = tl.dot(queries, keys, input_precision="ieee") * SCALE + added
        if CAUSAL:
            scores = tl.where(n[None, :] <= m[:, None], scores, float("-inf"))
        if not ALL_N:
            scores = tl.where((n < KV_LEN)[None, :], scores, float("-inf"))
        values = load_tile(v_at + n[:, None] * V_S + e[None, :] * V_D, n[:, None], e[None, :], KV_LEN, V_DIM, ALL_N, ALL_E)
        top, total, rows = absorb(scores, values, top, total, rows)

    at = out + batch * (Q_LEN * HEADS * V_DIM) + (m * HEADS + head)[:, None] * V_DIM + e[None, :]
    tl.store(at, divided(rows, total).to(out.dtype.element_ty), mask=(m < Q_LEN)[:, None] & (e < V_DIM)[None, :])
