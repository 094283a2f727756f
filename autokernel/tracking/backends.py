"""Which backend won how often, and by how much the others lost: for MLflow, the tables and scripts. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autokernel.records import Candidate
from autokernel.tracking.summary import ProblemSummary, RunSummary, latency_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """A backend's fastest kernel of one problem, as screened."""

    candidate: Candidate
    us: float
    behind: float  # its time over that of the kernel that is used; below 1 if it is faster and was not confirmed


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSummary:
    """One backend over all problems of a run. Means are geometric; None where there is nothing to average."""

    backend: str
    num_timed: int  # problems with a kernel of it that passed its checks
    num_used: int  # problems for which a kernel of it is used in the end
    lead: float | None  # where it is used: the runner-up's time over its own
    behind: float | None  # elsewhere: its own time over that of the kernel used


def best_of_each(problem: ProblemSummary) -> dict[str, Best]:
    """The fastest kernel of each backend, fastest first; empty as long as nothing is used."""
    found = problem.by_backend
    used = found.get(problem.backend)
    if used is None:
        return {}
    return {
        name: Best(candidate=trial.evaluation.candidate, us=latency_us(trial), behind=latency_us(trial) / latency_us(used))
        for name, trial in found.items()
    }


def backend_summaries(run: RunSummary) -> tuple[BackendSummary, ...]:
    """Every backend with a timed kernel, those used most first."""
    rows = []
    for backend in run.backends:
        leads, behinds, num_timed = [], [], 0
        for problem in run.problems:
            best = best_of_each(problem)
            if backend not in best:
                continue
            num_timed += 1
            if problem.backend != backend:
                behinds.append(best[backend].behind)
            elif problem.runner_up is not None:
                leads.append(problem.runner_up[1])
        rows.append(
            BackendSummary(
                backend=backend,
                num_timed=num_timed,
                num_used=sum(problem.backend == backend for problem in run.problems),
                lead=_mean(leads),
                behind=_mean(behinds),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.num_used))


def _mean(ratios: list[float]) -> float | None:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else None
