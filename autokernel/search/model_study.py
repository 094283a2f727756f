"""The sampler `model`: every legal config ranked by the shipped cost model, and corrected by what this run measures.

A Gaussian process over the difference between measurement and model tells, for every config not yet tried, how fast it
should be and how unsure that is; the one that promises the largest improvement is next. Configs in flight count as if
they had come out as expected, so many can be asked for at once. Needs numpy and scipy; deterministic.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.special import ndtr

from autokernel.records import Candidate, ConfigValue, Status
from autokernel.search.cost_model import CostModel, Floats
from autokernel.search.ledger import Kind, Outcome
from autokernel.search.space import BoundSpace, Config

_MAX_CONFIGS = 40_000  # of one backend; a random part of larger spaces
_MAX_OBSERVED = 250  # then the slowest are forgotten
_FAILED = math.log(2.0)  # a config that failed counts as so much slower than expected
_WORTH_FAILING = 0.5  # configs more likely to fail than this come last


@dataclass(frozen=True, slots=True, kw_only=True)
class Beliefs:
    """How the model may be wrong, in log(time): standard deviations, and how fast they change between configs."""

    level: float = 1.0  # all configs of a backend
    local: float = 0.15  # one region of a space, at least; more where measurements differ more from the model
    noise: float = 0.03  # one config
    reach: float = 1.6  # steps (factors of two) over which configs share their error
    trust: int = 3  # every so many draws, the model's own next choice, whatever was measured; 0: never


@dataclass(slots=True)
class _Arm:
    """One backend's configs with what is believed of them."""

    backend: str
    configs: list[Config]
    place: dict[tuple[tuple[str, ConfigValue], ...], int]
    prior: Floats  # log(time / best time), by the model
    points: Floats  # configs as points in which one step is a factor of two
    known: bool  # whether the model knows the backend


