"""`torch.ops.autokernel.cute_gemm`: a compiled CuTe DSL kernel as an operator, so that torch.compile can call it.

The kernel is named by the file of its shared object. Opaque to Inductor: what it fuses is decided by the object's epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autokernel.cutedsl.objects import load

NAME = "autokernel::cute_gemm"


def cute_gemm(
    a: torch.Tensor, b: torch.Tensor, operands: Sequence[torch.Tensor], columns: int, out_dtype: torch.dtype, path: str
) -> torch.Tensor:
    """The product of two matrices, with the object's epilogue.

    Args:
        a: [M, K], or [batch, M, K].
        b: [K, N], or [batch, K, N].
        operands: of the epilogue, in its order: a bias [N], matrices [M, N].
        columns: of the result: N, or half of it.
        out_dtype: of the result; the object's own.
        path: of the object.

    Returns:
        [M, columns] or [batch, M, columns], row by row.

    Raises:
        ObjectError: the object is missing, damaged, or not for this machine.
    """
    return load(path)(a, b, operands)


def _fake(
    a: torch.Tensor, b: torch.Tensor, operands: Sequence[torch.Tensor], columns: int, out_dtype: torch.dtype, path: str
) -> torch.Tensor:
    return a.new_empty((*a.shape[:-1], columns), dtype=out_dtype)


# Without the checks and wrappers of `torch.library.custom_op`, which take 10 us a call. Kernels are compiled for the strides
# that the graph has: Inductor must not change them.
_library: Any = torch.library.Library("autokernel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "cute_gemm(Tensor a, Tensor b, Tensor[] operands, int columns, ScalarType out_dtype, str path) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.impl("cute_gemm", cute_gemm, "CUDA")
torch.library.register_fake(NAME, _fake)
OVERLOAD: Any = torch.ops.autokernel.cute_gemm.default  # as graphs have it
