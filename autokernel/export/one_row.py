"""Products of one row as reductions: the graph option `one_row`, and entries with `template: reduction`.

A product of one row reads its weight once, and Inductor writes that as a reduction along K, which it fuses with what comes
behind it (activations, residuals) and with products of the same size beside it. Inductor does so itself only under
`coordinate_descent_tuning`, which times kernels in every new process. This pass needs no timing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass

from autokernel.errors import BundleError
from autokernel.export.bundle import Entry
from autokernel.export.plan import Plan
from autokernel.export.templates import gemm_of_node
from autokernel.records import ConfigValue

aten = torch.ops.aten
prims = torch.ops.prims

OPTION = "one_row"
REDUCTION, ALL = "reduction", "all"
DTYPES = ("bfloat16", "float16", "float32")
TARGETS = (aten.mm.default, aten.addmm.default)
ORIGIN = ("stack_trace", "nn_module_stack", "original_aten", "from_node")  # what names the kernels, and traces them back


class OneRowPass(CustomGraphPass):
    """mm(x, w) -> sum(x.t() * w, 0) for x of one row, on CUDA.

    With "all" it must run before the passes that give products with an entry their kernels, and nothing may merge such
    products (`MergePass`). With "reduction" it must run behind them: what they left is what it takes.
    """

    def __init__(self, plan: Plan, value: ConfigValue) -> None:
        if value not in (REDUCTION, ALL):
            raise BundleError(f"graph option {OPTION}: {value!r} is unknown; write {REDUCTION!r} or {ALL!r}, or leave it out")
        self.plan = plan
        self.value = value

    def uuid(self) -> str:
        return f"autokernel-one-row-1-{self.value}-{self.plan.digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        if not self.plan.active:
            return
        for node in list(graph.nodes):
            if is_one_row(node) and (self.value == ALL or not self._is_merged(node)):
                _reduce(graph, node)

    def _is_merged(self, node: torch.fx.Node) -> bool:
        """Whether an entry made this product of several, for cuBLAS: such entries alone leave a product in the graph."""
        gemm = gemm_of_node(node)
        entry = self.plan.find_or_merged(gemm) if gemm is not None else None
        return entry is not None and entry.backend == "aten" and entry.config.get("merge") == "concat"


class ReductionPass(CustomGraphPass):
    """The same for products that have an entry of this kind, and for no others."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def uuid(self) -> str:
        return f"autokernel-reductions-1-{self.plan.digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        if not self.plan.active:
            return
        for node in list(graph.nodes):
            gemm = gemm_of_node(node) if node.target in TARGETS else None
            entry = self.plan.find(gemm) if gemm is not None else None
            if entry is None or not is_reduction(entry):
                continue
            if is_one_row(node):
                _reduce(graph, node)
                self.plan.hit(entry)
            else:
                self.plan.skip(entry, f"at {node.name} it is scaled, or its matrices are laid out in another way")


def is_reduction(entry: Entry) -> bool:
    """Whether an entry says that its product of one row becomes a reduction."""
    return entry.backend == "inductor" and entry.config.get("template") == REDUCTION


def is_one_row(node: torch.fx.Node) -> bool:
    """Whether a node is a product of one row, unscaled, by a matrix whose K is contiguous, of known sizes on a GPU."""
    if node.target not in TARGETS or any(scale != 1 for scale in node.kwargs.values()):
        return False
    gemm = gemm_of_node(node)
    if gemm is None or gemm.m != 1 or gemm.dtype not in DTYPES:
        return False
    *added, x, w = (argument.meta["val"] for argument in node.args)  # type: ignore[union-attr]
    if w.dtype != x.dtype or w.stride(0) != 1:
        return False  # along rows of a row-major weight, cuBLAS reads as well
    return all(value.dtype == x.dtype and tuple(value.shape) in ((w.shape[1],), (1, w.shape[1])) for value in added)


def realized(x: Any) -> Any:
    """x itself, in Inductor as a buffer. Else what computes x would run again in each program of the reduction."""
    if isinstance(x, ir.TensorBox):
        x.realize()
    return x


realized._inductor_lowering_function = True  # type: ignore[attr-defined]


def _reduce(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Replace the product. It is summed, and the bias added, in float32, and rounded once.

    The weight is converted by no node of its own: one that can be folded would leave a float32 copy of it.
    """
    *added, x, w = node.args
    with graph.inserting_before(node):
        column = _call(graph, node, aten.permute.default, _call(graph, node, realized, x), [1, 0])
        wide = _call(graph, node, prims.convert_element_type.default, column, torch.float32)
        products = _call(graph, node, aten.mul.Tensor, wide, w)
        result = _call(graph, node, aten.sum.dim_IntList, products, [0], True)
        for bias in added:
            result = _call(graph, node, aten.add.Tensor, result, bias)
        result = _call(graph, node, prims.convert_element_type.default, result, node.meta["val"].dtype)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _call(graph: torch.fx.Graph, origin: torch.fx.Node, target: Any, *args: Any) -> torch.fx.Node:
    node = graph.call_function(target, args)
    node.meta.update({key: origin.meta[key] for key in ORIGIN if key in origin.meta})
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
    return node