class ModelStudy:
    """Draws what the cost model and the measurements so far promise most of."""

    def __init__(
        self, spaces: Mapping[str, BoundSpace], model: CostModel | None, seed: int, beliefs: Beliefs | None = None
    ) -> None:
        self._beliefs = Beliefs() if beliefs is None else beliefs
        rng = random.Random(seed)
        self._arms = [_arm(backend, space, model, rng) for backend, space in spaces.items()]
        self._arm_of = {arm.backend: i for i, arm in enumerate(self._arms)}
        self._offset = np.cumsum([0, *(len(arm.configs) for arm in self._arms)])
        self._prior = np.concatenate([arm.prior for arm in self._arms])
        self._points = _side_by_side([arm.points for arm in self._arms])
        self._observed: dict[int, float] = {}  # position -> log(us)
        self._failed: set[int] = set()
        self._pending: set[int] = set()
        self._left_out = np.zeros(len(self._prior), dtype=bool)
        self._local = self._beliefs.local

    @property
    def num_trials(self) -> int:
        return len(self._observed) + len(self._failed)

    @property
    def num_feasible(self) -> int:
        return len(self._observed)

    def ask(self) -> tuple[int, str, Config]:
        """The config that promises most; its position is the draw."""
        place = self._next()
        arm = self._arms[int(np.searchsorted(self._offset, place, side="right")) - 1]
        self._pending.add(place)
        return place, arm.backend, dict(arm.configs[place - int(self._offset[self._arm_of[arm.backend]])])

    def start(self, candidate: Candidate) -> int:
        """A candidate that others proposed is in flight."""
        place = self._place(candidate)
        if place >= 0:
            self._pending.add(place)
        return place

    def learn(self, outcome: Outcome, trial: int | None) -> None:
        """The end of a candidate."""
        place = self._place(outcome.candidate) if trial is None else trial
        if place < 0:
            return
        self._pending.discard(place)
        if outcome.median_us is not None:
            self._observed[place] = math.log(outcome.median_us)
        elif outcome.status is not Status.LOST:
            self._failed.add(place)

    def reject(self, trial: int, violated: float) -> None:
        """The draw is illegal: never again."""
        self._pending.discard(trial)
        self._failed.add(trial)

    def repeat(self, trial: int, known: Outcome | None) -> None:
        """The draw is known, or in flight by another way."""
        if known is not None:
            self.learn(known, trial)

    def leave_out(self, kinds: Collection[Kind]) -> None:
        """Draw none of these as long as there are others."""
        self._left_out = np.array([Kind.of(arm.backend, config) in kinds for arm in self._arms for config in arm.configs])

    def thin(self) -> None:
        """Forget the slowest; they stay tried in the ledger."""
        keep = sorted(self._observed, key=lambda place: self._observed[place])[:_MAX_OBSERVED]
        self._observed = {place: self._observed[place] for place in keep}
        self._failed = set(sorted(self._failed)[-_MAX_OBSERVED // 5 :])
        self._pending.clear()

    def _place(self, candidate: Candidate) -> int:
        i = self._arm_of.get(candidate.backend)
        if i is None:
            return -1
        place = self._arms[i].place.get(_identity(candidate.config))
        return -1 if place is None else place + int(self._offset[i])

    def _next(self) -> int:
        tried = [*self._observed, *self._failed, *self._pending]
        open_ = ~self._left_out
        open_[tried] = False
        if not open_.any():
            return int(self._prior.argmin())
        by_model = self._beliefs.trust > 0 and len(tried) % self._beliefs.trust == self._beliefs.trust - 1
        if not self._observed or by_model:
            return int(np.where(open_, self._prior, np.inf).argmin())
        mean, deviation = self._posterior()
        best = min(self._observed.values())
        gain = best - mean
        z = gain / deviation
        expected = gain * ndtr(z) + deviation * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        # far from the best, expected improvements underflow: there, what is fastest by expectation
        score = np.log(np.maximum(expected, 1e-300))
        score = np.where(expected > 1e-200, score, -1e3 - mean)
        return int(np.where(open_, score, -np.inf).argmax())

    def _posterior(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation of log(us) for every config [n]."""
        beliefs = self._beliefs
        places = np.array([*self._observed, *self._failed])
        expected = np.array([*self._observed.values()])
        level = float(np.median(expected - self._prior[places[: len(expected)]]))
        failed = self._prior[places[len(expected) :]] + level + _FAILED
        residual = np.concatenate([expected, failed]) - self._prior[places] - level
        self._local = max(beliefs.local, float(np.sqrt((residual[: len(expected)] ** 2).mean())))
        if self._pending:  # as expected: nothing is learned from them but where not to look twice
            waiting = np.array(sorted(self._pending))
            gram = self._kernel(places, places) + np.eye(len(places)) * beliefs.noise**2
            believed = self._kernel(waiting, places) @ cho_solve(cho_factor(gram, lower=True), residual)
            places, residual = np.concatenate([places, waiting]), np.concatenate([residual, believed])
        gram = self._kernel(places, places) + np.eye(len(places)) * beliefs.noise**2
        factor = cho_factor(gram, lower=True)
        cross = self._kernel(np.arange(len(self._prior)), places)
        mean = self._prior + level + cross @ cho_solve(factor, residual)
        explained = solve_triangular(factor[0], cross.T, lower=True)
        variance = beliefs.level**2 + self._local**2 - (explained**2).sum(axis=0)
        return mean, np.sqrt(np.maximum(variance, 1e-8) + beliefs.noise**2)

    def _kernel(self, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> Floats:
        """Covariance of the model's errors [rows, columns]."""
        a, b = self._points[rows] / self._beliefs.reach, self._points[columns] / self._beliefs.reach
        squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
        distance = np.sqrt(np.maximum(squared, 0.0) * 3.0)
        arms_a = np.searchsorted(self._offset, rows, side="right")
        arms_b = np.searchsorted(self._offset, columns, side="right")
        same = arms_a[:, None] == arms_b[None, :]
        local = self._local**2 * (1 + distance) * np.exp(-distance)
        return np.where(same, self._beliefs.level**2 + local, 0.5 * self._beliefs.level**2)


def _identity(config: Mapping[str, ConfigValue]) -> tuple[tuple[str, ConfigValue], ...]:
    return tuple(sorted(config.items()))


def _arm(backend: str, space: BoundSpace, model: CostModel | None, rng: random.Random) -> _Arm:
    configs = list(space.enumerate())
    if len(configs) > _MAX_CONFIGS:
        configs = rng.sample(configs, _MAX_CONFIGS)
    cost = model.predict(backend, space.names, configs) if model is not None else None
    if cost is None or model is None:
        prior = np.array([rng.random() * 1e-3 for _ in configs])  # no opinion: any order
    else:
        fails = model.fails(backend, space.names, configs)
        prior = cost + np.where(fails > _WORTH_FAILING, _FAILED, 0.0)
    place = {_identity(config): i for i, config in enumerate(configs)}
    return _Arm(backend, configs, place, prior, _points(space, configs), cost is not None)


def _points(space: BoundSpace, configs: Sequence[Config]) -> Floats:
    """Numbers as their binary logarithm, everything else as one axis for each value; 3 steps between two texts."""
    columns: list[list[float]] = []
    for domain in space.domains:
        values = [config.get(domain.name) for config in configs]
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values if v is not None):
            columns.append([0.0 if v is None else math.log2(float(v) + (1.0 if 0 in domain.choices else 0.0)) for v in values])
        else:
            columns += [[3.0 / math.sqrt(2) * (value == choice) for value in values] for choice in domain.choices]
    return np.array(columns, dtype=np.float64).T.reshape(len(configs), -1)


def _side_by_side(parts: Sequence[Floats]) -> Floats:
    """Points of several spaces in one matrix, each with axes of its own, padded with zeros."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])
