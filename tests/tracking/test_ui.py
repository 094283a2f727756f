from __future__ import annotations

import base64
import json
import subprocess
import sys
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import pytest

from autokernel.errors import ConfigError, StorageError
from autokernel.events import Evaluated, Event
from autokernel.tracking.journal import Journal, run_folder
from autokernel.tracking.mlflow_env import default_tracking_uri, prepare_environment
from autokernel.tracking.mlflow_layout import charted_trials
from autokernel.tracking.mlflow_writer import sync_journal
from autokernel.tracking.summary import summarize
from autokernel.tracking.titles import problem_title
from autokernel.tracking.ui import find_experiment, free_port, open_ui, ui_command, ui_environment
from autokernel.tracking.views import CHART, RESULTS, VIEW_NAMES, ChartedTrials, encode_view, publish_views, ui_url, view_states

pytestmark = pytest.mark.clock


def test_addresses_open_the_model_training_layout() -> None:
    assert ui_url("http://h:1/") == "http://h:1/#/experiments?workflowType=machine_learning"
    assert ui_url("http://h:1", "7", None) == "http://h:1/#/experiments/7/runs?workflowType=machine_learning"
    assert (
        ui_url("http://h:1", "7")
        == "http://h:1/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=ak-results"
    )
    assert ui_url("http://h:1", "7", CHART).endswith("viewStateShareKey=ak-chart&compareRunsMode=CHART")


def test_views_are_packed_as_mlflow_unpacks_them() -> None:
    charted = ChartedTrials(hotspot="mm it's", backend="inductor", params=("block_m",))
    states = view_states(["decode-b1"], ["block_m"], charted)
    assert set(states) == set(VIEW_NAMES)
    tag = json.loads(encode_view("1 Results", states[RESULTS], 5))
    kind, _, packed = tag["state"].partition(";")
    assert kind == "deflate"
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert state == states[RESULTS]
    assert "metrics.`e2e.decode-b1.speedup`" in state["selectedColumns"]
    assert states[CHART]["searchFilter"].count("'") % 2 == 0
    assert "params.`backend` = 'inductor'" in states[CHART]["searchFilter"]
    assert states[CHART]["compareRunCharts"][0]["selectedParams"] == ["block_m"]


def test_chart_shows_trials_that_have_all_its_parameters(gpu_events: list[Event]) -> None:
    """MLflow leaves a run out that lacks one of them, and the chart if no run is left."""
    charted = charted_trials(summarize(gpu_events), ["SPLIT_K", "BLOCK_N", "BLOCK_M", "template", "num_stages"])
    assert charted is not None
    shown = [
        e.evaluation.candidate
        for e in gpu_events
        if isinstance(e, Evaluated)
        and e.evaluation.candidate.backend == charted.backend
        and problem_title(e.evaluation.candidate.problem) == charted.hotspot
        and e.evaluation.measurement is not None
    ]
    complete = [candidate for candidate in shown if set(charted.params) <= set(candidate.config)]
    assert len(complete) > 5
    assert charted_trials(summarize(gpu_events[:3]), []) is None


def test_refused_views_leave_the_plain_table(caplog: pytest.LogCaptureFixture) -> None:
    prepare_environment()
    from mlflow.exceptions import MlflowException

    class Refusing:
        def set_experiment_tag(self, *arguments: Any) -> None:
            raise MlflowException("tag too long")

    assert publish_views(Refusing(), "1", view_states([], []), 0) == []
    assert "plain table" in caplog.text


def test_command_and_environment_are_lean() -> None:
    command = ui_command("127.0.0.1", 5001)
    assert command[1:4] == ["-m", "mlflow", "server"]
    assert command[command.index("--workers") + 1] == "1"
    assert "--allowed-hosts" not in command
    assert "--allowed-hosts" in ui_command("0.0.0.0", 5001)
    environment = ui_environment("postgresql://me:secret@h/db")
    assert "secret" not in " ".join(command)
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_nothing_recorded_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing was recorded there yet"), open_ui(default_tracking_uri(tmp_path)):
        pass


def test_server_of_ones_own_is_used_as_it_is() -> None:
    with open_ui("https://mlflow.example.org") as ui:
        assert ui.process is None
        assert ui.url("3").startswith("https://mlflow.example.org/#/experiments/3/")


@pytest.mark.slow
def test_ui_serves_the_run_and_is_gone_afterwards(tmp_path: Path, synthetic_events: list[Event]) -> None:
    folder = run_folder(tmp_path, "synthetic-llama", "20261121-014900-3f2a")
    journal = Journal(folder)
    for event in synthetic_events[:12]:
        journal.record(event)
    journal.close()
    synced = sync_journal(folder)
    assert find_experiment(synced.tracking_uri, "synthetic-llama") == synced.experiment_id
    assert find_experiment(synced.tracking_uri, "another") is None
    with open_ui(synced.tracking_uri, port=free_port(preferred=0)) as ui:
        with urllib.request.urlopen(f"{ui.base}/api/2.0/mlflow/experiments/get?experiment_id={synced.experiment_id}") as answer:
            assert "synthetic-llama" in json.load(answer)["experiment"]["name"]
        with urllib.request.urlopen(ui.base) as answer:
            assert b"<title>MLflow" in answer.read()
        process = ui.process
    assert process is not None
    assert process.poll() is not None
    with pytest.raises(OSError):
        urllib.request.urlopen(ui.base, timeout=2)


def test_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("this is no database, but text that is long enough to be read as a header " * 20)
    with (
        pytest.raises(StorageError, match=r"not a database|exit code"),
        open_ui(f"sqlite:///{path}", port=free_port(preferred=0)),
    ):
        pass


def test_importing_tracking_imports_no_engine() -> None:
    modules = [
        "journal",
        "state",
        "summary",
        "report",
        "plots",
        "views",
        "ui",
        "mlflow_mirror",
        "mlflow_writer",
        "mlflow_layout",
    ]
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module('autokernel.tracking.' + m)\n"
    code += "print(sorted({'mlflow', 'matplotlib', 'jinja2', 'torch', 'pandas'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
