"""Makes helper modules of this folder importable in its tests, and starts PostgreSQL for those that want one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell that runs tests in the background has SIGINT ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)


# Half a minute to minutes each, the longest first, so that the short ones fill what is left on the other worker.
LONG = (
    "test_durability.py",
    "test_pipeline.py",
    "test_mlflow.py",
    "test_cluster.py",
    "test_objects.py",
    "test_aoti.py",
    "test_compiler.py",
    "test_capture.py",
    "test_cli.py",
    "test_tuner.py",
    "test_blackwell.py",
    "test_pool.py",
    "test_worker.py",
    "test_http_server.py",
    "test_docs.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would begin with the files of most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        if item.get_closest_marker("clock"):
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=2))


@pytest.fixture
def own_threads() -> Iterator[None]:
    """Jobs pin the threads of their process, which in a test is everybody's."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _find_postgres() -> Path | None:
    candidates = [Path("/usr/local/bin"), *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return next((p for p in candidates if (p / "postgres").exists() and (p / "initdb").exists()), None)


@pytest.fixture
def postgresql() -> Iterator[str]:
    pytest.importorskip("psycopg2", reason="PostgreSQL needs the `postgresql` extra")
    binaries = _find_postgres()
    if binaries is None:
        pytest.skip("no PostgreSQL server on this machine")
    user = {"user": "nobody"} if os.geteuid() == 0 else {}  # postgres refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="autokernel-pg-"))
    if user:
        shutil.chown(folder, "nobody")
    common: dict[str, Any] = {**user, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        made = subprocess.run(
            [binaries / "initdb", "-D", folder / "data", "-U", "ak", "-A", "trust", "-N"], check=False, **common
        )
        if made.returncode != 0:
            pytest.skip("initdb does not run here")
        port = _free_port()
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        server = subprocess.Popen([binaries / "postgres", "-D", folder / "data", "-p", str(port), *options], **common)
        try:
            _await_port(port)
            yield f"postgresql://ak:unused@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # its fast shutdown: SIGTERM waits for clients
            server.wait(20)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _await_port(port: int) -> None:
    import psycopg2

    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user="ak", dbname="postgres").close()
            return
        except psycopg2.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
