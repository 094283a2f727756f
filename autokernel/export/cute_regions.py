"""A CuTe DSL kernel in the place of a region: one call with two results, and what the kernel leaves to the graph.

A product, what is added to it and the norm of the sum (`ops/linear_rms_norm.py`) become a kernel that writes the sum and the
sums of squares of each row's tiles. The norm is plain torch from there on, so that Inductor writes one kernel for it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch

from autokernel.cutedsl import op
from autokernel.cutedsl.config import CuteConfig
from autokernel.cutedsl.objects import load
from autokernel.export.bundle import Entry
from autokernel.export.cute_specs import arch_of, has_aligned_rows, inner_epilogue, spec_for, spec_of_value
from autokernel.export.cutedsl import Resolver, called, refuse_in_package, viewed
from autokernel.ops import Region
from autokernel.ops.linear_rms_norm import LinearRmsNorm, norm_of_squares


@dataclass(frozen=True, slots=True, kw_only=True)
class CuteCall:
    """A compiled kernel for a region, with its arguments: of the rows that x and the residual are, whatever their rank."""

    region: Region
    path: str
    swizzle: int

    @classmethod
    def of(cls, region: Region, entry: Entry, resolve: Resolver) -> CuteCall:
        """The kernel that an entry names.

        Raises:
            ValueError, ObjectError, CompileError: stock code has to stay; the message says why.
        """
        refuse_in_package()
        if region.problem.op != LinearRmsNorm.name:
            raise ValueError(f"there is no CuTe DSL kernel for {region.problem.op}")
        x, w, _, *added = (node.meta["val"] for node in region.inputs)
        for residual in (spec_of_value(_rows(value)) for value in added):
            if not has_aligned_rows(residual):
                raise ValueError(f"what is added has strides {residual.stride}: the kernel reads aligned rows")
        kernel = spec_for(
            entry.config,
            spec_of_value(_rows(x)),
            spec_of_value(w),
            out_dtype=region.problem.inputs[0].dtype,
            epilogue=inner_epilogue(region.problem),
            arch=arch_of(torch.cuda.get_device_capability(x.device)),
            num_units=torch.cuda.get_device_properties(x.device).multi_processor_count,
        )
        path = str(resolve(kernel))
        load(path)  # what cannot be loaded is found out here, where stock code is still to be had
        return cls(region=region, path=path, swizzle=CuteConfig.from_entry(entry.config).swizzle_of_calls)

    def insert(self, graph: torch.fx.Graph) -> list[torch.fx.Node]:
        """Add the call where the graph's insertion point is: the nodes of both results, and that of the norm's weight."""
        x, w, weight, *added = self.region.inputs
        a, *operands = (viewed(graph, node, tuple(_rows(node.meta["val"]).shape)) for node in (x, *added))
        target, arguments = op.call_arguments(a, w, operands, self.path, self.swizzle, squares=True)
        both = called(graph, target, *arguments)
        return [*(called(graph, operator.getitem, both, i) for i in range(2)), weight]


def what_is_left(region: Region) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The region's results, from what `CuteCall.insert` returns."""
    shape = region.outputs[0].meta["val"].shape
    norm = {name: value for name, value in region.problem.scalars if name in ("eps", "rounded", "offset")}

    def function(total: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = norm_of_squares(total, squares, weight, **norm)  # type: ignore[arg-type]
        return total.reshape(shape), normed.reshape(shape)

    return function


def _rows(value: torch.Tensor) -> torch.Tensor:
    """The (fake) tensor as a matrix; itself where it is one."""
    return value if value.dim() == 2 else value.reshape(-1, value.shape[-1])
