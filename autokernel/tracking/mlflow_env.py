"""What MLflow has to be told before it is imported, and where it keeps things unless an experiment says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

QUIET: Mapping[str, str] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a job runner of 2 GB that nothing here uses
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the mirror retries by itself, and knows when to stop
    "GIT_PYTHON_REFRESH": "quiet",
}


def prepare_environment() -> None:
    """Set what is not set yet. Call before importing mlflow, which reads some of it on import."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def default_tracking_uri(runs_folder: Path | str) -> str:
    """A SQLite file in the folder of runs, shared by all experiments there."""
    return f"sqlite:///{Path(runs_folder).expanduser().resolve() / 'mlflow.db'}"


def default_artifact_folder(runs_folder: Path | str) -> Path:
    """Where artifacts lie when the tracking URI is a database (a server has a place of its own)."""
    return Path(runs_folder).expanduser().resolve() / "mlartifacts"


def is_server(tracking_uri: str) -> bool:
    """Whether the URI names an MLflow server rather than a database."""
    return urlsplit(tracking_uri).scheme in ("http", "https", "databricks")


def redacted(tracking_uri: str) -> str:
    """The URI without its password, for messages."""
    parts = urlsplit(tracking_uri)
    if parts.password is None:
        return tracking_uri
    return tracking_uri.replace(f":{parts.password}@", ":***@", 1)
