"""Linear layers that read the same input (q/k/v, gate/up) as one wider product: an opportunity, not a node of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.base import Site
from autokernel.ops.epilogue import apply_gated, find_gated
from autokernel.ops.gemm import scalars_of
from autokernel.ops.matching import consumers_of, identity, is_constant, op_name, producers_of, site_name, tensor_spec
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node


class MergedMm:
    """Two or more `mm`, or `addmm` with a bias each, of one input with constant weights.

    Inputs: `x` of `[M, K]`, the weights of `[K, N_i]`, then one bias of `[N_i]` per weight, or none at all. All but `x` are
    constants. There is one output of `[M, N_i]` per weight. Two `mm` on a GPU that are used as `f(first) * second` alone, as a
    kernel may compute it (an epilogue of `GATED_EPILOGUES`), have that as their only output.
    """

    name = "merged_mm"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        import torch

        num_parts = len(weights_of(problem))
        x, weights, biases = inputs[0], inputs[1 : 1 + num_parts], inputs[1 + num_parts :]
        if biases:
            outputs = tuple([torch.addmm(biases[i], x, weights[i]) for i in range(num_parts)])
        else:
            outputs = tuple([torch.mm(x, weight) for weight in weights])
        return (apply_gated(problem.epilogue[0], *outputs),) if problem.epilogue else outputs

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """As of one product with `n` columns in all; `num_parts` weights, the narrowest with `min_n` columns. `num_epilogue` is
        1 where two products become one output; biases are the parts' own.
        """
        x, columns = problem.inputs[0], [weight.shape[1] for weight in weights_of(problem)]
        return {
            "batch": 1,
            "m": x.shape[0],
            "n": sum(columns),
            "k": x.shape[1],
            "dtype_bytes": DTYPE_BYTES[x.dtype],
            "has_constant_weight": 1,
            "num_parts": len(columns),
            "min_n": min(columns),
            "num_epilogue": len(problem.epilogue),
        }

    def flops(self, problem: Problem) -> int:
        """Of all the products together."""
        dims = self.dims(problem)
        return 2 * dims["m"] * dims["n"] * dims["k"]

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once (`x` too: that is what merging gains), every output written once."""
        dims = self.dims(problem)
        columns = dims["min_n"] if problem.epilogue else dims["n"]
        return dims["m"] * columns * dims["dtype_bytes"] + sum(spec.num_bytes for spec in problem.inputs)

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """Groups of at least two, each with all products of its input (see `Op.find`)."""
        groups: dict[tuple[object, ...], list[Node]] = {}
        for node in graph.nodes:
            if _can_merge(node, constants):
                groups.setdefault((op_name(node), *identity(_split(node)[0])), []).append(node)
        return [_site(nodes, constants, device) for nodes in groups.values() if len(nodes) > 1]


def weights_of(problem: Problem) -> tuple[TensorSpec, ...]:
    """The weights among the inputs: biases have one dimension."""
    return tuple(spec for spec in problem.inputs[1:] if len(spec.shape) == 2)


def _split(node: Node) -> tuple[Node, Node, list[Node]]:
    """(x, weight, [bias] or []) of an mm or addmm."""
    *bias, x, weight = node.args
    return x, weight, bias  # type: ignore[return-value]


def _can_merge(node: Node, constants: frozenset[str]) -> bool:
    if op_name(node) not in ("aten.mm", "aten.addmm") or scalars_of(node):
        return False
    x, weight, bias = _split(node)
    specs = [tensor_spec(operand) for operand in (node, x, weight, *bias)]
    if None in specs or len({spec.dtype for spec in specs if spec is not None}) != 1:
        return False
    if any(len(operand.meta["val"].shape) != 1 for operand in bias):
        return False
    return not is_constant(x, constants) and all(is_constant(operand, constants) for operand in (weight, *bias))


def _site(nodes: list[Node], constants: frozenset[str], device: str) -> Site:
    parts = [_split(node) for node in nodes]
    x = parts[0][0]
    operands = [x, *(weight for _, weight, _ in parts), *(operand for _, _, bias in parts for operand in bias)]
    specs = [tensor_spec(operand) for operand in operands]
    plain_pair = len(nodes) == 2 and device == "cuda" and not parts[0][2]
    gated = find_gated(nodes[0], nodes[1]) if plain_pair else None
    problem = Problem(
        op="merged_mm",
        inputs=tuple(spec for spec in specs if spec is not None),
        device=device,
        constants=tuple(range(1, len(operands))),
        epilogue=(gated[0],) if gated is not None else (),
    )
    last = nodes if gated is None else [gated[1]]
    return Site(
        problem=problem,
        name=" + ".join(site_name(node) for node in nodes),
        producers=producers_of([x], constants),
        consumers=tuple(dict.fromkeys(name for node in last for name in consumers_of(node))),
        nodes=tuple(node.name for node in nodes),
    )
