"""What a plan should save, by its parts' own times and by the plans that were timed in the model. Needs numpy; deterministic.

Savings add up but for what parts do to their neighbours, and neighbours to them. That is one unknown number for each part that
is in a plan, and one for each config of a runner-up, normal about nothing. Every comparison in the model says what the numbers
of two plans come to, within its interval, and all plans with the same parts and configs are corrected by it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autokernel.search.plans import WITHIN_MODEL, Part, Plan

_BESIDE_NEIGHBOURS = 0.1  # of what stock code takes for a part's calls: a guess of what its neighbours make of its saving
Floats = npt.NDArray[np.float64]


class Beliefs:
    """Of one scenario's plans.

    Args:
        parts: the entries that may be in a plan.
        step_us: one step of the scenario; nothing saves more.
        noise_us: the least that a comparison of two plans is off by.
    """

    def __init__(self, parts: Sequence[Part], step_us: float, noise_us: float) -> None:
        self._parts = tuple(parts)
        self._noise_us = max(noise_us, 1e-6 * step_us, 1e-9)
        self._deviations: dict[tuple[str, str], float] = {}  # by part and config; "": of being in a plan at all
        for part in parts:
            self._deviations[part.key, ""] = _BESIDE_NEIGHBOURS * min(part.stock_us, step_us)
            # twice as much is seldom
            self._deviations |= {(part.key, config): WITHIN_MODEL / 2 * part.own_us for config in part.runners_up}
        self._number = {name: number for number, name in enumerate(self._deviations)}
        # of the unknown numbers, in deviations: the inverse of their covariance, and that times their mean
        self._precision: Floats = np.eye(len(self._number))
        self._pull: Floats = np.zeros(len(self._number))
        self._settle()

    def tell(self, plan: Plan, over: Plan, gained_us: float, noise_us: float = 0.0) -> None:
        """A plan saved so much more than another when both were timed in the model, with this standard deviation."""
        noise_us = max(noise_us, self._noise_us)
        row = (self._row(plan) - self._row(over)) / noise_us
        off = (gained_us - (plan.saved_us - over.saved_us)) / noise_us
        self._precision = self._precision + np.outer(row, row)
        self._pull = self._pull + row * off
        self._settle()

    def gain_us(self, plan: Plan, over: Plan) -> tuple[float, float]:
        """What a plan should save more than another, and the standard deviation of that."""
        row = self._row(plan) - self._row(over)
        mean = plan.saved_us - over.saved_us + float(row @ self._mean)
        return mean, math.sqrt(max(0.0, float(row @ self._spread @ row)))

    def expecting(self, plan: Plan, over: Plan) -> Beliefs:
        """The same with a comparison under way, as if it came out as expected."""
        found = copy.copy(self)
        found.tell(plan, over, self.gain_us(plan, over)[0])
        return found

    def _settle(self) -> None:
        self._spread: Floats = np.asarray(np.linalg.inv(self._precision), np.float64)
        self._mean: Floats = self._spread @ self._pull

    def _row(self, plan: Plan) -> Floats:
        """What a plan has, in deviations."""
        row = np.zeros(len(self._number))
        configs = dict(plan.configs)
        for part in self._parts:
            if part.key in plan.keys:
                for config in {"", configs.get(part.key, "")}:
                    name = part.key, config
                    row[self._number[name]] = self._deviations[name] * part.left(plan.keys)
        return row


def improvement_us(gain_us: float, deviation_us: float) -> float:
    """What a plan is expected to save more if it is kept only where it does save more."""
    if deviation_us <= 0:
        return max(gain_us, 0.0)
    z = gain_us / deviation_us
    return gain_us * 0.5 * (1 + math.erf(z / math.sqrt(2))) + deviation_us * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
