"""Ask and tell for one problem: which candidate next. The only module that imports optuna.

Sampling works on an Optuna study in memory, which answers in milliseconds; every finished trial is mirrored into the
real storage (SQLite, PostgreSQL) before `tell` returns, so a killed process loses none. What Optuna is told:

    OK                         COMPLETE, log(median in us)
    INVALID ... CRASHED        COMPLETE, a value worse than the worst, and a violated constraint: its config is to blame
    LOST                       FAIL, which samplers ignore; the candidate is proposed again

In which order candidates are proposed is in proposals.py.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from autokernel.errors import ConfigError, StorageError
from autokernel.records import Candidate, Problem, Status, digest_of
from autokernel.requirements import install_extra
from autokernel.search.cost_model import CostModel, is_predicted, load_model
from autokernel.search.ledger import Kind, Outcome
from autokernel.search.model_study import ModelStudy
from autokernel.search.observations import Observation, Observations
from autokernel.search.proposals import SEEDED_BY_RULE, Proposal, Proposer, Sampled
from autokernel.search.space import BoundSpace, Config, Domain, Names, Space

if TYPE_CHECKING:
    from autokernel.search.seeds import Seed

logger = logging.getLogger(__name__)

SamplerName = Literal["model", "tpe", "random", "cmaes", "gp"]
_T = TypeVar("_T")

__all__ = ["Proposal", "SamplerName", "Tuner"]


class Tuner(Proposer):
    """Proposes candidates of one problem and learns from their evaluations.

    Args:
        problem: what is tuned.
        spaces: by backend; those without a legal config on this device are ignored.
        names: of the problem and device (`space.names_for`).
        storage: SQLAlchemy URL for the durable copy, or None to keep everything in memory.
        study_name: name of the study there; one per problem.
        sampler: "model" (ranked by the shipped cost model, model_study.py), or Optuna's "tpe", "random", "cmaes" or "gp";
            "auto" is "model" on the device that the cost model was recorded on, and "tpe" elsewhere.
        seed: makes proposals reproducible, given the same tells in the same order.
        max_trials: distinct candidates to propose in all, those of a resumed run included. May be raised later.
        cost_model: what the sampler "model" ranks by; default: the one that comes with the package.
        in_journal: ids of the candidates whose ends the run's journal has. Others that the storage knows were cut off there
            and are proposed again: nothing but the journal tells later stages what became of them. Default: all.

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
        sampler: SamplerName | Literal["auto"] = "tpe",
        seed: int = 0,
        max_trials: int = 1000,
        cost_model: CostModel | None = None,
        in_journal: Collection[str] | None = None,
    ) -> None:
        bound = {backend: space.bind(names) for backend, space in spaces.items()}
        usable = {backend: space for backend, space in bound.items() if not space.empty}
        if sampler in {"auto", "model"} and cost_model is None:
            cost_model = load_model()
        chosen: SamplerName = sampler if sampler != "auto" else "model" if _recorded(cost_model, names) else "tpe"
        if not is_predicted(problem.op, names):
            cost_model = None  # `model` then goes by what is measured alone
        _check_sampler(chosen)
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise a line per trial
        self._sampler: SamplerName = chosen
        self._cost_model = cost_model
        self._ranked = cost_model.ranked(names) if chosen == "model" and cost_model is not None else frozenset()
        super().__init__(
            problem,
            usable,
            mirror=_StorageMirror(storage, study_name, usable) if storage is not None else None,
            sampler_name=chosen,
            seed=seed,
            max_trials=max_trials,
            use_model=chosen != "random",
            cheap=chosen != "gp",  # whose draws take a second each
            alternate=chosen == "model" and cost_model is not None,
            in_journal=in_journal,
            **({"num_startup": 0} if chosen == "model" else {}),
        )

    def enqueue(self, seeds: Iterable[Seed]) -> int:
        """As `Proposer.enqueue`. Where the cost model knows the backend, nvMatmulHeuristics' seeds, the backend's default and
        Inductor's own choices are left out: it ranks better (docs/search.md), and with a few trials for a hotspot they
        would be all that is tried. Seeds of other backends take turns with what it ranks, as do those of CuTe DSL kernels for
        dtypes of other sizes than the recorded one: in fp8 other tiles are fast.
        """
        return super().enqueue(
            seed for seed in seeds if seed.origin not in SEEDED_BY_RULE or seed.candidate.backend not in self._ranked
        )

    def _new_study(self, spaces: Mapping[str, BoundSpace], seed: int) -> Sampled:
        if self._sampler == "model":
            return ModelStudy(spaces, self._cost_model, seed)
        return _MemoryStudy(spaces, self._sampler, seed)


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

    def leave_out(self, kinds: Collection[Kind]) -> None:
        """Nothing to do: such draws are rejected, and samplers learn from that."""

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
        case "model":
            raise AssertionError("not one of Optuna's")


def _recorded(model: CostModel | None, names: Names) -> bool:
    """Whether landscapes of this kind of device made the model."""
    return model is not None and names["device"] == "cuda" and names["isa"] in model.origin.get("isa", ())


def _check_sampler(name: SamplerName) -> None:
    if name == "cmaes":
        try:
            import cmaes  # type: ignore[import-not-found, import-untyped]  # noqa: F401
        except ImportError:
            raise ConfigError("search.sampler: cmaes needs a package that is not installed: pip install cmaes") from None


class _StorageMirror:
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
            cure = install_extra("postgresql") if self._url.startswith("postgres") else "install its driver"
            raise StorageError(f"storage {self._url}: {error}; {cure}") from None
        except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, OSError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise StorageError(
                f"storage {self._url}: study {self._study_name!r} cannot be read or written: {reason}; free some "
                "space there or make its folder writable (and share no database with MLflow), then run the same command again"
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
