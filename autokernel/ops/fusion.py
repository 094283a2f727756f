"""What fusions that are found by their reference have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autokernel.ops.base import Region, Site, sites_of
from autokernel.ops.patterns import Pattern
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph


class PatternFusion:
    """An op whose first spelling is its reference. The rest of an op (`dims`, `flops`, `num_bytes`) is each fusion's own."""

    name: str
    pattern: Pattern

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        return self.pattern.spellings[0](*inputs, **dict(problem.scalars))

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """See `Op.find`."""
        return sites_of(self.match(graph, constants, device), constants)

    def match(self, graph: Graph, constants: frozenset[str], device: str) -> list[Region]:
        """See `FusionOp.match`."""
        return self.pattern.match(graph, device)


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least: 16 bits are widened, float64 stays (the reference is judged in it)."""
    return x.float() if x.dtype.itemsize < 4 else x
