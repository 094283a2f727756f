"""A Triton kernel for root-mean-square norms and what is fused with them: each row is read once, and kept in registers.

Sums are in fp32. A program has `BLOCK_ROWS` rows at a time and takes `REPEAT` such blocks one after another, so that the
weight is read once for all of them.
"""

# Triton compiles statements: it takes no conditional expressions over tensors.
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def row_places(row, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr):
    """Offsets of rows whose numbers count through three dimensions."""
    return row // (SIZE_1 * SIZE_2) * S0 + row // SIZE_2 % SIZE_1 * S1 + row % SIZE_2 * S2


@triton.jit
def places(row, column, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
            S3: tl.constexpr):  # fmt: skip
    """Offsets of a block of rows, whose numbers count through three dimensions."""
    return row_places(row, SIZE_1, SIZE_2, S0, S1, S2)[:, None] + column[None, :] * S3


@triton.jit
def row_norm_kernel(
    x, weight, residual, factor, y, total,
    ROWS: tl.constexpr, COLS: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
    X0: tl.constexpr, X1: tl.constexpr, X2: tl.constexpr, X3: tl.constexpr, W: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr, F3: tl.constexpr,
    Y0: tl.constexpr, Y1: tl.constexpr, Y2: tl.constexpr, Y3: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    SUM: tl.constexpr, SCALE: tl.constexpr, GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, REPEAT: tl.constexpr, BLOCK_COLS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = norm(x) * (weight + OFFSET), of `ROWS` rows with `COLS` columns; strides are those of four dimensions.

    SUM: of x + residual, which is written to `total`. SCALE: times 1 + factor. GATE: times factor, plus residual. What a
    mode does not use is not read. AHEAD: the weight is read before the kernel in front has ended.
    """
    column = tl.arange(0, BLOCK_COLS)
    in_row = column < COLS
    gain = tl.load(weight + column * W, mask=in_row, other=0.0).to(tl.float32)
    if OFFSET != 0.0:
        gain += OFFSET
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0).to(tl.int64) * REPEAT
    for step in range(REPEAT):
        row = (block + step) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < ROWS)[:, None] & in_row[None, :]
        value = tl.load(x + places(row, column, SIZE_1, SIZE_2, X0, X1, X2, X3), mask=mask, other=0.0).to(tl.float32)
        if SUM or GATE:
            stream = tl.load(residual + places(row, column, SIZE_1, SIZE_2, R0, R1, R2, R3), mask=mask, other=0.0)
        if SUM:
            added = (value + stream.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + places(row, column, SIZE_1, SIZE_2, T0, T1, T2, T3), added, mask=mask)
            value = added.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / COLS + EPS)
        result = value * scale[:, None] * gain[None, :]
        if SCALE or GATE:
            by = tl.load(factor + places(row, column, SIZE_1, SIZE_2, F0, F1, F2, F3), mask=mask, other=0.0).to(tl.float32)
            if SCALE:
                by += 1.0
            result *= by
        if GATE:
            result += stream.to(tl.float32)
        place = places(row, column, SIZE_1, SIZE_2, Y0, Y1, Y2, Y3)
        tl.store(y + place, result.to(y.dtype.element_ty), mask=mask)
