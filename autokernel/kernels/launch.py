"""What it takes to run Triton kernels in the place of a region: buffers, grids and arguments, as data.

A planner makes a `KernelPlan` of a problem and an entry's config (`kernels/plans.py` has the table of planners). Production
puts it into Inductor's code (`export/region_kernels.py`); `run` launches it directly, for tests and by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from autokernel.records import TensorSpec

if TYPE_CHECKING:
    import torch


AHEAD = "AHEAD"  # of kernels: whether they read or ask for something before they wait for the kernel in front of them


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a kernel gets: an input of the problem (`as_real`), an output, or scratch, by its position."""

    kind: Literal["in", "out", "scratch"]
    index: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """Scratch memory, row-major.

    A `zeroed` buffer is a row of zeros when the first launch starts, and the last one has to leave zeros in it: all regions
    of a graph share one per dtype, which is filled once per run of the graph.
    """

    shape: tuple[int, ...]
    dtype: str
    zeroed: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel. `arguments` has every parameter of it: operands as pointers, and numbers (compile-time ones as well).

    `weights` are the operands that it reads before it waits for the kernel in front of it, if its argument AHEAD is 1; none
    of them where it only asks for memory until then, None where it has no such argument. Plans say 0, and whoever launches
    it so may change that (`export/region_kernels.py`).
    """

    kernel: Any  # a triton.JITFunction
    grid: tuple[int, int, int]
    arguments: Mapping[str, Operand | int | float | bool]
    num_warps: int
    num_stages: int
    weights: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """Launches that follow each other, and what they write. Every element of the outputs has to be written."""

    outputs: tuple[TensorSpec, ...]
    scratch: tuple[Buffer, ...]
    launches: tuple[Launch, ...]

    def __post_init__(self) -> None:
        for buffer in self.scratch:
            if buffer.zeroed and len(buffer.shape) != 1:
                raise ValueError(f"a zeroed buffer is a row, of one dimension; its shape is {buffer.shape}")
        for launch in self.launches:
            given, wanted = set(launch.arguments), set(launch.kernel.arg_names)
            if given != wanted:
                raise ValueError(
                    f"a launch gives every parameter of {launch.kernel.__name__}; missing: {sorted(wanted - given)}, "
                    f"unknown: {sorted(given - wanted)}"
                )


def resolve(launch: Launch, tensors: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """A launch's arguments, in the kernel's order, with what `tensors` has for its operands ("in", "out", "scratch")."""
    return {
        name: tensors[value.kind][value.index] if isinstance(value, Operand) else value
        for name in launch.kernel.arg_names
        for value in (launch.arguments[name],)
    }


def as_real(spec: TensorSpec) -> TensorSpec:
    """As kernels see an input: complex numbers are pairs of real ones, in one more dimension."""
    if spec.dtype != "complex64":
        return spec
    return TensorSpec(shape=(*spec.shape, 2), dtype="float32", stride=(*(2 * s for s in spec.stride), 1))


def run(plan: KernelPlan, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Launch a plan's kernels on tensors that have the problem's shapes, dtypes and strides; returns its outputs."""
    import torch

    device = inputs[0].device
    tensors = {
        "in": [torch.view_as_real(x) if x.is_complex() else x for x in inputs],
        "out": [
            torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device=device)
            for spec in plan.outputs
        ],
        "scratch": [
            (torch.zeros if buffer.zeroed else torch.empty)(buffer.shape, dtype=getattr(torch, buffer.dtype), device=device)
            for buffer in plan.scratch
        ],
    }
    for launch in plan.launches:
        launch.kernel[launch.grid](**resolve(launch, tensors), num_warps=launch.num_warps, num_stages=launch.num_stages)
    return tuple(tensors["out"])
