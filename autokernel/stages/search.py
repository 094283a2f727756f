"""Stage 2: ask tuners, evaluate on the pool, tell tuners; until the trials or the time are used up."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from autokernel.backends import all_backends
from autokernel.config import SearchSection
from autokernel.errors import WorkerError
from autokernel.evaluate.candidate import EvaluateCandidate, evaluation_of_failure
from autokernel.evaluate.roofline import Ceilings
from autokernel.events import Evaluated, Profiled, SearchPlanned
from autokernel.export.matching import gemm_of
from autokernel.ops import get_op
from autokernel.records import Evaluation, Hotspot, Status, digest_of
from autokernel.search.budget import Scheduler, allocate, merge
from autokernel.search.seeds import SeedContext, seeds_from
from autokernel.search.space import DeviceFacts, Names, Space, names_for
from autokernel.search.space_file import load_space
from autokernel.search.tuner import Proposal, Tuner
from autokernel.stages.context import RunContext
from autokernel.tracking.history import ok_evaluations
from autokernel.tracking.mlflow_env import with_driver

log = logging.getLogger(__name__)

_MAX_KEY = 400  # characters of a problem's key in a study's name


@dataclass(slots=True, kw_only=True)
class Hunt:
    """One hotspot being searched."""

    hotspot: Hotspot
    tuner: Tuner


@dataclass(slots=True, kw_only=True)
class _Flight:
    hunt: Hunt
    proposal: Proposal


def search(context: RunContext, profiled: Profiled) -> dict[str, list[Evaluation]]:
    """Evaluations by problem key, those of an earlier process included."""
    settings = context.experiment.search
    if context.state is not None and "search" in context.state.stages_done:
        return _known(context, ())  # which is all in the journal
    hunts = open_hunts(context, profiled)
    done = sum(hunt.tuner.num_finished for hunt in hunts.values())
    number = context.state.num_trials if context.state is not None else 0
    evaluations = _known(context, hunts)
    scheduler = _scheduler(hunts, profiled, settings.min_trials)
    ceilings = Ceilings.from_json(profiled.ceilings)
    total = min(settings.trials, sum(hunt.tuner.max_trials for hunt in hunts.values()))
    began, seconds, device_s = time.monotonic(), seconds_left(context), 0.0
    deadline = began + seconds
    flights: dict[Future[Evaluation], _Flight] = {}
    lost: list[str] = []  # problems with a candidate that went down with its worker
    with context.stage("search", total=total, budget_s=round(seconds, 1), note=f"{len(hunts)} hotspots"):
        context.emit(SearchPlanned(trials={key: hunt.tuner.max_trials for key, hunt in hunts.items()}))
        try:
            while True:
                # one waits behind each that runs, so that no worker idles while the driver records
                while len(flights) < 2 * context.pool.num_workers and time.monotonic() < deadline and done < total:
                    flight = _again(hunts, lost) or _next(hunts, scheduler)
                    if flight is None:
                        break
                    job = EvaluateCandidate(
                        candidate=flight.proposal.candidate,
                        seed=context.seed,
                        ceilings=ceilings,
                        deterministic_required=context.experiment.validation.deterministic,
                        threads=context.threads,
                        max_copies=settings.max_copies,
                        best_us=_best_us(flight),
                    )
                    flights[context.pool.submit(job, settings.trial_timeout_s)] = flight
                    done += 1
                if not flights:
                    break
                finished, _ = wait(flights, timeout=0.5, return_when=FIRST_COMPLETED)
                if time.monotonic() >= deadline:
                    for future in [f for f in flights if f.cancel()]:
                        flights.pop(future)
                for future in finished:
                    if future not in flights:
                        continue
                    flight = flights.pop(future)
                    evaluation = _evaluation(future, flight)
                    device_s += evaluation.device_s
                    number += 1
                    context.emit(Evaluated(evaluation=evaluation, origin=flight.proposal.origin, number=number))
                    flight.hunt.tuner.tell(flight.proposal.number, evaluation)
                    evaluations[evaluation.candidate.problem.key].append(evaluation)
                    if evaluation.status is Status.LOST:
                        done -= 1
                        lost.append(evaluation.candidate.problem.key)
                    context.progress("search", done - len(flights), total, _message(flight, evaluation))
        finally:
            for future in flights:
                future.cancel()
            for hunt in hunts.values():
                hunt.tuner.close()
        busy = device_s / max(time.monotonic() - began, 1e-9)
        log.info("the device was busy %.1f s, %.0f %% of the search", device_s, 100 * busy)
        context.progress("search", done, total, f"device busy {busy:.0%} of the time")
    return evaluations


def _known(context: RunContext, keys: Iterable[str]) -> dict[str, list[Evaluation]]:
    """What earlier processes of this run evaluated, by problem key: of these problems, and of those that have any."""
    known: dict[str, list[Evaluation]] = {key: [] for key in keys}
    if context.state is not None:
        for evaluation in context.state.evaluations.values():
            known.setdefault(evaluation.candidate.problem.key, []).append(evaluation)
    return known


def _scheduler(hunts: dict[str, Hunt], profiled: Profiled, minimum: int) -> Scheduler:
    limits = {key: hunt.tuner.max_trials for key, hunt in hunts.items()}
    scheduler = Scheduler(limits, merge(profiled.hotspots), minimum=minimum)
    for key, hunt in hunts.items():
        scheduler.spend(key, hunt.tuner.num_finished)
    return scheduler


def seconds_left(context: RunContext) -> float:
    """What is left of `search.seconds`: a run that was interrupted and resumed gets no more time than one that was not.

    Nothing is set aside for hotspots that were not tried yet, for seeds come first and an uninterrupted run would have
    stopped here, too. Such a hotspot stays stock.
    """
    spent = context.state.stage_seconds.get("search", 0.0) if context.state is not None else 0.0
    return max(0.0, context.experiment.search.seconds - spent)


def _again(hunts: dict[str, Hunt], lost: list[str]) -> _Flight | None:
    """A lost candidate once more: its trial was paid for already, whatever the scheduler has left."""
    while lost:
        key = lost.pop()
        proposals = hunts[key].tuner.ask(1)
        if proposals:
            return _Flight(hunt=hunts[key], proposal=proposals[0])
    return None


def _next(hunts: dict[str, Hunt], scheduler: Scheduler) -> _Flight | None:
    """The next proposal, of the hotspot with the largest expected gain that is left."""
    while (key := scheduler.next()) is not None:
        tuner = hunts[key].tuner
        tuner.max_trials = max(tuner.max_trials, scheduler.limit(key))
        proposals = tuner.ask(1)
        if proposals:
            scheduler.spend(key)
            return _Flight(hunt=hunts[key], proposal=proposals[0])
        scheduler.exhaust(key)
    return None


def _evaluation(future: Future[Evaluation], flight: _Flight) -> Evaluation:
    try:
        return future.result()
    except WorkerError as error:
        return evaluation_of_failure(flight.proposal.candidate, error)


def _best_us(flight: _Flight) -> float | None:
    """The best time known for a problem: who is clearly slower is not measured to the end."""
    best = flight.hunt.tuner.best()
    return None if best is None else best.median_us


def _message(flight: _Flight, evaluation: Evaluation) -> str:
    best = flight.hunt.tuner.best()
    text = f"{flight.hunt.hotspot.scenario}: {evaluation.candidate.problem.op}"
    if best is not None and best.median_us is not None:
        text += f", best {best.median_us:.1f} us ({best.candidate.label})"
    return text


def device_facts(context: RunContext, profiled: Profiled) -> DeviceFacts:
    """What constraints of search spaces may ask of the device."""
    environment = context.environment
    smem = 232448 if environment.isa.startswith("sm_9") else 0
    return DeviceFacts(
        device=context.device,
        threads=context.threads,
        isa=environment.isa,
        device_name=environment.device_name,
        l2_bytes=int(profiled.ceilings.get("l2_bytes", 0)),
        smem_bytes=smem,
        num_units=environment.num_units,
    )


def spaces_for(context: RunContext, hotspot: Hotspot, spaces: Mapping[str, Space]) -> dict[str, Space]:
    """Of the spaces of the hotspot's op, those of allowed backends that can serve its problem."""
    usable: dict[str, Space] = {}
    for backend in all_backends():
        if backend.name not in context.experiment.backends or backend.name not in spaces:
            continue
        why_not = backend.unavailable(context.device) or backend.supports(hotspot.problem)
        if why_not:
            log.info("%s: no candidates from %s: %s", hotspot.problem.key, backend.name, why_not)
            continue
        usable[backend.name] = spaces[backend.name]
    return usable


