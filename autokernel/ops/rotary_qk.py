"""Queries and keys that are turned by the same tables, each normed before or not: one call for both.

Neither depends on the other, and each is small where a model decodes: most of what they take is the launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.base import Region, Site, sites_of
from autokernel.ops.fusion import pattern_of
from autokernel.ops.matching import identity
from autokernel.ops.norm_rotary import NormRotary
from autokernel.ops.norm_rotary_complex import NormRotaryComplex
from autokernel.ops.patterns import Order, Writes, can_be_one, writes_in
from autokernel.ops.rotary import Rotary
from autokernel.ops.rotary_complex import RotaryComplex
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node

# What is done to each of the two. Those with a norm come first: they have the others in them.
NORM_COMPLEX, NORM, COMPLEX, PLAIN = _ONES = (NormRotaryComplex(), NormRotary(), RotaryComplex(), Rotary())


class RotaryQk:
    """Two of `rotary`, `rotary_complex`, `norm_rotary` or `norm_rotary_complex`.

    Inputs: the first one's x (and weight), the second one's, and the tables of both; of the two the larger x comes first.
    Outputs: the first one's, the second one's. Scalars are those of one.
    """

    name = "rotary_qk"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        spelling = pattern_of(kind_of(problem).patterns, problem).spellings[0]
        each = _num_own(problem)
        first, second, tables = inputs[:each], inputs[each : 2 * each], inputs[2 * each :]
        scalars = dict(problem.scalars)
        return (*spelling(*first, *tables, **scalars), *spelling(*second, *tables, **scalars))

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`rows` (of `head_dim` elements, of both), `head_dim`, `dtype_bytes`."""
        (first, second), head_dim = self._both(problem), problem.inputs[0].shape[-1]
        rows = (first.num_elements + second.num_elements) // head_dim
        return {"rows": rows, "head_dim": head_dim, "dtype_bytes": DTYPE_BYTES[first.dtype]}

    def flops(self, problem: Problem) -> int:
        """The sum of both."""
        return sum(kind_of(problem).flops(part) for part in parts_of(problem))

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, the results written once."""
        written = sum(x.num_elements * DTYPE_BYTES[x.dtype] for x in self._both(problem))
        return written + sum(spec.num_bytes for spec in problem.inputs)

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """See `Op.find`."""
        return sites_of(self.match(graph, constants, device), constants)

    def match(self, graph: Graph, constants: frozenset[str], device: str) -> list[Region]:
        """See `FusionOp.match`."""
        order = {node: position for position, node in enumerate(graph.nodes)}
        writes = writes_in(order)
        taken: set[Node] = set()
        pairs: list[Region] = []
        for kind in _ONES:
            alone = [region for region in kind.match(graph, constants, device) if not region.inner & taken]
            taken.update(*(region.inner for region in alone))
            while alone:
                one = alone.pop(0)
                partners = ((other, _pair(one, other, order, writes)) for other in alone)
                partner, pair = next(((other, pair) for other, pair in partners if pair is not None), (None, None))
                if partner is not None and pair is not None:
                    alone.remove(partner)
                    pairs.append(pair)
        return sorted(pairs, key=lambda region: order[region.name_of])

    def _both(self, problem: Problem) -> tuple[TensorSpec, TensorSpec]:
        return problem.inputs[0], problem.inputs[_num_own(problem)]


def kind_of(problem: Problem) -> Rotary | RotaryComplex:
    """What is done to each of the two."""
    normed, turns = "eps" in [name for name, _ in problem.scalars], problem.inputs[-1].dtype == "complex64"
    return (NORM_COMPLEX if normed else COMPLEX) if turns else (NORM if normed else PLAIN)


def parts_of(problem: Problem) -> tuple[Problem, Problem]:
    """The problems of the two."""
    each, name = _num_own(problem), kind_of(problem).name
    tables = problem.inputs[2 * each :]
    first, second = (
        Problem(op=name, inputs=(*own, *tables), device=problem.device, scalars=problem.scalars)
        for own in (problem.inputs[:each], problem.inputs[each : 2 * each])
    )
    return first, second


def num_tables(problem: Problem) -> int:
    """Of one, or of two: cos and sin, or complex numbers."""
    return 1 if problem.inputs[-1].dtype == "complex64" else 2


def _num_own(problem: Problem) -> int:
    """How many inputs each of the two has for itself."""
    return (len(problem.inputs) - num_tables(problem)) // 2


def _pair(one: Region, other: Region, order: Order, writes: Writes) -> Region | None:
    """Both as one region, None if one call cannot stand for them."""
    a, b = sorted((one, other), key=lambda region: _rank(region, order))
    tables = num_tables(a.problem)
    x, y = a.problem.inputs[0], b.problem.inputs[0]
    if (
        a.problem.scalars != b.problem.scalars
        or (x.dtype, len(x.shape), x.shape[-1]) != (y.dtype, len(y.shape), y.shape[-1])
        or [*map(identity, a.inputs[-tables:])] != [*map(identity, b.inputs[-tables:])]
        or a.inner & b.inner
    ):
        return None
    inputs = (*a.inputs[:-tables], *b.inputs[:-tables], *a.inputs[-tables:])
    outputs, inner = (*a.outputs, *b.outputs), a.inner | b.inner
    if not can_be_one(inputs, outputs, inner, order, writes):
        return None
    problem = Problem(
        op=RotaryQk.name,
        inputs=(*a.problem.inputs[:-tables], *b.problem.inputs[:-tables], *a.problem.inputs[-tables:]),
        device=a.problem.device,
        scalars=a.problem.scalars,
    )
    return Region(problem=problem, inputs=inputs, outputs=outputs, inner=inner, name_of=a.name_of)


def _rank(region: Region, order: Order) -> tuple[int, tuple[int, ...], int]:
    """Larger ones first: a graph may have them in either order."""
    x = region.problem.inputs[0]
    return -x.num_elements, x.stride, order[region.name_of]
