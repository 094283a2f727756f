"""What an op has to say about itself, and one place where it applies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place in a captured graph where an op applies."""

    problem: Problem
    name: str  # the node's name, for people
    producers: tuple[str, ...] = ()  # targets of the nodes that feed its non-constant inputs
    consumers: tuple[str, ...] = ()  # targets of the nodes that use its result


class Op(Protocol):
    """What an op has to say about itself. Ops hold no state."""

    name: str

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The op in plain torch, in the dtype of the inputs, epilogue included; one output per result.

        `inputs` follow `problem.inputs`. An epilogue with an operand of its own ("add", "mul") takes it from the inputs
        behind the op's own, in order.
        """
        ...

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """The names that constraints of search spaces may use: `batch`, `m`, `n`, `k`, `dtype_bytes`, ..."""
        ...

    def flops(self, problem: Problem) -> int:
        """Floating-point operations of one call."""
        ...

    def num_bytes(self, problem: Problem) -> int:
        """Least traffic of one call: every input read once, every output written once."""
        ...

    def find(self, graph: torch.fx.Graph, constants: frozenset[str], device: str) -> list[Site]:
        """Sites in a post-grad ATen graph.

        Args:
            graph: nodes carry `meta["val"]` (a fake tensor).
            constants: names of placeholder nodes that are parameters or buffers.
            device: "cpu" or "cuda".
        """
        ...
