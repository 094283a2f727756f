"""What a sampler has been told of one problem, in its own terms, and what it may forget. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autokernel.records import Candidate
from autokernel.search.space import BoundSpace

_KEEP_BEST, _KEEP_RECENT, _KEEP_VIOLATED = 100, 60, 40
_FIRST_PENALTY = math.log(1e6)  # before anything was measured: one second


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One finished trial; `log_us` is None where the config is illegal or made its candidate fail."""

    params: Mapping[str, Any]
    log_us: float | None
    violated: float  # 0 if legal and fine


class Observations:
    """Parameters are `backend`, then `<backend>.<name>`; an ordered one is the position of its value."""

    def __init__(self, spaces: Mapping[str, BoundSpace]) -> None:
        self._spaces = spaces
        self._worst = -math.inf
        self.kept: list[Observation] = []
        self.num_feasible = 0

    def params(self, candidate: Candidate) -> dict[str, Any]:
        """A candidate's parameters."""
        params: dict[str, Any] = {"backend": candidate.backend}
        for domain in self._spaces[candidate.backend].domains:
            if domain.name in candidate.config:
                value = candidate.config[domain.name]
                params[f"{candidate.backend}.{domain.name}"] = domain.choices.index(value) if domain.ordered else value
        return params

    def add(self, params: Mapping[str, Any], median_us: float | None, violated: float = 1.0) -> Observation:
        """Take in one trial: its median, or how badly it failed."""
        observation = self.observe(params, median_us, violated)
        self.kept.append(observation)
        return observation

    def observe(self, params: Mapping[str, Any], median_us: float | None, violated: float = 1.0) -> Observation:
        """As `add`, but remembers the worst time alone."""
        log_us = math.log(median_us) if median_us is not None else None
        observation = Observation(params=dict(params), log_us=log_us, violated=violated if log_us is None else 0.0)
        if log_us is not None:
            self.num_feasible += 1
            self._worst = max(self._worst, log_us)
        return observation

    def value(self, observation: Observation) -> float:
        """What the sampler is told: log of the time, or twice the worst time seen."""
        if observation.log_us is not None:
            return observation.log_us
        return self._worst + math.log(2) if math.isfinite(self._worst) else _FIRST_PENALTY

    def thin(self) -> None:
        """Keep the best, the latest, and the latest failures: fitting a model costs time in proportion."""
        feasible = [seen for seen in self.kept if seen.log_us is not None]
        best = sorted(feasible, key=lambda seen: seen.log_us or 0.0)[:_KEEP_BEST]
        violated = [seen for seen in self.kept if seen.log_us is None][-_KEEP_VIOLATED:]
        keep = {id(seen) for seen in (*best, *feasible[-_KEEP_RECENT:], *violated)}
        self.kept = [seen for seen in self.kept if id(seen) in keep]
