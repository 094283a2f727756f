"""Which experiment is it: its settings, and the contents of every file that it names."""

from __future__ import annotations

import hashlib
from pathlib import Path

from autokernel.config import CallScenario, LoadedExperiment
from autokernel.records import digest_of

_HASHED_BYTES = 64 << 20  # larger files are known by size and time


def experiment_digest(loaded: LoadedExperiment) -> str:
    """Changes with the experiment and with every file that it names: what decides whether a run can be resumed.

    What has its default counts as not said: a run can be resumed by a version whose experiments may say more.
    """
    experiment = loaded.experiment
    named: list[Path] = []
    if experiment.model.checkpoint is not None:
        named.append(loaded.resolve(experiment.model.checkpoint))
    if isinstance(experiment.model.config, Path):
        named.append(loaded.resolve(experiment.model.config))
    if experiment.search.spaces is not None:
        named.append(loaded.resolve(experiment.search.spaces))
    references = [experiment.model.factory, experiment.model.class_path]
    references += [s.inputs_function for s in experiment.scenarios.values() if isinstance(s, CallScenario)]
    if experiment.validation.eval is not None:
        references += [experiment.validation.eval.metric, experiment.validation.eval.data]
    for reference in references:
        target = (reference or "").rpartition(":")[0] or (reference or "")
        if target and loaded.resolve(target).exists():
            named.append(loaded.resolve(target))
    prints = {str(path): _fingerprint(path) for path in named}
    return digest_of([experiment.model_dump(mode="json", exclude_defaults=True), prints])


def checkpoint_bytes(loaded: LoadedExperiment) -> int:
    """Size of the weights in the model's checkpoint folder; 0 without one."""
    if loaded.experiment.model.checkpoint is None:
        return 0
    folder = loaded.resolve(loaded.experiment.model.checkpoint)
    return sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))


def _fingerprint(path: Path) -> list[str]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    prints = []
    for file in files:
        if "__pycache__" in file.parts:
            continue
        status = file.stat()
        known = f"{status.st_size} {status.st_mtime_ns}"
        if status.st_size <= _HASHED_BYTES:
            known = hashlib.sha256(file.read_bytes()).hexdigest()
        prints.append(f"{file.name} {known}")
    return prints
