"""A linear layer, the residual behind it, and the norm of their sum: what ends each half of a transformer's layer.

A kernel that makes the product has every sum of a row in its registers: squared there, the norm needs no pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.base import Region, Site, sites_of
from autokernel.ops.fusion import PatternFusion, wide
from autokernel.ops.matching import op_name
from autokernel.ops.patterns import Pattern
from autokernel.ops.rms_norm import LATE, Norm, example, norm_patterns
from autokernel.ops.spelling import Spelling
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph

_PRODUCTS = frozenset({"aten.mm", "aten.addmm"})
_NORM = "aten.rsqrt"
_NAME = "linear_rms_norm"


def _around(norm: Norm, residual: bool, joined: bool) -> Spelling:
    """One way to write it: a function of x, the matrix, the norm's weight, and what is added if there is any.

    Args:
        norm: how the norm is spelled.
        residual: whether something is added.
        joined: whether it is part of the product (`addmm`).
    """
    has_residual = residual

    def linear_rms_norm(
        x: torch.Tensor,
        w: torch.Tensor,
        weight: torch.Tensor,
        *added: torch.Tensor,
        eps: float,
        residual: bool,
        rounded: str = "early",
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, ...]:
        import torch

        shape = (*x.shape[:-1], w.shape[-1])
        if weight.shape != w.shape[1:] or (has_residual and added[0].shape != shape):
            raise ValueError(f"the residual has the shape of the product, {list(shape)}, and the norm's weight its columns")
        rows = x.reshape(-1, x.shape[-1])
        if joined:
            total = torch.addmm(added[0], rows, w)
        else:
            total = torch.mm(rows, w).reshape(shape)
            total = total + added[0] if has_residual else total
        return total, norm(total, weight, eps)

    return linear_rms_norm


def _patterns(residual: bool, joined: bool, rows: tuple[int, ...]) -> tuple[Pattern, ...]:
    shapes = ((*rows, 8), (8, 16), (16,), *[(*rows, 16)] * residual)
    return norm_patterns(
        _NAME,
        lambda norm: _around(norm, residual, joined),
        lambda dtype: example(dtype, *shapes),
        fixed=(("residual", residual),),
    )


def norm_of_squares(
    total: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor, *, eps: float, rounded: str = "early", offset: float = 0.0
) -> torch.Tensor:
    """The norm of rows whose squares are summed already, in parts.

    Written for Inductor: filled up with zeros, the parts are a reduction of as many columns as the row has, and all of it is
    one kernel, which reads the row once.

    Args:
        total: [rows, cols], rounded: what is scaled.
        squares: fp32 [rows, parts], with parts <= cols; their sums may be of the values before rounding.
        weight: [cols].
        eps: added to the mean of the squares.
        rounded, offset: as of `rms_norm`.
    """
    import torch

    cols, parts = total.shape[1], squares.shape[1]
    sums = torch.nn.functional.pad(squares, (0, cols - parts)).sum(-1, keepdim=True)
    normed = wide(total) * torch.rsqrt(sums / cols + eps)
    gain = wide(weight) + offset if offset else weight
    return (normed * gain).to(total.dtype) if (("rounded", rounded),) == LATE else normed.to(total.dtype) * gain


def as_matrix(spec: TensorSpec) -> TensorSpec:
    """`x.reshape(-1, cols)`: the same memory, or a copy where rows do not follow each other at one distance."""
    shape, step = (math.prod(spec.shape[:-1]), spec.shape[-1]), spec.row_step
    if step is None:
        return TensorSpec.contiguous(shape, spec.dtype)
    return TensorSpec(shape=shape, dtype=spec.dtype, stride=(step, spec.stride[-1]))


class LinearRmsNorm(PatternFusion):
    """x @ w [+ residual], and its root-mean-square norm.

    Inputs: x `[..., k]`, the right matrix w `[k, n]`, the norm's weight `[n]`, and the residual `[..., n]` if there is one.
    Outputs: the sum, rounded to the inputs' dtype, and its norm. Scalars: `residual`, and those of `rms_norm`.

    The reference squares the rounded sums. A kernel may square them before they are rounded, which is more exact; what it
    scales has to be the rounded sum, for that is what others see.
    """

    name = _NAME
    # The largest regions first; of two dimensions, Inductor makes the residual a part of the product.
    patterns = (
        *_patterns(residual=True, joined=False, rows=(2, 3)),
        *_patterns(residual=True, joined=True, rows=(6,)),
        *_patterns(residual=False, joined=False, rows=(2, 3)),
    )

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """See `Op.find`. None on a CPU, which has no kernel for it."""
        return sites_of(self.match(graph, constants, device), constants) if device == "cuda" else []

    def match(self, graph: Graph, constants: frozenset[str], device: str) -> list[Region]:
        """See `FusionOp.match`. Only a graph with a product and a norm is looked at."""
        names = {op_name(node) for node in graph.nodes}
        if _NORM not in names or names.isdisjoint(_PRODUCTS):
            return []
        return super().match(graph, constants, device)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`m` rows, `k`, `n`, `dtype_bytes`, `has_residual`."""
        x, w = problem.inputs[:2]
        return {
            "m": math.prod(x.shape[:-1]),
            "k": x.shape[-1],
            "n": w.shape[-1],
            "dtype_bytes": DTYPE_BYTES[x.dtype],
            "has_residual": int(bool(dict(problem.scalars)["residual"])),
        }

    def flops(self, problem: Problem) -> int:
        """Of the product; what is done once an element of the result is not counted."""
        dims = self.dims(problem)
        return 2 * dims["m"] * dims["n"] * dims["k"]

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, both outputs written once."""
        dims = self.dims(problem)
        return sum(spec.num_bytes for spec in problem.inputs) + 2 * dims["m"] * dims["n"] * dims["dtype_bytes"]
