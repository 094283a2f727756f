"""The largest numbers of each row of a tile, in order: bitonic top-k in registers, for Triton kernels.

Runs of as many numbers as are wanted are sorted, one up and the next one down. Of two neighbours the larger of each pair are
the largest of both, rise and fall, and are sorted again, until one run is left. `tl.topk` does the same; this one also runs in
Triton's interpreter.

A tile is seen as a cube with one axis of two for each bit of a number's place. Sizes are powers of two, given as exponents.
"""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"


@triton.jit
def _bit(PLACE: tl.constexpr, BITS: tl.constexpr):
    """A bit of the place, the lowest is 0: broadcastable to a cube of BITS axes."""
    return tl.reshape(tl.arange(0, 2), [1] * (BITS - 1 - PLACE) + [2] + [1] * PLACE)


@triton.jit
def _sorted_runs(cube, down, RUN_BITS: tl.constexpr, BITS: tl.constexpr):
    """Runs that rise and then fall, or the other way round, in order: falling where `down` is 1."""
    for step in tl.static_range(RUN_BITS):
        other = tl.sum(cube, axis=BITS - RUN_BITS + step, keep_dims=True) - cube  # the partner; sums may wrap
        upper = _bit(RUN_BITS - 1 - step, BITS)
        cube = tl.where((cube > other) != ((down ^ upper) == 1), other, cube)
    return cube


@triton.jit
def largest(numbers, ROW_BITS: tl.constexpr, WIDTH_BITS: tl.constexpr, COUNT_BITS: tl.constexpr):
    """int64 [rows, width] -> [rows, count], the largest first; 2 <= count < width."""
    cube = tl.reshape(numbers, [2] * (ROW_BITS + WIDTH_BITS))
    for bits in tl.static_range(1, COUNT_BITS + 1):
        cube = _sorted_runs(cube, _bit(bits, ROW_BITS + WIDTH_BITS), bits, ROW_BITS + WIDTH_BITS)
    for left in tl.static_range(WIDTH_BITS - COUNT_BITS):
        cube = tl.max(cube, axis=ROW_BITS + WIDTH_BITS - COUNT_BITS - 1 - left)
        if left + 1 < WIDTH_BITS - COUNT_BITS:
            down = _bit(COUNT_BITS, ROW_BITS + WIDTH_BITS - 1 - left)
            cube = _sorted_runs(cube, down, COUNT_BITS, ROW_BITS + WIDTH_BITS - 1 - left)
        else:
            cube = _sorted_runs(cube, 1, COUNT_BITS, ROW_BITS + COUNT_BITS)
    return tl.reshape(cube, [1 << ROW_BITS, 1 << COUNT_BITS])
