"""What kernels of the LM head have in common before they are launched: the tile of a program, and the rows. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autokernel.kernels.config import DTYPES, MAX_ELEMENTS, MAX_M, MODES, Mode
from autokernel.kernels.launch import Operand
from autokernel.kernels.parameters import Parameters, is_power_of_two, power_of_two
from autokernel.ops.lm_head import LAST, position_of
from autokernel.records import Problem, TensorSpec

_MIN_TILE = 16  # of matrix instructions


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTile(Parameters):
    """How a program computes its logits. It has all rows.

    Attributes:
        mode: as in `config.SkinnyConfig`: "rows" or "swap", whose rows are those of the matrix instruction (of x or of the
            weight); "vector" for one row.
        block_n, block_k: the tile of the weight.
        num_warps, num_stages: of Triton.
    """

    mode: Mode
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def tile_problem(self, op: str, m: int, n: int, k: int) -> str | None:
        """The rule that a problem breaks, None if the tile is one."""
        if self.mode not in MODES:
            return f"mode is one of {', '.join(MODES)}; it is {self.mode}"
        for name in ("block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if not is_power_of_two(value):
                return f"{name} is a power of two; it is {value}"
        if not 1 <= m <= MAX_M:
            return f"{op} is for 1 to {MAX_M} rows; there are {m}"
        if n * k > MAX_ELEMENTS:
            return f"{op} has 32-bit offsets; the weight has {n * k} elements, more than {MAX_ELEMENTS}"
        if k % self.block_k:
            return f"block_k must divide K; they are {self.block_k} and {k}"
        if self.mode == "vector" and m != 1:
            return f"mode vector is for one row; there are {m}"
        if self.mode != "vector" and min(self.block_n, self.block_k) < _MIN_TILE:
            return f"tiles of matrix instructions are at least {_MIN_TILE}; this is {self.block_n}x{self.block_k}"
        return None

    def block_m(self, m: int) -> int:
        """Rows of a program's tile."""
        return 1 if self.mode == "vector" else max(_MIN_TILE, power_of_two(m))

    def arguments(self, problem: Problem, sizes: Mapping[str, int]) -> dict[str, Operand | int | float | bool]:
        """Of a launch, what its tiles of logits are computed from. Sizes as of `ops.lm_head.LmHead.dims`.

        Raises:
            ValueError: as `rows_of`.
        """
        start, row = rows_of(problem)
        return {
            "x": Operand("in", 0),
            "w": Operand("in", 1),
            "M": sizes["m"],
            "N": sizes["n"],
            "K": sizes["k"],
            "X_START": start,
            "X_ROW": row,
            "BLOCK_M": self.block_m(sizes["m"]),
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "MODE": MODES.index(self.mode),
            "STAGES": self.num_stages,
        }


def rows_of(problem: Problem) -> tuple[int, int]:
    """Elements before the first row that counts, and from each to the next.

    Raises:
        ValueError: they are not evenly apart.
    """
    x = problem.inputs[0]
    if position_of(problem) == LAST:
        return (x.shape[1] - 1) * x.stride[1], x.stride[0]
    if x.row_step is None:
        raise ValueError(f"{problem.op} takes rows that are evenly apart; x is {list(x.shape)} with strides {list(x.stride)}")
    return 0, x.row_step


def inputs_problem(problem: Problem) -> str | None:
    """The rule that the inputs break."""
    x, weight = problem.inputs
    if math.prod((*x.shape, *weight.shape)) == 0:
        return f"{problem.op} takes nothing empty; x is {list(x.shape)}, the weight {list(weight.shape)}"
    if x.dtype != weight.dtype or x.dtype not in DTYPES:
        return f"{problem.op} takes {' or '.join(DTYPES)}, both alike; these are {x.dtype} and {weight.dtype}"
    k = x.shape[-1]
    if k > 1 and x.stride[-1] != 1:
        return f"elements of a row lie next to each other; strides of x are {list(x.stride)}"
    if x.reach > MAX_ELEMENTS:  # last positions of long prompts
        return f"{problem.op} has 32-bit offsets; x reaches {x.reach} elements, more than {MAX_ELEMENTS}"
    if weight != TensorSpec.contiguous(weight.shape, weight.dtype):
        return f"the weight lies as nn.Linear keeps it, [N, K] row by row; its strides are {list(weight.stride)}"
    return None
