"""Two linear layers with an activation between them, and the residual behind them: the feed-forward part of a transformer.

Without a library call between the layers the hidden values never leave the chip. They must have no other user.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autokernel.ops.base import Region, Site, sites_of
from autokernel.ops.fusion import PatternFusion, wide
from autokernel.ops.gated import ACTIVATIONS as GATES
from autokernel.ops.gated import Activation
from autokernel.ops.matching import op_name
from autokernel.ops.patterns import Pattern
from autokernel.ops.spelling import Spelling
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph


def relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)."""
    import torch

    return torch.relu(x)


ACTIVATIONS: Mapping[str, tuple[Activation, ...]] = {"relu": (relu,), **GATES}
# What a graph has if it has the activation, any of them: where there is none, its patterns need no trace.
_MARKS: Mapping[str, frozenset[str]] = {
    "relu": frozenset({"aten.relu"}),
    "silu": frozenset({"aten.exp", "aten.sigmoid"}),
    "gelu": frozenset({"aten.erf"}),
    "gelu_tanh": frozenset({"aten.tanh"}),
}
_PRODUCTS = frozenset({"aten.mm", "aten.addmm"})
# Whether the first and the second layer have one; the most first: a sum is seen as a product as well.
BIASES: Mapping[str, tuple[bool, bool]] = {
    "both": (True, True), "second": (False, True), "first": (True, False), "none": (False, False),
}  # fmt: skip


def _spelling(function: Activation, bias: str, residual: bool, joined_in: bool, joined_out: bool) -> Spelling:
    """One way to write an MLP: a function of x, the weights and what else there is, in the order of the problem's inputs.

    Args:
        function: the activation.
        bias, residual: what there is; see `Mlp`.
        joined_in, joined_out: whether what a layer adds is part of its product (`addmm`).
    """
    (has_in, has_out), has_residual, widens = BIASES[bias], residual, function is not relu

    def mlp(*inputs: torch.Tensor, activation: str, bias: str, residual: bool) -> tuple[torch.Tensor, ...]:
        rest = list(inputs)
        x, w_in, b_in = rest.pop(0), rest.pop(0), rest.pop(0) if has_in else None
        w_out, b_out = rest.pop(0), rest.pop(0) if has_out else None
        inner = _linear(x.reshape(-1, x.shape[-1]), w_in, b_in, joined_in)
        hidden = inner.reshape(*x.shape[:-1], inner.shape[-1])
        active = function(wide(hidden) if widens else hidden).to(x.dtype).reshape(inner.shape)
        if not has_residual:
            return (_linear(active, w_out, b_out, joined_out),)
        (added,) = rest
        shape = (*x.shape[:-1], w_out.shape[-1])
        if added.shape != shape:
            raise ValueError(f"the residual has the shape of the result, {list(shape)}; its own is {list(added.shape)}")
        if joined_out and not has_out:
            import torch

            return (torch.addmm(added, active, w_out),)
        return (_linear(active, w_out, b_out, joined_out).reshape(shape) + added,)

    return mlp


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, joined: bool) -> torch.Tensor:
    import torch

    if bias is None:
        return torch.mm(x, weight)
    if bias.shape != weight.shape[1:]:
        raise ValueError(f"a bias has one number a column, {weight.shape[1]}; its shape is {list(bias.shape)}")
    return torch.addmm(bias, x, weight) if joined else torch.mm(x, weight) + bias


def _inputs(bias: str, residual: bool, dtype: str, rows: tuple[int, ...] = (2, 3)) -> tuple[TensorSpec, ...]:
    shapes = ((*rows, 8), (8, 16), (16,), (16, 24), (24,), (*rows, 24))
    has_in, has_out = BIASES[bias]
    there = (True, True, has_in, True, has_out, residual)
    return tuple(TensorSpec.contiguous(shape, dtype) for shape, given in zip(shapes, there, strict=True) if given)


def _pattern(activation: str, bias: str, residual: bool) -> Pattern:
    has_in, has_out = BIASES[bias]
    return Pattern(
        op="mlp",
        spellings=tuple(
            _spelling(function, bias, residual, joined_in, joined_out)
            for function in ACTIVATIONS[activation]
            for joined_in in ((True, False) if has_in else (False,))
            for joined_out in ((True, False) if has_out else (False,))
        ),
        inputs=lambda dtype: _inputs(bias, residual, dtype),
        fixed=(("activation", activation), ("bias", bias), ("residual", residual)),
    )


