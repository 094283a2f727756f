"""What `torch.compile(mode="max-autotune")` runs for a problem: a stock choice that finalists meet, timed and never exported.

Inductor finds it by timing kernels while it compiles. What it picked is told as candidates, as far as a bundle can have it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch._inductor import list_mode_options
from torch._inductor.select_algorithm import get_algorithm_selector_cache

from autokernel.export.one_row import REDUCTION
from autokernel.export.templates import DECOMPOSE_K, TILE
from autokernel.records import Candidate, ConfigValue, Problem

BACKEND, MODE = "inductor", "max-autotune"
TEMPLATES: Mapping[str, tuple[str, ...]] = {  # of each product, for GPUs: what an entry may name
    "mm": ("mm", "mm_persistent_tma", DECOMPOSE_K, REDUCTION),
    "addmm": ("mm", "mm_persistent_tma", REDUCTION),
    "merged_mm": ("mm", "mm_persistent_tma"),
    "bmm": ("bmm",),
    "baddbmm": ("bmm",),
}
_CPP_TEMPLATES = {"mm": "cpp_gemm", "addmm": "cpp_gemm", "bmm": "cpp_bmm"}
_CPP_OWN = {  # Inductor's own blocking
    **dict.fromkeys(("threads_m", "threads_n", "threads_k", "block_m", "block_n", "block_k"), 0), "k_slices": 1,
}  # fmt: skip


def max_autotune_of(problem: Problem) -> Candidate:
    """The candidate that stands for it."""
    return Candidate(problem=problem, backend=BACKEND, config={"mode": MODE})


def is_max_autotune(candidate: Candidate) -> bool:
    """Whether a candidate is what `max_autotune_of` makes."""
    return candidate.backend == BACKEND and candidate.config.get("mode") == MODE


def options() -> dict[str, Any]:
    """Inductor's configuration for it.

    CUDA graphs are captured by hand, as for everybody. A graph from the cache would say nothing of its kernels; their timings
    come from a cache all the same.
    """
    return {**list_mode_options("max-autotune-no-cudagraphs"), "fx_graph_cache": False}


@dataclass(slots=True)
class Picks:
    """What Inductor picked for the products of a problem, while it was compiled. Copies of one product are one pick."""

    problem: Problem
    names: list[str] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The picks in words."""
        return ", ".join(dict.fromkeys(self.names)) or "nothing to choose from"

    def note(self, timings: Mapping[Any, float], *_: Any) -> None:
        """Inductor's hook: the time of each kernel that it chose from; of one product, when it is lowered."""
        timed = {choice: us for choice, us in timings.items() if math.isfinite(us)}
        if not timed:
            return
        best = min(timed, key=lambda choice: timed[choice])
        candidate = _candidate(self.problem, best)
        self.names.append(candidate.label if candidate is not None else f"aten {best.name}" if _is_library(best) else best.name)
        if candidate is not None and candidate not in self.candidates:
            self.candidates.append(candidate)


@contextmanager
def listening(problem: Problem) -> Iterator[Picks]:
    """Hear what Inductor picks while the block compiles; complete when it ends."""
    picks = Picks(problem)
    savers: list[Any] = get_algorithm_selector_cache().feedback_saver_fns
    savers.append(picks.note)
    try:
        yield picks
    finally:
        savers.remove(picks.note)
    if not picks.names and _is_row(problem):
        # nothing was chosen from: Inductor's graph has no product any more
        picks.names.append(REDUCTION)
        picks.candidates.append(Candidate(problem=problem, backend=BACKEND, config={"template": REDUCTION}))


def _is_library(choice: Any) -> bool:
    return type(choice).__name__ == "ExternKernelCaller"


def _is_row(problem: Problem) -> bool:
    return problem.device == "cuda" and problem.op == "mm" and problem.inputs[0].shape[0] == 1


def _candidate(problem: Problem, choice: Any) -> Candidate | None:
    """A kernel as what an entry may say of this problem; None where that cannot be said."""
    config: dict[str, ConfigValue]
    if problem.device == "cpu":
        from torch._inductor.codegen.cpp_gemm_template import CppGemmTemplate

        if problem.op not in _CPP_TEMPLATES or not isinstance(getattr(choice, "template", None), CppGemmTemplate):
            return None
        return Candidate(problem=problem, backend=BACKEND, config={"template": _CPP_TEMPLATES[problem.op], **_CPP_OWN})
    made_of: Any = getattr(choice, "annotations", {}).get("ktc")
    template = str(made_of.template.uid).removeprefix("triton::") if made_of is not None else ""
    if problem.op == "merged_mm" or template not in TEMPLATES.get(problem.op, ()):
        return None  # of merged products each has a pick of its own
    fields = made_of.params.to_kwargs()
    names = ("k_split",) if template == DECOMPOSE_K else TILE
    if any(name not in fields for name in names):
        return None
    config = {"template": template, **{name: int(fields[name]) for name in names}}
    return Candidate(problem=problem, backend=BACKEND, config=config)
