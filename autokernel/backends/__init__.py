"""Backends turn a candidate into something that runs. One file each, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from autokernel.records import Candidate, ConfigValue, Problem

if TYPE_CHECKING:
    import torch


class BuildError(Exception):
    """The candidate's own config made its build fail. The message is one sentence."""


class Refused(Exception):
    """The backend cannot build this config for this problem (status INVALID). The message says which rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A candidate, ready to run on `num_copies` independent sets of inputs in one call.

    Running many copies in one call keeps caches as cold as inside a model and the cost of the call itself out of the
    number. `run` takes, for every copy in order, the problem's non-constant inputs, and returns the outputs of every copy
    in order. Constants were given to `Backend.build`.
    """

    run: Callable[..., tuple[torch.Tensor, ...]]
    num_copies: int
    hits: int = 1  # how many of the candidate's entries were really used; 0 means stock code ran instead
    notes: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """What a backend has to offer. Backends hold no state."""

    name: str

    def unavailable(self, device: str) -> str | None:
        """None if it can run on this machine's `device` ("cpu", "cuda"); otherwise one sentence with the cure."""
        ...

    def supports(self, problem: Problem) -> str | None:
        """None if it may have candidates for the problem; otherwise one sentence that says why not."""
        ...

    def build(self, candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        """Compile. `constants` holds, per copy, the problem's constant inputs in order.

        Raises:
            Refused: the config is not legal for the problem.
            BuildError: the compiler failed on it.
        """
        ...

    def export(self, candidate: Candidate) -> Mapping[str, ConfigValue]:
        """The entry of a bundle that makes production build exactly this candidate."""
        ...


def get_backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: no such backend.
    """
    for backend in all_backends():
        if backend.name == name:
            return backend
    raise ValueError(f"no backend {name!r}; there are {', '.join(b.name for b in all_backends())}")


def all_backends() -> tuple[Backend, ...]:
    """Every backend, in order of precedence: of two equal candidates the simpler one wins."""
    from autokernel.backends.aten import AtenBackend
    from autokernel.backends.cutedsl import CuteDslBackend
    from autokernel.backends.inductor import InductorBackend
    from autokernel.backends.triton import TritonBackend

    return (AtenBackend(), InductorBackend(), TritonBackend(), CuteDslBackend())
