"""A run mirrored into a real MLflow server, as an experiment's `tracking: http://...` asks for."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autokernel.events import Event
from autokernel.tracking.journal import Journal, run_folder
from autokernel.tracking.mlflow_env import QUIET, prepare_environment
from autokernel.tracking.mlflow_mirror import MlflowMirror
from autokernel.tracking.ui import free_port

pytestmark = pytest.mark.clock

RUN_ID = "20261121-014900-3f2a"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server that keeps artifacts itself, in `tmp_path / "kept"`, and is reached by HTTP alone."""
    import os

    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", str(tmp_path / "kept")]
    env = {**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options, *stores],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                with urllib.request.urlopen(f"{base}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.2)
        yield base
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.mark.slow
def test_a_run_is_mirrored_over_http(server: str, tmp_path: Path, synthetic_run: Callable[..., list[Event]]) -> None:
    prepare_environment()
    import mlflow

    folder = run_folder(tmp_path / "runs", "synthetic-llama", RUN_ID)
    journal, mirror = Journal(folder), MlflowMirror(folder, server)
    (folder / "report.html").write_text("<html></html>")
    for event in synthetic_run(18):
        journal.record(event)
        mirror.record(event)
    journal.close()
    mirror.close()
    assert mirror.complete

    client = mlflow.MlflowClient(server)
    (experiment,) = [e for e in client.search_experiments() if e.name.startswith("synthetic")]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    kinds = Counter(run.data.tags["ak.kind"] for run in runs)
    assert kinds["campaign"] == 1
    assert kinds["hotspot"] == 6
    assert kinds["trial"] >= 16
    (campaign,) = [run for run in runs if run.data.tags["ak.kind"] == "campaign"]
    names = {item.path for item in client.list_artifacts(campaign.info.run_id)}
    assert "journal.jsonl" in names
    assert list((tmp_path / "kept").rglob("journal.jsonl")), "artifacts went to the server, not to this machine's disk"
