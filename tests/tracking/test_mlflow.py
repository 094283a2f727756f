"""MLflow for real: SQLite, PostgreSQL where a server is at hand, a server that refuses."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autokernel.errors import StorageError
from autokernel.events import Event
from autokernel.tracking.journal import Journal, run_folder
from autokernel.tracking.mlflow_env import (
    default_tracking_uri,
    is_server,
    prepare_environment,
    redacted,
    scrubbed,
    with_driver,
)
from autokernel.tracking.mlflow_mirror import MlflowMirror
from autokernel.tracking.mlflow_writer import sync_journal, sync_runs
from autokernel.tracking.views import VIEW_NAMES

pytestmark = pytest.mark.clock

_RUN_ID = "20261121-014900-3f2a"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow spends seconds on making its tables: once."""
    prepare_environment()
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def runs(tmp_path: Path, empty_database: Path) -> Path:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(with_driver(uri))


def _write(folder: Path, events: list[Event], *recorders: MlflowMirror) -> None:
    journal = Journal(folder)
    (folder / "bundle").mkdir(exist_ok=True)
    (folder / "bundle" / "bundle.json").write_text("{}")
    for event in events:
        for recorder in (journal, *recorders):
            recorder.record(event)
    journal.close()


def _all_runs(uri: str) -> list[Any]:
    client = _client(uri)
    ids = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    return list(client.search_runs(ids, max_results=5000)) if ids else []


def _image(uri: str) -> list[Any]:
    """Everything that mirroring again must not change."""
    rows = []
    for run in _all_runs(uri):
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        rows.append(
            (run.info.run_id, run.info.run_name, run.info.status, run.info.end_time, run.data.params, run.data.metrics, tags)
        )
    return sorted(rows, key=lambda row: row[0])


def _check_layout(uri: str) -> None:
    runs = _all_runs(uri)
    kinds = Counter(r.data.tags["ak.kind"] for r in runs)
    assert kinds == {"campaign": 1, "hotspot": 6, "trial": 59}  # the LOST one is tried again, not shown
    campaign = next(r for r in runs if r.data.tags["ak.kind"] == "campaign")
    assert campaign.info.status == "FINISHED"
    assert campaign.data.tags["ak.status"] == "won"
    assert campaign.data.tags["mlflow.source.git.commit"].startswith("0123456789")
    assert campaign.data.tags["ak.torch"] == "2.13.0+cpu"
    assert "| decode-b1 |" in campaign.data.tags["mlflow.note.content"]
    assert campaign.data.metrics["e2e.prefill-1x512.speedup"] == 1.31
    assert campaign.data.metrics["eval.bits_per_byte.stock"] == 1.4213
    assert campaign.data.metrics["trials.WRONG"] == 2
    hotspots = {r.info.run_id: r for r in runs if r.data.tags["ak.kind"] == "hotspot"}
    trials = [r for r in runs if r.data.tags["ak.kind"] == "trial"]
    assert {h.data.tags["mlflow.parentRunId"] for h in hotspots.values()} == {campaign.info.run_id}
    assert {t.data.tags["mlflow.parentRunId"] for t in trials} == set(hotspots)
    assert {h.data.tags["ak.status"] for h in hotspots.values()} == {"won", "kept stock", "dropped"}
    for run in trials:
        timed = run.data.tags["ak.status"] == "OK"
        assert ("latency_us" in run.data.metrics) == timed
        assert (run.info.status == "FINISHED") == timed
    hotspot = hotspots[trials[0].data.tags["mlflow.parentRunId"]]
    history = _client(uri).get_metric_history(hotspot.info.run_id, "best_latency_us")
    values = [m.value for m in sorted(history, key=lambda m: m.step)]
    assert len(values) > 5
    assert values == sorted(values, reverse=True)
    mine = [t for t in trials if t.data.tags["mlflow.parentRunId"] == hotspot.info.run_id]
    assert values[-1] == min(t.data.metrics["latency_us"] for t in mine if "latency_us" in t.data.metrics)
    assert all(float(f"{v:.4g}") == v for t in trials for v in t.data.metrics.values())


