"""`torch.ops.autokernel.cute_gemm`: a compiled CuTe DSL kernel as an operator, so that torch.compile can call it.

The kernel is named by the file of its shared object. Opaque to Inductor: what it fuses is decided by the object's epilogue.
Every argument costs the host a fraction of a microsecond at each call: what the object's record says is no argument, kernels
without an epilogue's operands have an overload without the list, and the usual swizzle is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from autokernel.cutedsl.config import DEFAULT_SWIZZLE
from autokernel.cutedsl.objects import load, read_info
from autokernel.cutedsl.spec import KernelSpec


def cute_gemm(a: torch.Tensor, b: torch.Tensor, path: str, swizzle: int = DEFAULT_SWIZZLE) -> torch.Tensor:
    """The product of two matrices, with the object's epilogue.

    Args:
        a: [M, K], or [batch, M, K].
        b: [K, N], or [batch, K, N].
        path: of the object.
        swizzle: as `CuteConfig` has it, for objects that take it at a call.

    Returns:
        [M, N], [batch, M, N] or [parts of K, M, N], or with half the columns, in the object's dtype, row by row.

    Raises:
        ObjectError: the object is missing, damaged, or not for this machine.
    """
    product: torch.Tensor = load(path, swizzle).run(a, b, ())
    return product


def fused_cute_gemm(
    a: torch.Tensor, b: torch.Tensor, operands: Sequence[torch.Tensor], path: str, swizzle: int = DEFAULT_SWIZZLE
) -> torch.Tensor:
    """As `cute_gemm`, with the epilogue's operands in its order: a bias [N], matrices [M, N]."""
    product: torch.Tensor = load(path, swizzle).run(a, b, operands)
    return product


def cute_gemm_squares(
    a: torch.Tensor, b: torch.Tensor, operands: Sequence[torch.Tensor], path: str, swizzle: int = DEFAULT_SWIZZLE
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused_cute_gemm`, for objects that sum squares.

    Returns:
        [M, N] in the object's dtype, row by row; and fp32 [M, tiles of N]: of each tile, the sum of squares before rounding.
    """
    both: tuple[torch.Tensor, torch.Tensor] = load(path, swizzle).run(a, b, operands)
    return both


def _fake(a: torch.Tensor, b: torch.Tensor, path: str, swizzle: int = DEFAULT_SWIZZLE) -> torch.Tensor:
    spec = _spec_of(path)
    lead = (spec.num_parts, a.shape[0]) if spec.num_parts else a.shape[:-1]
    return a.new_empty((*lead, spec.num_columns(b.shape[-1])), dtype=getattr(torch, spec.out_dtype))


def _fused_fake(
    a: torch.Tensor, b: torch.Tensor, operands: Sequence[torch.Tensor], path: str, swizzle: int = DEFAULT_SWIZZLE
) -> torch.Tensor:
    return _fake(a, b, path)


def _squares_fake(
    a: torch.Tensor, b: torch.Tensor, operands: Sequence[torch.Tensor], path: str, swizzle: int = DEFAULT_SWIZZLE
) -> tuple[torch.Tensor, torch.Tensor]:
    tiles = -(-b.shape[1] // _spec_of(path).squared_columns)
    return _fake(a, b, path), a.new_empty((a.shape[0], tiles), dtype=torch.float32)


@functools.cache
def _spec_of(path: str) -> KernelSpec:
    return read_info(Path(path)).spec


# Without the checks and wrappers of `torch.library.custom_op`, which take 10 us a call. Kernels are compiled for the strides
# that the graph has: Inductor must not change them.
_library: Any = torch.library.Library("autokernel", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(name: str, arguments: str, function: Callable[..., Any], fake: Callable[..., Any], results: str = "Tensor") -> None:
    schema = f"{name}({arguments}, str path, int swizzle={DEFAULT_SWIZZLE}) -> {results}"
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    _library.impl(name, function, "CUDA")
    torch.library.register_fake(f"autokernel::{name}", fake)


_define("cute_gemm", "Tensor a, Tensor b", cute_gemm, _fake)
_define("cute_gemm.fused", "Tensor a, Tensor b, Tensor[] operands", fused_cute_gemm, _fused_fake)
_define("cute_gemm.squares", "Tensor a, Tensor b, Tensor[] operands", cute_gemm_squares, _squares_fake, "(Tensor, Tensor)")
PLAIN: Any = torch.ops.autokernel.cute_gemm.default  # as graphs have them
FUSED: Any = torch.ops.autokernel.cute_gemm.fused
SQUARES: Any = torch.ops.autokernel.cute_gemm.squares


def call_arguments(
    a: Any, b: Any, operands: Sequence[Any], path: str, swizzle: int, *, squares: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """The overload, and its arguments, for tensors or a graph's nodes; `squares` for an object with two results."""
    target, tensors = (SQUARES if squares else FUSED, (a, b, list(operands))) if operands or squares else (PLAIN, (a, b))
    return target, (*tensors, path) if swizzle == DEFAULT_SWIZZLE else (*tensors, path, swizzle)
