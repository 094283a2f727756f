"""Kernels of nvidia-cutlass-operators: the only import of it. Import it with `compiler.environment` set.

On SM90 it has one kernel of its own, which is tuned further here than its operators offer: swizzle and raster order. For
SM100 every operator that it lists can be compiled by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cutlass import operators
from cutlass.operators.providers.cutedsl.gemm.implementations.sm90_static_persistent_impl import Sm90StaticPersistentGemmKernel
from cutlass.operators.providers.cutedsl.gemm.sm90_static_persistent import Sm90StaticPersistentGemmOperator
from cutlass.operators.providers.cutedsl.gemm.sm100_persistent import PersistentDenseGemmOperator

from autokernel.cutedsl.config import ROWS, CuteConfig
from autokernel.cutedsl.spec import KernelSpec, Launch
from autokernel.errors import CompileError


class TunedSm90Operator(Sm90StaticPersistentGemmOperator):  # type: ignore[misc]
    """Operators' SM90 GEMM with the parameters of its kernel that it leaves at their defaults."""

    supported_args_type = operators.GemmArguments
    designed_for_min_cc = 90

    def __init__(self, metadata: Any, config: CuteConfig) -> None:
        super().__init__(metadata)
        self.impl = Sm90StaticPersistentGemmKernel(
            metadata.operands.accumulator_type,
            (config.tile_m, config.tile_n),
            (config.cluster_m, config.cluster_n),
            config.swizzle,
            config.raster == ROWS,
        )


def compile_spec(
    spec: KernelSpec, matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor], function: str
) -> tuple[Any, Launch]:
    """One kernel on SM90 or SM100.

    Args:
        spec: without an epilogue.
        matrices: a, b and the result, of any legal size: examples.
        function: what the kernel is to be called.

    Returns:
        What has `export_to_c`, and how to call it.

    Raises:
        CompileError: Operators has no such kernel.
    """
    config, target = spec.cute, spec.arch.removeprefix("sm_")
    a, b, out = matrices
    names = ("a", "b", "out")
    if config.swap:
        a, b, out = b.mT, a.mT, out.mT
        names = ("b^T", "a^T", "out^T")
    accumulator = torch.int32 if spec.dtype == "int8" else torch.float32
    arguments = operators.GemmArguments(a, b, out, accumulator_type=accumulator)
    found = operators.get_operators(arguments, target_sm=target, metadata_filter=_with_shape(config, target))
    if not found:
        raise CompileError(
            f"nvidia-cutlass-operators has no kernel for {spec.dtype} -> {spec.out_dtype}, A {spec.a_major}-major, "
            f"B {spec.b_major}-major, tile {config.tile_m}x{config.tile_n}, cluster {config.cluster_m}x{config.cluster_n} "
            f"on {spec.arch}: choose others"
        )
    operator = found[0]
    if isinstance(operator, Sm90StaticPersistentGemmOperator):
        operator = TunedSm90Operator(operator.metadata, config)
    compiled = operator.compile(arguments, target_sm=target).compiled_obj
    return compiled, Launch(function=function, arguments=(*names, "stream"), transposed=config.swap)


def _with_shape(config: CuteConfig, target: str) -> Callable[[Any], bool]:
    """Of the operators with a config's tile and cluster, the persistent kernel of the architecture."""
    of_class = Sm90StaticPersistentGemmOperator if target.startswith("9") else PersistentDenseGemmOperator

    def wanted(metadata: Any) -> bool:
        design = metadata.design
        shape = (tuple(design.tile_shape[:2]), tuple(design.cluster_shape[:2]))
        fits = shape == ((config.tile_m, config.tile_n), (config.cluster_m, config.cluster_n))
        return fits and metadata.operator_class is of_class

    return wanted
