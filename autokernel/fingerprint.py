"""Which experiment is it: its settings, and the contents of every file that it names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from autokernel.config import CallScenario, LoadedExperiment
from autokernel.records import digest_of

_HASHED_BYTES = 64 << 20  # larger files are known by size and time
_SPACES = "search.spaces"
# What runs write (docs/tracking.md), named again: the modules that write it lie above this one.
_OF_A_RUN = frozenset({"journal.jsonl", "journal.lock"})
_MLFLOW_DATABASE = "mlflow.db"  # and mlflow.db-journal, -wal, -shm
_MLFLOW_ARTIFACTS = "mlartifacts"


def experiment_digest(loaded: LoadedExperiment) -> str:
    """Changes with the experiment and with every file that it names: what decides whether a run can be resumed.

    What has its default counts as not said: a run can be resumed by a version whose experiments may say more.
    """
    prints = {str(path): _fingerprint(path, spaces=key == _SPACES) for key, path in _named_files(loaded)}
    return digest_of([loaded.experiment.model_dump(mode="json", exclude_defaults=True), prints])


def file_digests(loaded: LoadedExperiment) -> dict[str, str]:
    """By key of the experiment, a digest of the file or folder that it names: tells which of them have changed."""
    return {key: digest_of([str(path), _fingerprint(path, spaces=key == _SPACES)]) for key, path in _named_files(loaded)}


def _named_files(loaded: LoadedExperiment) -> list[tuple[str, Path]]:
    """Keys of the experiment that name a file or a folder, with what they name."""
    model, evaluated = loaded.experiment.model, loaded.experiment.validation.eval
    named: list[tuple[str, Path]] = []
    if model.checkpoint is not None:
        named.append(("model.checkpoint", loaded.resolve(model.checkpoint)))
    if isinstance(model.config, Path):
        named.append(("model.config", loaded.resolve(model.config)))
    if loaded.experiment.search.spaces is not None:
        named.append((_SPACES, loaded.resolve(loaded.experiment.search.spaces)))
    references = [("model.factory", model.factory), ("model.class_path", model.class_path)]
    references += [
        (f"scenarios.{name}.inputs", scenario.inputs_function)
        for name, scenario in loaded.experiment.scenarios.items()
        if isinstance(scenario, CallScenario)
    ]
    if evaluated is not None:
        references += [("validation.eval.metric", evaluated.metric), ("validation.eval.data", evaluated.data)]
    for key, reference in references:
        target = (reference or "").rpartition(":")[0] or (reference or "")
        if target and loaded.resolve(target).exists():
            named.append((key, loaded.resolve(target)))
    return named


def checkpoint_bytes(loaded: LoadedExperiment) -> int:
    """Size of the weights in the model's checkpoint folder; 0 without one."""
    if loaded.experiment.model.checkpoint is None:
        return 0
    folder = loaded.resolve(loaded.experiment.model.checkpoint)
    return sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))


def _fingerprint(path: Path, *, spaces: bool) -> list[str]:
    """Of a file, or of all files of a folder but runs; of a folder of search spaces only those, wherever it lies."""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in (path.glob("*.yaml") if spaces else _files_below(path)) if p.is_file())
    prints = []
    for file in files:
        if "__pycache__" in file.parts:
            continue
        try:
            status = file.stat()
            known = f"{status.st_size} {status.st_mtime_ns}"
            if status.st_size <= _HASHED_BYTES:
                known = hashlib.sha256(file.read_bytes()).hexdigest()
        except FileNotFoundError:  # deleted since it was listed
            continue
        prints.append(f"{file.name} {known}")
    return prints


def _files_below(folder: Path) -> Iterator[Path]:
    """Files at any depth, but none that runs write: a run must not change what it began with."""
    for root, folders, files in os.walk(folder):
        here = Path(root)
        if here != folder and _OF_A_RUN.issubset(files):
            folders.clear()
            continue
        folders[:] = [name for name in folders if name != _MLFLOW_ARTIFACTS]
        yield from (here / name for name in files if not name.startswith(_MLFLOW_DATABASE))
