"""What fusions that are found by their reference have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autokernel.ops.base import Region, Site, sites_of
from autokernel.ops.matching import tensor_spec
from autokernel.ops.patterns import Pattern
from autokernel.ops.spelling import trace
from autokernel.records import Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph


class PatternFusion:
    """An op whose first spelling is its reference. The rest of an op (`dims`, `flops`, `num_bytes`) is each fusion's own.

    Patterns come in order of precedence: where two see the same nodes, the first one has them.
    """

    name: str
    patterns: tuple[Pattern, ...]

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        return pattern_of(self.patterns, problem).spellings[0](*inputs, **dict(problem.scalars))

    def outputs(self, problem: Problem) -> tuple[TensorSpec, ...]:
        """What the reference returns, in the layouts that eager PyTorch gives them."""
        traced = trace(pattern_of(self.patterns, problem).spellings[0], problem.inputs, problem.scalars)
        specs = [spec for spec in map(tensor_spec, traced.outputs) if spec is not None]
        assert len(specs) == len(traced.outputs), "fusions compute dense tensors of known dtypes"
        return tuple(specs)

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """See `Op.find`."""
        return sites_of(self.match(graph, constants, device), constants)

    def match(self, graph: Graph, constants: frozenset[str], device: str) -> list[Region]:
        """See `FusionOp.match`."""
        regions: list[Region] = []
        for pattern in self.patterns:
            taken = frozenset().union(*(region.inner for region in regions))
            regions += [region for region in pattern.match(graph, device) if not region.inner & taken]
        return regions


def pattern_of(patterns: Sequence[Pattern], problem: Problem) -> Pattern:
    """The pattern that a problem was found by.

    Raises:
        ValueError: none of them has such scalars.
    """
    scalars = dict(problem.scalars)
    names = sorted(scalars)  # Dynamo of torch 2.11 traces this function, and compares no views of dictionaries
    for pattern in patterns:
        fixed = dict(pattern.fixed)
        if names == sorted([*fixed, *pattern.scalars]) and all(scalars[name] == value for name, value in pattern.fixed):
            return pattern
    raise ValueError(f"{problem.key}: no pattern of {problem.op} has the scalars {', '.join(scalars) or 'none'}")


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least: 16 bits are widened, float64 stays (the reference is judged in it)."""
    return x.float() if x.dtype.itemsize < 4 else x
