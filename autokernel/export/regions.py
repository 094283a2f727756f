"""Other code in the place of regions: the graph pass that puts a bundle's entries for fusions into a graph.

It runs where Inductor's graph is final, as the profiler saw it. An entry is for a problem's sizes and numbers; its region is
replaced by what its config names: an implementation in plain torch (`rewrites`), which is traced into the graph, a Triton
kernel of ours, or a CuTe DSL kernel with what it leaves to the graph. What does not fit stays, and the plan is told why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from autokernel.cutedsl.objects import ObjectError
from autokernel.errors import CompileError
from autokernel.export import region_kernels
from autokernel.export.bundle import Entry
from autokernel.export.cute_regions import CuteCall, what_is_left
from autokernel.export.cutedsl import Resolver, compiled_here, is_cute, objects_of
from autokernel.export.one_row import ORIGIN
from autokernel.export.plan import Plan
from autokernel.kernels.plans import plan_of
from autokernel.ops import OPS, FusionOp, Region
from autokernel.ops.matching import computed_before
from autokernel.ops.patterns import writes_in
from autokernel.rewrites import find_rewrite

TRITON = "triton"  # the backend whose entries are kernels of ours


class RegionPass(CustomGraphPass):
    """Replaces every region that has an entry."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._resolve = objects_of(plan)

    def uuid(self) -> str:
        return f"autokernel-regions-4-{self.plan.digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        wanted = self.plan.region_ops if self.plan.active else frozenset()
        now: dict[torch.fx.Node, torch.fx.Node] = {}  # an output that was replaced -> what computes it now
        gone: set[torch.fx.Node] = set()
        for found, entry in self._matches(graph, wanted):
            if found.inner & gone:
                continue  # regions may overlap: the one whose entry comes first in the bundle has the nodes
            region = replace(found, inputs=tuple(now.get(node, node) for node in found.inputs))
            try:
                results = replace_region(graph, region, entry, self._resolve)
            except UnfitError as error:
                self.plan.skip(entry, str(error))
            else:
                self.plan.hit(entry)
                now |= dict(zip(region.outputs, results, strict=True))
                gone |= region.inner

    def _matches(self, graph: torch.fx.Graph, wanted: Collection[str]) -> list[tuple[Region, Entry]]:
        """Regions with their entries: in the bundle's order, those of one entry in the graph's."""
        place = {id(entry): number for number, entry in enumerate(self.plan.bundle.entries)}
        found = [
            (region, entry)
            for op in OPS
            if op.name in wanted and isinstance(op, FusionOp)
            for region in op.match(graph, frozenset(), self.plan.bundle.environment.device)
            if (entry := self.plan.find_region(region.problem)) is not None
        ]
        return sorted(found, key=lambda pair: place[id(pair[1])])


class UnfitError(Exception):
    """What an entry names cannot take the place of a region. The message says why."""


def replace_region(
    graph: torch.fx.Graph, region: Region, entry: Entry, resolve: Resolver = compiled_here
) -> list[torch.fx.Node]:
    """Put what the entry names in the place of a region.

    Args:
        graph: that the region is in.
        region: what is replaced.
        entry: for the region's problem.
        resolve: finds the objects of CuTe DSL kernels.

    Returns:
        The nodes of its results, one per output.

    Raises:
        UnfitError: the region has to stay.
    """
    try:
        insert = _inserter(region, entry, resolve)
    except (ValueError, ObjectError, CompileError) as error:
        raise UnfitError(str(error)) from None
    place, early = _place(graph, region)
    with graph.inserting_before(place):
        before = set(graph.nodes)
        results = insert(graph)
    for node in graph.nodes:
        if node not in before:
            node.meta.update({key: region.name_of.meta[key] for key in ORIGIN if key in region.name_of.meta})
    for old, new in zip(region.outputs, results, strict=True):
        old.replace_all_uses_with(new)
    for node in early:
        place.prepend(node)
    for node in reversed([node for node in graph.nodes if node in region.inner]):
        if not node.users:
            graph.erase_node(node)
    return results


def _place(graph: torch.fx.Graph, region: Region) -> tuple[torch.fx.Node, list[torch.fx.Node]]:
    """The node that the call comes before, and what has to follow it there: what is computed from its results sooner.

    It is the first output; or what is behind the last input.

    Raises:
        UnfitError: an input is computed from a result, or memory is written meanwhile.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    first, last = min(region.outputs, key=order.__getitem__), max(region.inputs, key=order.__getitem__)
    if order[last] < order[first]:
        return first, []
    early = computed_before(last, region.outputs, region.inner, order)
    for node in early:
        if node in region.inputs:
            raise UnfitError(f"{node.name} is computed behind {first.name}, which would need it")
    if early:
        for position, written in writes_in(order):
            if order[early[0]] <= position <= order[last]:
                raise UnfitError(f"{written.name} is written between {first.name} and {last.name}")
    return last.next, early


def _inserter(region: Region, entry: Entry, resolve: Resolver) -> Callable[[torch.fx.Graph], list[torch.fx.Node]]:
    """What adds an entry's nodes where the graph's insertion point is, and returns those of the results.

    Raises:
        ValueError, ObjectError, CompileError: the entry names what does not exist, or not for this problem, or not here.
    """
    if entry.backend == TRITON:
        plan = plan_of(region.problem, entry.config)  # in the strides that are here
        return lambda graph: region_kernels.insert(graph, region, plan)
    if is_cute(entry):
        call = CuteCall.of(region, entry, resolve)
        return lambda graph: _inlined(graph, what_is_left(region), call.insert(graph), region)
    rewrite = find_rewrite(entry.problem.op, str(entry.config.get("implementation")))
    return lambda graph: _inlined(graph, lambda *inputs: rewrite(region.problem, *inputs), region.inputs, region)


def _inlined(
    graph: torch.fx.Graph,
    function: Callable[..., tuple[torch.Tensor, ...]],
    nodes: Sequence[torch.fx.Node],
    region: Region,
) -> list[torch.fx.Node]:
    """The nodes of a plain function's results, one per output of the region, traced to where the insertion point is."""
    wanted = [node.meta["val"] for node in region.outputs]
    traced = trace(lambda *inputs: restrided(function(*inputs), wanted), nodes)
    placeholders = [node for node in traced.nodes if node.op == "placeholder"]
    results: Any = graph.graph_copy(traced, dict(zip(placeholders, nodes, strict=True)))
    return list(results)


def trace(function: Callable[..., tuple[torch.Tensor, ...]], nodes: Sequence[torch.fx.Node]) -> torch.fx.Graph:
    """The graph of a function over these nodes' values, in the ops that Inductor lowers; its nodes carry fake tensors."""
    inputs = [node.meta["val"] for node in nodes]
    mode = torch._guards.detect_fake_mode(inputs)
    assert mode is not None, "Inductor's graphs carry fake tensors"
    with mode, torch.no_grad():
        traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="real")(*inputs)
    traced.graph.eliminate_dead_code()
    return traced.graph


def restrided(outputs: tuple[torch.Tensor, ...], wanted: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs in the layouts that the graph's own had: what follows was made for them."""
    return tuple(_as_like(out, like) for out, like in zip(outputs, wanted, strict=True))


def _as_like(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if out.shape != like.shape or out.dtype != like.dtype:
        raise UnfitError(f"a rewriting gives {out.dtype}{list(out.shape)} for {like.dtype}{list(like.shape)}")
    order = sorted(range(like.dim()), key=lambda i: (-like.stride()[i], i))
    inverse = [order.index(i) for i in range(like.dim())]
    return out.permute(order).contiguous().permute(inverse)
