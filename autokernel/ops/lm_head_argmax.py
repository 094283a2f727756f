"""The LM head with greedy sampling: the index of each row's largest logit, without the logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from autokernel.ops.lm_head import ALL, INDEX_DTYPE, LAST, LmHead, fixed_scalars, logits_of
from autokernel.ops.patterns import Pattern
from autokernel.ops.spelling import Spelling
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch

Choice = Callable[["torch.Tensor", bool], "torch.Tensor"]


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
    fixed = fixed_scalars("keepdim", keepdim, position)
    return Pattern(op="lm_head_argmax", spellings=_SPELLINGS, inputs=_inputs, fixed=fixed)


class LmHeadArgmax(LmHead):
    """argmax(x @ weight^T, -1), int64, where nobody else uses the logits. Of equal logits torch may take any on a GPU.

    Scalars: `keepdim`; `position: last` where x is `[B, T, K]` and one token is chosen for each of B sequences, from its last
    position.
    """

    name = "lm_head_argmax"
    patterns = tuple(itertools.starmap(_pattern, itertools.product((False, True), (ALL, LAST))))

    def num_bytes(self, problem: Problem) -> int:
        """What is read, and the indices written once."""
        return self.read_bytes(problem) + self.dims(problem)["m"] * DTYPE_BYTES[INDEX_DTYPE]
