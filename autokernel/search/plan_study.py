"""Which plan to time next: first those that should save most, then what Optuna makes of the measurements.

Savings of single entries add up only as far as entries leave each other alone: a kernel that Inductor cannot see into costs its
neighbours their fusion. Each plan that was timed end to end corrects the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import optuna

from autokernel.search.plans import Part, Plan, best_plans, completed, differing_us

_TRIES = 64  # proposals that were known already before the study is taken to be exhausted
_AT_LEAST = 3  # plans of the first round: sums of savings are off by what a launch takes, and what neighbours gain
_TOLD_PLANS = 32  # how many plans tell the sampler what sums of savings look like


class PlanStudy:
    """Proposes plans of one scenario, each once. Of plans that could not be told apart only the one that should save most.

    Args:
        parts: the entries that may be in a plan, with what each saves.
        step_us: one step of the scenario without any of them.
        limit: plans to propose in all.
        seed: makes proposals reproducible, given the same measurements.
        told_apart_us: plans that differ in less than this could not be told apart.
    """

    def __init__(self, parts: Sequence[Part], step_us: float, limit: int, seed: int = 0, told_apart_us: float = 0.0) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise a line per trial
        self._parts = tuple(parts)
        self._step_us = step_us
        self._limit = limit
        self._told_apart_us = told_apart_us
        self._proposed: list[Plan] = []
        self.left_out: list[tuple[Plan, float]] = []  # of the first plans: in what, in us, they differ from a better one
        self._names = {part.key: f"part {number}" for number, part in enumerate(self._parts)}
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=0, multivariate=True)
        self._study = optuna.create_study(sampler=sampler)
        self._ranked = best_plans(parts, max(limit, _TOLD_PLANS))
        for plan in self._ranked:
            self._tell(plan, plan.saved_us)

    def first(self) -> list[Plan]:
        """The plans that should save most: the better half of what may be proposed, three at least."""
        count = min(self._limit, max(_AT_LEAST, math.ceil(self._limit / 2)))
        found: list[Plan] = []
        for plan in self._ranked:
            if len(found) == count:
                break
            us = self._differs_us(plan)
            if us > self._told_apart_us:
                found.append(self._note(plan))
            else:
                self.left_out.append((plan, us))
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
            if self._differs_us(plan) > self._told_apart_us:
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

    def _differs_us(self, plan: Plan) -> float:
        """In how much it differs from any plan that was proposed and should save as much, at least."""
        better = (known for known in self._proposed if known.saved_us >= plan.saved_us)
        return min((differing_us(known, plan, self._parts) for known in better), default=math.inf)

    def _note(self, plan: Plan) -> Plan:
        self._proposed.append(plan)
        return plan

    def _saved(self, key: str) -> float:
        return next(part.saved_us for part in self._parts if part.key == key)
