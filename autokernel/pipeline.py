"""The whole flow: profile, search, confirm, graph options, validate, export, prove. Each stage is one file in `stages/`."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import autokernel
from autokernel.config import LoadedExperiment, load_experiment
from autokernel.environment import current_environment, physical_cores
from autokernel.errors import AutokernelError, ConfigError, WorkloadError
from autokernel.events import ModelValidated, Recorder, RunFinished, RunStarted, ScenarioResult
from autokernel.export.bundle import Bundle
from autokernel.fingerprint import checkpoint_bytes, experiment_digest, file_digests
from autokernel.stages.checks import check_experiment, left_out_backends, resolve_device
from autokernel.stages.context import RunContext, close_all
from autokernel.tracking.state import RunState, find_resumable, why_a_new_run

log = logging.getLogger(__name__)

_PATIENCE_WHEN_INTERRUPTED_S = 3.0  # for MLflow; the journal has everything
STAGES = ("profile", "search", "confirm", "graph", "validate", "export", "prove")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a run ended, and where everything lies."""

    outcome: str  # "won", "stock" or "stopped" (after the stage that was asked for)
    message: str
    folder: Path
    bundle: Path | None
    seconds: float


def run(
    experiment: Path | str | LoadedExperiment,
    *,
    overrides: tuple[str, ...] = (),
    runs_folder: Path | str = "runs",
    fresh: bool = False,
    until: str = STAGES[-1],
    recorders: Sequence[Recorder] = (),
) -> RunOutcome:
    """Run an experiment, or go on with the newest unfinished run of the same one.

    Args:
        experiment: the YAML file.
        overrides: `a.b=value`, on top of the file.
        runs_folder: where runs are kept.
        fresh: start anew even if there is an unfinished run.
        until: the last stage to do.
        recorders: told of every event, after the journal.

    Raises:
        ConfigError: the experiment cannot be run as it stands.
        AutokernelError: the run failed; what was finished is in its journal.
    """
    if until not in STAGES:
        raise ConfigError(f"until is one of {', '.join(STAGES)}, not {until!r}")
    loaded = experiment if isinstance(experiment, LoadedExperiment) else load_experiment(experiment, overrides)
    for sentence in left_out_backends(loaded, check_experiment(loaded)):
        log.warning("%s", sentence)
    with open_run(loaded, Path(runs_folder), fresh=fresh, recorders=recorders) as context:
        return _run_stages(context, until)


def _run_stages(context: RunContext, until: str) -> RunOutcome:
    """The flow on one screen."""
    from autokernel.stages.whole_model import measure_ahead

    measure_ahead(context)  # while the other stages are imported
    from autokernel.stages.confirm import compatible, confirm, entry_of, within_memory
    from autokernel.stages.graph import search_graph_options
    from autokernel.stages.model import validate
    from autokernel.stages.plan import choose_plans
    from autokernel.stages.production import export_bundle, make_bundle, prove
    from autokernel.stages.profile import profile
    from autokernel.stages.rows import evidence_of, hold_rows
    from autokernel.stages.search import search

    profiled = profile(context)
    if until == "profile":
        return _stopped(context, until)
    evaluations = search(context, profiled)
    if until == "search":
        return _stopped(context, until)
    winners, dropped = compatible(confirm(context, profiled, evaluations), evaluations, profiled.read_gb_per_s)
    winners, excluded = choose_plans(context, profiled, winners)
    winners, too_large = within_memory(context, winners)
    dropped |= excluded | too_large
    rows = hold_rows(context, profiled, winners)
    if until == "confirm":
        return _stopped(context, until)
    bundle = make_bundle(context, [entry_of(winner, rows.get(winner.hotspot.problem.key)) for winner in winners], {})
    bundle = make_bundle(context, bundle.entries, *search_graph_options(context, bundle))
    if until == "graph":
        return _stopped(context, until)
    validated, bundle = validate(context, bundle, dropped)
    if until == "validate":
        return _stopped(context, until)
    evidence = evidence_of(rows, bundle)
    bundle = make_bundle(context, bundle.entries, bundle.graph_options, bundle.scenario_options, validated, evidence)
    export_bundle(context, bundle, validated)
    proved = prove(context, bundle, validated) if until != "export" else None
    if proved is not None and not proved.passed:
        raise AutokernelError(f"the exported bundle did not hold in a fresh process: {proved.message}")
    return _finish(context, bundle, validated)


def _finish(context: RunContext, bundle: Bundle, validated: ModelValidated) -> RunOutcome:
    if bundle.stock:
        outcome = "stock"
        message = "Nothing beat stock code clearly enough: the bundle says so, and changes nothing."
    else:
        outcome, message = "won", _gains(validated.scenarios)
    seconds = round(time.monotonic() - context.started, 1)
    context.emit(RunFinished(outcome=outcome, message=message, seconds=seconds))
    return RunOutcome(
        outcome=outcome, message=message, folder=context.folder, bundle=context.folder / "bundle", seconds=seconds
    )


