"""Import this in a process that compiles CuTe DSL kernels and does nothing else, or that such processes are forked from.

Both sources are imported, but not what quack's decorators bring along (`torch.compile` and all that it needs): half of the
time, for what compiling a kernel never asks for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _as_it_is(function: Any = None, *_: Any, recompile_limit: int = 0, **__: Any) -> Any:
    """A decorator, with arguments or without, that changes nothing. quack asks whether there is a `recompile_limit`."""
    return function if callable(function) else lambda decorated: decorated


@contextlib.contextmanager
def _undecorated() -> Iterator[None]:
    before: tuple[Callable[..., Any], Callable[..., Any]] = torch.compile, torch.compiler.disable
    torch.compile, torch.compiler.disable = _as_it_is, _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile, torch.compiler.disable = before  # type: ignore[assignment]


with _undecorated():
    from autokernel.cutedsl import operators, quack  # noqa: F401
