"""How many trials each hotspot gets: Amdahl's share times what its roofline leaves to gain; and how many plans. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from autokernel.records import Hotspot

_SECONDS_PER_TRIAL = 0.1  # 15 workers of an H200 take 0.2: more trials than fit are not planned, and time left over is lost
_STEP_PER_PLAN = 0.02  # of a scenario's step that has to be at stake for each plan that is timed in the model


def merge(hotspots: Iterable[Hotspot]) -> dict[str, float]:
    """Attainable gain by problem key, the same problem of several scenarios added up; in order of first appearance."""
    gains: dict[str, float] = {}
    for hotspot in hotspots:
        gains[hotspot.problem.key] = gains.get(hotspot.problem.key, 0.0) + hotspot.attainable_gain
    return gains


def allocate(
    hotspots: Sequence[Hotspot],
    trials: int,
    seconds: float = math.inf,
    minimum: int = 1,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Trials by problem key.

    Every problem gets `minimum` (its seeds) as far as `trials` reach, those with more to gain first; the rest is dealt
    in proportion to attainable gain, in whole trials, and never beyond the size of a space.

    Args:
        hotspots: all that are to be searched; equal problems of several scenarios share their trials.
        trials: what may be spent in all.
        seconds: wall time of the search; plans no more trials than could fit.
        minimum: of each problem.
        sizes: number of legal configs by problem key, where known.

    Returns:
        Problem key -> trials; the sum is at most `trials`. Most to gain first.
    """
    gains = merge(hotspots)
    ranked = sorted(gains, key=lambda key: (-gains[key], key))
    caps = {key: (sizes or {}).get(key, trials) for key in ranked}
    left = trials if math.isinf(seconds) else min(trials, math.floor(seconds / _SECONDS_PER_TRIAL))
    given = dict.fromkeys(ranked, 0)
    for key in ranked:
        given[key] = min(minimum, caps[key], left)
        left -= given[key]
    while left > 0:
        # whoever is below its cap shares what is left; a cap that is hit frees trials for another round
        open_keys = [key for key in ranked if given[key] < caps[key] and gains[key] > 0]
        if not open_keys:
            break
        total = sum(gains[key] for key in open_keys)
        pool = left
        for key in open_keys:
            extra = min(math.floor(pool * gains[key] / total), caps[key] - given[key])
            given[key] += extra
            left -= extra
        if left == pool:  # every share is below one: the largest first
            for key in open_keys[:left]:
                given[key] += 1
                left -= 1
    return given


def plans_to_time(limit: int, at_stake: float) -> int:
    """How many plans of a scenario are worth timing in the model: the best by the sum, and one for each 2 % at stake.

    Args:
        limit: of the experiment.
        at_stake: the fraction of the scenario's step that the choice between plans is about, by its profile.
    """
    return min(limit, 1 + math.ceil(min(at_stake, 1.0) / _STEP_PER_PLAN))


class Scheduler:
    """Whose turn it is: the problem with the most gain still expected. Trials that one cannot use go to the others.

    What the next trial may gain falls with those spent: gain / (1 + spent), so problems advance in proportion to their
    gains, and each gets its minimum first.
    """

    def __init__(self, allocation: Mapping[str, int], gains: Mapping[str, float], minimum: int = 1) -> None:
        self._limits = dict(allocation)
        self._gains = {key: gains.get(key, 0.0) for key in allocation}
        self._minimum = minimum
        self._spent = dict.fromkeys(allocation, 0)
        self._closed: set[str] = set()

    def limit(self, key: str) -> int:
        """Trials this problem may use by now: its allocation and what others passed on."""
        return self._limits[key]

    def next(self) -> str | None:
        """The problem to ask next; None when all trials are spent or no problem can use them."""
        candidates = self._open()
        if not candidates:
            return None
        return max(candidates, key=lambda key: (self._spent[key] < min(self._minimum, self._limits[key]), self._expected(key)))

    def spend(self, key: str, count: int = 1) -> None:
        """Trials were proposed, or found finished when a run was resumed."""
        self._spent[key] += count

    def exhaust(self, key: str) -> None:
        """The problem has nothing left to try: what it did not use goes to the others by their gains. Idempotent."""
        if key in self._closed:
            return
        self._closed.add(key)
        unused = max(0, self._limits[key] - self._spent[key])
        self._limits[key] -= unused
        others = [k for k in self._limits if k not in self._closed]
        for _ in range(unused if others else 0):
            heir = max(others, key=lambda k: self._gains[k] / (1 + self._limits[k]))
            self._limits[heir] += 1

    def _open(self) -> list[str]:
        return [key for key in self._limits if key not in self._closed and self._spent[key] < self._limits[key]]

    def _expected(self, key: str) -> float:
        return self._gains[key] / (1 + self._spent[key])