def _gains(scenarios: Sequence[ScenarioResult]) -> str:
    """In a sentence. Where eager PyTorch beats all that is compiled, a bundle that passes is still slower than that."""
    faster = [scenario for scenario in scenarios if scenario.speedup.low > 1]
    behind = [scenario for scenario in scenarios if scenario.behind_eager]
    level = [scenario for scenario in scenarios if scenario not in faster and scenario not in behind]
    parts = [
        (faster, "faster than the best stock mode"),
        (level, "no slower" if faster else "no scenario is slower"),
        (behind, "no faster than eager, which beats all that is compiled"),
    ]
    sentence = "; ".join(f"{words}: {_ratios(found)}" for found, words in parts if found)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _ratios(scenarios: Sequence[ScenarioResult]) -> str:
    return ", ".join(f"{scenario.scenario} {scenario.speedup.ratio:.2f}x" for scenario in scenarios)


def _stopped(context: RunContext, stage: str) -> RunOutcome:
    seconds = round(time.monotonic() - context.started, 1)
    return RunOutcome(outcome="stopped", message=f"stopped after {stage}", folder=context.folder, bundle=None, seconds=seconds)


@contextlib.contextmanager
def open_run(
    loaded: LoadedExperiment, runs_folder: Path, *, fresh: bool, recorders: Sequence[Recorder]
) -> Iterator[RunContext]:
    """A run's folder, journal, mirror and pool; and an end to all of them, whatever happens."""
    from autokernel.tracking.history import earlier_runs
    from autokernel.tracking.journal import Journal, new_run_id, run_folder
    from autokernel.tracking.mlflow_mirror import MlflowMirror
    from autokernel.workers.limits import memory_limit, worker_env
    from autokernel.workers.pool import open_pool

    experiment = loaded.experiment
    device = resolve_device(loaded)
    threads = experiment.threads or physical_cores()
    digest = experiment_digest(loaded)
    state: RunState | None
    found = None if fresh else _unfinished(loaded, runs_folder, digest)
    folder, state = found or (run_folder(runs_folder, experiment.name, new_run_id()), None)
    folder = folder.resolve()
    environment = current_environment(device, threads)
    if state is not None and (changed := environment.differences(state.started.environment)):
        log.warning("the unfinished run %s is left alone, and a new one started: here is %s", folder.name, "; ".join(changed))
        folder, state = run_folder(runs_folder, experiment.name, new_run_id()).resolve(), None
    journal = Journal(folder)
    mirror = MlflowMirror(folder, experiment.tracking)
    all_recorders: list[Recorder] = [journal, mirror, *recorders]
    started = time.monotonic()
    emit = [r.record for r in all_recorders]
    event = RunStarted(
        run_id=folder.name,
        name=experiment.name,
        experiment=loaded.text,
        experiment_digest=digest,
        environment=environment,
        seed=experiment.search.seed,
        version=autokernel.__version__,
        git_commit=_git_commit(loaded),
        resumed=state is not None,
        overrides=loaded.overrides,
        files=file_digests(loaded),
    )
    try:
        for record in emit:
            record(event)
        pool = open_pool(
            experiment.cluster,
            device=device,
            num_workers=experiment.search.workers,
            env=worker_env(threads),
            memory_limit_bytes=memory_limit(experiment.search.workers, checkpoint_bytes(loaded)),
            preload=("torch", "torch._inductor.compile_fx"),  # what nearly every job needs; while it is waited for
        )
        try:
            yield RunContext(
                loaded=loaded,
                folder=folder,
                run_id=folder.name,
                device=device,
                threads=threads,
                environment=environment,
                pool=pool,
                recorders=all_recorders,
                state=state,
                history=earlier_runs(runs_folder, folder),
                started=started,
            )
        finally:
            pool.close()
    except KeyboardInterrupt:
        mirror.patience_s = _PATIENCE_WHEN_INTERRUPTED_S
        _end(all_recorders, "interrupted", "interrupted; the same command resumes it", started)
        raise
    except Exception as error:  # whatever it is, the journal says that the run is over
        named = _with_file(error, loaded)
        _end(all_recorders, "failed", _sentence(named), started)
        if named is error:
            raise
        raise named from error
    finally:
        close_all(all_recorders)


def _unfinished(loaded: LoadedExperiment, runs_folder: Path, digest: str) -> tuple[Path, RunState] | None:
    """The run to go on with; says so where the newest unfinished one is of another version of the experiment."""
    found = find_resumable(runs_folder, loaded.experiment.name, digest)
    if found is None and (why := why_a_new_run(runs_folder, loaded)):
        log.warning("%s", why)
    return found


def _end(recorders: Sequence[Recorder], outcome: str, message: str, started: float) -> None:
    """The last line of a run that did not end well; a journal that cannot take it must not hide the reason."""
    event = RunFinished(outcome=outcome, message=message, seconds=round(time.monotonic() - started, 1))
    for recorder in recorders:
        try:
            recorder.record(event)
        except AutokernelError as error:
            log.warning("%s", error)


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, AutokernelError) else f"unexpected {type(error).__name__}: {error}"


def _with_file(error: Exception, loaded: LoadedExperiment) -> Exception:
    """An error that begins with a key of the experiment, as jobs raise it, with the file in front."""
    key = re.split(r"[.:]", str(error), maxsplit=1)[0]
    if isinstance(error, (ConfigError, WorkloadError)) and key in type(loaded.experiment).model_fields:
        return type(error)(f"{loaded.path}: {error}")
    return error


def _git_commit(loaded: LoadedExperiment) -> str:
    from autokernel.stages.production import git_commit

    return git_commit(loaded.path.parent)
