"""Steps that attention kernels share: tiles of keys and values, masks, and a softmax over tiles that come one by one.

What a row has seen so far is `top` (its largest score), `total` (the sum of weights) and `rows` (weighted values), both
relative to `top`. Scores stay in natural units: times log2(e), a mask of the dtype's lowest number would be -inf. Masks are
added, so that NaN and infinities go where they go in the library.

Products of fp32 are added up in parts: a score's error is the relative error of its weight, and one chain of additions over
the whole head makes errors twice as large as the library's now and then.
"""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def load_tile(at, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    """A tile of a [ROWS, COLUMNS] matrix; zeros beyond its edges, where there can be any."""
    if ALL_ROWS and ALL_COLUMNS:
        tile = tl.load(at)
    elif ALL_COLUMNS:
        tile = tl.load(at, mask=row < ROWS, other=0.0)
    elif ALL_ROWS:
        tile = tl.load(at, mask=column < COLUMNS, other=0.0)
    else:
        tile = tl.load(at, mask=(row < ROWS) & (column < COLUMNS), other=0.0)
    return tile


@triton.jit
def mask_tile(at, inside, MASK: tl.constexpr):
    """A mask's tile as what is added to scores: MASK 0 there is none, 1 booleans that say what is seen, 2 numbers."""
    if MASK == 1:
        added = tl.where(tl.load(at, mask=inside, other=0).to(tl.int1), 0.0, float("-inf"))
    elif MASK == 2:
        added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        added = 0.0
    return added


@triton.jit
def _halves(x):
    """[R, D] -> its even and odd columns, [R, D / 2] each: neighbours in registers stay where they are."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)).split()


@triton.jit
def _product(a, b, TF32X3: tl.constexpr):
    """a [R, D] times b' [S, D], added up by itself: without the last argument Triton would make sums of products one chain."""
    return tl.dot(a, tl.trans(b), input_precision="tf32x3" if TF32X3 else "ieee", max_num_imprecise_acc=1)


@triton.jit
def row_products(queries, keys, TF32X3: tl.constexpr):
    """Rows of q [R, D] times keys [D, S] -> [R, S], fp32."""
    if queries.dtype != tl.float32:
        found = tl.dot(queries, keys)
    elif queries.shape[1] < 32:
        found = _product(queries, tl.trans(keys), TF32X3)
    else:
        q0, q1 = _halves(queries)
        k0, k1 = _halves(tl.trans(keys))
        if queries.shape[1] < 64:
            found = _product(q0, k0, TF32X3) + _product(q1, k1, TF32X3)
        else:
            q00, q01 = _halves(q0)
            q10, q11 = _halves(q1)
            k00, k01 = _halves(k0)
            k10, k11 = _halves(k1)
            found = _product(q00, k00, TF32X3) + _product(q01, k01, TF32X3)
            found += _product(q10, k10, TF32X3) + _product(q11, k11, TF32X3)
    return found


@triton.jit
def added_product(a, b, total, TF32X3: tl.constexpr):
    """total + a b. In fp32 the product is added up by itself: without the last argument Triton would make it one chain."""
    if b.dtype == tl.float32:
        total += tl.dot(a, b, input_precision="tf32x3" if TF32X3 else "ieee", max_num_imprecise_acc=1)
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def absorb(scores, values, top, total, rows, TF32X3: tl.constexpr):
    """The state of rows [R], [R], [R, E] with a tile of scores [R, S] and values [S, E] added to it."""
    highest = tl.maximum(top, tl.max(scores, 1))
    level = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen yet: weights of zero, not NaN
    weights = tl.exp2((scores - level[:, None]) * 1.4426950408889634)
    shrink = tl.exp2((top - level) * 1.4426950408889634)
    total = total * shrink + tl.sum(weights, 1)
    rows *= shrink[:, None]
    rows = added_product(weights.to(values.dtype), values, rows, TF32X3)
    return highest, total, rows


@triton.jit
def absorb_products(products, values, top, total, rows, SCALE: tl.constexpr, TF32X3: tl.constexpr):
    """`absorb` of scores that are products [R, S] times a positive SCALE: a difference, an fma and an exp2 for each weight.

    The difference is exact where it matters: a single fma of large products and a rounded level would be off by hundreds.
    """
    largest = tl.max(products, 1)
    score = largest * SCALE
    highest = tl.maximum(top, score)
    level = tl.where(highest == float("-inf"), 0.0, highest)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    # How far this tile's largest score is from the largest of all: nothing, said in so many words if it is that one. The
    # compiler makes one fma of a product and a difference, and what rounding took from the product would be far from nothing.
    below = tl.where(score >= top, 0.0, score - level) * 1.4426950408889634
    weights = tl.exp2((products - base[:, None]) * (SCALE * 1.4426950408889634) + below[:, None])
    shrink = tl.exp2((top - level) * 1.4426950408889634)
    total = total * shrink + tl.sum(weights, 1)
    rows *= shrink[:, None]
    rows = added_product(weights.to(values.dtype), values, rows, TF32X3)
    return highest, total, rows


@triton.jit
def divided(rows, total, GUARDED: tl.constexpr):
    """Weighted values over the sum of weights; a row that saw nothing is zero, or NaN where the model does not guard it."""
    if GUARDED:
        total = tl.where(total == 0.0, 1.0, total)
    return rows / total[:, None]
