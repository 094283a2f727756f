"""Gated activations, where no product has them as its epilogue: SwiGLU and GeGLU between two linear layers and a third."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autokernel.ops.fusion import PatternFusion, wide
from autokernel.ops.patterns import Pattern
from autokernel.ops.spelling import Spelling
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch

Activation = Callable[["torch.Tensor"], "torch.Tensor"]


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), as Inductor decomposes it."""
    import torch

    return x / (torch.exp(-x) + 1)


def silu_by_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """The same."""
    import torch

    return x * torch.sigmoid(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x times the normal distribution, with the exact error function."""
    import torch

    return (x * 0.5) * (torch.erf(x * math.sqrt(0.5)) + 1)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Its approximation."""
    import torch

    inner = (x + (x * x * x) * 0.044715) * math.sqrt(2 / math.pi)
    return (x * 0.5) * (torch.tanh(inner) + 1)


ACTIVATIONS: Mapping[str, tuple[Activation, ...]] = {
    "silu": (silu, silu_by_sigmoid), "gelu": (gelu,), "gelu_tanh": (gelu_tanh,),
}  # fmt: skip


def _gated_by(function: Activation) -> Spelling:
    def gated(a: torch.Tensor, b: torch.Tensor, *, activation: str) -> tuple[torch.Tensor, ...]:
        return (function(wide(a)).to(a.dtype) * b,)

    return gated


def _inputs(dtype: str) -> tuple[TensorSpec, ...]:
    return TensorSpec.contiguous((2, 8), dtype), TensorSpec.contiguous((2, 8), dtype)


class Gated(PatternFusion):
    """activation(a) * b, computed in float32 and rounded behind the activation and behind the product.

    Inputs: a and b of one shape. Scalars: `activation`, one of `ACTIVATIONS`.
    """

    name = "gated"
    patterns = tuple(
        Pattern(op="gated", spellings=tuple(map(_gated_by, functions)), inputs=_inputs, fixed=(("activation", name),))
        for name, functions in ACTIVATIONS.items()
    )

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`rows`, `cols`, `dtype_bytes`, and `silu` and `gelu_tanh`: 1 where that is the activation."""
        *rows, cols = problem.inputs[0].shape
        activation = dict(problem.scalars)["activation"]
        kinds = {name: int(activation == name) for name in ("silu", "gelu_tanh")}
        return {"rows": math.prod(rows), "cols": cols, "dtype_bytes": DTYPE_BYTES[problem.inputs[0].dtype], **kinds}

    def flops(self, problem: Problem) -> int:
        """About ten for each element."""
        return 10 * problem.inputs[0].num_elements

    def num_bytes(self, problem: Problem) -> int:
        """Both inputs read once, the result written once."""
        a, b = problem.inputs
        return a.num_bytes + b.num_bytes + a.num_elements * DTYPE_BYTES[a.dtype]
