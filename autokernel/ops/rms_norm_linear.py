"""An RMS norm and the linear layer behind it: few rows are normed by whoever multiplies them.

    (x / rms(x) * g) W = (x * g) W / rms(x)     with one rms for a row of x

So a kernel can sum a row's squares on its way through the product: no launch of the norm, and no pass of its own over x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.base import Region, Site, sites_of
from autokernel.ops.fusion import PatternFusion
from autokernel.ops.matching import op_name
from autokernel.ops.patterns import Pattern
from autokernel.ops.rms_norm import Norm, RmsNorm, example, norm_patterns
from autokernel.ops.spelling import Spelling
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph

MAX_ROWS = 128  # with more, each program norms too much again; the library's products are the faster ones there
_NAME = "rms_norm_linear"
_NORM = "aten.rsqrt"
_PRODUCTS = frozenset({"aten.mm", "aten.addmm"})


def _around(norm: Norm, bias: bool, joined: bool) -> Spelling:
    """One way to write it: a function of x, the norm's weight, the matrix, and its bias if there is one.

    Args:
        norm: how the norm is spelled.
        bias: whether there is one.
        joined: whether it is part of the product (`addmm`).
    """

    def rms_norm_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        w: torch.Tensor,
        *added: torch.Tensor,
        eps: float,
        bias: bool,
        rounded: str = "early",
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, ...]:
        import torch

        if weight.shape != x.shape[-1:] or any(b.shape != w.shape[1:] for b in added):
            raise ValueError(f"the norm's weight has one number a column of x, {x.shape[-1]}, and a bias one of each result")
        rows = norm(x, weight, eps).reshape(-1, x.shape[-1])
        if joined:
            return (torch.addmm(added[0], rows, w),)
        return (torch.mm(rows, w) + added[0],) if added else (torch.mm(rows, w),)

    return rms_norm_linear


def _patterns(bias: bool, joined: bool) -> tuple[Pattern, ...]:
    shapes = ((2, 3, 8), (8,), (8, 16), *[(16,)] * bias)
    return norm_patterns(
        _NAME,
        lambda norm: _around(norm, bias, joined),
        lambda dtype: example(dtype, *shapes),
        fixed=(("bias", bias),),
    )


class NormedProducts:
    """What an RMS norm with one linear layer behind it, or several, has to say about itself.

    Inputs: x, the norm's weight, the right matrices `[k, n_i]`, and behind them the biases `[n_i]` that there are.
    """

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`m` rows, `k`, `n` columns of all products, the narrowest with `min_n`; `num_parts` products; `dtype_bytes`."""
        x, columns = problem.inputs[0], [weight.shape[1] for weight in weights_of(problem)]
        return {
            "m": math.prod(x.shape[:-1]),
            "k": x.shape[-1],
            "n": sum(columns),
            "min_n": min(columns),
            "num_parts": len(columns),
            "dtype_bytes": DTYPE_BYTES[x.dtype],
        }

    def flops(self, problem: Problem) -> int:
        """Of the products; what is done once an element of x is not counted."""
        dims = self.dims(problem)
        return 2 * dims["m"] * dims["n"] * dims["k"]

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, the results written once; the normed rows never."""
        dims = self.dims(problem)
        return sum(spec.num_bytes for spec in problem.inputs) + dims["m"] * dims["n"] * dims["dtype_bytes"]

    def launched(self, problem: Problem) -> Problem:
        """See `LaunchingOp.launched`: the norm."""
        scalars = tuple((name, value) for name, value in problem.scalars if name != "bias")
        return Problem(op=RmsNorm.name, inputs=problem.inputs[:2], device=problem.device, scalars=scalars)


class RmsNormLinear(NormedProducts, PatternFusion):
    """rms_norm(x) @ w [+ bias], of at most `MAX_ROWS` rows, where nobody else uses the normed x.

    Inputs: x `[..., k]`, the norm's weight `[k]`, the right matrix w `[k, n]`, and its bias `[n]` if there is one. The result
    is `[rows, n]`. Scalars: `bias`, and those of `rms_norm`.
    """

    name = _NAME
    # The largest regions first: a sum is seen as a product as well.
    patterns = (
        *_patterns(bias=True, joined=True),
        *_patterns(bias=True, joined=False),
        *_patterns(bias=False, joined=False),
    )

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """See `Op.find`. None on a CPU, which has no kernel for it."""
        return sites_of(self.match(graph, constants, device), constants) if device == "cuda" else []

    def match(self, graph: Graph, constants: frozenset[str], device: str) -> list[Region]:
        """See `FusionOp.match`. Only a graph with a norm and a product is looked at."""
        if not has_normed_products(graph):
            return []
        return [region for region in super().match(graph, constants, device) if few_rows(region.problem.inputs[0])]


def has_normed_products(graph: Graph) -> bool:
    """Whether a graph can have any: it has what a norm is known by, and products."""
    names = {op_name(node) for node in graph.nodes}
    return _NORM in names and not names.isdisjoint(_PRODUCTS)


def few_rows(x: TensorSpec) -> bool:
    """Whether there are as many rows as the kernel is for."""
    return 1 <= math.prod(x.shape[:-1]) <= MAX_ROWS


def weights_of(problem: Problem) -> tuple[TensorSpec, ...]:
    """The right matrices among the inputs: behind them are biases, of one dimension."""
    return tuple([spec for spec in problem.inputs[2:] if len(spec.shape) == 2])


def biases_of(problem: Problem) -> tuple[int | None, ...]:
    """For each right matrix the position of its bias among the inputs; None if it has none."""
    said, at = dict(problem.scalars)["bias"], 2 + len(weights_of(problem))
    there = [digit == "1" for digit in said] if isinstance(said, str) else [bool(said)]
    return tuple([at + sum(there[:i]) if has_bias else None for i, has_bias in enumerate(there)])