def study_name(run_id: str, key: str) -> str:
    """What Optuna calls a problem's study: databases hold 512 characters, and a generated fusion's key is its whole program."""
    return f"{run_id} {key}" if len(key) <= _MAX_KEY else f"{run_id} {key[:_MAX_KEY]} {digest_of(key)}"


def worth_searching(profiled: Profiled, settings: SearchSection) -> list[Hotspot]:
    """Hotspots with enough to gain, one for each GEMM, those with most to gain first.

    A compiled graph does not say which epilogue an entry was tuned with (`export.matching`), so GEMMs that differ in
    that alone share one search: that of the one with most to gain, for the weight of all.
    """
    best: dict[object, Hotspot] = {}
    weights: dict[object, float] = {}
    for hotspot in profiled.hotspots:
        key = gemm_of(hotspot.problem) or hotspot.problem.key
        best.setdefault(key, hotspot)
        weights[key] = weights.get(key, 0.0) + hotspot.weight
    return [hotspot for key, hotspot in best.items() if weights[key] >= settings.min_weight]


def open_hunts(context: RunContext, profiled: Profiled) -> dict[str, Hunt]:
    """A tuner for each hotspot worth searching, seeded, and taught what is known already."""
    settings = context.experiment.search
    facts = device_facts(context, profiled)
    folder = context.loaded.resolve(settings.spaces) if settings.spaces is not None else None
    by_op: dict[str, Mapping[str, Space]] = {}
    chosen: dict[str, Hotspot] = {}
    spaces: dict[str, dict[str, Space]] = {}
    names: dict[str, Names] = {}
    for hotspot in worth_searching(profiled, settings):
        key, op = hotspot.problem.key, hotspot.problem.op
        if op in settings.without or (len(chosen) >= settings.hotspots and not gemm_of(hotspot.problem)):
            continue
        if op not in by_op:
            by_op[op] = load_space(op, folder)
        found = spaces_for(context, hotspot, by_op[op])
        known_names = names_for(get_op(op).dims(hotspot.problem), facts)
        if sum(space.count(known_names, 2) for space in found.values()) < 2:
            continue  # stock code alone: there is nothing to choose, and others want the place
        chosen[key], spaces[key], names[key] = hotspot, found, known_names
        if len(chosen) == settings.hotspots and not settings.all_gemms:
            break
    # nobody gets more trials than there are
    sizes = {key: sum(space.count(names[key], settings.trials) for space in spaces[key].values()) for key in chosen}
    trials = allocate(list(chosen.values()), settings.trials, settings.seconds, settings.min_trials, sizes)
    known = list(context.state.evaluations.values()) if context.state is not None else []
    here = context.environment
    earlier = ok_evaluations(context.history, here.device_name, here.torch) if "history" in settings.seeds else []
    hunts: dict[str, Hunt] = {}
    for key, hotspot in chosen.items():
        tuner = Tuner(
            problem=hotspot.problem,
            spaces=spaces[key],
            names=names[key],
            storage=with_driver(context.experiment.storage or f"sqlite:///{context.folder / 'optuna.db'}"),
            study_name=study_name(context.run_id, key),
            sampler=settings.sampler,
            seed=context.seed,
            max_trials=max(1, trials.get(key, 1)),
            in_journal={evaluation.candidate.id for evaluation in known},
        )
        seeding = SeedContext(problem=hotspot.problem, spaces=spaces[key], names=names[key], history=earlier)
        tuner.warm_start(e for e in known if e.candidate.problem.key == key)
        tuner.enqueue(seeds_from(settings.seeds, seeding))
        hunts[key] = Hunt(hotspot=hotspot, tuner=tuner)
    return hunts
