"""Ask and tell for one problem: which candidate next. The only module that imports optuna.

Sampling works on an Optuna study in memory, which answers in milliseconds; every finished trial is mirrored into the
real storage (SQLite, PostgreSQL) before `tell` returns, so a killed process loses none. What Optuna is told:

    OK                         COMPLETE, log(median in us)
    INVALID ... CRASHED        COMPLETE, a value worse than the worst, and a violated constraint: its config is to blame
    LOST                       FAIL, which samplers ignore; the candidate is proposed again

Stock and other seeds come first, then all of every small backend space, then the sampler. What the sampler draws is
checked here: an illegal config is told as a violated constraint and never proposed, a known one is answered at once.
"""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from autokernel.errors import ConfigError, StorageError
from autokernel.records import Candidate, Evaluation, Problem, Status, digest_of
from autokernel.search.ledger import Ledger, Outcome, Waiting
from autokernel.search.observations import Observation, Observations
from autokernel.search.space import BoundSpace, Config, Domain, Names, Space

if TYPE_CHECKING:
    from autokernel.search.seeds import Seed

logger = logging.getLogger(__name__)

SamplerName = Literal["tpe", "random", "cmaes", "gp"]
_T = TypeVar("_T")

_SMALL_SPACE = 12  # a backend with so few configs is tried completely rather than sampled
_NUM_STARTUP = 10  # legal random configs before a model is fitted
_MAX_REJECTIONS = 4  # draws that may be illegal or known before the unseen config nearest to one is taken
_PATIENCE = 150  # trials; later draws mostly repeat, and a step from the last one is as good and much cheaper
_MAX_STUDY_TRIALS = 300  # then the study in memory is thinned: fitting costs time in proportion


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A candidate to evaluate; `number` is what `tell` wants back."""

    number: int
    candidate: Candidate
    origin: str  # who proposed it: a seeder's name, "enumerated", or the sampler's


@dataclass(slots=True, kw_only=True)
class _InFlight:
    proposal: Proposal
    trial: optuna.trial.Trial | None  # in the study in memory, if its backend is sampled


class Tuner:
    """Proposes candidates of one problem and learns from their evaluations.

    Args:
        problem: what is tuned.
        spaces: by backend; those without a legal config on this device are ignored.
        names: of the problem and device (`space.names_for`).
        storage: SQLAlchemy URL for the durable copy, or None to keep everything in memory.
        study_name: name of the study there; one per problem.
        sampler: "tpe", "random", "cmaes" or "gp".
        seed: makes proposals reproducible, given the same tells in the same order.
        max_trials: distinct candidates to propose in all, those of a resumed run included. May be raised later.

    Raises:
        ConfigError: the sampler needs a package that is not installed.
        StorageError: the storage cannot be opened.
    """

    def __init__(
        self,
        *,
        problem: Problem,
        spaces: Mapping[str, Space],
        names: Names,
        storage: str | None = None,
        study_name: str = "autokernel",
        sampler: SamplerName = "tpe",
        seed: int = 0,
        max_trials: int = 1000,
    ) -> None:
        self.problem = problem
        self.max_trials = max_trials
        bound = {backend: space.bind(names) for backend, space in spaces.items()}
        self._ledger = Ledger(problem, {backend: space for backend, space in bound.items() if not space.empty})
        self._sampler_name: SamplerName = sampler
        self._seed = seed
        self._in_flight: dict[int, _InFlight] = {}
        self._study: _MemoryStudy | None = None
        _check_sampler(sampler)
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise a line per trial
        self._mirror = _Mirror(storage, study_name, self._ledger.spaces) if storage is not None else None
        if self._mirror is not None:
            for outcome in self._mirror.load(problem):
                self._ledger.finish(outcome, "resumed")
        self._number = self._ledger.num_spent
        # a resumed process must not draw again what it drew before
        self._rng = random.Random(f"{seed} {problem.key} {self._number}")
        sizes = self._ledger.sizes
        everything = sum(sizes.values()) <= max_trials
        self._sampled = [b for b, size in sizes.items() if size > _SMALL_SPACE and not everything]
        self._enumerated = False

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

    @property
    def num_in_flight(self) -> int:
        """Proposals that were not told yet."""
        return len(self._in_flight)

    def best(self) -> Outcome | None:
        """The fastest candidate that is OK, with its median in microseconds."""
        return self._ledger.best()

    def enqueue(self, seeds: Iterable[Seed]) -> int:
        """Propose these first, in order. Illegal and known ones are left out, with a line in the log.

        Returns:
            How many were taken.
        """
        taken = 0
        for seed in seeds:
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
            waiting = self._waiting()
            trial: optuna.trial.Trial | None = None
            if waiting is None:
                candidate, trial = self._sample()
                if candidate is None:
                    break
                waiting = Waiting(candidate=candidate, origin=self._sampler_name)
            elif self._study is not None and waiting.candidate.backend in self._sampled:
                trial = self._study.start(waiting.candidate)
            proposal = Proposal(number=self._number, candidate=waiting.candidate, origin=waiting.origin)
            self._number += 1
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

    def _learn(self, outcome: Outcome, origin: str, trial: optuna.trial.Trial | None) -> None:
        self._ledger.finish(outcome, origin)
        if self._study is not None and outcome.candidate.backend in self._sampled:
            self._study.learn(outcome, trial)
        if self._mirror is not None:
            self._mirror.append(outcome, origin)

    def _waiting(self) -> Waiting | None:
        waiting = self._ledger.next_waiting()
        if waiting is None and not self._enumerated:
            self._enumerated = True
            small = [backend for backend in self._ledger.spaces if backend not in self._sampled]
            candidates = list(self._ledger.unseen_of(small))
            self._rng.shuffle(candidates)  # any prefix is a fair sample
            for candidate in candidates:
                self._ledger.wait(candidate, "enumerated")
            waiting = self._ledger.next_waiting()
        return waiting

    def _sample(self) -> tuple[Candidate | None, optuna.trial.Trial | None]:
        if not self._sampled or self._ledger.exhausted:
            return None, None
        study = self._memory_study()
        backend, config = self._rng.choice(self._sampled), None
        if self._sampler_name != "random" and study.num_feasible >= _NUM_STARTUP:
            patient = self._ledger.num_spent < _PATIENCE and self._sampler_name != "gp"  # whose draws take a second each
            for _ in range(_MAX_REJECTIONS if patient else 1):
                trial, backend, config = study.ask()
                violated = len(self._ledger.spaces[backend].violations(config))
                candidate = self._ledger.candidate(backend, config)
                if violated:
                    study.reject(trial, float(violated))
                elif not self._ledger.seen(candidate):
                    return candidate, trial
                else:
                    study.repeat(trial, self._ledger.outcomes.get(candidate.id))
        for place in [backend, *(b for b in self._sampled if b != backend)]:
            found = self._ledger.unseen_near(place, config if place == backend else None, self._rng)
            if found is not None:
                return found, study.start(found)
        return None, None

    def _memory_study(self) -> _MemoryStudy:
        if self._study is None:
            spaces = {backend: self._ledger.spaces[backend] for backend in self._sampled}
            seed = self._rng.getrandbits(31)
            self._study = _MemoryStudy(spaces, self._sampler_name, seed)
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
        return self._study


class _MemoryStudy:
    """The Optuna study that is sampled."""

    def __init__(self, spaces: Mapping[str, BoundSpace], sampler: SamplerName, seed: int) -> None:
        self._spaces = spaces
        self._sampler_name = sampler
        self._seed = seed
        self._seen = Observations(spaces)
        self._study = self._new_study()

    @property
    def num_trials(self) -> int:
        return len(self._seen.kept)

    @property
    def num_feasible(self) -> int:
        return self._seen.num_feasible

    def ask(self) -> tuple[optuna.trial.Trial, str, Config]:
        """What the sampler would try; it may be illegal or known."""
        trial = self._study.ask()
        backend = str(trial.suggest_categorical("backend", list(self._spaces)))
        config: Config = {}
        values: dict[str, Any] = dict(self._spaces[backend].names)
        for domain in self._spaces[backend].domains:
            if domain.present(values):
                config[domain.name] = values[domain.name] = _suggest(trial, f"{backend}.{domain.name}", domain)
        return trial, backend, config

    def start(self, candidate: Candidate) -> optuna.trial.Trial:
        """A running trial with the candidate's parameters, so that further draws keep away from it."""
        self._study.enqueue_trial(self._seen.params(candidate))
        return self.ask()[0]

    def learn(self, outcome: Outcome, trial: optuna.trial.Trial | None) -> None:
        """The end of a candidate; `trial` is its running trial, if it has one."""
        if outcome.status is Status.LOST:
            if trial is not None:
                self._study.tell(trial, state=TrialState.FAIL)
            return
        observation = self._seen.add(self._seen.params(outcome.candidate), outcome.median_us)
        if trial is None:
            self._add(observation)
        else:
            self._tell(trial, observation)

    def reject(self, trial: optuna.trial.Trial, violated: float) -> None:
        """The draw is illegal."""
        self._tell(trial, self._seen.add(trial.params, None, violated))

    def repeat(self, trial: optuna.trial.Trial, known: Outcome | None) -> None:
        """The draw is known (answered with what is known) or in flight (forgotten)."""
        if known is None or known.status is Status.LOST:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self.learn(known, trial)

    def thin(self) -> None:
        """Start over with the best and the latest trials; the caller starts running trials again."""
        self._seen.thin()
        self._seed += 1
        self._study = self._new_study()
        for observation in self._seen.kept:
            self._add(observation)

    def _tell(self, trial: optuna.trial.Trial, observation: Observation) -> None:
        trial.set_constraint("legal", observation.violated)
        self._study.tell(trial, self._seen.value(observation))

    def _add(self, observation: Observation) -> None:
        self._study.add_trial(_finished(self._spaces, observation, self._seen.value(observation)))

    def _new_study(self) -> optuna.Study:
        conditional = len(self._spaces) > 1 or any(d.when is not None for s in self._spaces.values() for d in s.domains)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = _make_sampler(self._sampler_name, self._seed, conditional)
        return optuna.create_study(direction="minimize", sampler=sampler)


