"""The LM head with greedy sampling: the index of each row's largest logit, without the logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import PatternFusion
from autokernel.ops.patterns import Pattern
from autokernel.ops.spelling import Spelling
from autokernel.records import DTYPE_BYTES, ConfigValue, Problem, TensorSpec

if TYPE_CHECKING:
    import torch

INDEX_DTYPE = "int64"
ALL, LAST = "all", "last"  # positions whose tokens are chosen
Choice = Callable[["torch.Tensor", bool], "torch.Tensor"]


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


def by_argmax(logits: torch.Tensor, keepdim: bool) -> torch.Tensor:
    """The usual spelling."""
    return logits.argmax(-1, keepdim)


def by_max(logits: torch.Tensor, keepdim: bool) -> torch.Tensor:
    """The same, where nobody asks for the values."""
    return logits.max(-1, keepdim)[1]


def _chosen(choice: Choice) -> Spelling:
    def lm_head_argmax(
        x: torch.Tensor, weight: torch.Tensor, *, keepdim: bool, position: str = ALL
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        return (choice(logits_of(x, weight, position), keepdim),)

    return lm_head_argmax


_SPELLINGS = (_chosen(by_argmax), _chosen(by_max))


def _inputs(dtype: str) -> tuple[TensorSpec, ...]:
    return TensorSpec.contiguous((2, 3, 8), dtype), TensorSpec.contiguous((16, 8), dtype)


def _pattern(keepdim: bool, position: str) -> Pattern:
    fixed: tuple[tuple[str, ConfigValue], ...] = (("keepdim", keepdim),)
    if position != ALL:
        fixed += (("position", position),)
    return Pattern(op="lm_head_argmax", spellings=_SPELLINGS, inputs=_inputs, fixed=fixed)


class LmHeadArgmax(PatternFusion):
    """argmax(x @ weight^T, -1), int64, where nobody else uses the logits. Of equal logits torch may take any on a GPU.

    Models round logits to their dtype, which makes some equal; a kernel may leave that out. So an index is judged by the exact
    logit that it has (`scores`), and not by being eager's.

    Inputs: x `[..., K]`, and nn.Linear's weight `[V, K]`. Scalars: `keepdim`; `position: last` where x is `[B, T, K]` and one
    token is chosen for each of B sequences, from its last position.
    """

    name = "lm_head_argmax"
    patterns = tuple(itertools.starmap(_pattern, itertools.product((False, True), (ALL, LAST))))

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

    def num_bytes(self, problem: Problem) -> int:
        """The weight and the rows that count read once, the indices written once."""
        dims = self.dims(problem)
        read = dims["m"] * dims["k"] * dims["dtype_bytes"] + problem.inputs[1].num_bytes
        return read + dims["m"] * DTYPE_BYTES[INDEX_DTYPE]


def position_of(problem: Problem) -> str:
    """Which positions count, `ALL` or `LAST`."""
    return str(dict(problem.scalars).get("position", ALL))
