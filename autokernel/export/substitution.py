"""Kernels of our own in place of GEMMs: the graph pass, and the lowering that puts a Triton kernel into Inductor's code.

`SubstitutionPass` runs where Inductor's graph is final. A GEMM with an entry of backend "triton" gets a lowering that hands
the kernel to Inductor as any user-defined Triton kernel, so it is compiled, captured and packaged (AOTInductor) like one.
Entries are for exact shapes, or for the rows `m_min` to `m_max` where the config says that they were measured.

Tiles that several programs share are counted in an int32 buffer, which must be zero before a launch and is zero again
behind it. One such buffer is zeroed per run of the graph and serves all its launches: they follow each other on one stream,
and two runs at the same time have a buffer each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import empty_strided, lowerings

from autokernel.export.bundle import Entry
from autokernel.export.dependent_launch import may_read_ahead
from autokernel.export.matching import Gemm
from autokernel.export.plan import Plan
from autokernel.export.templates import gemm_of_node
from autokernel.export.user_kernels import enqueue
from autokernel.kernels.config import DTYPES, KERNEL, SkinnyConfig
from autokernel.kernels.op import layout_problem, num_units_of

aten = torch.ops.aten

BACKEND = "triton"


class SubstitutionPass(CustomGraphPass):
    """Gives every GEMM that has an entry of ours a lowering that builds our kernel."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def uuid(self) -> str:
        return f"autokernel-substitution-2-{self.plan.digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        if not self.plan.active or not any(is_substituted(entry) for entry in self.plan.bundle.entries):
            return
        sites = []
        for node in graph.nodes:
            gemm = gemm_of_node(node)
            entry = find_entry(self.plan, gemm) if gemm is not None and not gemm.kind else None
            site = self._site(node, gemm, entry) if gemm is not None and entry is not None else None
            if site is not None:
                sites.append(site)
        if sites:
            self._substitute(graph, sites)

    def _site(self, node: torch.fx.Node, gemm: Gemm, entry: Entry) -> Site | None:
        """The node with what to put in its place; None, and the plan is told why, where stock code has to stay."""
        try:
            config = SkinnyConfig.from_entry(entry.config)
        except ValueError as error:
            self.plan.skip(entry, str(error))
            return None
        *added, x, w = (argument.meta["val"] for argument in node.args)  # type: ignore[union-attr]
        wrong = config.problem(gemm.m, gemm.ns[0], gemm.k) or layout_problem(x, w)
        if gemm.dtype not in DTYPES:
            wrong = f"skinny_mm takes {' and '.join(DTYPES)}, not {gemm.dtype}"
        elif node.kwargs:
            wrong = f"the product is scaled at {node.name}"
        elif added and added[0].dim() == 1 and added[0].stride(0) != 1:
            wrong = f"the bias at {node.name} is not contiguous"
        if wrong:
            self.plan.skip(entry, wrong)
            return None
        return Site(node, entry, config, gemm, num_units_of(x.device) if config.waves else 1)

    def _substitute(self, graph: torch.fx.Graph, sites: Sequence[Site]) -> None:
        """Replace the nodes; the kernels of a device share one buffer of counters, as long as the longest need of any."""
        lengths: dict[torch.device, int] = {}
        for site in sites:
            needed = site.config.num_counters(site.gemm.m, site.gemm.ns[0])
            lengths[site.device] = max(needed, lengths.get(site.device, 0))
        buffers = {device: _counters(graph, length, device) for device, length in lengths.items() if length}
        for site in sites:
            counters = [buffers[site.device]] if site.device in buffers else []
            lower = functools.partial(lower_skinny_mm, site.config, site.num_units)
            with graph.inserting_before(site.node):
                node = graph.call_function(functools.wraps(lower_skinny_mm)(lower), (*site.node.args, *counters))
            node.meta.update(site.node.meta)
            site.node.replace_all_uses_with(node)
            graph.erase_node(site.node)
            self.plan.hit(site.entry)


@dataclass(frozen=True, slots=True)
class Site:
    """A GEMM of the graph that our kernel takes over."""

    node: torch.fx.Node
    entry: Entry
    config: SkinnyConfig
    gemm: Gemm
    num_units: int

    @property
    def device(self) -> torch.device:
        device: torch.device = self.node.meta["val"].device
        return device


def is_substituted(entry: Entry) -> bool:
    """Whether the entry is a kernel of ours."""
    return entry.backend == BACKEND and entry.config.get("kernel") == KERNEL


def find_entry(plan: Plan, gemm: Gemm) -> Entry | None:
    """The entry of ours for a GEMM: the one of its shape, or one that was measured for a range of rows around it."""
    entry = plan.find_for_rows(gemm)
    return entry if entry is not None and is_substituted(entry) else None


def _counters(graph: torch.fx.Graph, length: int, device: torch.device) -> torch.fx.Node:
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    options: dict[str, Any] = {"dtype": torch.int32, "device": device, "pin_memory": False}
    with graph.inserting_before(first):
        node = graph.call_function(aten.full.default, ([length], 0), options)
    mode = torch._guards.detect_fake_mode([n.meta.get("val") for n in graph.nodes])
    assert mode is not None, "Inductor's graphs carry fake tensors"
    with mode:
        node.meta["val"] = torch.full([length], 0, dtype=torch.int32, device=device)
    return node


def lower_skinny_mm(config: SkinnyConfig, num_units: int, *arguments: Any) -> Any:
    """Allocate the output and the scratch memory, and enqueue the kernel.

    Args:
        config: the kernel's parameters.
        num_units: multiprocessors of the device.
        arguments: what the GEMM's node had ([bias or matrix to add,] x, w), and the counters if any kernel of the graph has
            shared tiles.
    """
    from autokernel.kernels.skinny_mm import skinny_mm_kernel

    operands = list(arguments)
    counters = operands.pop() if operands[-1].get_dtype() == torch.int32 else None
    *added, x, w = operands
    (m, k), n = (int(size) for size in x.get_size()), int(w.get_size()[1])
    x.realize()  # else each product by it would have a copy of its own
    x = ir.ExternKernel.require_contiguous(x)
    w = ir.ExternKernel.require_contiguous(lowerings[aten.permute.default](w, [1, 0]))
    bias = added[0] if added and len(added[0].get_size()) == 1 else None
    device, dtype = x.get_device(), x.get_dtype()
    y = empty_strided((m, n), (n, 1), dtype=dtype, device=device)
    parts = y
    if config.reduces:
        parts = empty_strided((config.num_parts(m, n, k, num_units),), (1,), dtype=torch.float32, device=device)
    descriptors: dict[str, Any] = {}
    if config.tma:
        descriptors["x"] = ("stable", ((config.block_m, config.block_k),))
        descriptors["w"] = ("stable", ((config.block_n, config.block_k),))
    grid = (config.programs(m, n, k, num_units), 1, 1)
    ahead = may_read_ahead([w], grid, config.num_warps, config.num_stages)
    enqueue(
        skinny_mm_kernel,
        grid,
        {
            "x": x,
            "w": w,
            "bias": x if bias is None else bias,
            "y": y,
            "parts": parts,
            "counters": counters if config.reduces else y,
            **config.constants(m, n, k, bias=bias is not None, num_units=num_units, ahead=ahead),
        },
        ("y", "parts", "counters") if config.reduces else ("y",),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        descriptors=descriptors,
    )
    if added and bias is None:
        return lowerings[aten.add.Tensor](y, added[0])
    return y


lower_skinny_mm._inductor_lowering_function = True  # type: ignore[attr-defined]