def _finished(spaces: Mapping[str, BoundSpace], observation: Observation, value: float | None) -> FrozenTrial:
    """A trial as Optuna stores it; without a value it is FAIL."""
    params = dict(observation.params)
    distributions: dict[str, Any] = {}
    if params:
        distributions["backend"] = optuna.distributions.CategoricalDistribution(list(spaces))
        for domain in spaces[params["backend"]].domains:
            name = f"{params['backend']}.{domain.name}"
            if name in params:
                distributions[name] = (
                    optuna.distributions.IntDistribution(0, len(domain.choices) - 1)
                    if domain.ordered
                    else optuna.distributions.CategoricalDistribution(list(domain.choices))
                )
    return create_trial(
        state=TrialState.COMPLETE if value is not None else TrialState.FAIL,
        value=value,
        params=params,
        distributions=distributions,
        constraints={"legal": observation.violated},
    )


def _suggest(trial: optuna.trial.Trial, name: str, domain: Domain) -> Any:
    if domain.ordered:
        return domain.choices[trial.suggest_int(name, 0, len(domain.choices) - 1)]
    return trial.suggest_categorical(name, list(domain.choices))


def _make_sampler(name: SamplerName, seed: int, conditional: bool) -> optuna.samplers.BaseSampler:
    match name:
        case "tpe":
            # groups: a backend's parameters are fitted jointly, from the trials that have them
            return optuna.samplers.TPESampler(seed=seed, group=conditional, n_startup_trials=0, constant_liar=True)
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=0, warn_independent_sampling=False)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=0, deterministic_objective=False)


