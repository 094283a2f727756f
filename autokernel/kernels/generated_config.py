"""What generated kernels are launched with: their parameters, and the rules that these keep. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from autokernel.kernels.parameters import Parameters, Precision, is_power_of_two, precision_problem

Mode = Literal["rows", "swap", "vector"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_WHOLE_ROW = 32768  # columns that a program holds at once
_MIN_TILE = 16  # of matrix instructions


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig(Parameters):
    """Parameters of `generated_rows`.

    Attributes:
        block_m: rows of a program.
        block_k: columns of a tile; 0: whole rows are held at once, and read once.
        num_warps, num_stages: of Triton.
    """

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int = 2

    def problem(self, columns: int) -> str | None:
        """The rule that a row of so many columns breaks, None if there is none."""
        for name, value in (("block_m", self.block_m), ("block_k", self.block_k or 1)):
            if not is_power_of_two(value):
                return f"{name} must be a power of two; it is {value}"
        if self.block_k == 0 and columns > MAX_WHOLE_ROW:
            return f"rows of more than {MAX_WHOLE_ROW} columns are walked over in tiles; these have {columns}: set block_k"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductsConfig(Parameters):
    """Parameters of `generated_mm`.

    Attributes:
        mode: "rows": rows of the left matrix are the rows of the matrix instruction. "swap": columns of the right one are, so
            that few rows waste nothing of an instruction of 64. "vector": one row, no matrix instruction.
        block_m, block_n, block_k: the tile. In mode "vector", block_m is 1.
        block_s: columns of a tile where statistics of rows are found, before the loop over K; not used without statistics, nor
            in mode "vector" without split_k where they make a scale that can be taken out (`ops/row_scale.py`).
        split_k: programs that share a tile, each with a part of K; the last one to finish adds the parts in order.
        num_warps, num_stages: of Triton.
        precision: of products in fp32. "ieee": multiplied by vector units. "tf32x3": each factor is the sum of two numbers of
            the matrix instruction's 19 bits, and three of their four products are taken; the fourth is a rounding's worth.
    """

    mode: Mode
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    block_s: int = 512
    split_k: int = 1
    precision: Precision = "ieee"

    def problem(self, rows: int, depth: int, whole_row: int = 0) -> str | None:
        """The rule that products of so many rows and such a depth break, None if there is none.

        Args:
            rows, depth: of the left matrix.
            whole_row: columns of a result whose rows are reduced behind the product, 0 without that.
        """
        if self.mode not in MODES:
            return f"mode must be one of {', '.join(MODES)}; it is {self.mode}"
        if wrong := precision_problem(self.precision):
            return wrong
        for name in ("block_m", "block_n", "block_k", "block_s"):
            value = getattr(self, name)
            if not is_power_of_two(value):
                return f"{name} must be a power of two; it is {value}"
        if self.mode == "vector" and (rows != 1 or self.block_m != 1):
            return f"mode vector is for one row and block_m of 1; there are {rows} rows, block_m is {self.block_m}"
        if self.mode != "vector" and min(self.block_m, self.block_n, self.block_k) < _MIN_TILE:
            return f"tiles of matrix instructions are at least 16; this is {self.block_m}x{self.block_n}x{self.block_k}"
        if whole_row and (self.mode == "vector" or self.block_n < whole_row):
            return (
                f"a program holds whole rows of {whole_row} columns where these are reduced behind the product: "
                f"block_n must be as many, in mode rows or swap; it is {self.block_n} in mode {self.mode}"
            )
        if not 1 <= self.split_k <= max(1, -(-depth // self.block_k)):
            return f"K has {-(-depth // self.block_k)} blocks of {self.block_k}; split_k is {self.split_k}"
        return None
