"""Which run is meant, and what its journal says."""

from __future__ import annotations

from pathlib import Path

from autokernel.errors import ConfigError, StorageError
from autokernel.events import Event, RunStarted
from autokernel.tracking.journal import JOURNAL_NAME, find_runs, read_journal
from autokernel.tracking.mlflow_env import default_tracking_uri
from autokernel.tracking.summary import RunSummary, summarize


def find_run(which: str | None, runs: Path) -> Path:
    """The folder of a run, given as a folder, its id, or the name of an experiment (its newest run).

    Raises:
        ConfigError: there is no such run.
    """
    if which is not None:
        folder = Path(which).expanduser()
        folder = folder.parent if folder.name == JOURNAL_NAME else folder
        if (folder / JOURNAL_NAME).is_file():
            return folder.resolve()
    found = find_runs(runs)
    if not found:
        raise ConfigError(f"{runs.resolve()}: no runs there; `autokernel run` an experiment first, or name its --runs")
    matching = [f for f in found if which is None or which in (f.name, f.parent.name)]
    if not matching:
        names = sorted({f.parent.name for f in found})
        raise ConfigError(
            f"{which}: neither a run's folder nor the id of a run or the name of an experiment under {runs.resolve()}; "
            f"experiments there: {', '.join(names)}; newest runs: {', '.join(f.name for f in found[:3])}"
        )
    return matching[0].resolve()


def runs_folder_of(folder: Path, runs: Path) -> Path:
    """What other commands need as --runs for this run: `runs` itself if that is where it lies."""
    return runs if folder.parent.parent == runs.resolve() else folder.parent.parent


def earlier_events(runs: Path, started: RunStarted) -> list[Event]:
    """What a resumed run's journal holds; nothing if it cannot be read, since only a display asks."""
    try:
        return read_journal(runs / started.name / started.run_id)
    except StorageError:
        return []


def summary_of(folder: Path) -> RunSummary:
    """A run as its journal tells it.

    Raises:
        StorageError: the journal cannot be read, or nothing is in it.
    """
    events = read_journal(folder)
    if not any(isinstance(event, RunStarted) for event in events):
        raise StorageError(f"{folder}: the journal is empty: the run was killed before it began; start with --fresh")
    return summarize(events)


def tracking_of_newest(runs: Path) -> tuple[str, str]:
    """(MLflow tracking URI, experiment's name) of the newest run; the name is empty if there is no run."""
    import yaml

    try:
        started = summary_of(find_run(None, runs)).started
    except (ConfigError, StorageError):
        return default_tracking_uri(runs), ""
    try:
        data = yaml.safe_load(started.experiment)
    except yaml.YAMLError:
        data = None
    named = data.get("tracking") if isinstance(data, dict) else None
    return str(named or default_tracking_uri(runs)), started.name
