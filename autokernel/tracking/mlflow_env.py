"""What MLflow has to be told before it is imported, and where it keeps things unless an experiment says otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from autokernel.config_messages import without_passwords

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
    scheme, separator, _ = tracking_uri.partition(":")  # urlsplit would refuse what has a `[` in its password
    return bool(separator) and scheme.lower() in ("http", "https", "databricks")


def with_driver(tracking_uri: str) -> str:
    """The URI with the PostgreSQL driver that is installed, where it names none.

    SQLAlchemy 2.1 takes a plain `postgresql://` for psycopg 3; the `postgresql` extra installs psycopg2.
    """
    scheme, separator, rest = tracking_uri.partition("://")
    if scheme in ("postgresql", "postgres") and find_spec("psycopg") is None and find_spec("psycopg2") is not None:
        return f"postgresql+psycopg2{separator}{rest}"
    return tracking_uri


def scrubbed(text: str, tracking_uri: str) -> str:
    """A text, such as an error that quotes the URI, without the URI's password. Never raises."""
    for password in sorted(_passwords(tracking_uri), key=len, reverse=True):
        text = text.replace(f":{password}@", ":***@")
    return without_passwords(text)


def _passwords(tracking_uri: str) -> set[str]:
    """The URI's password, in every spelling that a text may quote; where it is unclear how far it goes, both."""
    widest = re.search(r"://[^:/]*:(.*)@", tracking_uri, re.DOTALL)  # SQLAlchemy takes `[`, `/`, `?` and `#` in it, too
    found = {widest[1] if widest else ""}
    with suppress(ValueError):  # a `[` makes it no URL
        found.add(urlsplit(tracking_uri).password or "")
    return {spelling for password in found if password for spelling in (password, unquote(password))}


def redacted(tracking_uri: str) -> str:
    """The URI without its password, for messages."""
    return scrubbed(tracking_uri, tracking_uri)
