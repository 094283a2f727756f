"""Linear layers that read the same input (q/k/v, gate/up) as one wider product: an opportunity, not a node of the graph.

Layers with a bias (`addmm`) are not merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.base import Site
from autokernel.ops.matching import consumers_of, identity, is_constant, op_name, producers_of, site_name, tensor_spec
from autokernel.records import DTYPE_BYTES, Problem

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node


class MergedMm:
    """Two or more `mm` of one input with constant weights.

    Inputs: `x` of `[M, K]`, then the weights of `[K, N_i]`, which are constants. One output of `[M, N_i]` per weight.
    """

    name = "merged_mm"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        import torch

        return tuple([torch.mm(inputs[0], weight) for weight in inputs[1:]])

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """As of one product with `n` columns in all; `num_parts` weights, the narrowest with `min_n` columns."""
        x, columns = problem.inputs[0], [weight.shape[1] for weight in problem.inputs[1:]]
        return {
            "batch": 1,
            "m": x.shape[0],
            "n": sum(columns),
            "k": x.shape[1],
            "dtype_bytes": DTYPE_BYTES[x.dtype],
            "has_constant_weight": 1,
            "num_parts": len(columns),
            "min_n": min(columns),
        }

    def flops(self, problem: Problem) -> int:
        """Of all the products together."""
        dims = self.dims(problem)
        return 2 * dims["m"] * dims["n"] * dims["k"]

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once (`x` too: that is what merging gains), every output written once."""
        dims = self.dims(problem)
        return dims["m"] * dims["n"] * dims["dtype_bytes"] + sum(spec.num_bytes for spec in problem.inputs)

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """Groups of at least two, each with all products of its input (see `Op.find`)."""
        groups: dict[tuple[object, ...], list[Node]] = {}
        for node in graph.nodes:
            if op_name(node) == "aten.mm" and _can_merge(node, constants):
                groups.setdefault(identity(node.args[0]), []).append(node)
        return [_site(nodes, constants, device) for nodes in groups.values() if len(nodes) > 1]


def _can_merge(node: Node, constants: frozenset[str]) -> bool:
    x, weight = node.args[:2]
    specs = [tensor_spec(operand) for operand in (x, weight, node)]  # type: ignore[arg-type]
    same_dtype = None not in specs and len({spec.dtype for spec in specs if spec is not None}) == 1
    return same_dtype and is_constant(weight, constants) and not is_constant(x, constants)  # type: ignore[arg-type]


def _site(nodes: list[Node], constants: frozenset[str], device: str) -> Site:
    operands = [nodes[0].args[0], *(node.args[1] for node in nodes)]
    specs = [tensor_spec(operand) for operand in operands]  # type: ignore[arg-type]
    problem = Problem(
        op="merged_mm",
        inputs=tuple(spec for spec in specs if spec is not None),
        device=device,
        constants=tuple(range(1, len(operands))),
    )
    return Site(
        problem=problem,
        name=" + ".join(site_name(node) for node in nodes),
        producers=producers_of(operands[:1], constants),  # type: ignore[arg-type]
        consumers=tuple(dict.fromkeys(name for node in nodes for name in consumers_of(node))),
    )
