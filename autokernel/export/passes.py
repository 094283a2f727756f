"""Graph passes that a plan brings into a compilation: merging GEMMs, and seeing which packed GEMMs are there.

`MergePass` runs on the joint graph, before weights are folded: it concatenates the weights of GEMMs that share an input.
`SitePass` runs on the post-grad graph, where weights are packed: it groups GEMMs for Inductor's grouped template, and
counts the entries whose choice is made by packing alone.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from autokernel.export.bundle import Entry
from autokernel.export.matching import Gemm
from autokernel.export.pins import dtype_name
from autokernel.export.plan import Plan

aten = torch.ops.aten
prims = torch.ops.prims


class MergePass(CustomGraphPass):
    """mm(x, w1), mm(x, w2), ... -> split(mm(x, cat(w1, w2, ...))) where the plan says so.

    GEMMs of fewer than `min_rows` rows are left alone.
    """

    def __init__(self, plan: Plan, min_rows: int = 1) -> None:
        self.plan = plan
        self.min_rows = min_rows

    def uuid(self) -> str:
        return f"autokernel-merge-2-{self.min_rows}-{self.plan.digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        if not self.plan.active:
            return
        for shared, gemms in _gemms_by_input(graph).items():
            left = gemms
            m, k = shared.meta["val"].shape
            if m < self.min_rows:
                continue
            for entry, gemm in self.plan.groups(dtype_name(shared.meta["val"].dtype), int(m), int(k)):
                if entry.config.get("merge") != "concat":
                    continue
                members = pick([node for node in left if _has_bias(node) == gemm.bias], gemm.ns)
                if members is None:
                    continue
                _concatenate(graph, shared, members)
                # otherwise what takes the place of the concatenated GEMM counts
                if entry.config.get("template") is None and entry.backend not in ("triton", "cutedsl"):
                    self.plan.hit(entry)
                left = [gemm for gemm in left if gemm not in set(members)]


def _gemms_by_input(graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    groups: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    constants = _constants(graph)
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, x, w = node.args
        if _static_2d(x) and _static_2d(w) and _is_weight(w, constants) and all(_is_bias(b, node, constants) for b in bias):
            groups.setdefault(_canonical(x), []).append(node)
    return groups


def _constants(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """What stands for a constant: attributes, and the inputs that AOTAutograd made of parameters, which come first.

    Where it does not say how many these are (packages), any input may be a weight.
    """
    context = torch._guards.TracingContext.try_get()
    parameters = context.params_flat if context is not None else None
    inputs = graph.find_nodes(op="placeholder")
    return {*graph.find_nodes(op="get_attr"), *(inputs[: len(parameters)] if parameters else inputs)}


def _has_bias(node: torch.fx.Node) -> bool:
    return node.target is aten.addmm.default


def _is_bias(node: Any, product: torch.fx.Node, constants: Collection[torch.fx.Node]) -> bool:
    """Whether a bias of a product can lie beside others: a constant with an element for each column."""
    return _is_constant(node, constants) and tuple(node.meta["val"].shape) == tuple(product.meta["val"].shape[-1:])


def _is_constant(node: Any, constants: Collection[torch.fx.Node]) -> bool:
    """Whether it is one of the constants, or one in another dtype, as autocast multiplies."""
    while isinstance(node, torch.fx.Node) and node.target in (prims.convert_element_type.default, aten._to_copy.default):
        node = node.args[0]
    return node in constants


def _canonical(x: torch.fx.Node) -> torch.fx.Node:
    """The node that stands for x: several identical views of one tensor count as one input."""
    for other in x.args[0].users if x.args and isinstance(x.args[0], torch.fx.Node) else ():
        if other.target == x.target and other.args == x.args and other.kwargs == x.kwargs:
            return other
    return x


def _static_2d(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 2 and all(isinstance(n, int) for n in value.shape)


def _is_weight(node: torch.fx.Node, constants: Collection[torch.fx.Node]) -> bool:
    """A transposed constant, as `nn.Linear` leaves it: the only form whose rows can be concatenated."""
    return (
        node.op == "call_function"
        and node.target in (aten.permute.default, aten.t.default)
        and _is_constant(node.args[0], constants)
    )


def pick(users: list[torch.fx.Node], ns: tuple[int, ...]) -> list[torch.fx.Node] | None:
    """Users with these Ns, in graph order; None if there are not enough."""
    left, members = list(ns), []
    for user in users:
        n = int(user.meta["val"].shape[-1])
        if n in left:
            left.remove(n)
            members.append(user)
    return members if not left else None


def _concatenate(graph: torch.fx.Graph, shared: torch.fx.Node, members: list[torch.fx.Node]) -> None:
    first = min(members, key=list(graph.nodes).index)
    weights = [user.args[-1].args[0] for user in members]  # type: ignore[union-attr]
    biases = [user.args[0] for user in members if _has_bias(user)]
    sizes = [int(user.meta["val"].shape[1]) for user in members]
    with graph.inserting_before(first):
        stacked = _call(graph, aten.cat.default, weights, 0)
        transposed = _call(graph, aten.permute.default, stacked, [1, 0])
        if biases:
            bias = _call(graph, aten.cat.default, biases, 0)
            product = _call(graph, aten.addmm.default, bias, first.args[1], transposed)
        else:
            product = _call(graph, aten.mm.default, first.args[0], transposed)
        split = _call(graph, aten.split_with_sizes.default, product, sizes, 1)
        parts = [_call(graph, operator.getitem, split, i) for i in range(len(sizes))]
    for user, part in zip(members, parts, strict=True):
        user.replace_all_uses_with(part)
        graph.erase_node(user)


def _call(graph: torch.fx.Graph, target: Any, *args: Any) -> torch.fx.Node:
    node = graph.call_function(target, args)
    values = torch.fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values)
    return node


class SitePass(CustomGraphPass):
    """Carries the plan into Inductor (pins look for it here), groups GEMMs, and counts packed sites."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def uuid(self) -> str:
        return f"autokernel-sites-2-{self.plan.digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        if not self.plan.active:
            return
        _separate_constants(graph)
        self._group(graph)
        for node in graph.nodes:
            gemm = packed_gemm(node)
            entry = self.plan.find(gemm) if gemm is not None else None
            if entry is not None and entry.backend == "aten" and entry.config.get("prepack"):
                self.plan.hit(entry)

    def _group(self, graph: torch.fx.Graph) -> None:
        by_input: dict[torch.fx.Node, list[tuple[torch.fx.Node, Gemm]]] = {}
        for node in graph.nodes:
            gemm = packed_gemm(node)
            if gemm is not None and node.target is torch.ops.mkldnn._linear_pointwise.default:
                by_input.setdefault(node.args[0], []).append((node, gemm))
        for users in by_input.values():
            for entry, merged in self.plan.groups(users[0][1].dtype, users[0][1].m, users[0][1].k):
                if entry.config.get("merge") == "grouped":
                    nodes = [node for node, gemm in users if gemm.bias == merged.bias]
                    self._group_one(graph, nodes, entry, merged.ns)

    def _group_one(self, graph: torch.fx.Graph, users: list[torch.fx.Node], entry: Entry, ns: tuple[int, ...]) -> None:
        from torch._inductor.mkldnn_lowerings import grouped_gemm_lowering

        members = pick(users, ns)
        if members is None:
            return  # other GEMMs of this input
        if len(set(ns)) != 1:
            self.plan.skip(entry, "the grouped template needs GEMMs of equal N on one input")
            return
        if any(node.args[3] != "none" for node in members):
            self.plan.skip(entry, "an activation is already fused into one of the GEMMs")
            return
        first = min(members, key=list(graph.nodes).index)
        with graph.inserting_before(first):
            # the input as it is now: it may have been one of a group that was replaced before
            arguments = (first.args[0], [node.args[1] for node in members], [node.args[2] for node in members])
            grouped = graph.call_function(grouped_gemm_lowering, arguments)
            grouped.meta["val"] = [node.meta["val"] for node in members]
            parts = [graph.call_function(operator.getitem, (grouped, i)) for i in range(len(members))]
        for node, part in zip(members, parts, strict=True):
            part.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def _separate_constants(graph: torch.fx.Graph) -> None:
    """Give constants that are parts of others, as of a fused weight, a storage of their own.

    Inductor's C++ template packs what lies at the beginning of a constant's storage (torch 2.13), which is another part.
    """
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(graph.owning_module, str(node.target), None)
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.storage_offset():
            setattr(graph.owning_module, str(node.target), torch.nn.Parameter(value.detach().clone(), requires_grad=False))


def packed_gemm(node: torch.fx.Node) -> Gemm | None:
    """The GEMM of a node that multiplies by a packed weight (oneDNN or MKL), None for anything else."""
    if node.op != "call_function":
        return None
    ops = torch.ops
    targets: dict[Any, int] = {ops.mkldnn._linear_pointwise.default: 2, ops.mkldnn._linear_pointwise.binary: 3}
    if hasattr(ops.mkl, "_mkl_linear"):
        # Inductor's pattern leaves the packet, not its overload
        targets |= {ops.mkl._mkl_linear.default: 3, ops.mkl._mkl_linear: 3}
    if node.target not in targets:
        return None
    bias = node.args[targets[node.target]]
    x, out = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(x, torch.Tensor) or not isinstance(out, torch.Tensor):
        return None
    if not all(isinstance(n, int) for n in (*x.shape, *out.shape)):
        return None
    m = int(x.numel() // x.shape[-1])
    return Gemm(dtype_name(x.dtype), 1, m, (int(out.shape[-1]),), int(x.shape[-1]), bias is not None)
