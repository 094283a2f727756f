"""Which of NVIDIA's BLAS libraries ATen calls, for the length of a call. Knows torch, not Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def with_blas_library(compiled: Callable[..., Any], library: str) -> Callable[..., Any]:
    """Compiled code that runs with another BLAS library.

    torch keeps the choice for the whole process and reads it at each product: it is set in front of every call, and put back
    behind it. Threads that run products at that very moment see it too; a call that is captured in a CUDA graph pays once.

    Args:
        compiled: the code.
        library: "cublas" or "cublaslt".
    """

    def run(*args: Any) -> Any:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            return compiled(*args)
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    return run
