"""Why products that have an entry are not built from it, where it needs constant weights: said once, never silent.

The pass runs on Inductor's graph when weights have been packed and put side by side, or never will be. There every spelling
of a product is one of four operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from autokernel.export.bundle import Entry
from autokernel.export.freezing import needs_constant
from autokernel.export.matching import Gemm
from autokernel.export.passes import packed_gemm, pick
from autokernel.export.pins import dtype_name
from autokernel.export.plan import Plan

aten = torch.ops.aten

_SINGLE, _BATCHED = (aten.mm.default, aten.addmm.default), (aten.bmm.default, aten.baddbmm.default)
_SAME_NUMBERS = (
    *("permute", "t", "transpose", "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "alias", "detach"),
    *("clone", "_to_copy", "convert_element_type"),
)


class MissedPass(CustomGraphPass):
    """Tells the plan why a product that fits an entry with constant weights gets stock code. Changes nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def uuid(self) -> str:
        return f"autokernel-missed-1-{self.plan.digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        if not self.plan.active or not any(map(needs_constant, self.plan.bundle.entries)):
            return
        by_input: dict[torch.fx.Node, list[tuple[torch.fx.Node, Gemm]]] = {}
        for node in graph.nodes:
            packed = packed_gemm(node)
            gemm = packed or _plain_gemm(node)
            if gemm is None:
                continue
            entry = self.plan.find(gemm)
            if packed is None and entry is not None and needs_constant(entry):
                self._explain(entry, [node])
            by_input.setdefault(_left(node), []).append((node, gemm))
        for users in by_input.values():
            for entry, merged in self.plan.groups(users[0][1].dtype, users[0][1].m, users[0][1].k):
                members = pick([node for node, gemm in users if gemm.bias == merged.bias], merged.ns)
                if members is not None and needs_constant(entry) and entry.config.get("merge") == "concat":
                    self._explain(entry, members)

    def _explain(self, entry: Entry, nodes: Sequence[torch.fx.Node]) -> None:
        why = next((why for node in nodes if (why := _why_not(node)) is not None), None)
        if why is None and entry.config.get("merge") == "concat":
            why = (
                "its weights are constants, but were not put side by side: each must have a row for every column of the "
                "result, as F.linear and x @ w.T read them"
            )
        elif why is None and entry.config.get("template") is None:
            why = "Inductor does not pack its weight, although it is a constant"
        if why is not None:  # else Inductor chooses a template later on
            self.plan.skip(entry, why)


def _plain_gemm(node: torch.fx.Node) -> Gemm | None:
    """The GEMM of a product whose weight is not packed; None for anything else, and for more than one batch."""
    if node.op != "call_function" or node.target not in (*_SINGLE, *_BATCHED):
        return None
    values: list[Any] = [argument.meta.get("val") for argument in node.args if isinstance(argument, torch.fx.Node)]
    if not all(isinstance(value, torch.Tensor) and all(isinstance(s, int) for s in value.shape) for value in values):
        return None
    *added, left, right = values
    if left.dim() == 3 and left.shape[0] != 1:
        return None
    bias = any(value.numel() == right.shape[-1] for value in added)
    return Gemm(dtype_name(left.dtype), 1, int(left.shape[-2]), (int(right.shape[-1]),), int(left.shape[-1]), bias)


def _left(node: torch.fx.Node) -> Any:
    return _source(node.args[0] if packed_gemm(node) is not None else node.args[-2])


def _source(node: Any) -> Any:
    """What has the same numbers in another shape, order or dtype."""
    while node.op == "call_function" and _name(node) in _SAME_NUMBERS:
        node = node.args[0]
    return node


def _why_not(node: torch.fx.Node) -> str | None:
    """Why a product's weight is neither packed nor put beside others; None if it could be. Without names: said once."""
    if packed_gemm(node) is not None:
        return None
    if node.target in _BATCHED:
        return "it is a product of batches here, as einsum and torch.bmm make one; F.linear and x @ w.T are packed"
    if node.kwargs:
        return "the product is scaled here (alpha or beta of addmm)"
    source = _source(node.args[-1])
    if source.op == "get_attr":
        return None
    if source.op == "placeholder":
        return (
            "its weight is no constant here but an input of the graph; constants are parameters that F.linear, matmul (@), mm, "
            "addmm or inner multiply by, also as a view or in another dtype"
        )
    return f"its weight is no constant here: {_name(source)} computes it in each call"


def _name(node: torch.fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".", maxsplit=1)[0]
