"""The LM head with top-k sampling: each row's largest logits and their indices, without the others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.lm_head import ALL, INDEX_DTYPE, LAST, LmHead, fixed_scalars, logits_of
from autokernel.ops.patterns import WHOLE_MARKS, Pattern
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch


def lm_head_topk(
    x: torch.Tensor, weight: torch.Tensor, *, cast: bool, top: int, position: str = ALL
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    logits = logits_of(x, weight, position)
    values, indices = (logits.float() if cast else logits).topk(top)
    return values, indices


def _inputs(dtype: str) -> tuple[TensorSpec, ...]:
    return TensorSpec.contiguous((2, 3, 8), dtype), TensorSpec.contiguous((2 * WHOLE_MARKS, 8), dtype)


def _pattern(cast: bool, position: str) -> Pattern:
    fixed = fixed_scalars("cast", cast, position)
    return Pattern(
        op="lm_head_topk", spellings=(lm_head_topk,), inputs=_inputs, scalars=("top",), whole=frozenset({"top"}), fixed=fixed
    )


class LmHeadTopk(LmHead):
    """topk(x @ weight^T, top), values and int64 indices, where both are used and nobody else uses the logits.

    Scalars: `top`; `cast`, whether logits become float32 first; `position: last` where x is `[B, T, K]` and tokens are chosen
    for each of B sequences, from its last position.
    """

    name = "lm_head_topk"
    # logits in float32 have no conversion: theirs is the first one
    patterns = tuple(itertools.starmap(_pattern, itertools.product((False, True), (ALL, LAST))))

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """As of `LmHead`, and `top`; `kept` is the least power of two that is not less, and no less than 2."""
        top = top_of(problem)
        return {**super().dims(problem), "top": top, "kept": 1 << max(1, (top - 1).bit_length())}

    def num_bytes(self, problem: Problem) -> int:
        """What is read, and values and indices written once."""
        value = "float32" if dict(problem.scalars)["cast"] else problem.inputs[0].dtype
        written = self.dims(problem)["m"] * top_of(problem) * (DTYPE_BYTES[value] + DTYPE_BYTES[INDEX_DTYPE])
        return self.read_bytes(problem) + written


def top_of(problem: Problem) -> int:
    """How many logits of a row are wanted."""
    return int(dict(problem.scalars)["top"])
