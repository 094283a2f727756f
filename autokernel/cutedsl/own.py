"""Our own CuTe DSL kernel for few rows, compiled for any sizes. Import it with `compiler.environment` set."""

from __future__ import annotations

from typing import Any

import cutlass
import torch
from cutlass import cute

from autokernel.cutedsl.cluster_gemm import ClusterGemm
from autokernel.cutedsl.config import ALIGNMENT_BYTES
from autokernel.cutedsl.spec import KernelSpec, Launch

_ELEMENTS = 8  # of 16 bits, in what TMA reads at least
_DTYPES = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16, torch.float32: cutlass.Float32}


def compile_spec(
    spec: KernelSpec, matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor], function: str
) -> tuple[Any, Launch]:
    """The kernel on SM90.

    Args:
        spec: of two matrices of 16 bits, both contiguous along K, without an epilogue.
        matrices: a, b and the result: only their dtypes count.
        function: what the kernel is to be called.

    Returns:
        What has `export_to_c`, and how to call it.
    """
    m, n, k = cute.sym_int(), cute.sym_int(divisibility=_ELEMENTS), cute.sym_int(divisibility=_ELEMENTS)
    a, b, out = (_DTYPES[matrix.dtype] for matrix in matrices)
    columns = cute.runtime.make_fake_tensor(b, (k, n), stride=(1, _stride()), assumed_align=ALIGNMENT_BYTES)
    arguments = (columns, _symbolic(a, m, k), _symbolic(out, m, n), cute.runtime.make_fake_stream())
    compiled = cute.compile(ClusterGemm(spec.cute), *arguments, options="--enable-tvm-ffi")
    return compiled, Launch(function=function, arguments=("b", "a", "out", "stream"), transposed=True)


def _symbolic(dtype: Any, rows: Any, columns: Any) -> Any:
    """A matrix of any size, with 16-byte aligned rows."""
    return cute.runtime.make_fake_tensor(dtype, (rows, columns), stride=(_stride(), 1), assumed_align=ALIGNMENT_BYTES)


def _stride() -> Any:
    return cute.sym_int64(divisibility=_ELEMENTS)
