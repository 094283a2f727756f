"""What the plain GEMMs have in common: how they are found in a graph, and what they cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autokernel.ops.base import Site
from autokernel.ops.epilogue import apply_epilogue, find_epilogue
from autokernel.ops.matching import consumers_of, is_constant, op_name, producers_of, site_name, tensor_spec
from autokernel.records import DTYPE_BYTES, ConfigValue, Problem, TensorSpec

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node


class Gemm:
    """An ATen GEMM whose last two operands are the matrices: `[M, K] @ [K, N]`, or both with a batch in front.

    `scalars` of its problems hold `alpha` and `beta` where they are not 1.
    """

    name: str
    num_operands: int  # 2, or 3 with what is added

    @property
    def target(self) -> str:
        """What a graph calls it."""
        return f"aten.{self.name}"

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`batch`, `m`, `n`, `k`, `dtype_bytes`, `has_constant_weight` (1 if the right matrix is a constant), `num_epilogue`.

        The last is how many steps follow the product, what is added by the op itself included.
        """
        left, right = problem.inputs[self.num_operands - 2 : self.num_operands]
        return {
            "batch": left.shape[0] if len(left.shape) == 3 else 1,
            "m": left.shape[-2],
            "n": right.shape[-1],
            "k": left.shape[-1],
            "dtype_bytes": DTYPE_BYTES[left.dtype],
            "has_constant_weight": int(self.num_operands - 1 in problem.constants),
            "num_epilogue": self.num_operands - 2 + len(problem.epilogue),
        }

    def flops(self, problem: Problem) -> int:
        """Of the multiplication; what is added and the epilogue are not counted."""
        dims = self.dims(problem)
        return 2 * dims["batch"] * dims["m"] * dims["n"] * dims["k"]

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, the result written once; what is broadcast counts once."""
        dims = self.dims(problem)
        written = dims["batch"] * dims["m"] * dims["n"] * dims["dtype_bytes"]
        return written + sum(spec.num_bytes for spec in problem.inputs)

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """Sites of this op, each with the longest epilogue that can be fused (see `Op.find`)."""
        order = {node: position for position, node in enumerate(graph.nodes)}
        sites = (
            make_site(self.name, node, node.args[: self.num_operands], scalars_of(node), order, constants, device)  # type: ignore[arg-type]
            for node in graph.nodes
            if op_name(node) == self.target and self._fits(node)
        )
        return [site for site in sites if site is not None]

    def _fits(self, node: Node) -> bool:
        """Whether operands and result have the dtypes of this op."""
        return _same_dtype(node)

    def _finish(self, problem: Problem, value: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (apply_epilogue(problem.epilogue, value, inputs[self.num_operands :]),)


def make_site(
    op: str,
    node: Node,
    operands: Sequence[Node],
    scalars: tuple[tuple[str, ConfigValue], ...],
    order: Mapping[Node, int],
    constants: frozenset[str],
    device: str,
) -> Site | None:
    """The site of a GEMM with the longest epilogue that can be fused; None where sizes are not known.

    Args:
        op: name of the op.
        node: the GEMM.
        operands: its inputs in the order of the problem's.
        scalars: of the problem.
        order: position of every node in the graph.
        constants: names of placeholder nodes that are parameters or buffers.
        device: "cpu" or "cuda".
    """
    epilogue = find_epilogue(node, order)
    log.debug("autokernel: behind %s, %s can be fused: %s", node.name, list(epilogue.names) or "nothing", epilogue.end)
    specs = [tensor_spec(operand) for operand in operands]
    known = [spec for spec in specs if spec is not None]
    if len(known) != len(specs) or tensor_spec(node) is None:
        return None
    nodes = [*operands, *epilogue.operands]
    problem = Problem(
        op=op,
        inputs=(*known, *epilogue.operand_specs),
        device=device,
        constants=tuple(i for i, operand in enumerate(nodes) if is_constant(operand, constants)),
        scalars=scalars,
        epilogue=epilogue.names,
    )
    return Site(
        problem=problem,
        name=site_name(node),
        producers=producers_of(nodes, constants),
        consumers=consumers_of(epilogue.last),
        nodes=(node.name,),
    )


def k_major(left: TensorSpec, right: TensorSpec) -> bool:
    """Whether K is the contiguous dimension of both matrices, [M, K] and [K, N]."""
    return left.stride[1] == 1 and right.stride[0] == 1


def scalars_of(node: Node) -> tuple[tuple[str, ConfigValue], ...]:
    """`alpha` and `beta` of a call where they are not 1."""
    return tuple(
        (key, value)
        for key, value in sorted(node.kwargs.items())
        if key in ("alpha", "beta") and isinstance(value, (int, float)) and value != 1
    )


def factors_of(problem: Problem) -> dict[str, Any]:
    """`alpha` and `beta` of a problem where they are not 1: said at all, they are in the graph, whose patterns then miss."""
    return {name: float(value) for name, value in problem.scalars if name in ("alpha", "beta")}


def _same_dtype(node: Node) -> bool:
    """Whether operands and result share one dtype: `out_dtype` variants are another problem."""
    return len({str(n.meta["val"].dtype) for n in (node, *node.all_input_nodes)}) == 1
