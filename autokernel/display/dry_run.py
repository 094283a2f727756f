"""What a run would do, and whether it can, without doing it: needs torch, to see the device, but no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from autokernel.config import CallScenario, DecodeScenario, LoadedExperiment, PrefillScenario
from autokernel.display.words import duration
from autokernel.doctor import OK, check_folder
from autokernel.environment import current_environment, physical_cores
from autokernel.errors import ConfigError
from autokernel.fingerprint import experiment_digest
from autokernel.stages.checks import HERE, check_experiment, left_out_backends, ops_without_space
from autokernel.tracking.mlflow_env import default_tracking_uri, redacted
from autokernel.tracking.state import RunState, find_resumable, why_a_new_run

UNCHECKED = "the model, its inputs and the metric's functions were not loaded"


def plan_json(loaded: LoadedExperiment, runs_folder: Path, *, fresh: bool) -> dict[str, Any]:
    """The plan of a run for scripts; `plan_table` shows the same."""
    experiment = loaded.experiment
    device, problems = _checked(loaded)
    storage = check_folder(runs_folder)
    if storage.state != OK:
        problems.append(f"{storage.value}; {storage.fix}")
    found, why_new = (None, None) if fresh else _resumable(loaded, runs_folder, device)
    resumes = None
    if found is not None:
        folder, state = found
        resumes = {
            "folder": str(folder),
            "stages_done": sorted(state.stages_done),
            "num_trials": state.num_trials,
        }
    search, validation = experiment.search, experiment.validation
    return {
        "experiment": experiment.name,
        "file": str(loaded.path),
        "model": _model(loaded),
        "scenarios": {name: _scenario(s) for name, s in experiment.scenarios.items()},
        "device": device or experiment.device,
        "threads": experiment.threads or physical_cores(),
        "backends": list(experiment.backends),
        "left_out": left_out_backends(loaded, device) if device else [],
        "spaces": str(loaded.resolve(search.spaces)) if search.spaces is not None else None,
        "ops_without_space": ops_without_space(loaded),
        "trials": search.trials,
        "seconds": search.seconds,
        "workers": search.workers,
        "hotspots": search.hotspots,
        "sampler": search.sampler,
        "seeds": list(search.seeds),
        "graph_trials": experiment.graph.trials if experiment.graph.enabled else 0,
        "min_gain": validation.min_gain,
        "metric": validation.eval.metric if validation.eval is not None else None,
        "cluster": experiment.cluster.address,
        "runs_folder": str(runs_folder.resolve() / experiment.name),
        "storage": redacted(experiment.storage) if experiment.storage else "SQLite in the run's folder",
        "tracking": redacted(experiment.tracking or default_tracking_uri(runs_folder)),
        "writable": storage.state == OK,
        "resumes": resumes,
        "why_new": why_new,
        "problems": problems,
        "unchecked": UNCHECKED,
    }


def _checked(loaded: LoadedExperiment) -> tuple[str, list[str]]:
    """(device, what keeps the run from starting); the device is empty where something does."""
    try:
        return check_experiment(loaded), []
    except ConfigError as error:
        return "", [str(error)]


def _resumable(loaded: LoadedExperiment, runs_folder: Path, device: str) -> tuple[tuple[Path, RunState] | None, str | None]:
    """(the run that would be gone on with, why the newest unfinished one would not)."""
    experiment = loaded.experiment
    found = find_resumable(runs_folder, experiment.name, experiment_digest(loaded))
    if found is None:
        return None, why_a_new_run(runs_folder, loaded)
    if device and (device == "cpu" or experiment.cluster.address in HERE):  # only then there is one to compare with
        here = current_environment(device, experiment.threads or physical_cores())
        if changed := here.differences(found[1].started.environment):
            return None, f"the unfinished run {found[0].name} is left alone: here is {'; '.join(changed)}"
    return found, None


def plan_table(plan: dict[str, Any]) -> Table:
    """The plan for people."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("experiment", Text(f"{plan['experiment']} ({plan['file']})"))
    grid.add_row("model", Text(plan["model"]))
    for i, (name, what) in enumerate(plan["scenarios"].items()):
        grid.add_row("" if i else "scenarios", Text(f"{name}: {what}"))
    grid.add_row("device", f"{plan['device']}, {plan['threads']} CPU threads")
    grid.add_row("backends", Text("\n".join([", ".join(plan["backends"]), *plan["left_out"]])))
    if plan["spaces"] is not None:
        lacks = ", ".join(plan["ops_without_space"])
        grid.add_row(
            "search spaces",
            Text(plan["spaces"] + (f"\nnone for {lacks}: a hotspot of one of these ends the run" if lacks else "")),
        )
    budget = f"{plan['trials']} trials or {duration(plan['seconds'])}, at most {plan['hotspots']} hotspots"
    grid.add_row("search", f"{budget}; {plan['sampler']}, seeds {', '.join(plan['seeds']) or 'none'}")
    grid.add_row("graph options", f"{plan['graph_trials']} sets" if plan["graph_trials"] else "off")
    grid.add_row("a winner needs", f"a lower bound of its speed-up above {1 + plan['min_gain']:.3f}")
    grid.add_row("metric", plan["metric"] or "none: only equivalence is checked")
    where = {"local": "Ray on this machine", "inline": "child processes, no Ray"}.get(plan["cluster"], plan["cluster"])
    grid.add_row("workers", Text(f"{plan['workers']}, {where}"))
    grid.add_row("results in", Text(plan["runs_folder"] + ("" if plan["writable"] else "  (NOT writable)")))
    grid.add_row("Optuna", Text(plan["storage"]))
    grid.add_row("MLflow", Text(plan["tracking"]))
    resumes = plan["resumes"]
    if resumes is None:
        grid.add_row("starts", Text("\n".join(filter(None, ["a new run", plan["why_new"]]))))
    else:
        done = ", ".join(resumes["stages_done"]) or "none"
        said = f"{resumes['folder']}\n{resumes['num_trials']} trials done; stages done: {done}; --fresh starts anew"
        grid.add_row("resumes", Text(said))
    return grid


