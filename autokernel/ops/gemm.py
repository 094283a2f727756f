"""What the plain GEMMs have in common: how they are found in a graph, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.base import Site
from autokernel.ops.epilogue import apply_epilogue, find_epilogue
from autokernel.ops.matching import consumers_of, is_constant, op_name, producers_of, site_name, tensor_spec
from autokernel.records import DTYPE_BYTES, ConfigValue, Problem

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node


class Gemm:
    """An ATen GEMM whose last two operands are the matrices: `[M, K] @ [K, N]`, or both with a batch in front.

    `scalars` of its problems hold `alpha` and `beta` where they are not 1.
    """

    name: str
    num_operands: int  # 2, or 3 with what is added

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`batch`, `m`, `n`, `k`, `dtype_bytes`, and `has_constant_weight` (1 if the right matrix is a constant)."""
        left, right = problem.inputs[self.num_operands - 2 : self.num_operands]
        return {
            "batch": left.shape[0] if len(left.shape) == 3 else 1,
            "m": left.shape[-2],
            "n": right.shape[-1],
            "k": left.shape[-1],
            "dtype_bytes": DTYPE_BYTES[left.dtype],
            "has_constant_weight": int(self.num_operands - 1 in problem.constants),
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
        sites = (self._site(node, order, constants, device) for node in graph.nodes if op_name(node) == f"aten.{self.name}")
        return [site for site in sites if site is not None]

    def _site(self, node: Node, order: Mapping[Node, int], constants: frozenset[str], device: str) -> Site | None:
        operands = list(node.args[: self.num_operands])
        epilogue = find_epilogue(node, order)
        specs = [tensor_spec(operand) for operand in operands]  # type: ignore[arg-type]
        known = [spec for spec in specs if spec is not None]
        if len(known) != len(specs) or tensor_spec(node) is None or not _same_dtype(node):
            return None
        nodes: list[Node] = [*operands, *epilogue.operands]  # type: ignore[list-item]
        problem = Problem(
            op=self.name,
            inputs=(*known, *epilogue.operand_specs),
            device=device,
            constants=tuple(i for i, operand in enumerate(nodes) if is_constant(operand, constants)),
            scalars=scalars_of(node),
            epilogue=epilogue.names,
        )
        return Site(
            problem=problem,
            name=site_name(node),
            producers=producers_of(nodes, constants),
            consumers=consumers_of(epilogue.last),
        )

    def _finish(self, problem: Problem, value: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (apply_epilogue(problem.epilogue, value, inputs[self.num_operands :]),)


def scalars_of(node: Node) -> tuple[tuple[str, ConfigValue], ...]:
    """`alpha` and `beta` of a call where they are not 1."""
    return tuple(
        (key, value)
        for key, value in sorted(node.kwargs.items())
        if key in ("alpha", "beta") and isinstance(value, (int, float)) and value != 1
    )


def factors_of(problem: Problem) -> tuple[float, float]:
    """`alpha` and `beta` of a problem."""
    scalars = dict(problem.scalars)
    return float(scalars.get("alpha", 1)), float(scalars.get("beta", 1))


def _same_dtype(node: Node) -> bool:
    """Whether operands and result share one dtype: `out_dtype` variants are another problem."""
    return len({str(n.meta["val"].dtype) for n in (node, *node.all_input_nodes)}) == 1
