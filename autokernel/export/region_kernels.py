"""Triton kernels of ours in the place of a region: one node whose lowering hands the launches to Inductor.

They are what any user-defined Triton kernel is to it: compiled, captured in CUDA graphs and packaged (AOTInductor) as one.
Inputs are held to the strides that the problem says, which the kernels were built for.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import empty_strided

from autokernel.export.dependent_launch import may_read_ahead
from autokernel.export.user_kernels import enqueue
from autokernel.kernels.launch import AHEAD, Buffer, KernelPlan, Launch, Operand, resolve
from autokernel.ops import Region
from autokernel.records import TensorSpec

_ZEROS = "autokernel_zeros"  # marks the buffers of zeros that the regions of a graph share


def insert(graph: torch.fx.Graph, region: Region, plan: KernelPlan) -> list[torch.fx.Node]:
    """Add the launches where the graph's insertion point is; one node per output, laid out as the region's own are."""
    mode = torch._guards.detect_fake_mode([node.meta["val"] for node in region.inputs])
    assert mode is not None, "Inductor's graphs carry fake tensors"
    device = region.outputs[0].meta["val"].device
    zeros = {buffer.dtype: _zeros(graph, buffer, device, mode) for buffer in _zeroed(plan)}
    inputs = [_as_real(graph, node, mode) for node in region.inputs]
    strides = tuple(tuple(node.meta["val"].stride()) for node in inputs)
    lower = functools.wraps(lower_region)(functools.partial(lower_region, plan, strides, tuple(zeros)))
    call = graph.call_function(lower, (*inputs, *zeros.values()))
    with mode:
        call.meta["val"] = tuple(_empty(spec, device) for spec in plan.outputs)
    found = []
    for index, (value, old) in enumerate(zip(call.meta["val"], region.outputs, strict=True)):
        node = graph.call_function(operator.getitem, (call, index))
        node.meta["val"] = value
        found.append(_laid_out(graph, node, old.meta["val"]))
    return found


def _as_real(graph: torch.fx.Graph, node: torch.fx.Node, mode: Any) -> torch.fx.Node:
    """The node itself, or a view of its complex numbers as pairs: Triton knows none."""
    if not node.meta["val"].is_complex():
        return node
    pairs = graph.call_function(torch.ops.aten.view_as_real.default, (node,))
    with mode:
        pairs.meta["val"] = torch.view_as_real(node.meta["val"])
    return pairs


def lower_region(
    plan: KernelPlan, strides: tuple[tuple[int, ...], ...], zero_dtypes: tuple[str, ...], *operands: Any
) -> tuple[Any, ...]:
    """Allocate outputs and scratch memory, and enqueue the kernels.

    Args:
        plan: what is launched.
        strides: that each input must have, in elements.
        zero_dtypes: of the buffers of zeros.
        operands: the region's inputs, and behind them the buffers of zeros.
    """
    inputs, zeros = operands[: len(strides)], dict(zip(zero_dtypes, operands[len(strides) :], strict=True))
    device = inputs[0].get_device()
    for x in inputs:
        x.realize()  # a view of what is not stored yet would be computed and copied for each region that takes it
    held = [ir.ExternKernel.require_exact_strides(x, stride) for x, stride in zip(inputs, strides, strict=True)]
    outputs = tuple(_allocated(spec, device) for spec in plan.outputs)
    scratch = [
        zeros[buffer.dtype] if buffer.zeroed else _allocated(TensorSpec.contiguous(buffer.shape, buffer.dtype), device)
        for buffer in plan.scratch
    ]
    for launch in plan.launches:
        arguments = resolve(launch, {"in": held, "out": outputs, "scratch": scratch})
        weights = None if launch.weights is None else [arguments[name] for name in launch.weights]
        if weights is not None and may_read_ahead(weights, launch.grid, launch.num_warps, launch.num_stages):
            arguments[AHEAD] = 1
        enqueue(
            launch.kernel,
            launch.grid,
            arguments,
            _written(launch),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return outputs


lower_region._inductor_lowering_function = True  # type: ignore[attr-defined]


def _written(launch: Launch) -> list[str]:
    """Parameters that are outputs or scratch; the last of those that are the same one (stand-ins for what is not there)."""
    names = {value: name for name, value in launch.arguments.items() if isinstance(value, Operand) and value.kind != "in"}
    return list(names.values())


def _allocated(spec: TensorSpec, device: torch.device) -> Any:
    return empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device=device)


def _empty(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device=device)


def _zeroed(plan: KernelPlan) -> list[Buffer]:
    """The longest zeroed buffer of each dtype."""
    longest: dict[str, Buffer] = {}
    for buffer in plan.scratch:
        if buffer.zeroed and (buffer.dtype not in longest or buffer.shape > longest[buffer.dtype].shape):
            longest[buffer.dtype] = buffer
    return list(longest.values())


def _zeros(graph: torch.fx.Graph, buffer: Buffer, device: torch.device, mode: Any) -> torch.fx.Node:
    """The graph's buffer of zeros of this dtype, at least as long as the one that is needed; filled once per run."""
    mark, length = (buffer.dtype, str(device)), buffer.shape[0]
    node = next((node for node in graph.nodes if node.meta.get(_ZEROS) == mark), None)
    if node is None:
        first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
        options: dict[str, Any] = {"dtype": getattr(torch, buffer.dtype), "device": device, "pin_memory": False}
        with graph.inserting_before(first):
            node = graph.call_function(torch.ops.aten.full.default, ([length], 0), options)
        node.meta[_ZEROS] = mark
    else:
        length = max(length, int(node.meta["val"].shape[0]))
        node.args = ([length], 0)
    with mode:
        node.meta["val"] = torch.full([length], 0, dtype=getattr(torch, buffer.dtype), device=device)
    return node


def _laid_out(graph: torch.fx.Graph, node: torch.fx.Node, like: torch.Tensor) -> torch.fx.Node:
    """The node in the layout that the graph's own had: what follows was made for it. Strides of one element mean nothing."""
    value = node.meta["val"]
    if value.shape != like.shape or value.dtype != like.dtype:
        raise AssertionError(f"a kernel gives {value.dtype}{list(value.shape)} for {like.dtype}{list(like.shape)}")
    same = all(a == b for a, b, size in zip(value.stride(), like.stride(), value.shape, strict=True) if size != 1)
    if same:
        return node
    order = sorted(range(like.dim()), key=lambda i: (-like.stride()[i], i))
    inverse = [order.index(i) for i in range(like.dim())]
    aten = torch.ops.aten
    options: dict[str, Any] = {"memory_format": torch.contiguous_format}
    for target, arguments, keywords in (
        (aten.permute.default, (order,), {}),
        (aten.clone.default, (), options),
        (aten.permute.default, (inverse,), {}),
    ):
        value = target(value, *arguments, **keywords)
        node = graph.call_function(target, (node, *arguments), keywords)
        node.meta["val"] = value
    return node
