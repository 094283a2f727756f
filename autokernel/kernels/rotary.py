"""A Triton kernel for rotary embeddings, with a norm of each head before or without, of one tensor or of two: each row is read
once, and kept in registers.

Sums and products are in fp32. The first programs have the rows of q, those behind them the rows of k.
"""

# Triton compiles statements: it takes no conditional expressions over tensors.
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

from autokernel.kernels.row_norm import places

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def gain_at(place, mask, OFFSET: tl.constexpr):
    """What a norm multiplies by."""
    gain = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if OFFSET != 0.0:
        gain += OFFSET
    return gain


@triton.jit
def turn_halves(
    x, weight, cos, sin, y, row, real, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr, W: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    Y0: tl.constexpr, Y1: tl.constexpr, Y2: tl.constexpr, Y3: tl.constexpr,
    HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a * cos - b * sin, b * cos + a * sin), of the halves of rows."""
    column = tl.arange(0, BLOCK)
    in_half = column < HALF
    mask = real[:, None] & in_half[None, :]
    here = x + places(row, column, SIZE_1, SIZE_2, X0, X1, X2, X3)
    a = tl.load(here, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(here + HALF * X3, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + EPS)
        # read for every row: a vector of its own would have to be passed on through shared memory
        gains = weight + tl.zeros_like(row)[:, None] + column[None, :] * W
        a = a * scale[:, None] * gain_at(gains, mask, OFFSET)
        b = b * scale[:, None] * gain_at(gains + HALF * W, mask, OFFSET)
    at_cos = cos + places(row, column, SIZE_1, SIZE_2, C0, C1, C2, C3)
    at_sin = sin + places(row, column, SIZE_1, SIZE_2, S0, S1, S2, S3)
    out = y + places(row, column, SIZE_1, SIZE_2, Y0, Y1, Y2, Y3)
    c = tl.load(at_cos, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(at_sin, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, (a * c - b * s).to(y.dtype.element_ty), mask=mask)
    c = tl.load(at_cos + HALF * C3, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(at_sin + HALF * S3, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + HALF * Y3, (b * c + a * s).to(y.dtype.element_ty), mask=mask)


@triton.jit
def turn_neighbours(
    x, weight, turns, y, row, real, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr, W: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    Y0: tl.constexpr, Y1: tl.constexpr, Y2: tl.constexpr, Y3: tl.constexpr,
    HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a * c - b * s, a * s + b * c), of neighbours in rows and in rows of `turns`."""
    column = tl.arange(0, 2 * BLOCK)
    in_row = column < 2 * HALF
    mask = real[:, None] & in_row[None, :]
    value = tl.load(x + places(row, column, SIZE_1, SIZE_2, X0, X1, X2, X3), mask=mask, other=0.0).to(tl.float32)
    turn = tl.load(turns + places(row, column, SIZE_1, SIZE_2, C0, C1, C2, 1), mask=mask, other=0.0)
    if NORM:
        gains = weight + tl.zeros_like(row)[:, None] + column[None, :] * W
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / (2 * HALF) + EPS)
        value = value * scale[:, None] * gain_at(gains, mask, OFFSET)
    a, b = tl.split(tl.reshape(value, (BLOCK_ROWS, BLOCK, 2)))
    c, s = tl.split(tl.reshape(turn, (BLOCK_ROWS, BLOCK, 2)))
    result = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (BLOCK_ROWS, 2 * BLOCK))
    out = y + places(row, column, SIZE_1, SIZE_2, Y0, Y1, Y2, Y3)
    tl.store(out, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    q, q_weight, q_out, k, k_weight, k_out, cos, sin,
    Q_ROWS: tl.constexpr, Q_SIZE_1: tl.constexpr, Q_SIZE_2: tl.constexpr, QW: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, Q3: tl.constexpr,
    QY0: tl.constexpr, QY1: tl.constexpr, QY2: tl.constexpr, QY3: tl.constexpr,
    K_ROWS: tl.constexpr, K_SIZE_1: tl.constexpr, K_SIZE_2: tl.constexpr, KW: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr,
    KY0: tl.constexpr, KY1: tl.constexpr, KY2: tl.constexpr, KY3: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, NEIGHBOURS: tl.constexpr,
    WIDE: tl.constexpr, Q_BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns `Q_ROWS` rows of q and, unless it is zero, `K_ROWS` of k; strides are those of four dimensions.

    NORM: of the norms of rows, `OFFSET` added to their weight. NEIGHBOURS: by complex numbers, which `cos` has as pairs; `sin`
    is not read. WIDE: places need 64 bits.
    """
    block = tl.program_id(0)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if WIDE:
        row = row.to(tl.int64)
    if block < Q_BLOCKS:
        if NEIGHBOURS:
            turn_neighbours(
                q, q_weight, cos, q_out, row, row < Q_ROWS, Q_SIZE_1, Q_SIZE_2, Q0, Q1, Q2, Q3, QW, C0, C1, C2,
                QY0, QY1, QY2, QY3, HALF, NORM, EPS, OFFSET, BLOCK_ROWS, BLOCK,
            )  # fmt: skip
        else:
            turn_halves(
                q, q_weight, cos, sin, q_out, row, row < Q_ROWS, Q_SIZE_1, Q_SIZE_2, Q0, Q1, Q2, Q3, QW,
                C0, C1, C2, C3, S0, S1, S2, S3, QY0, QY1, QY2, QY3, HALF, NORM, EPS, OFFSET, BLOCK,
            )  # fmt: skip
    elif K_ROWS > 0:
        row -= Q_BLOCKS * BLOCK_ROWS
        if NEIGHBOURS:
            turn_neighbours(
                k, k_weight, cos, k_out, row, row < K_ROWS, K_SIZE_1, K_SIZE_2, K0, K1, K2, K3, KW, C0, C1, C2,
                KY0, KY1, KY2, KY3, HALF, NORM, EPS, OFFSET, BLOCK_ROWS, BLOCK,
            )  # fmt: skip
        else:
            turn_halves(
                k, k_weight, cos, sin, k_out, row, row < K_ROWS, K_SIZE_1, K_SIZE_2, K0, K1, K2, K3, KW,
                C0, C1, C2, C3, S0, S1, S2, S3, KY0, KY1, KY2, KY3, HALF, NORM, EPS, OFFSET, BLOCK,
            )  # fmt: skip
