"""What the kernel for the LM head with greedy sampling is launched with: its parameters, and the launches. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from autokernel.kernels.launch import Buffer, KernelPlan, Launch, Operand
from autokernel.kernels.lm_head_config import HeadTile, inputs_problem
from autokernel.kernels.parameters import power_of_two
from autokernel.ops.lm_head import INDEX_DTYPE
from autokernel.ops.lm_head_argmax import LmHeadArgmax
from autokernel.records import ConfigValue, Problem

Join = Literal["last", "launch"]
JOINS: tuple[Join, ...] = get_args(Join)
_JOINED = 1024  # parts that are looked at together
_JOIN_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHeadConfig(HeadTile):
    """Parameters of `lm_head_argmax`.

    Attributes:
        join: who looks for the largest of all tiles: the "last" program to arrive, or a "launch" of its own, one program a row.
    """

    join: Join = "last"

    def problem(self, op: str, m: int, n: int, k: int) -> str | None:
        """The rule that a problem breaks, None if the kernel takes it."""
        if self.join not in JOINS:
            return f"join is one of {', '.join(JOINS)}; it is {self.join}"
        return self.tile_problem(op, m, n, k)


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
    m, n = sizes["m"], sizes["n"]
    wrong = inputs_problem(problem) or chosen.problem(op.name, m, n, sizes["k"])
    if wrong:
        raise ValueError(wrong)
    tiles, alone = -(-n // chosen.block_n), chosen.join == "launch"
    parts, y = Operand("scratch", 0), Operand("out", 0)
    width = min(_JOINED, power_of_two(tiles))
    arguments: dict[str, Operand | int | float | bool] = {
        **chosen.arguments(problem, sizes),
        "parts": parts,
        "counter": parts if alone else Operand("scratch", 1),  # stand-ins where nobody joins
        "y": parts if alone else y,
        "JOIN": not alone,
        "ROWS": min(power_of_two(m), max(1, 2 * _JOINED // width)),
        "WIDTH": width,
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