def _joined_residual(activation: str, bias: str) -> Pattern:
    """Of two dimensions and without a second bias: Inductor makes a product and what is added to it one `addmm`."""
    return Pattern(
        op="mlp",
        spellings=tuple(
            _spelling(function, bias, True, joined_in, True)
            for function in ACTIVATIONS[activation]
            for joined_in in ((True, False) if BIASES[bias][0] else (False,))
        ),
        inputs=lambda dtype: _inputs(bias, True, dtype, rows=(6,)),
        fixed=(("activation", activation), ("bias", bias), ("residual", True)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpInputs:
    """A problem's inputs by what they are. Weights are right matrices: [k, hidden] and [hidden, n]."""

    x: TensorSpec
    w_in: TensorSpec
    w_out: TensorSpec
    positions: Mapping[str, int]  # of x, w_in, b_in, w_out, b_out, residual; without those that there are not


def inputs_of(problem: Problem) -> MlpInputs:
    """What a problem's inputs are."""
    scalars = dict(problem.scalars)
    has_in, has_out = BIASES[str(scalars["bias"])]
    named = (
        ("x", True), ("w_in", True), ("b_in", has_in), ("w_out", True), ("b_out", has_out), ("residual", scalars["residual"]),
    )  # fmt: skip
    names = [name for name, there in named if there]
    positions = {name: i for i, name in enumerate(names)}
    x, w_in, w_out = (problem.inputs[positions[name]] for name in ("x", "w_in", "w_out"))
    return MlpInputs(x=x, w_in=w_in, w_out=w_out, positions=positions)


class Mlp(PatternFusion):
    """linear -> activation -> linear [-> + residual]; every step is rounded to the inputs' dtype.

    Inputs: x `[..., k]`, the first weight `[k, hidden]`, its bias `[hidden]` if there is one, the second weight
    `[hidden, n]`, its bias `[n]` if there is one, the residual `[..., n]` if there is one. The result is `[rows, n]`, or
    has the residual's shape. Scalars: `activation`, one of `ACTIVATIONS`; `bias`, one of `BIASES`; `residual`.
    """

    name = "mlp"
    # The first one of its scalars has the reference; the largest regions come first.
    patterns = tuple(
        pattern
        for activation in ACTIVATIONS
        for pattern in (
            *(_pattern(activation, bias, True) for bias in BIASES),
            *(_joined_residual(activation, bias) for bias in ("first", "none")),
            *(_pattern(activation, bias, False) for bias in BIASES),
        )
    )

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """See `Op.find`. None on a CPU, which has no kernel for it."""
        return sites_of(self.match(graph, constants, device), constants) if device == "cuda" else []

    def match(self, graph: Graph, constants: frozenset[str], device: str) -> list[Region]:
        """See `FusionOp.match`. Only patterns whose activation is in the graph are looked for."""
        names = [op_name(node) for node in graph.nodes]
        if sum(name in _PRODUCTS for name in names) < 2:
            return []
        there = {name for name, marks in _MARKS.items() if not marks.isdisjoint(names)}
        regions: list[Region] = []
        for pattern in self.patterns:
            if dict(pattern.fixed)["activation"] not in there:
                continue
            taken = frozenset().union(*(region.inner for region in regions))
            regions += [region for region in pattern.match(graph, device) if not region.inner & taken]
        return regions

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`m` rows, `k` of the first product, `hidden`, `n` of the second one, `dtype_bytes`, `has_residual`."""
        found = inputs_of(problem)
        return {
            "m": math.prod(found.x.shape[:-1]),
            "k": found.x.shape[-1],
            "hidden": found.w_in.shape[1],
            "n": found.w_out.shape[1],
            "dtype_bytes": DTYPE_BYTES[found.x.dtype],
            "has_residual": int("residual" in found.positions),
        }

    def flops(self, problem: Problem) -> int:
        """Of both products; the activation and what is added are not counted."""
        dims = self.dims(problem)
        return 2 * dims["m"] * dims["hidden"] * (dims["k"] + dims["n"])

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, the result written once; the hidden values never."""
        dims = self.dims(problem)
        return sum(spec.num_bytes for spec in problem.inputs) + dims["m"] * dims["n"] * dims["dtype_bytes"]
