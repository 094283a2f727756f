"""In which order candidates of one problem are proposed, and what becomes of them. Needs no optuna.

Seeds come first, then all of every small backend space, then the sampler; if that ranks some backends by a cost model, seeds
of the others come by turns with it, and small spaces without such seeds before them. What the sampler draws is checked here:
an illegal config is told as a violated constraint and never proposed, a known one is answered at once. Lost candidates are
proposed again. Of a kind of kernel whose first candidates were all refused, no more are proposed.
"""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from autokernel.records import Candidate, Evaluation, Problem, Status
from autokernel.search.ledger import Kind, Ledger, Outcome, Waiting
from autokernel.search.space import BoundSpace, Config

if TYPE_CHECKING:
    from autokernel.search.seeds import Seed

logger = logging.getLogger(__name__)

_SMALL_SPACE = 12  # a backend with so few configs is tried completely rather than sampled
_NUM_STARTUP = 10  # legal random configs before a model is fitted
_MAX_REJECTIONS = 4  # draws that may be illegal or known before the unseen config nearest to one is taken
_PATIENCE = 150  # trials; later draws mostly repeat, and a step from the last one is as good and much cheaper
_MAX_STUDY_TRIALS = 300  # then the study in memory is thinned: fitting costs time in proportion

# Whose seeds are many, and no better than what a sampler with a cost model proposes for other backends meanwhile.
SEEDED_BY_RULE = frozenset({"nvmatmul", "default", "inductor"})

