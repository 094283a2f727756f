"""An RMS norm and all the linear layers that read it: queries, keys and values; or gate and up.

Two or three products of one left matrix that nobody else reads. Their weights stay where they are: a kernel has tiles of all of
them in one launch, so that nothing is put side by side or copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autokernel.ops.base import Region, Site, sites_of
from autokernel.ops.gemm import scalars_of
from autokernel.ops.matching import is_reshape, op_name, settled, tensor_spec
from autokernel.ops.patterns import Order, Writes, can_be_one, writes_in
from autokernel.ops.rms_norm import RmsNorm, norm_of
from autokernel.ops.rms_norm_linear import NormedProducts, biases_of, few_rows, has_normed_products, weights_of
from autokernel.records import Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node

MAX_PARTS = 3
_BIAS = "bias"


class RmsNormQkv(NormedProducts):
    """rms_norm(x) @ w_i [+ b_i] for two or three i, of at most `MAX_ROWS` rows, where nobody else uses the normed x.

    Inputs: x `[..., k]`, the norm's weight `[k]`, the right matrices `[k, n_i]`, the widest first, and the biases `[n_i]` of
    those that have one. Outputs: `[rows, n_i]` each. Scalars: `bias`, for each product 1 or 0, and those of `rms_norm`.
    """

    name = "rms_norm_qkv"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        import torch

        scalars = dict(problem.scalars)
        normed = norm_of(scalars)(inputs[0], inputs[1], float(scalars["eps"]))
        rows = normed.reshape(-1, normed.shape[-1])
        outputs = []
        for number, bias in enumerate(biases_of(problem)):
            weight = inputs[2 + number]
            outputs.append(torch.mm(rows, weight) if bias is None else torch.addmm(inputs[bias], rows, weight))
        return tuple(outputs)

    def outputs(self, problem: Problem) -> tuple[TensorSpec, ...]:
        """What the reference returns."""
        rows = self.dims(problem)["m"]
        return tuple(TensorSpec.contiguous((rows, w.shape[1]), problem.inputs[0].dtype) for w in weights_of(problem))

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """See `Op.find`. None on a CPU, which has no kernel for it."""
        return sites_of(self.match(graph, constants, device), constants) if device == "cuda" else []

    def match(self, graph: Graph, constants: frozenset[str], device: str) -> list[Region]:
        """See `FusionOp.match`: norms by their patterns, and what reads them."""
        if not has_normed_products(graph):
            return []
        order = {node: position for position, node in enumerate(graph.nodes)}
        writes = writes_in(order)
        norms = [norm for norm in RmsNorm().match(graph, constants, device) if few_rows(norm.problem.inputs[0])]
        found = (_with_products(norm, order, writes) for norm in norms)
        return [region for region in found if region is not None]


def _with_products(norm: Region, order: Order, writes: Writes) -> Region | None:
    """A norm with the products that read it, None if somebody else reads it too, or one call cannot stand for them."""
    (normed,) = norm.outputs
    read = _readers(normed)
    if read is None:
        return None
    products, views = read
    parts = [_split(node) for node in products]
    if not 2 <= len(parts) <= MAX_PARTS or not all(
        _fits(node, normed, *part) for node, part in zip(products, parts, strict=True)
    ):
        return None
    # a graph may have them in any order
    ranked = sorted(range(len(parts)), key=lambda i: (*_rank(*parts[i]), order[products[i]]))
    outputs = tuple(products[i] for i in ranked)
    weights, biases = [parts[i][0] for i in ranked], [parts[i][1] for i in ranked]
    inputs = (*norm.inputs, *weights, *(bias for bias in biases if bias is not None))
    inner = norm.inner | {*views, *products}
    if not can_be_one(inputs, outputs, inner, order, writes):
        return None
    specs = [tensor_spec(node) for node in inputs]
    problem = Problem(
        op=RmsNormQkv.name,
        inputs=tuple(settled(spec) for spec in specs if spec is not None),
        device=norm.problem.device,
        scalars=((_BIAS, "".join(str(int(bias is not None)) for bias in biases)), *norm.problem.scalars),
    )
    return Region(problem=problem, inputs=inputs, outputs=outputs, inner=inner, name_of=min(products, key=order.__getitem__))


def _readers(normed: Node) -> tuple[list[Node], list[Node]] | None:
    """The products whose left matrix is a node, and the reshapes in between; None if there are other users."""
    products: list[Node] = []
    views: list[Node] = []
    left = [normed]
    while left:
        value = left.pop()
        for user in value.users:
            if is_reshape(user):
                views.append(user)
                left.append(user)
            elif op_name(user) in ("aten.mm", "aten.addmm") and user.args[-2] is value:
                products.append(user)
            else:
                return None
    return products, views


def _split(node: Node) -> tuple[Node, Node | None]:
    """(right matrix, bias or None) of an mm or addmm."""
    *bias, _, weight = node.args
    return weight, bias[0] if bias else None  # type: ignore[return-value]


def _fits(node: Node, normed: Node, weight: Node, bias: Node | None) -> bool:
    """Whether a product multiplies whole rows, unscaled, all in one dtype, and adds nothing but a bias."""
    specs = [tensor_spec(value) for value in (node, weight, normed, *([bias] if bias is not None else []))]
    known = [spec for spec in specs if spec is not None]
    if scalars_of(node) or len(known) != len(specs) or len({spec.dtype for spec in known}) != 1:
        return False
    return weight.meta["val"].shape[0] == normed.meta["val"].shape[-1] and all(
        tuple(spec.shape) == tuple(known[1].shape[1:]) for spec in known[3:]
    )


def _rank(weight: Node, bias: Node | None) -> tuple[int, bool, Sequence[int]]:
    """The widest first; whatever the graph's order is, equal problems have one key."""
    spec = tensor_spec(weight)
    assert spec is not None, "as _fits knows"
    return -spec.shape[1], bias is None, spec.stride
