"""Which candidates of one problem are known, in flight or waiting, so that none is evaluated twice. Pure Python."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from autokernel.records import Candidate, ConfigValue, Evaluation, Problem, Status
from autokernel.search.space import BoundSpace, Config

MAX_LOST = 2  # a candidate whose worker went away is tried again this often
MAX_WRONG = 5  # of one kind, and none of it is right: no more of it are proposed
# What speaks against a kind, in wrong candidates. What does not build is often only too large: other tiles may do. What a
# machine under load may cause does not count.
_REFUSED: Mapping[Status, Fraction] = {
    Status.WRONG: Fraction(1), Status.INVALID: Fraction(1, 3), Status.BUILD_ERROR: Fraction(1, 3),
}  # fmt: skip
_KIND = ("implementation", "template", "kernel", "source", "mode", "precision")  # parameters that choose an algorithm
_COUNT_LIMIT = 1_000  # spaces beyond this are not counted, and never called exhausted
_MAX_MUTATIONS = 32
_MAX_RANDOM = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is known of a candidate; `median_us` if and only if it is OK."""

    candidate: Candidate
    status: Status
    median_us: float | None = None

    @classmethod
    def of(cls, evaluation: Evaluation) -> Outcome:
        measured = evaluation.measurement
        median = measured.median_us if measured is not None else None
        return cls(candidate=evaluation.candidate, status=evaluation.status, median_us=median)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Configs of a backend that run the same algorithm, with other tiles: if some are not exact enough, all of them are."""

    backend: str
    chosen: tuple[tuple[str, ConfigValue], ...]  # parameter and value

    @classmethod
    def of(cls, backend: str, config: Mapping[str, ConfigValue]) -> Kind:
        """The kind of a config."""
        return cls(backend=backend, chosen=tuple((name, config[name]) for name in _KIND if name in config))

    @property
    def label(self) -> str:
        """As it is said in a log: "inductor template=mm"."""
        return " ".join([self.backend, *(f"{name}={value}" for name, value in self.chosen)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A candidate that is to be proposed before the sampler is asked."""

    candidate: Candidate
    origin: str


