"""Which plans to time: first those that should save most, then what Optuna proposes, plans and configs in one.

Savings of single entries add up only as far as entries leave each other alone: a kernel that Inductor cannot see into costs its
neighbours their fusion, and the config that wins alone may not be the best beside them. Optuna's study has one choice for each
part: out, the config that won, or that of a runner-up. It is told what plans should save, by the sums and by what was timed in
the model (`search/plan_beliefs.py`); of what it proposes, those are timed that promise the largest improvement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna

from autokernel.search.plan_beliefs import Beliefs, improvement_us
from autokernel.search.plans import Part, Plan, best_plans, completed, differing_us, with_config

_TRIES = 128  # proposals of each round
_TOLD_PLANS = 32  # how many plans tell the sampler what sums of savings look like
_OUT, _OWN = "out", "config 1"  # of a part's choices; runners-up are configs 2, 3, ...
_SELDOM = 2.0  # deviations that a plan is not expected to be better by than it should be


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
        self._seed = seed
        self._told_apart_us = told_apart_us
        self._proposed: list[Plan] = []
        self._rounds = 0
        self.left_out: list[tuple[Plan, float]] = []  # of the first plans: in what, in us, they differ from a better one
        self._beliefs = Beliefs(parts, step_us, told_apart_us / 2)
        self._choices = {part.key: self._choices_of(part) for part in self._parts}
        self._names = {part.key: f"part {number}" for number, part in enumerate(self._parts)}
        self._distributions: dict[str, Any] = {
            self._names[key]: optuna.distributions.CategoricalDistribution(list(choices))
            for key, choices in self._choices.items()
            if len(choices) > 1
        }
        self._ranked = best_plans(parts, max(limit, _TOLD_PLANS))

    def first(self) -> list[Plan]:
        """The plans that should save most, with the configs that won alone: half of what may be proposed."""
        found: list[Plan] = []
        for plan in self._ranked:
            us = self._differs_us(plan)
            if us <= self._told_apart_us:
                self.left_out.append((plan, us))
            elif len(found) < math.ceil(self._limit / 2):
                found.append(self._note(plan))
        return found

    def next(self, best: Plan | None = None) -> list[Plan]:
        """Optuna's proposals that may be better than a plan, half of the limit at most; none twice.

        Args:
            best: to be beaten; default: the first.
        """
        best = best or self._proposed[0]
        count = min(self._limit - len(self._proposed), math.ceil(self._limit / 2))
        if count <= 0 or not self._distributions:
            return []
        study = self._informed(best)
        found: dict[Plan, None] = {}
        for _ in range(_TRIES):
            trial = study.ask(self._distributions)
            plan = self._asked(trial.params)
            found[plan] = None
            study.tell(trial, self._expected_us(plan, best))
        return self._most_promising(found, best, count)

    def tell(self, plan: Plan, over: Plan, gained_us: float, noise_us: float = 0.0) -> None:
        """What a plan saves per step beyond another, both timed end to end, with the standard deviation of that."""
        self._beliefs.tell(plan, over, gained_us, noise_us)

    def _choices_of(self, part: Part) -> dict[str, str | None]:
        """What may become of a part: config by the name of the choice."""
        contested = bool(part.rivals) or any(part.key in other.rivals for other in self._parts)
        runners_up = {f"config {number}": config for number, config in enumerate(part.runners_up, start=2)}
        return {**({_OUT: None} if contested else {}), _OWN: None, **runners_up}

    def _informed(self, best: Plan) -> optuna.Study:
        """A study that knows what the plans that should save most, and the runners-up in the best one, should save."""
        self._rounds += 1
        seed = (self._seed + self._rounds - 1) % 2**32
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, multivariate=True)
        study = optuna.create_study(sampler=sampler)
        others = [with_config(best, part.key, config, self._parts) for part in self._parts for config in part.runners_up]
        for plan in dict.fromkeys([*self._ranked[:_TOLD_PLANS], *self._proposed, *others]):
            study.add_trial(
                optuna.trial.create_trial(
                    params=self._params(plan),
                    distributions=self._distributions,
                    value=self._expected_us(plan, best),
                )
            )
        return study

    def _params(self, plan: Plan) -> dict[str, str]:
        """A plan as the study's choices."""
        configs = dict(plan.configs)
        chosen = {}
        for key, choices in self._choices.items():
            own = _OWN if key in plan.keys else _OUT
            runner_up = (name for name, config in choices.items() if config is not None and config == configs.get(key))
            chosen[key] = next(runner_up, own)
        return {self._names[key]: choice for key, choice in chosen.items() if self._names[key] in self._distributions}

    def _asked(self, params: Mapping[str, str]) -> Plan:
        """The plan of the study's choices: what excludes each other is settled by what it saves, and all that fits is added."""
        chosen = {key: params.get(self._names[key], _OWN) for key in self._choices}
        saved = {part.key: part.saved_us for part in self._parts}
        wanted = sorted((key for key in chosen if chosen[key] != _OUT), key=lambda key: saved[key], reverse=True)
        configs = {key: self._choices[key][chosen[key]] for key in wanted}
        plan = completed(wanted, self._parts, {key: config for key, config in configs.items() if config is not None})
        return replace(plan, origin="optuna")

    def _expected_us(self, plan: Plan, best: Plan) -> float:
        """What a step should take with a plan."""
        return self._step_us - best.saved_us - self._beliefs.gain_us(plan, best)[0]

    def _most_promising(self, plans: Iterable[Plan], best: Plan, count: int) -> list[Plan]:
        """Those with the largest expected improvement, each as if those before it had come out as expected."""
        beliefs = self._beliefs
        found: list[Plan] = []
        plans = [plan for plan in plans if self._is_new(plan)]
        while len(found) < count:
            gains = {plan: beliefs.gain_us(plan, best) for plan in plans if self._is_new(plan)}
            gains = {plan: (us, off) for plan, (us, off) in gains.items() if us + _SELDOM * off > self._told_apart_us}
            if not gains:
                break
            plan = max(gains, key=lambda plan: improvement_us(*gains[plan]))
            beliefs = beliefs.expecting(plan, best)
            found.append(self._note(plan))
        return found

    def _is_new(self, plan: Plan) -> bool:
        """Whether it could be told apart from all that was proposed."""
        return all(differing_us(known, plan, self._parts) > self._told_apart_us for known in self._proposed)

    def _differs_us(self, plan: Plan) -> float:
        """In how much it differs from any plan that was proposed and should save as much, at least."""
        better = (known for known in self._proposed if known.saved_us >= plan.saved_us)
        return min((differing_us(known, plan, self._parts) for known in better), default=math.inf)

    def _note(self, plan: Plan) -> Plan:
        self._proposed.append(plan)
        return plan