def test_mirror_lays_a_run_out_and_stores_its_artifacts(runs: Path, synthetic_events: list[Event]) -> None:
    folder = run_folder(runs, "synthetic-llama", _RUN_ID)
    mirror = MlflowMirror(folder)
    assert mirror.tracking_uri == default_tracking_uri(runs)
    _write(folder, synthetic_events, mirror)
    mirror.close()
    mirror.close()
    assert mirror.complete, (folder / "mlflow.log").read_text()
    _check_layout(mirror.tracking_uri)
    client = _client(mirror.tracking_uri)
    experiment = client.get_experiment_by_name("synthetic-llama - Synthetic CPU (family 1 model 2)")
    assert experiment.experiment_id == mirror.experiment_id
    assert {f"mlflow.sharedViewState.{key}" for key in VIEW_NAMES} <= set(experiment.tags)
    campaign = client.search_runs([experiment.experiment_id], "tags.`ak.kind` = 'campaign'")[0]
    names = {f.path for f in client.list_artifacts(campaign.info.run_id)}
    assert names == {"bundle", "experiment.yaml", "journal.jsonl", "plots", "report.html"}
    assert (runs / "mlartifacts" / campaign.info.run_id / "artifacts" / "bundle" / "bundle.json").is_file()
    before = _image(mirror.tracking_uri)
    trial = next(r for r in _all_runs(mirror.tracking_uri) if r.data.tags["ak.kind"] == "trial")
    client.update_run(trial.info.run_id, status="RUNNING")  # as a writer that was killed in the middle leaves it
    assert sync_runs(runs) == 1
    assert _image(mirror.tracking_uri) == before


def test_interrupted_run_is_completed_when_it_goes_on(runs: Path, synthetic_events: list[Event]) -> None:
    folder = run_folder(runs, "synthetic-llama", _RUN_ID)
    uri = default_tracking_uri(runs)
    _write(folder, synthetic_events[:40])
    sync_journal(folder)
    campaign = next(r for r in _all_runs(uri) if r.data.tags["ak.kind"] == "campaign")
    assert (campaign.info.status, campaign.data.tags["ak.status"]) == ("KILLED", "interrupted")
    _write(folder, synthetic_events[40:])
    sync_journal(folder)
    _check_layout(uri)


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_lost_server_costs_the_run_nothing(runs: Path, synthetic_events: list[Event], caplog: pytest.LogCaptureFixture) -> None:
    folder = run_folder(runs, "synthetic-llama", _RUN_ID)
    mirror = MlflowMirror(folder, f"http://user:secret@127.0.0.1:{_closed_port()}", patience_s=40)
    with caplog.at_level(logging.INFO):
        start_s = time.perf_counter()
        _write(folder, synthetic_events, mirror)
        assert time.perf_counter() - start_s < 3
        mirror.close()
    assert mirror.complete is False
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert "the run goes on" in warnings[0]
    assert "autokernel ui" in warnings[1]
    assert "secret" not in caplog.text + (folder / "mlflow.log").read_text()
    sync_journal(folder)  # into the default database: it has everything
    _check_layout(default_tracking_uri(runs))


def test_child_that_dies_costs_the_run_nothing(runs: Path, synthetic_events: list[Event]) -> None:
    folder = run_folder(runs, "synthetic-llama", _RUN_ID)
    mirror = MlflowMirror(folder)
    mirror.record(synthetic_events[0])
    assert mirror._child is not None
    mirror._child.kill()
    mirror._child.wait()
    _write(folder, synthetic_events, mirror)
    mirror.close()
    assert mirror.complete is False


def test_mirror_ends_when_its_driver_is_killed(runs: Path) -> None:
    folder = run_folder(runs, "synthetic-llama", _RUN_ID)
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import synthetic_runs
from autokernel.tracking.journal import Journal
from autokernel.tracking.mlflow_mirror import MlflowMirror
recorders = Journal({str(folder)!r}), MlflowMirror({str(folder)!r})
for event in synthetic_runs.make_events()[:12]:
    for recorder in recorders:
        recorder.record(event)
