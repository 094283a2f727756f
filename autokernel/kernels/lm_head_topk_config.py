"""What the kernels for the LM head with top-k sampling are launched with: their parameters, and the launches. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autokernel.kernels.config import MAX_ELEMENTS
from autokernel.kernels.launch import Buffer, KernelPlan, Launch, Operand
from autokernel.kernels.lm_head_config import HeadTile, inputs_problem
from autokernel.kernels.parameters import is_power_of_two, power_of_two
from autokernel.ops.lm_head import INDEX_DTYPE
from autokernel.ops.lm_head_topk import LmHeadTopk
from autokernel.records import ConfigValue, Problem

MAX_TOP = 64
_MERGED_BY_A_WARP = 256  # parts: eight numbers in each lane
_MAX_WARPS = 8

Arguments = dict[str, Operand | int | float | bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHeadTopkConfig(HeadTile):
    """Parameters of `lm_head_topk`.

    Attributes:
        width: parts of a row that a program of the later launches looks at.
    """

    width: int = 2048

    def problem(self, op: str, sizes: Mapping[str, int]) -> str | None:
        """The rule that a problem breaks, None if the kernels take it. Sizes as of `LmHeadTopk.dims`."""
        m, n, top, kept = (sizes[name] for name in ("m", "n", "top", "kept"))
        if not 1 <= top <= MAX_TOP:
            return f"{op} is for the 1 to {MAX_TOP} largest; top is {top}"
        if not is_power_of_two(self.width) or self.width < 2 * kept:
            return f"width is a power of two, no less than {2 * kept} where top is {top}; it is {self.width}"
        wrong = self.tile_problem(op, m, n, sizes["k"])
        if wrong is None and m * self.candidates(n, kept) > MAX_ELEMENTS:
            return f"{op} has 32-bit offsets; there are {m * self.candidates(n, kept)} parts, more than {MAX_ELEMENTS}"
        return wrong

    def candidates(self, n: int, kept: int) -> int:
        """Parts of a row: what all tiles leave."""
        return -(-n // self.block_n) * min(self.block_n, kept)


def plan_topk(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """Two launches, or more: one for the tiles, one for each time that parts are more than `width`, and the last one.

    Args:
        problem: of `lm_head_topk`.
        config: the fields of `LmHeadTopkConfig`.

    Raises:
        ValueError: the kernels do not take the problem or the config; says the rule.
    """
    from autokernel.kernels.lm_head_topk import lm_head_best_kernel, lm_head_merge_kernel

    chosen, op = LmHeadTopkConfig.from_entry(config), LmHeadTopk()
    sizes = op.dims(problem)
    m, n, kept = sizes["m"], sizes["n"], sizes["kept"]
    wrong = inputs_problem(problem) or chosen.problem(op.name, sizes)
    if wrong:
        raise ValueError(wrong)
    launches = [_tiles(problem, chosen, sizes)]
    left = chosen.candidates(n, kept)
    scratch = [Buffer((m, left), INDEX_DTYPE)]
    while left > chosen.width:
        groups = -(-left // chosen.width)
        merging: Arguments = {
            "parts": Operand("scratch", len(scratch) - 1),
            "fewer": Operand("scratch", len(scratch)),
            "CANDIDATES": left,
            "GROUPS": groups,
            **_exponents(chosen.width, kept),
        }
        launches.append(Launch(lm_head_merge_kernel, (m, groups, 1), merging, _warps(chosen.width), 1))
        left = groups * kept
        scratch.append(Buffer((m, left), INDEX_DTYPE))
    width = max(2 * kept, power_of_two(left))
    choosing: Arguments = {
        "parts": Operand("scratch", len(scratch) - 1),
        "values": Operand("out", 0),
        "indices": Operand("out", 1),
        "N": n,
        "TOP": sizes["top"],
        "CANDIDATES": left,
        **_exponents(width, kept),
    }
    launches.append(Launch(lm_head_best_kernel, (m, 1, 1), choosing, _warps(width), 1))
    return KernelPlan(outputs=op.outputs(problem), scratch=tuple(scratch), launches=tuple(launches))


def _tiles(problem: Problem, chosen: LmHeadTopkConfig, sizes: Mapping[str, int]) -> Launch:
    """The launch that computes the logits."""
    from autokernel.kernels.lm_head_topk import lm_head_topk_kernel

    arguments: Arguments = {
        **chosen.arguments(problem, sizes),
        "parts": Operand("scratch", 0),
        "KEPT": min(chosen.block_n, sizes["kept"]),
        "ROW_BITS": _exponent(chosen.block_m(sizes["m"])),
        **_exponents(chosen.block_n, sizes["kept"]),
    }
    grid = (-(-sizes["n"] // chosen.block_n), 1, 1)
    return Launch(lm_head_topk_kernel, grid, arguments, chosen.num_warps, chosen.num_stages)


def _exponents(width: int, kept: int) -> Arguments:
    return {"WIDTH_BITS": _exponent(width), "COUNT_BITS": _exponent(kept)}


def _exponent(power: int) -> int:
    return power.bit_length() - 1


def _warps(width: int) -> int:
    """For a program that looks at so many parts."""
    return min(_MAX_WARPS, max(1, width // _MERGED_BY_A_WARP))