Draw = Any  # the sampler's own handle of something it drew


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A candidate to evaluate; `number` is what `tell` wants back."""

    number: int
    candidate: Candidate
    origin: str  # who proposed it: a seeder's name, "enumerated", or the sampler's


@dataclass(slots=True, kw_only=True)
class _InFlight:
    proposal: Proposal
    trial: Draw | None  # in the study that is sampled, if its backend is


class Sampled(Protocol):
    """A study that draws configs and learns from what becomes of them."""

    @property
    def num_trials(self) -> int: ...

    @property
    def num_feasible(self) -> int: ...

    def ask(self) -> tuple[Draw, str, Config]:
        """Backend and config that would be tried; they may be illegal or known."""
        ...

    def start(self, candidate: Candidate) -> Draw:
        """A candidate is in flight: further draws keep away from it."""
        ...

    def learn(self, outcome: Outcome, trial: Draw | None) -> None:
        """A candidate ended."""
        ...

    def reject(self, trial: Draw, violated: float) -> None:
        """A draw was illegal."""
        ...

    def repeat(self, trial: Draw, known: Outcome | None) -> None:
        """A draw was known, or in flight."""
        ...

    def leave_out(self, kinds: Collection[Kind]) -> None:
        """Draw none of these if that can be helped, and again of those that were left out before."""
        ...

    def thin(self) -> None:
        """Forget what matters least; draws in flight are forgotten too."""
        ...


class Mirror(Protocol):
    """Where finished candidates are kept for good."""

    def load(self, problem: Problem) -> list[Outcome]: ...

    def append(self, outcome: Outcome, origin: str) -> None: ...

    def close(self) -> None: ...


class Proposer(ABC):
    """Proposes candidates of one problem and learns from their evaluations; subclasses bring the sampler."""

    def __init__(
        self,
        problem: Problem,
        spaces: Mapping[str, BoundSpace],
        *,
        mirror: Mirror | None,
        sampler_name: str,
        seed: int,
        max_trials: int,
        use_model: bool,
        cheap: bool,
        num_startup: int = _NUM_STARTUP,
        alternate: bool = False,
        in_journal: Collection[str] | None = None,
    ) -> None:
        self.problem = problem
        self.max_trials = max_trials
        self._ledger = Ledger(problem, spaces)
        self._sampler_name = sampler_name
        self._use_model = use_model
        self._cheap = cheap
        self._num_startup = num_startup
        self._alternate = alternate  # the sampler knows enough from the start: seeds and its proposals take turns
        self._after_seed = False
        self._in_flight: dict[int, _InFlight] = {}
        self._study: Sampled | None = None
        self._left_out: frozenset[Kind] = frozenset()  # what the study leaves out
        self._used_up: set[str] = set()  # backends that had nothing left to try, given what is left out
        self._mirror = mirror
        loaded = {outcome.candidate.id: outcome for outcome in (mirror.load(problem) if mirror is not None else ())}
        for identity, outcome in loaded.items():  # one that was tried again is there twice: the last one counts
            if in_journal is None or identity in in_journal:
                self._ledger.finish(outcome, "resumed")
        self._number = self._ledger.num_spent
        # a resumed process must not draw again what it drew before
        self._rng = random.Random(f"{seed} {problem.key} {self._number}")
        sizes = self._ledger.sizes
        everything = sum(sizes.values()) <= max_trials
        self._sampled = [b for b, size in sizes.items() if size > _SMALL_SPACE and not everything]
        self._enumerated: set[str] = set()  # backends whose configs all waited

    @abstractmethod
    def _new_study(self, spaces: Mapping[str, BoundSpace], seed: int) -> Sampled:
        """An empty study of these backends."""

    @property
    def size(self) -> int | None:
        """Legal configs of all backends; None if there are too many to count."""
        return self._ledger.size

    @property
    def exhausted(self) -> bool:
        """Whether every legal config is finished or in flight."""
        return self._ledger.exhausted

    @property
    def num_finished(self) -> int:
        """Distinct candidates whose outcome is known."""
        return len(self._ledger.outcomes)

    def best(self) -> Outcome | None:
        """The fastest candidate that is OK, with its median in microseconds."""
        return self._ledger.best()

    def enqueue(self, seeds: Iterable[Seed]) -> int:
        """Propose these first, in order. Illegal and known ones are left out, with a line in the log.

        Where seeds take turns with the sampler there are many: small backends without any, a library's few ways, come before.

        Returns:
            How many were taken.
        """
        taken, seeds = 0, list(seeds)
        seeded = {seed.candidate.backend for seed in seeds if seed.origin in SEEDED_BY_RULE}
        early = [backend for backend, size in self._ledger.sizes.items() if size <= _SMALL_SPACE and backend not in seeded]
        for seed in seeds:
            if self._alternate and seed.origin in SEEDED_BY_RULE:
                self._enumerate(early)
            reasons = self._ledger.violations(seed.candidate)
            if reasons:
                logger.info("seed %s (%s) left out: %s", seed.candidate.label, seed.origin, "; ".join(reasons))
            elif self._ledger.wait(seed.candidate, seed.origin):
                taken += 1
        return taken

    def warm_start(self, evaluations: Iterable[Evaluation]) -> int:
        """Take in what an earlier process of this run finished: it is learnt from and never proposed again.

        Evaluations of other problems and lost ones are passed over; what the storage lacks is added to it.

        Returns:
            How many were new.
        """
        new = 0
        for evaluation in evaluations:
            known = evaluation.candidate.id in self._ledger.outcomes
            if known or evaluation.status is Status.LOST or evaluation.candidate.problem.key != self.problem.key:
                continue
            self._learn(Outcome.of(evaluation), "resumed", trial=None)
            new += 1
        self._number = max(self._number, self._ledger.num_spent)
        return new

    def ask(self, count: int) -> list[Proposal]:
        """Up to `count` candidates that were never proposed before; fewer when budget or space run out."""
        proposals: list[Proposal] = []
        while len(proposals) < count and self._ledger.num_spent < self.max_trials:
            waiting = None if self._alternate and self._after_seed else self._waiting()
            trial: Draw | None = None
            if waiting is None:
                candidate, trial = self._sample()
                waiting = Waiting(candidate=candidate, origin=self._sampler_name) if candidate is not None else self._waiting()
                if waiting is None:
                    break
            if trial is None and self._study is not None and waiting.candidate.backend in self._sampled:
                trial = self._study.start(waiting.candidate)
            proposal = Proposal(number=self._number, candidate=waiting.candidate, origin=waiting.origin)
            self._number += 1
            self._after_seed = proposal.origin in SEEDED_BY_RULE
            self._ledger.start(proposal.candidate)
            self._in_flight[proposal.number] = _InFlight(proposal=proposal, trial=trial)
            proposals.append(proposal)
        return proposals

    def tell(self, number: int, evaluation: Evaluation) -> None:
        """The outcome of a proposal. When this returns, it is in the storage.

        Raises:
            ValueError: no such proposal is in flight, or the evaluation is of another candidate.
            StorageError: the storage cannot be written.
        """
        flight = self._in_flight.get(number)
        if flight is None:
            raise ValueError(f"proposal {number} is not in flight; in flight are {sorted(self._in_flight)}")
        if flight.proposal.candidate.id != evaluation.candidate.id:
            raise ValueError(f"proposal {number} is {flight.proposal.candidate.label}, not {evaluation.candidate.label}")
        del self._in_flight[number]
        self._learn(Outcome.of(evaluation), flight.proposal.origin, trial=flight.trial)

    def close(self) -> None:
        """Let go of the storage. Idempotent."""
        if self._mirror is not None:
            self._mirror.close()

    def _learn(self, outcome: Outcome, origin: str, trial: Draw | None) -> None:
        before = self._ledger.given_up
        self._ledger.finish(outcome, origin)
        for kind in self._ledger.given_up - before:
            logger.info(
                "%s: %s: its first %d candidates were all wrong or did not build; no more are tried, others get the trials",
                self.problem, kind.label, self._ledger.num_of(kind),
            )  # fmt: skip
        known_here = outcome.candidate.backend in self._sampled and not self._ledger.violations(outcome.candidate)
        if self._study is not None and known_here:
            self._study.learn(outcome, trial)
        if self._mirror is not None:
            self._mirror.append(outcome, origin)

    def _waiting(self) -> Waiting | None:
        waiting = self._ledger.next_waiting()
        if waiting is None:
            self._enumerate(backend for backend in self._ledger.spaces if backend not in self._sampled)
            waiting = self._ledger.next_waiting()
        return waiting

    def _enumerate(self, backends: Iterable[str]) -> None:
        """All of these backends waits, once."""
        new = [backend for backend in backends if backend not in self._enumerated]
        self._enumerated |= {*new}
        candidates = list(self._ledger.unseen_of(new))
        self._rng.shuffle(candidates)  # any prefix is a fair sample
        for candidate in candidates:
            self._ledger.wait(candidate, "enumerated")

    def _sample(self) -> tuple[Candidate | None, Draw | None]:
        if not self._sampled or self._ledger.exhausted:
            return None, None
        study = self._current_study()
        backend, config = self._rng.choice(self._sampled), None
        if self._use_model and study.num_feasible >= self._num_startup:
            patient = self._cheap and self._ledger.num_spent < _PATIENCE
            for _ in range(_MAX_REJECTIONS if patient else 1):
                trial, backend, config = study.ask()
                violated = len(self._ledger.spaces[backend].violations(config))
                candidate = self._ledger.candidate(backend, config)
                if violated:
                    study.reject(trial, float(violated))
                elif self._ledger.seen(candidate):
                    study.repeat(trial, self._ledger.outcomes.get(candidate.id))
                elif self._ledger.worth_trying(candidate):
                    return candidate, trial
                else:
                    study.reject(trial, 1.0)
        for place in [backend, *(b for b in self._sampled if b != backend)]:
            if place in self._used_up:
                continue
            found = self._ledger.unseen_near(place, config if place == backend else None, self._rng)
            if found is not None:
                return found, study.start(found)
            self._used_up.add(place)
        return None, None

    def _current_study(self) -> Sampled:
        if self._study is None:
            spaces = {backend: self._ledger.spaces[backend] for backend in self._sampled}
            seed = self._rng.getrandbits(31)
            self._study, self._left_out = self._new_study(spaces, seed), frozenset()
            for outcome in self._ledger.outcomes.values():
                if outcome.candidate.backend in spaces and not self._ledger.violations(outcome.candidate):
                    self._study.learn(outcome, None)
            for flight in self._in_flight.values():
                if flight.proposal.candidate.backend in spaces:
                    flight.trial = self._study.start(flight.proposal.candidate)
        elif self._study.num_trials > _MAX_STUDY_TRIALS:
            in_flight = [f for f in self._in_flight.values() if f.trial is not None]
            self._study.thin()
            for flight in in_flight:
                flight.trial = self._study.start(flight.proposal.candidate)
        given_up = self._ledger.given_up
        if given_up != self._left_out:
            self._study.leave_out(given_up)
            self._left_out = given_up
            self._used_up.clear()
        return self._study
