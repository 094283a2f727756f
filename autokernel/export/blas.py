"""Which of NVIDIA's BLAS libraries ATen calls, for the length of a call. Knows torch, not Inductor."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch


def with_blas_library(compiled: Callable[..., Any], library: str) -> Callable[..., Any]:
    """Compiled code that runs with another BLAS library.

    torch keeps the choice for the whole process and reads it at each product: it is set in front of every call, and put back
    behind it; behind the last of several that overlap. Threads that run other products at that very moment see it too; a call
    that is captured in a CUDA graph pays once.

    Args:
        compiled: the code.
        library: "cublas" or "cublaslt".
    """

    def run(*args: Any) -> Any:
        with _choice.of(library):
            return compiled(*args)

    return run


class _Choice:
    """The library that calls which are on their way have chosen, and what there was before the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[str] = []
        self._before: Any = None

    @contextlib.contextmanager
    def of(self, library: str) -> Iterator[None]:
        choose = torch.backends.cuda.preferred_blas_library
        with self._lock:
            if not self._running:
                self._before = choose()
            self._running.append(library)
            choose(library)
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(library)
                choose(self._running[-1] if self._running else self._before)


_choice = _Choice()
