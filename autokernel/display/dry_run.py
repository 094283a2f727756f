"""What a run would do, without doing it: needs neither torch nor any engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from autokernel.config import CallScenario, DecodeScenario, LoadedExperiment, PrefillScenario
from autokernel.display.words import duration
from autokernel.environment import physical_cores
from autokernel.fingerprint import experiment_digest
from autokernel.tracking.mlflow_env import default_tracking_uri, redacted
from autokernel.tracking.state import find_resumable

_NVIDIA = Path("/proc/driver/nvidia/version")


def plan_json(loaded: LoadedExperiment, runs_folder: Path, *, fresh: bool) -> dict[str, Any]:
    """The plan of a run for scripts; `plan_table` shows the same."""
    experiment = loaded.experiment
    found = None
    if not fresh:
        found = find_resumable(runs_folder, experiment.name, experiment_digest(loaded))
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
        "device": _device(experiment.device),
        "threads": experiment.threads or physical_cores(),
        "backends": list(experiment.backends),
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
        "writable": _writable(runs_folder),
        "resumes": resumes,
    }


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
    grid.add_row("backends", ", ".join(plan["backends"]))
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
        grid.add_row("starts", "a new run")
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
            return f"decode, batch {scenario.batch}, {scenario.context} tokens in the cache{end[scenario.sample]}"
        case CallScenario():
            inputs = f"from {scenario.inputs}" if isinstance(scenario.inputs, str) else ", ".join(scenario.inputs)
            return f"call, batch {scenario.batch}, inputs {inputs}"


def _device(wanted: str) -> str:
    """What "auto" will most likely be; torch itself is asked only when the run starts."""
    if wanted != "auto":
        return wanted
    return "auto: cuda if this torch has CUDA, else cpu" if _NVIDIA.exists() else "cpu"


def _writable(folder: Path) -> bool:
    """Whether the folder, or what it would be made in, can be written."""
    place = folder.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
