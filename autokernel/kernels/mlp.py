"""Triton kernels for linear -> activation -> linear with few rows: hidden values never leave the chip.

A program has a slice of the hidden dimension. It computes those columns over the whole depth of the first product, rounds
and activates them as eager PyTorch does, keeps them as a tile, and multiplies them with the second weight's rows for
all columns of the result, which gives one part of the sum. Parts are fp32 scratch; a second launch adds them in a fixed
order, with the bias and the residual.

Products of fp32 are added up block by block, as in generated kernels: one long chain of additions would be less exact than
the library's.
"""

# Triton compiles statements: it takes no conditional expressions over tensors.
# ruff: noqa: N803, SIM108
from __future__ import annotations

import triton
import triton.language as tl

from autokernel.kernels.online_softmax import added_product
from autokernel.kernels.prefetch import prefetch
from autokernel.kernels.row_norm import row_places

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    """0: relu, NaN kept; 1: silu; 2: gelu; 3: gelu by tanh, where (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u))."""
    if ACTIVATION == 0:
        found = tl.where(value < 0, 0.0, value)
    elif ACTIVATION == 1:
        found = tl.div_rn(value, 1.0 + tl.exp(-value))
    elif ACTIVATION == 2:
        found = (0.5 * value) * (1.0 + tl.erf(value * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        found = tl.div_rn(value, 1.0 + tl.exp(-2.0 * inner))
    return found


@triton.jit
def _weights(at, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of a weight, which nobody reads again; zeros beyond its edges, where there can be any."""
    if ROWS % BLOCK_R == 0 and COLUMNS % BLOCK_C == 0:
        tile = tl.load(at, eviction_policy="evict_first")
    elif ROWS % BLOCK_R == 0:
        tile = tl.load(at, mask=column < COLUMNS, other=0.0, eviction_policy="evict_first")
    elif COLUMNS % BLOCK_C == 0:
        tile = tl.load(at, mask=row < ROWS, other=0.0, eviction_policy="evict_first")
    else:
        tile = tl.load(at, mask=(row < ROWS) & (column < COLUMNS), other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _prefetch(w_out, first, HIDDEN: tl.constexpr, N: tl.constexpr, OUT_N: tl.constexpr, BLOCK_H: tl.constexpr,
              BLOCK_N: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Ask for a slice of the second weight, one element in every STEP: it comes to the L2 cache during the first product."""
    column = tl.minimum(first + tl.arange(0, BLOCK_H // STEP) * STEP, HIDDEN - 1)
    for start in range(0, N, BLOCK_N):
        row = tl.minimum(start + tl.arange(0, BLOCK_N), N - 1)
        prefetch(w_out + row[:, None] * OUT_N + column[None, :])


@triton.jit
def mlp_kernel(
    x, w_in, b_in, w_out, parts,
    ROWS: tl.constexpr, K: tl.constexpr, HIDDEN: tl.constexpr, N: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr,
    IN_K: tl.constexpr, IN_H: tl.constexpr, B: tl.constexpr, OUT_H: tl.constexpr, OUT_N: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    SWAP_IN: tl.constexpr, SWAP_OUT: tl.constexpr, PREFETCH: tl.constexpr, TF32X3: tl.constexpr,
):  # fmt: skip
    """One slice's part of act(x w_in + b_in) w_out; grid: [slices, blocks of rows].

    Args:
        x: [ROWS, K], its rows counted through three dimensions with strides X0, X1 and X2; columns have stride X3.
        w_in: [K, HIDDEN], strides IN_K and IN_H.
        b_in: [HIDDEN], stride B; not read without BIAS.
        w_out: [HIDDEN, N], strides OUT_H and OUT_N.
        parts: fp32 scratch, [slices, ROWS, N].
        PREFETCH: elements of w_out, contiguous along HIDDEN, that come to the L2 cache at once; 0: nothing is asked for ahead.
        SWAP_IN, SWAP_OUT: whether a product's tile is transposed, so that the weight's rows are the instruction's.
    """
    part = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(m, ROWS - 1)  # rows that are not there are read from the last one, and never stored
    h = part * BLOCK_H + tl.arange(0, BLOCK_H)
    if PREFETCH > 0:
        _prefetch(w_out, part * BLOCK_H, HIDDEN, N, OUT_N, BLOCK_H, BLOCK_N, PREFETCH)
    x_at = x + row_places(row, SIZE_1, SIZE_2, X0, X1, X2)[:, None]
    if SWAP_IN:
        hidden = tl.zeros((BLOCK_H, BLOCK_M), dtype=tl.float32)
    else:
        hidden = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        if K % BLOCK_K == 0:
            rows = tl.load(x_at + k * X3)
        else:
            rows = tl.load(x_at + k * X3, mask=k < K, other=0.0)
        weights = _weights(w_in + h[:, None] * IN_H + k * IN_K, h[:, None], k, HIDDEN, K, BLOCK_H, BLOCK_K)
        if SWAP_IN:
            hidden = added_product(weights, tl.trans(rows), hidden, TF32X3)
        else:
            hidden = added_product(rows, tl.trans(weights), hidden, TF32X3)
    if SWAP_IN != SWAP_OUT:
        hidden = tl.trans(hidden)
    if SWAP_OUT:
        along = h[:, None]
    else:
        along = h[None, :]
    if BIAS:
        hidden += tl.load(b_in + along * B, mask=along < HIDDEN, other=0.0).to(tl.float32)
    hidden = _activated(hidden.to(x.dtype.element_ty).to(tl.float32), ACTIVATION)
    if HIDDEN % BLOCK_H != 0:
        hidden = tl.where(along < HIDDEN, hidden, 0.0)
    active = hidden.to(x.dtype.element_ty)

    mine = parts + part * (ROWS * N)
    for first in tl.range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        w_at = w_out + n[:, None] * OUT_N + h[None, :] * OUT_H
        weights = _weights(w_at, n[:, None], h[None, :], N, HIDDEN, BLOCK_N, BLOCK_H)
        if SWAP_OUT:
            tile = added_product(weights, active, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32), TF32X3)
            tl.store(mine + m[None, :] * N + n[:, None], tile, mask=(m < ROWS)[None, :] & (n < N)[:, None])
        else:
            tile = added_product(active, tl.trans(weights), tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), TF32X3)
            tl.store(mine + m[:, None] * N + n[None, :], tile, mask=(m < ROWS)[:, None] & (n < N)[None, :])


@triton.jit
def mlp_sum_kernel(
    parts, b_out, residual, out,
    ROWS: tl.constexpr, N: tl.constexpr, SLICES: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr,
    B: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    Y0: tl.constexpr, Y1: tl.constexpr, Y2: tl.constexpr, Y3: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SUM_PARTS: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of all slices' parts, plus what there is of a bias and a residual; grid: [blocks of the result's elements].

    Args:
        parts: [SLICES, ROWS, N], of which SUM_PARTS are read at once.
        b_out: [N], stride B; not read without BIAS.
        residual: as the result; not read without RESIDUAL. Rows of both are counted through three dimensions.
        out: the result.
    """
    element = tl.program_id(0) * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    there = element < ROWS * N
    total = tl.zeros((SUM_BLOCK,), dtype=tl.float32)
    for first in range(0, SLICES, SUM_PARTS):
        part = first + tl.arange(0, SUM_PARTS)
        mask = (part < SLICES)[:, None] & there[None, :]
        total += tl.sum(tl.load(parts + part[:, None] * (ROWS * N) + element[None, :], mask=mask, other=0.0), 0)
    row = element // N
    column = element % N
    if BIAS:
        total += tl.load(b_out + column * B, mask=there, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    if RESIDUAL:
        at = residual + row_places(row, SIZE_1, SIZE_2, R0, R1, R2) + column * R3
        added = result.to(tl.float32) + tl.load(at, mask=there, other=0.0).to(tl.float32)
        result = added.to(out.dtype.element_ty)
    tl.store(out + row_places(row, SIZE_1, SIZE_2, Y0, Y1, Y2) + column * Y3, result, mask=there)
