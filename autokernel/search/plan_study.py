"""Which plan to time next: first those that should save most, then what Optuna makes of the measurements.

Savings of single entries add up only as far as entries leave each other alone: a kernel that Inductor cannot see into costs its
neighbours their fusion. Each plan that was timed end to end corrects the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import optuna

from autokernel.search.plans import Part, Plan, best_plans, completed, nodes_of

_TRIES = 64  # proposals that were known already before the study is taken to be exhausted
_TOLD_PLANS = 32  # how many plans tell the sampler what sums of savings look like


class PlanStudy:
    """Proposes plans of one scenario, each once. Of plans that take the same nodes only the one that should save most: they
    leave their neighbours the same, so the times of their own kernels tell them apart.

    Args:
        parts: the entries that may be in a plan, with what each saves.
        step_us: one step of the scenario without any of them.
        limit: plans to propose in all.
        seed: makes proposals reproducible, given the same measurements.
    """

    def __init__(self, parts: Sequence[Part], step_us: float, limit: int, seed: int = 0) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise a line per trial
        self._parts = tuple(parts)
        self._step_us = step_us
        self._limit = limit
        self._proposed: dict[frozenset[str], Plan] = {}  # by the nodes that they take
        self._names = {part.key: f"part {number}" for number, part in enumerate(self._parts)}
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, multivariate=True)
        self._study = optuna.create_study(sampler=sampler)
        self._ranked = best_plans(parts, max(limit, _TOLD_PLANS))
        for plan in self._ranked:
            self._tell(plan, plan.saved_us)

    def first(self) -> list[Plan]:
        """The plans that should save most: the better half of what may be proposed, two at least."""
        count = min(self._limit, max(2, math.ceil(self._limit / 2)))
        found: list[Plan] = []
        for plan in self._ranked:
            if len(found) < count and self._is_new(plan):
                found.append(self._note(plan))
        return found

    def next(self) -> list[Plan]:
        """What Optuna proposes for the rest, nothing twice; fewer where there are no other plans."""
        found: list[Plan] = []
        for _ in range(_TRIES):
            if len(self._proposed) >= self._limit:
                break
            trial = self._study.ask()
            wanted = [part.key for part in self._parts if trial.suggest_categorical(self._names[part.key], [True, False])]
            plan = completed(sorted(wanted, key=self._saved, reverse=True), self._parts)
            if self._is_new(plan):
                found.append(self._note(plan))
            self._study.tell(trial, self._step_us - plan.saved_us)
        return found

    def tell(self, plan: Plan, saved_us: float) -> None:
        """What a plan really saves per step, timed end to end."""
        self._tell(plan, saved_us)

    def _tell(self, plan: Plan, saved_us: float) -> None:
        taken = set(plan.keys)
        choices = optuna.distributions.CategoricalDistribution([True, False])
        self._study.add_trial(
            optuna.trial.create_trial(
                params={self._names[part.key]: part.key in taken for part in self._parts},
                distributions=dict.fromkeys(self._names.values(), choices),
                value=self._step_us - saved_us,
            )
        )

    def _is_new(self, plan: Plan) -> bool:
        known = self._proposed.get(nodes_of(plan, self._parts))
        return known is None or (plan.keys != known.keys and plan.saved_us > known.saved_us)

    def _note(self, plan: Plan) -> Plan:
        self._proposed[nodes_of(plan, self._parts)] = plan
        return plan

    def _saved(self, key: str) -> float:
        return next(part.saved_us for part in self._parts if part.key == key)
