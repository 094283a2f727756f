"""What fusions of the LM head have in common: the logits that they choose among, and what a call costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import PatternFusion
from autokernel.records import DTYPE_BYTES, ConfigValue, Problem

if TYPE_CHECKING:
    import torch

INDEX_DTYPE = "int64"
ALL, LAST = "all", "last"  # positions whose tokens are chosen


def logits_of(x: torch.Tensor, weight: torch.Tensor, position: str) -> torch.Tensor:
    """As nn.Linear makes them; of all positions, or of the last one alone.

    Args:
        x: `[..., K]`; `[B, T, K]` where the last position counts.
        weight: `[V, K]`.
        position: `ALL` or `LAST`.

    Returns:
        `[..., V]`, or `[B, V]`.
    """
    import torch

    logits = torch.mm(x.reshape(-1, x.shape[-1]), weight.permute(1, 0)).view(*x.shape[:-1], weight.shape[0])
    return logits.select(1, -1) if position == LAST else logits


def fixed_scalars(name: str, value: bool, position: str) -> tuple[tuple[str, ConfigValue], ...]:
    """What tells a pattern from the others of its op: a flag, and the position unless all count."""
    return ((name, value), *((("position", position),) if position != ALL else ()))


def position_of(problem: Problem) -> str:
    """Which positions count, `ALL` or `LAST`."""
    return str(dict(problem.scalars).get("position", ALL))


class LmHead(PatternFusion):
    """x @ weight^T, of which only choices are left. Inputs: x `[..., K]`, and nn.Linear's weight `[V, K]`.

    Models round logits to their dtype, which makes some equal; a kernel may leave that out. So an index is judged by the exact
    logit that it has (`scores`), and not by being eager's.
    """

    def scores(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `ChoosingOp.scores`: the logits."""
        return (logits_of(inputs[0], inputs[1], position_of(problem)),)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`m` (tokens that are chosen), `n` (the vocabulary), `k`, `dtype_bytes`."""
        x, weight = problem.inputs
        rows = x.shape[:1] if position_of(problem) == LAST else x.shape[:-1]
        return {"m": math.prod(rows), "n": weight.shape[0], "k": weight.shape[1], "dtype_bytes": DTYPE_BYTES[x.dtype]}

    def flops(self, problem: Problem) -> int:
        """Two for each product."""
        dims = self.dims(problem)
        return 2 * dims["m"] * dims["n"] * dims["k"]

    def read_bytes(self, problem: Problem) -> int:
        """The weight and the rows that count, once."""
        dims = self.dims(problem)
        return dims["m"] * dims["k"] * dims["dtype_bytes"] + problem.inputs[1].num_bytes
