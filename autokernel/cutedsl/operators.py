"""Kernels of nvidia-cutlass-operators: the only import of it. Import it with `compiler.environment` set.

All of its operators for SM90 are here: the persistent one, and the one of Ampere, which newer GPUs run too. The persistent
kernel knows swizzle and raster order, which its operators leave as they are. Importing this module registers a provider of
our own with the package, once for the process, whose operators have the others: `get_operators` lists them behind the
package's own for whoever asks for SM90 without naming providers. Nothing else of the package is changed.

The smaller tiles that Ampere's operators name are tiles of 128x128, to the byte: `TENSOROP_TILES`. Operators that add up in
fp16 are not asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from cutlass import operators
from cutlass.operators.metadata import BLASDesignMetadata
from cutlass.operators.providers.cutedsl.gemm.implementations.sm90_static_persistent_impl import Sm90StaticPersistentGemmKernel
from cutlass.operators.providers.cutedsl.gemm.sm80_tensorop_gemm import Sm80TensorOpGemmOperator
from cutlass.operators.providers.cutedsl.gemm.sm90_static_persistent import Sm90StaticPersistentGemmOperator
from cutlass.operators.providers.cutedsl.gemm.sm100_persistent import PersistentDenseGemmOperator

from autokernel.cutedsl.config import COLUMNS, PERSISTENT, ROWS, SWIZZLES, TENSOROP, CuteConfig
from autokernel.cutedsl.spec import KernelSpec, Launch
from autokernel.errors import CompileError

PROVIDER = "autokernel"
_SM90 = "90"
_ORDER_OF_PACKAGE = (1, ROWS)  # swizzle and raster of the persistent operators of the package itself


@dataclass(kw_only=True)
class OrderedDesign(BLASDesignMetadata):  # type: ignore[misc]
    """Design of a persistent kernel whose tiles are computed in another order; names as in `CuteConfig`."""

    swizzle: int
    raster: str


@operators.register_provider(PROVIDER)  # type: ignore[untyped-decorator]
class AutokernelProvider(operators.Provider):  # type: ignore[misc]
    """What autokernel adds to the package's operators."""


@AutokernelProvider.register
class TunedSm90Operator(Sm90StaticPersistentGemmOperator):  # type: ignore[misc]
    """The package's persistent GEMM of SM90 in every order of tiles that the package does not offer itself."""

    supported_args_type = operators.GemmArguments
    designed_for_min_cc = 90

    def __init__(self, metadata: Any) -> None:
        super().__init__(metadata)
        design = metadata.design
        self.impl = Sm90StaticPersistentGemmKernel(
            metadata.operands.accumulator_type,
            tuple(design.tile_shape[:2]),
            tuple(design.cluster_shape[:2]),
            design.swizzle,
            design.raster == ROWS,
        )

    @classmethod
    def _generate_operators(
        cls, metadata_filter: Callable[[Any], bool], epilogue_args: Any = None, target_sm: Any = None, args: Any = None
    ) -> list[Any]:
        """Each of the package's own, in each order: what the interface asks of an operator."""
        theirs = Sm90StaticPersistentGemmOperator._generate_operators(lambda _: True, epilogue_args, target_sm, args)
        found = []
        for operator, order in itertools.product(theirs, itertools.product(SWIZZLES, (ROWS, COLUMNS))):
            if order == _ORDER_OF_PACKAGE:
                continue
            metadata = cls._ordered(operator.metadata, *order)
            if metadata_filter(metadata):
                found.append(cls(metadata))
        return found

    @classmethod
    def _ordered(cls, metadata: Any, swizzle: int, raster: str) -> Any:
        theirs, ours = f"cutedsl.{Sm90StaticPersistentGemmOperator.__name__}", f"{PROVIDER}.{cls.__name__}"
        name = f"{metadata.operator_name.replace(theirs, ours)}_swizzle{swizzle}_raster_{raster}"
        design = OrderedDesign(**vars(metadata.design), swizzle=swizzle, raster=raster)
        return replace(metadata, operator_name=name, operator_class=cls, design=design)


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
    found = operators.get_operators(arguments, target_sm=target, metadata_filter=chosen(config, target))
    if not found:
        raise CompileError(
            f"nvidia-cutlass-operators has no kernel for {spec.dtype} -> {spec.out_dtype}, A {spec.a_major}-major, "
            f"B {spec.b_major}-major, family {config.family}, tile {config.tile_m}x{config.tile_n}, "
            f"cluster {config.cluster_m}x{config.cluster_n} on {spec.arch}: choose others"
        )
    compiled = found[0].compile(arguments, target_sm=target).compiled_obj
    return compiled, Launch(function=function, arguments=(*names, "stream"), transposed=config.swap)


def chosen(config: CuteConfig, target: str) -> Callable[[Any], bool]:
    """Of all operators' metadata, that of a config.

    Args:
        config: of this source.
        target: "90a" or "100a", where the order of tiles is not chosen.
    """
    shape = ((config.tile_m, config.tile_n), (config.cluster_m, config.cluster_n))
    order = (config.swizzle, config.raster)
    ordered = target.startswith(_SM90) and config.family == PERSISTENT and order != _ORDER_OF_PACKAGE
    if config.family == TENSOROP:
        wanted = Sm80TensorOpGemmOperator
    elif target.startswith(_SM90):
        wanted = TunedSm90Operator if ordered else Sm90StaticPersistentGemmOperator
    else:
        wanted = PersistentDenseGemmOperator

    def is_wanted(metadata: Any) -> bool:
        if metadata.operator_class is not wanted:
            return False
        design = metadata.design
        fits = (tuple(design.tile_shape[:2]), tuple(design.cluster_shape[:2])) == shape
        return fits and (not ordered or (design.swizzle, design.raster) == order)

    return is_wanted
