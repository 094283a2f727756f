"""What the kernel for the LM head with greedy sampling is launched with: its parameters, and the launches. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from autokernel.kernels.config import DTYPES, MAX_ELEMENTS, MAX_M, MODES, Mode
from autokernel.kernels.launch import Buffer, KernelPlan, Launch, Operand
from autokernel.kernels.parameters import Parameters
from autokernel.ops.lm_head_argmax import INDEX_DTYPE, LAST, LmHeadArgmax, position_of
from autokernel.records import ConfigValue, Problem, TensorSpec

Join = Literal["last", "launch"]
JOINS: tuple[Join, ...] = get_args(Join)
_MIN_TILE = 16  # of matrix instructions
_JOINED = 1024  # parts that are looked at together
_JOIN_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHeadConfig(Parameters):
    """Parameters of `lm_head_argmax`. A program has all rows.

    Attributes:
        mode: as in `config.SkinnyConfig`: "rows" or "swap", whose rows are those of the matrix instruction (of x or of the
            weight); "vector" for one row.
        block_n, block_k: the tile of the weight.
        join: who looks for the largest of all tiles: the "last" program to arrive, or a "launch" of its own, one program a row.
        num_warps, num_stages: of Triton.
    """

    mode: Mode
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    join: Join = "last"

    def problem(self, m: int, n: int, k: int) -> str | None:
        """The rule that a problem breaks, None if the kernel takes it."""
        if self.mode not in MODES or self.join not in JOINS:
            return (
                f"mode is one of {', '.join(MODES)} and join one of {', '.join(JOINS)}; they are {self.mode} and {self.join}"
            )  # fmt: skip
        for name in ("block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                return f"{name} is a power of two; it is {value}"
        if not 1 <= m <= MAX_M:
            return f"lm_head_argmax is for 1 to {MAX_M} rows; there are {m}"
        if n * k > MAX_ELEMENTS:
            return f"lm_head_argmax has 32-bit offsets; the weight has {n * k} elements, more than {MAX_ELEMENTS}"
        if k % self.block_k:
            return f"block_k must divide K; they are {self.block_k} and {k}"
        if self.mode == "vector" and m != 1:
            return f"mode vector is for one row; there are {m}"
        if self.mode != "vector" and min(self.block_n, self.block_k) < _MIN_TILE:
            return f"tiles of matrix instructions are at least {_MIN_TILE}; this is {self.block_n}x{self.block_k}"
        return None

    def block_m(self, m: int) -> int:
        """Rows of a program's tile."""
        return 1 if self.mode == "vector" else max(_MIN_TILE, _power_of_two(m))


def plan_lm_head(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """One launch, or two.

    Args:
        problem: of `lm_head_argmax`.
        config: the fields of `LmHeadConfig`.

    Raises:
        ValueError: the kernel does not take the problem or the config; says the rule.
    """
    from autokernel.kernels.lm_head_argmax import lm_head_argmax_kernel, lm_head_join_kernel

    chosen, op = LmHeadConfig.from_entry(config), LmHeadArgmax()
    sizes = op.dims(problem)
    m, n, k = sizes["m"], sizes["n"], sizes["k"]
    wrong = _problem(problem) or chosen.problem(m, n, k)
    if wrong:
        raise ValueError(wrong)
    start, row = _rows(problem)
    tiles, alone = -(-n // chosen.block_n), chosen.join == "launch"
    parts, y = Operand("scratch", 0), Operand("out", 0)
    width = min(_JOINED, _power_of_two(tiles))
    arguments: dict[str, Operand | int | float | bool] = {
        "x": Operand("in", 0),
        "w": Operand("in", 1),
        "parts": parts,
        "counter": parts if alone else Operand("scratch", 1),  # stand-ins where nobody joins
        "y": parts if alone else y,
        "M": m,
        "N": n,
        "K": k,
        "X_START": start,
        "X_ROW": row,
        "BLOCK_M": chosen.block_m(m),
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "MODE": MODES.index(chosen.mode),
        "JOIN": not alone,
        "ROWS": min(_power_of_two(m), max(1, 2 * _JOINED // width)),
        "WIDTH": width,
        "STAGES": chosen.num_stages,
    }
    launches = [Launch(lm_head_argmax_kernel, (tiles, 1, 1), arguments, chosen.num_warps, chosen.num_stages)]
    scratch = [Buffer((m, tiles), INDEX_DTYPE)]
    if alone:
        joining: dict[str, Operand | int | float | bool] = {
            "parts": parts, "y": y, "M": m, "N": n, "TILES": tiles, "WIDTH": width,
        }  # fmt: skip
        launches.append(Launch(lm_head_join_kernel, (m, 1, 1), joining, _JOIN_WARPS, 1))
    else:
        scratch.append(Buffer((1,), "int32", zeroed=True))
    return KernelPlan(outputs=op.outputs(problem), scratch=tuple(scratch), launches=tuple(launches))


def _power_of_two(number: int) -> int:
    """The least one that is not less."""
    return 1 << max(0, number - 1).bit_length()


def _rows(problem: Problem) -> tuple[int, int]:
    """Elements before the first row that counts, and from each to the next.

    Raises:
        ValueError: they are not evenly apart.
    """
    x = problem.inputs[0]
    if position_of(problem) == LAST:
        return (x.shape[1] - 1) * x.stride[1], x.stride[0]
    sized = [(n, s) for n, s in zip(x.shape[:-1], x.stride[:-1], strict=True) if n > 1]
    even = all(outer == n * inner for (_, outer), (n, inner) in itertools.pairwise(sized))
    if not even:
        raise ValueError(f"lm_head_argmax takes rows that are evenly apart; x is {list(x.shape)} with strides {list(x.stride)}")
    return 0, sized[-1][1] if sized else x.shape[-1]


def _problem(problem: Problem) -> str | None:
    """The rule that the inputs break."""
    x, weight = problem.inputs
    if math.prod((*x.shape, *weight.shape)) == 0:
        return f"lm_head_argmax takes nothing empty; x is {list(x.shape)}, the weight {list(weight.shape)}"
    if x.dtype != weight.dtype or x.dtype not in DTYPES:
        return f"lm_head_argmax takes {' or '.join(DTYPES)}, both alike; these are {x.dtype} and {weight.dtype}"
    k = x.shape[-1]
    if k > 1 and x.stride[-1] != 1:
        return f"elements of a row lie next to each other; strides of x are {list(x.stride)}"
    if weight != TensorSpec.contiguous(weight.shape, weight.dtype):
        return f"the weight lies as nn.Linear keeps it, [N, K] row by row; its strides are {list(weight.stride)}"
    return None