class Ledger:
    """Bookkeeping of one problem's candidates by id."""

    def __init__(self, problem: Problem, spaces: Mapping[str, BoundSpace]) -> None:
        self.problem = problem
        self.spaces = spaces
        self.outcomes: dict[str, Outcome] = {}
        self.sizes = {backend: space.count(_COUNT_LIMIT) for backend, space in spaces.items()}
        self._waiting: deque[Waiting] = deque()
        self._waiting_ids: set[str] = set()
        self._pending: set[str] = set()
        self._lost: dict[str, int] = {}
        self._legal_seen: set[str] = set()
        self._refused: dict[Kind, Fraction] = {}
        self._right: set[Kind] = set()

    @property
    def given_up(self) -> frozenset[Kind]:
        """Kinds whose candidates were all refused so far, enough of them to say that the next would be, too.

        It depends on outcomes alone, not on their order; one in flight that comes back right takes its kind off again.
        """
        return frozenset(kind for kind in self._refused if self._gives_up(kind))

    def num_of(self, kind: Kind) -> int:
        """How many of a kind ended."""
        ended = (outcome.candidate for outcome in self.outcomes.values())
        return sum(Kind.of(candidate.backend, candidate.config) == kind for candidate in ended)

    @property
    def size(self) -> int | None:
        """Legal configs of all backends together; None if there are too many to count."""
        return None if any(size >= _COUNT_LIMIT for size in self.sizes.values()) else sum(self.sizes.values())

    @property
    def exhausted(self) -> bool:
        """Whether every legal config is finished or in flight."""
        return self.size is not None and len(self._legal_seen) >= self.size

    @property
    def num_spent(self) -> int:
        """Distinct candidates finished or in flight."""
        return len(self.outcomes) + len(self._pending)

    def candidate(self, backend: str, config: Mapping[str, ConfigValue]) -> Candidate:
        """A candidate of this ledger's problem."""
        return Candidate(problem=self.problem, backend=backend, config=config)

    def violations(self, candidate: Candidate) -> list[str]:
        """Why the candidate is not legal here; empty if it is."""
        space = self.spaces.get(candidate.backend)
        if candidate.problem.key != self.problem.key:
            return [f"it is for another problem: {candidate.problem.key}"]
        return [f"backend {candidate.backend} has no space here"] if space is None else space.violations(candidate.config)

    def seen(self, candidate: Candidate) -> bool:
        """Whether it is finished, in flight or waiting."""
        identity = candidate.id
        return identity in self.outcomes or identity in self._pending or identity in self._waiting_ids

    def wait(self, candidate: Candidate, origin: str) -> bool:
        """Put a legal candidate in the queue; False if it is seen already."""
        if self.seen(candidate):
            return False
        self._waiting.append(Waiting(candidate=candidate, origin=origin))
        self._waiting_ids.add(candidate.id)
        return True

    def next_waiting(self) -> Waiting | None:
        """The first of the queue whose kind is not given up."""
        for place, waiting in enumerate(self._waiting):
            if not self._is_given_up(waiting.candidate):
                del self._waiting[place]
                self._waiting_ids.discard(waiting.candidate.id)
                return waiting
        return None

    def start(self, candidate: Candidate) -> None:
        """The candidate is in flight."""
        self._pending.add(candidate.id)
        self._legal_seen.add(candidate.id)

    def finish(self, outcome: Outcome, origin: str) -> None:
        """A candidate's end. One that was lost waits again, up to `MAX_LOST` times."""
        identity = outcome.candidate.id
        self._pending.discard(identity)
        if outcome.status is Status.LOST:
            self._lost[identity] = self._lost.get(identity, 0) + 1
            if self._lost[identity] <= MAX_LOST:
                self._legal_seen.discard(identity)
                self._waiting.appendleft(Waiting(candidate=outcome.candidate, origin=origin))
                self._waiting_ids.add(identity)
                return
        self.outcomes[identity] = outcome
        kind = Kind.of(outcome.candidate.backend, outcome.candidate.config)
        if outcome.status is Status.OK:
            self._right.add(kind)
        elif outcome.status in _REFUSED:
            self._refused[kind] = self._refused.get(kind, Fraction(0)) + _REFUSED[outcome.status]
        if not self.violations(outcome.candidate):
            self._legal_seen.add(identity)

    def best(self) -> Outcome | None:
        """The fastest that is OK."""
        done = [outcome for outcome in self.outcomes.values() if outcome.median_us is not None]
        return min(done, key=lambda outcome: outcome.median_us or 0.0, default=None)

    def worth_trying(self, candidate: Candidate) -> bool:
        """Whether it is not seen, and its kind is not given up."""
        return not self._is_given_up(candidate) and not self.seen(candidate)

    def unseen_of(self, backends: Iterable[str]) -> Iterator[Candidate]:
        """Legal candidates of these backends that are worth trying, in the order of the file."""
        for backend in backends:
            for config in self.spaces[backend].enumerate():
                candidate = self.candidate(backend, config)
                if self.worth_trying(candidate):
                    yield candidate

    def unseen_near(self, backend: str, config: Config | None, rng: random.Random) -> Candidate | None:
        """A legal candidate worth trying: close to `config` if possible, else at random, else the first one left."""
        for draw in _draws(self.spaces[backend], config, rng):
            candidate = self.candidate(backend, draw)
            if self.worth_trying(candidate):
                return candidate
        return next(self.unseen_of([backend]), None)

    def _is_given_up(self, candidate: Candidate) -> bool:
        return self._gives_up(Kind.of(candidate.backend, candidate.config))

    def _gives_up(self, kind: Kind) -> bool:
        return self._refused.get(kind, 0) >= MAX_WRONG and kind not in self._right


def _draws(space: BoundSpace, config: Config | None, rng: random.Random) -> Iterator[Config]:
    start = space.nearest(config) if config is not None else None
    if start is not None:
        yield start
        for _ in range(_MAX_MUTATIONS):
            mutated = _mutated(start, space, rng)
            if mutated is not None:
                yield mutated
    for _ in range(_MAX_RANDOM):
        draw = space.random(rng)
        if draw is not None:
            yield draw


def _mutated(config: Config, space: BoundSpace, rng: random.Random) -> Config | None:
    """The config with one or two parameters changed at random; None if that is not legal."""
    domains = [domain for domain in space.domains if domain.name in config and len(domain.choices) > 1]
    changed = rng.sample(domains, min(len(domains), rng.choice((1, 2))))
    mutated: Config = {**config, **{domain.name: rng.choice(domain.choices) for domain in changed}}
    return None if space.violations(mutated) else mutated
