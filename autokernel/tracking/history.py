"""What earlier runs found, for seeds: read from their journals."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from autokernel.errors import StorageError
from autokernel.events import Evaluated, RunStarted
from autokernel.records import Evaluation, Status
from autokernel.tracking.journal import find_runs, read_journal

log = logging.getLogger(__name__)

MAX_RUNS = 10


def earlier_runs(runs_folder: Path, but_not: Path) -> list[Path]:
    """Folders of the newest runs of any experiment, without the current one, however either folder is spelled."""
    runs_folder, but_not = runs_folder.resolve(), but_not.resolve()
    folders = []
    if runs_folder.is_dir():
        for experiment in sorted(p for p in runs_folder.iterdir() if p.is_dir()):
            folders += [folder for folder in find_runs(runs_folder, experiment.name) if folder != but_not]
    return sorted(folders, key=lambda folder: folder.name, reverse=True)[:MAX_RUNS]


def ok_evaluations(folders: Iterable[Path], device_name: str, torch_version: str) -> list[Evaluation]:
    """Successful evaluations on the same kind of device with the same torch; unreadable journals are passed over."""
    found: list[Evaluation] = []
    for folder in folders:
        try:
            events = read_journal(folder)
        except StorageError as error:
            log.info("no seeds from %s: %s", folder, error)
            continue
        start = next((event for event in events if isinstance(event, RunStarted)), None)
        if start is None or (start.environment.device_name, start.environment.torch) != (device_name, torch_version):
            continue
        found += [e.evaluation for e in events if isinstance(e, Evaluated) and e.evaluation.status is Status.OK]
    return found