print(recorders[1]._child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    driver = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(driver.stdout)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the mirror outlives its driver"
        time.sleep(0.1)
    kinds = Counter(r.data.tags["ak.kind"] for r in _all_runs(default_tracking_uri(runs)))
    assert kinds == {"campaign": 1, "hotspot": 6, "trial": 6}


def test_mirroring_costs_the_driver_less_than_a_millisecond_a_trial(
    runs: Path, synthetic_run: Callable[..., list[Event]], record_property: Callable[[str, object], None]
) -> None:
    events = synthetic_run(40)
    folder = run_folder(runs, "synthetic-llama", _RUN_ID)
    journal, mirror = Journal(folder), MlflowMirror(folder)
    mirror.record(events[0])  # starts the child
    spent_s = 0.0
    for event in events:
        journal.record(event)
        start_s = time.perf_counter()
        mirror.record(event)
        spent_s += time.perf_counter() - start_s
    journal.close()
    start_s = time.perf_counter()
    mirror.close()
    close_s = time.perf_counter() - start_s
    record_property("driver_ms_per_event", 1000 * spent_s / len(events))
    assert mirror.complete
    assert spent_s / len(events) < 1e-3
    assert close_s < 120  # about 5 s on two idle cores


def test_refusing_database_is_an_error_with_the_cure(runs: Path, synthetic_events: list[Event]) -> None:
    folder = run_folder(runs, "synthetic-llama", _RUN_ID)
    _write(folder, synthetic_events[:3])
    with pytest.raises(StorageError, match="The journal has everything"):
        sync_journal(folder, f"http://127.0.0.1:{_closed_port()}")
    with pytest.raises(StorageError, match="did not take the run"):
        sync_journal(folder, "sqlite:////proc/autokernel/mlflow.db")
    with pytest.raises(StorageError, match="did not take the run") as refused:
        sync_journal(folder, "postgresql://me:p[ss@127.0.0.1:9/db")  # no URI at all for MLflow
    assert "p[ss" not in str(refused.value)


def test_password_stays_out_of_messages() -> None:
    assert redacted("postgresql://me:pa%40ss@host/db") == "postgresql://me:***@host/db"
    assert redacted("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"
    assert scrubbed("no route to me:pa@ss@host", "http://me:pa%40ss@host") == "no route to me:***@host"
    assert scrubbed("plain", "http://host") == "plain"


@pytest.mark.parametrize("password", ["p[ss", "p]ss", "[p]ss", "p/ss", "p#s?s", "p@s[s", "p%5Bss", "%", "p\u2100ss"])
def test_a_password_that_no_url_may_have_stays_out_of_messages(password: str) -> None:
    uri = f"postgresql://user:{password}@127.0.0.1:9/db"
    assert redacted(uri) == "postgresql://user:***@127.0.0.1:9/db"
    assert scrubbed(f"no route to user:{password}@127.0.0.1", uri) == "no route to user:***@127.0.0.1"
    assert scrubbed(f"tried {with_driver(uri)} twice", uri) == f"tried {with_driver(redacted(uri))} twice"
    assert redacted(f"postgresql://a@b.org:{password}@h/db") == "postgresql://a@b.org:***@h/db", "an address as the user"
    assert not is_server(uri)
    assert is_server(f"https://user:{password}@host")


def test_a_password_that_no_url_may_have_costs_the_run_nothing(
    runs: Path, synthetic_events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_folder(runs, "synthetic-llama", _RUN_ID)
    mirror = MlflowMirror(folder, "postgresql://user:p[ss@127.0.0.1:9/db", patience_s=40)
    with caplog.at_level(logging.INFO):
        _write(folder, synthetic_events[:3], mirror)
        mirror.close()
    assert mirror.complete is False
    assert "MLflow (postgresql://user:***@127.0.0.1:9/db) does not have everything" in caplog.text
    assert "p[ss" not in caplog.text + (folder / "mlflow.log").read_text()


def test_plain_postgresql_names_the_driver_that_is_installed() -> None:
    assert with_driver("postgresql+psycopg://h/d") == "postgresql+psycopg://h/d"
    assert with_driver("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"
    installed = importlib.util.find_spec("psycopg") is None and importlib.util.find_spec("psycopg2") is not None
    assert with_driver("postgresql://h/d") == ("postgresql+psycopg2://h/d" if installed else "postgresql://h/d")


def test_postgresql_holds_the_same(postgresql: str, tmp_path: Path, synthetic_events: list[Event]) -> None:
    folder = run_folder(tmp_path, "synthetic-llama", _RUN_ID)
    _write(folder, synthetic_events)
    sync_journal(folder, postgresql)
    _check_layout(postgresql)
    assert (tmp_path / "mlartifacts").is_dir()
    before = _image(postgresql)
    sync_journal(folder, postgresql)
    assert _image(postgresql) == before
