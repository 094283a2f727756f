"""What an op has to say about itself, and one place where it applies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from autokernel.ops.matching import consumers_of, is_constant, producers_of, site_name
from autokernel.records import Problem, TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place in a captured graph where an op applies."""

    problem: Problem
    name: str  # the node's name, for people
    producers: tuple[str, ...] = ()  # targets of the nodes that feed its non-constant inputs
    consumers: tuple[str, ...] = ()  # targets of the nodes that use its result
    nodes: tuple[str, ...] = ()  # names of the nodes that an entry takes the place of


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Nodes of a captured graph that one call can stand for.

    `problem` does not say which inputs are constants: production does not know. What is `inner` serves nothing but the
    outputs, which are among it; a node that others use as well stays, and is computed twice.
    """

    problem: Problem
    inputs: tuple[torch.fx.Node, ...]  # in the order of the problem's
    outputs: tuple[torch.fx.Node, ...]  # in the order of the reference's results
    inner: frozenset[torch.fx.Node]
    name_of: torch.fx.Node  # whose module names the site


def sites_of(regions: Iterable[Region], constants: frozenset[str]) -> list[Site]:
    """What a profile says about regions; their problems say which inputs are constants."""
    return [
        Site(
            problem=replace(
                region.problem, constants=tuple(i for i, node in enumerate(region.inputs) if is_constant(node, constants))
            ),
            name=site_name(region.name_of),
            producers=producers_of(list(region.inputs), constants),
            consumers=tuple(dict.fromkeys(name for node in region.outputs for name in consumers_of(node))),
            nodes=tuple(sorted(node.name for node in region.inner)),
        )
        for region in regions
    ]


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


@runtime_checkable
class FusionOp(Op, Protocol):
    """An op that stands for several nodes of a graph, or for one that can be written in other ways.

    What a bundle has for its problem takes the place of the region, wherever a graph has one (`export/regions.py`).
    """

    def match(self, graph: torch.fx.Graph, constants: frozenset[str], device: str) -> list[Region]:
        """The regions of a post-grad ATen graph, in its order. Arguments as of `find`; without overlap."""
        ...


@runtime_checkable
class ChoosingOp(Op, Protocol):
    """An op whose last outputs are indices of what is largest; earlier ones are judged as any output.

    Exact indices would be asked too much: where two values are closer than rounding, a right kernel may take the other one.
    """

    def scores(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each of the indices is chosen from: the choices as the last dimension, in rows. Inputs as of `reference`.

        An output has one index for each row, or several, the largest first. An index is judged by the exact score that it has
        (`evaluate/budget.py`).
        """
        ...


@runtime_checkable
class LaunchingOp(Op, Protocol):
    """An op whose stock code begins with a kernel of Inductor's, in front of the library's calls."""

    def launched(self, problem: Problem) -> Problem:
        """What that kernel computes. Where x comes from another such kernel, Inductor makes one of the two."""
        ...


@runtime_checkable
class MixedOp(Op, Protocol):
    """An op whose inputs do not say by themselves what dtype it computes in."""

    def compute_dtype(self, problem: Problem) -> str:
        """The dtype that a problem's operations are held against the peak of."""
        ...


def compute_dtype(op: Op, problem: Problem) -> str:
    """The dtype that a problem's operations are computed in: what its op says, or else that of the first floating input.

    Without a floating input it is that of the first one.
    """
    if isinstance(op, MixedOp):
        return op.compute_dtype(problem)
    return (floating(problem.inputs) or problem.inputs)[0].dtype


def floating(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Those of floating point."""
    return [spec for spec in specs if spec.dtype.startswith(("float", "bfloat"))]