def _check_sampler(name: SamplerName) -> None:
    if name == "cmaes":
        try:
            import cmaes  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            raise ConfigError("search.sampler: cmaes needs a package that is not installed: pip install cmaes") from None


class _Mirror:
    """The durable copy: one finished Optuna trial per finished candidate; its config is readable in the user attributes."""

    def __init__(self, url: str, study_name: str, spaces: Mapping[str, BoundSpace]) -> None:
        self._url = url
        self._spaces = spaces
        self._study_name = study_name
        self._seen = Observations(spaces)
        self._storage: optuna.storages.RDBStorage = self._guarded(lambda: _open_storage(url))
        self._study_id: int = self._guarded(self._open_study)

    def load(self, problem: Problem) -> list[Outcome]:
        """What is finished. Trials that a killed process left running are closed as FAIL."""
        trials = self._guarded(lambda: self._storage.get_all_trials(self._study_id, deepcopy=False))
        outcomes: list[Outcome] = []
        for trial in trials:
            if trial.state is TrialState.RUNNING:
                self._guarded(partial(self._storage.set_trial_state_values, trial._trial_id, TrialState.FAIL))
            said = trial.user_attrs.get("candidate")
            if trial.state is not TrialState.COMPLETE or said is None:
                continue
            status = Status(said["status"])
            median = math.exp(trial.value) if status is Status.OK and trial.value is not None else None
            candidate = Candidate(problem=problem, backend=said["backend"], config=said["config"])
            outcomes.append(Outcome(candidate=candidate, status=status, median_us=median))
        return outcomes

    def append(self, outcome: Outcome, origin: str) -> None:
        """Write one finished candidate; it is on disk when this returns."""
        candidate = outcome.candidate
        space = self._spaces.get(candidate.backend)
        fits = space is not None and not space.violations(candidate.config)  # what another space allowed has no parameters here
        observation = self._seen.observe(self._seen.params(candidate) if fits else {}, outcome.median_us)
        value = None if outcome.status is Status.LOST else self._seen.value(observation)
        trial = _finished(self._spaces, observation, value)
        # one attribute, since each is a statement of its own
        trial.user_attrs = {
            "candidate": {
                "backend": candidate.backend, "config": dict(candidate.config), "status": str(outcome.status), "origin": origin,
            }
        }  # fmt: skip
        self._guarded(lambda: self._storage.create_new_trial(self._study_id, trial))

    def close(self) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _open_study(self) -> int:
        """The study of this name, or, if the search space has changed since, one beside it."""
        fingerprint = digest_of([[b, [[d.name, list(d.choices)] for d in s.domains]] for b, s in self._spaces.items()])
        name = self._study_name
        while True:
            study = optuna.create_study(storage=self._storage, study_name=name, load_if_exists=True, direction="minimize")
            known = study.user_attrs.get("space")
            if known is None:
                study.set_user_attr("space", fingerprint)
            if known in (None, fingerprint):
                return int(study._study_id)
            logger.warning("study %s in %s was made with another search space; starting a new one beside it", name, self._url)
            name = f"{self._study_name} {fingerprint}"

    def _guarded(self, action: Callable[[], _T]) -> _T:
        """Storage trouble as a StorageError that says what to do."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return action()
        except ImportError as error:
            cure = "pip install 'autokernel[postgresql]'" if self._url.startswith("postgres") else "install its driver"
            raise StorageError(f"storage {self._url}: {error}; {cure}") from None
        except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, OSError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise StorageError(
                f"storage {self._url}: study {self._study_name!r} cannot be read or written: {reason}; its folder must exist "
                "and be writable, the disk not full, and the database not shared with MLflow"
            ) from error


def _open_storage(url: str) -> optuna.storages.RDBStorage:
    if not url.startswith("sqlite"):
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    from sqlalchemy import event

    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 30}})

    def configure(connection: Any, _record: Any) -> None:
        # a commit survives the death of the process without an fsync each
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(storage.engine, "connect", configure)
    storage.engine.dispose()  # connections made so far lack the settings
    return storage
