"""Opens MLflow's user interface on what was recorded: a server of its own as a child process, with one worker."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from autokernel.errors import ConfigError, StorageError
from autokernel.tracking.mlflow_env import QUIET, is_server, prepare_environment, redacted, scrubbed, with_driver
from autokernel.tracking.views import RESULTS, ui_url

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ui:
    """A user interface that answers.

    `process` is None where the tracking URI is a server, which has its own.
    """

    base: str
    process: subprocess.Popen[bytes] | None

    def url(self, experiment_id: str | None = None, view: str | None = RESULTS) -> str:
        """Address of an experiment's saved view, or of the list of experiments."""
        return ui_url(self.base, experiment_id, view)

    def wait(self) -> int:
        """Until the server ends by itself; 0 if there is none to wait for."""
        return self.process.wait() if self.process is not None else 0


def ui_command(host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """Arguments that start MLflow's server; `ui_environment` says what it serves.

    For a host beyond this machine, requests are accepted under any name: whoever opens it to a network trusts it.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    return command if host in _LOOPBACK else [*command, "--allowed-hosts", "*"]


def ui_environment(tracking_uri: str) -> dict[str, str]:
    """Environment of that server: telemetry and job runner off, and the store, whose password no process list shows."""
    return {
        **os.environ,
        **QUIET,
        "MLFLOW_BACKEND_STORE_URI": with_driver(tracking_uri),
        "MLFLOW_SERVE_ARTIFACTS": "false",  # artifacts have places of their own, recorded with each run
    }


def free_port(host: str = "127.0.0.1", preferred: int = 5000) -> int:
    """`preferred` if nothing listens there, otherwise one that the system picks."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError(f"{host}: no port can be opened there; name an address of this machine with --host")


@contextlib.contextmanager
def open_ui(tracking_uri: str, host: str = "127.0.0.1", port: int | None = None, timeout_s: float = 90.0) -> Iterator[Ui]:
    """MLflow's user interface while the context lasts; leaving it, by Ctrl-C too, stops the server.

    Args:
        tracking_uri: a database is served by a child process; a server is used as it is.
        host: where to listen.
        port: default: 5000, or a free one if that is taken.
        timeout_s: for the server to answer (about 7 s on two idle cores).

    Raises:
        ConfigError: the database is not there.
        StorageError: the server did not come up; holds the end of its log.
    """
    if is_server(tracking_uri):
        yield Ui(base=tracking_uri, process=None)
        return
    require_database(tracking_uri)
    port = port or free_port(host)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ui_command(host, port),
            env=ui_environment(tracking_uri),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            name = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
            base = f"http://{name}:{port}"
            _await_answer(process, base, timeout_s, log)
            yield Ui(base=base, process=process)
        finally:
            _stop(process)


def find_experiment(tracking_uri: str, name: str) -> str | None:
    """MLflow's id of the newest experiment that an autokernel experiment of this name recorded in, on any device.

    Raises:
        StorageError: MLflow cannot be asked.
    """
    prepare_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        pattern = name.replace("'", "").replace("%", "")
        found = MlflowClient(with_driver(tracking_uri)).search_experiments(
            filter_string=f"name LIKE '{pattern} - %'", order_by=["last_update_time DESC"], max_results=1
        )
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = scrubbed(str(error), tracking_uri).partition("\n")[0]
        raise StorageError(f"{redacted(tracking_uri)}: MLflow does not answer: {reason}") from None
    return str(found[0].experiment_id) if found else None


def require_database(tracking_uri: str) -> None:
    """See that MLflow can be asked for it: a database of a kind that it knows, and if that is a SQLite file, one that is there.

    Raises:
        ConfigError: it cannot.
    """
    scheme = tracking_uri.partition("://")[0].partition("+")[0]
    if scheme not in _DATABASES and not is_server(tracking_uri):
        known = ", ".join(f"{name}://" for name in (*_DATABASES, "http", "https"))
        raise ConfigError(f"a tracking URI begins with one of {known}, not {scheme!r}")
    if tracking_uri.startswith("sqlite:///"):
        path = Path(tracking_uri.removeprefix("sqlite:///"))
        if not path.is_file():
            raise ConfigError(
                f"{path}: nothing was recorded there yet; `autokernel run` an experiment first, or name its --runs"
            )


def _await_answer(process: subprocess.Popen[bytes], base: str, timeout_s: float, log: BinaryIO) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StorageError(f"MLflow's server ended with exit code {process.returncode}; the end of its log:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise StorageError(f"MLflow's server did not answer at {base} within {timeout_s:.0f} s; the end of its log:\n{_tail(log)}")


def _tail(log: BinaryIO, num_bytes: int = 2000) -> str:
    fd = log.fileno()
    size = os.fstat(fd).st_size
    return os.pread(fd, num_bytes, max(0, size - num_bytes)).decode(errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server and its workers: they are a process group of their own."""
    for signal_number, patience_s in ((15, 5.0), (9, 5.0)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