def _model(loaded: LoadedExperiment) -> str:
    model = loaded.experiment.model
    if model.checkpoint is not None:
        source = f"checkpoint {loaded.resolve(model.checkpoint)}"
    elif model.class_path is not None and isinstance(model.config, dict):
        source = f"random weights, a config of {len(model.config)} keys"
    elif isinstance(model.config, dict):
        source = f"random weights, config {model.config.get('model_type', '(no model_type)')}"
    elif model.config is not None:
        source = f"random weights, config {loaded.resolve(model.config)}"
    else:
        arguments = ", ".join(f"{k}={v!r}" for k, v in model.arguments.items())
        source = f"{model.factory or model.class_path}({arguments})"
        return f"{source}, {model.dtype}"
    return f"{f'{model.class_path}, ' if model.class_path else ''}{source}, {model.dtype}"


def _scenario(scenario: PrefillScenario | DecodeScenario | CallScenario) -> str:
    match scenario:
        case PrefillScenario():
            return f"prefill, batch {scenario.batch}, {scenario.length} tokens"
        case DecodeScenario():
            end = {"none": "", "argmax": ", greedy sampling", "top_k": f", the {scenario.num_sampled} likeliest tokens"}
            context = f"{scenario.context} tokens in the cache{end[scenario.sample]}"
            return f"decode, batch {scenario.batch}, {context}{_rows(scenario.rows)}"
        case CallScenario():
            inputs = f"from {scenario.inputs}" if isinstance(scenario.inputs, str) else ", ".join(scenario.inputs)
            return f"call, batch {scenario.batch}, inputs {inputs}{_rows(scenario.rows)}"


def _rows(rows: tuple[int, ...] | None) -> str:
    return f"; winners of backend triton are measured for {rows[0]} to {rows[1]} rows" if rows is not None else ""
