"""Hands a Triton kernel of ours to Inductor, and says what it writes.

Inductor would find that out itself: it makes Triton's intermediate code of the kernel for each call, and takes every operand
for written where that holds an instruction that it does not know, as all kernels that wait for others do (inline assembly).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch._inductor import ir

_state = threading.local()


def enqueue(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Mapping[str, Any],
    writes: Collection[str],
    *,
    num_warps: int,
    num_stages: int,
    descriptors: Mapping[str, Any] | None = None,
) -> None:
    """Have Inductor launch a kernel, in the graph that it is lowering.

    Args:
        kernel: a triton.JITFunction.
        grid: how many programs.
        arguments: all of its parameters; Inductor's nodes and numbers.
        writes: the names of those that it stores into.
        num_warps: of a program.
        num_stages: that its loops are pipelined in.
        descriptors: what Inductor's metadata says of TMA descriptors, by parameter.
    """
    _install()
    _state.writes = tuple(writes)
    try:
        ir.UserDefinedTritonKernel(
            kernel_idx=_index(kernel, num_warps, num_stages),
            grid=[grid],
            tma_descriptor_metadata=dict(descriptors or {}),
            kernel_args=dict(arguments),
        )
    finally:
        _state.writes = None


def _index(kernel: Any, num_warps: int, num_stages: int) -> int:
    """The kernel, with its warps and stages, among those that torch knows by number."""
    import triton
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    one = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return int(kernel_side_table.add_kernel(triton.autotune(configs=[one], key=[])(kernel)))


def _install() -> None:
    """Make torch's analysis of kernels answer what it was told. Idempotent; kernels of others are analysed as before."""
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    answers: dict[str, Callable[..., Any]] = {"identify_mutated_tensors": list}  # before torch 2.13
    if hasattr(wrap, "TensorAccesses"):  # where there is neither, kernels are analysed
        answers["identify_accessed_tensors"] = _accesses
    for name, answer in answers.items():
        analyse = getattr(wrap, name, None)
        if analyse is not None and not hasattr(analyse, "autokernel"):
            setattr(wrap, name, _answering(analyse, answer))


def _answering(analyse: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(analyse)
    def told(kernel: Any, kwargs: dict[str, Any], *args: Any, **options: Any) -> Any:
        writes = getattr(_state, "writes", None)
        return analyse(kernel, kwargs, *args, **options) if writes is None else answer(writes)

    told.autokernel = True  # type: ignore[attr-defined]
    return told


def _accesses(writes: tuple[str, ...]) -> Any:
    """As torch 2.13 says it. Nothing is fused into a kernel: it is as it was measured."""
    from torch._higher_order_ops.triton_kernel_wrap import TensorAccesses
    from torch._inductor.dependencies import ReadWrites, StarDep
    from torch.utils._ordered_set import OrderedSet

    written: Any = OrderedSet(StarDep(name) for name in writes)
    return TensorAccesses(ReadWrites(reads=OrderedSet(), writes=written, index_exprs=OrderedSet()), can_fuse_epilogue=False)
