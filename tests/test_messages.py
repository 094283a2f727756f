"""Error messages that no test beside their code meets: each says the rule, the value, and the cure."""

from __future__ import annotations

import marshal
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from autokernel import pipeline
from autokernel.config import CallScenario, LoadedExperiment, load_experiment
from autokernel.errors import AutokernelError, BundleError, ConfigError, JobCrashed, StorageError, WorkerError, WorkloadError
from autokernel.events import Proved

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip


@dataclass
class Lab:
    """A folder with an experiment that is changed key by key."""

    folder: Path

    def load(self, **changes: Any) -> LoadedExperiment:
        (self.folder / "parts.py").write_text("def score(forward):\n    return [1.0]\ndef nothing():\n    return b''\n")
        (self.folder / "broken.py").write_text("import no_such_package\n")
        (self.folder / "void").mkdir(exist_ok=True)
        data = {"name": "x", "model": {"config": LLAMA}, "scenarios": {"p": {"kind": "prefill", "length": 8}}, "device": "cpu"}
        path = self.folder / "x.yaml"
        path.write_text(yaml.safe_dump({**data, **changes}))
        return load_experiment(path)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


# --- experiments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": {"scenarios": ["q"]}}, r"x.yaml: graph.scenarios: 'q' is none of p$"),
        (
            {"model": {"factory": "parts.py:score", "config_overrides": {"a": 1}}},
            "`config_overrides` belong to `checkpoint` and `config`; a factory takes `arguments`",
        ),
    ],
)
def test_combinations_that_cannot_be(lab: Lab, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lab.load(**changes)


# --- models, data and metrics


def test_a_models_config_that_is_no_mapping(lab: Lab) -> None:
    from autokernel.profiling.workload import model_config

    (lab.folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config.json must hold the keys of a config, not list"):
        model_config(lab.load(model={"config": "config.json"}))


def test_a_call_scenario_without_its_experiment() -> None:
    from autokernel.profiling.workload import build_scenario

    scenario = CallScenario(kind="call", inputs="parts.py:inputs", batch=1)
    with pytest.raises(WorkloadError, match=r"scenario one: the inputs' function parts.py:inputs needs the experiment"):
        build_scenario(torch.nn.Linear(2, 2), scenario, name="one", seed=0, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, r"x.yaml: validation.eval is not given"),
        ({"metric": "broken.py:score"}, r"broken.py cannot be imported: No module named 'no_such_package'"),
        ({"metric": "perplexity", "data": "void"}, r"validation.eval.data: void holds no text"),
        ({"metric": "perplexity", "data": "parts.py:nothing"}, r"validation.eval.data: parts.py:nothing holds no text"),
        (
            {"metric": "perplexity", "data": "parts.py"},
            "a model of random weights with 64 tokens has no tokenizer; remove",
        ),
    ],
)
def test_metrics_that_cannot_be_measured(lab: Lab, section: dict[str, Any] | None, message: str) -> None:
    from autokernel.profiling.metric import load_metric
    from autokernel.profiling.workload import load_model

    loaded = lab.load(validation={} if section is None else {"eval": section})
    with pytest.raises(ConfigError, match=message):
        load_metric(loaded, load_model(loaded, "cpu"), "cpu")


def test_a_function_of_a_file_that_is_gone(lab: Lab) -> None:
    from autokernel.profiling.functions import load_function

    with pytest.raises(ConfigError, match=r"some.key: .*gone.py does not exist or is no Python file"):
        load_function(lab.load(), "gone.py:score", "some.key")


def test_a_language_metric_of_another_model(lab: Lab) -> None:
    from autokernel.profiling.metric import load_metric

    loaded = lab.load(validation={"eval": {"metric": "perplexity", "data": "parts.py"}})
    with pytest.raises(ConfigError, match=r"validation.eval.metric: perplexity is for language models of transformers"):
        load_metric(loaded, torch.nn.Linear(2, 2), "cpu")


# --- search spaces


def test_spaces_that_cannot_be_read(tmp_path: Path) -> None:
    from autokernel.search.graph_options import FILE, load_graph_options
    from autokernel.search.space_file import load_space

    (tmp_path / "mm.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"mm.yaml: cannot be read: .*can't decode byte 0xff"):
        load_space("mm", tmp_path)
    (tmp_path / FILE).mkdir()
    with pytest.raises(ConfigError, match=rf"{FILE}: cannot be read: .*Is a directory"):
        load_graph_options("cpu", tmp_path)


def test_a_package_without_its_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autokernel.search import space_file

    monkeypatch.setattr(space_file, "__file__", str(tmp_path / "autokernel" / "search" / "space_file.py"))
    with pytest.raises(
        ConfigError,
        match=r"no search_spaces folder: install it from its checkout again .*, or name a folder in `search.spaces`",
    ):
        space_file.default_spaces_folder()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tile": {"divisors": "m - 64"}}, r"divisors: `m - 64` is 0, must be a whole number from 1 to 1048576"),
        ({"tile": {"divisors": True}}, r"must be a whole number or an expression, not True"),
    ],
)
def test_divisors_of_nothing(tmp_path: Path, choices: dict[str, Any], message: str) -> None:
    from autokernel.search.space import DeviceFacts, names_for
    from autokernel.search.space_file import load_space

    part = {"cpu": {"choices": choices, "default": {"tile": 1}}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"op": "toy", "names": ["m"], "backends": {"inductor": part}}))
    device = DeviceFacts(device="cpu", threads=4, isa="AVX512", num_units=4)
    with pytest.raises(ConfigError, match=message):
        load_space("toy", tmp_path)["inductor"].bind(names_for({"m": 64}, device))


# --- workers and storage


def test_a_child_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from autokernel.workers.worker import Worker

    worker = Worker(env={"PYTHONHOME": "/nowhere"})
    with pytest.raises(WorkerError, match=r"the worker's child process did not start: .*ended with exit code 1"):
        worker.start()
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(WorkerError, match=r"a worker's child process cannot be started: .*No such file.*/nowhere/python"):
        worker.start()
    worker.close()


def test_an_answer_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from autokernel.workers.process import ChildProcess
    from autokernel.workers.worker import Worker

    worker = Worker()
    worker.start()
    monkeypatch.setattr(ChildProcess, "exchange", lambda child, request, timeout_s: marshal.dumps(7)[:1])
    with pytest.raises(JobCrashed, match="the job wrote into the worker's own pipe"):
        worker.run(print, 5)
    worker.close()


def test_a_device_lock_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autokernel.workers.device_lock import device_lock

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"autokernel-{os.getuid()}" / "cpu.lock").mkdir(parents=True)
    with (
        pytest.raises(StorageError, match=r"cpu.lock: the device lock cannot be opened: .*; set TMPDIR to a writable folder"),
        device_lock("cpu", exclusive=True),
    ):
        pass


def test_a_bundle_that_cannot_be_written(tmp_path: Path) -> None:
    from autokernel.environment import current_environment
    from autokernel.export.bundle import Bundle, write_bundle

    (tmp_path / "file").write_text("")
    bundle = Bundle(name="x", created="", version="", environment=current_environment("cpu", 1))
    cure = "free some space there, or make the folder writable, then run the same command again"
    with pytest.raises(BundleError, match=rf"file/bundle: the bundle cannot be written: .*Not a directory.*: {cure}"):
        write_bundle(bundle, tmp_path / "file" / "bundle")
    (tmp_path / "bundle.zip").mkdir()
    with pytest.raises(BundleError, match="cannot be written"):
        write_bundle(bundle, tmp_path / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "bundle.zip", "file"], "no half document is left behind"


def test_storage_without_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    from autokernel.records import Problem, TensorSpec
    from autokernel.search.space import DeviceFacts, names_for
    from autokernel.search.space_file import load_space
    from autokernel.search.tuner import Tuner

    monkeypatch.setitem(__import__("sys").modules, "psycopg2", None)
    spec = TensorSpec(shape=(64, 64), dtype="float32", stride=(64, 1))
    problem = Problem(op="mm", inputs=(spec, spec), device="cpu")
    device = DeviceFacts(device="cpu", threads=1, isa="AVX512", num_units=1)
    names = names_for({"m": 64, "n": 64, "k": 64, "dtype_bytes": 4, "has_constant_weight": 0, "num_epilogue": 0}, device)
    with pytest.raises(
        StorageError, match=r"storage postgresql\+psycopg2://.*; pip install -c constraints.txt -e '.\[postgresql\]'"
    ):
        Tuner(problem=problem, spaces=load_space("mm"), names=names, storage="postgresql+psycopg2://localhost/x")


# --- MLflow's server


def test_no_port_on_an_address_of_another_machine() -> None:
    from autokernel.tracking.ui import free_port

    with pytest.raises(
        ConfigError, match=r"192.0.2.1: no port can be opened there; name an address of this machine with --host"
    ):
        free_port("192.0.2.1")


def test_a_server_that_listens_but_never_answers(tmp_path: Path) -> None:
    from autokernel.tracking.ui import _await_answer

    class Alive:
        def poll(self) -> None:
            return None

    with socket.create_server(("127.0.0.1", 0)) as deaf, open(tmp_path / "log", "w+b") as log:
        log.write(b"last words")
        log.flush()
        base = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(StorageError, match=rf"did not answer at {base} within 0 s; the end of its log:\nlast words"):
            _await_answer(Alive(), base, 0.2, log)  # type: ignore[arg-type]


def test_a_tracking_store_that_does_not_answer(tmp_path: Path) -> None:
    from autokernel.tracking.ui import find_experiment

    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(StorageError, match=r"mlflow.db: MLflow does not answer: .*not a database"):
        find_experiment(f"sqlite:///{tmp_path}/mlflow.db", "x")


# --- a run whose bundle does not hold


def test_a_bundle_that_does_not_hold_in_a_fresh_process_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Anything:
        entries = ()
        graph_options: dict[str, Any] = {}  # noqa: RUF012
        scenario_options = ()

    proved = Proved(
        passed=False, num_hits=0, num_entries=1, num_benchmarks=0, compile_s=1, stock_compile_s=1, message="no entry was hit"
    )
    stages = {
        "profile.profile": SimpleNamespace(read_gb_per_s=1.0), "search.search": {}, "confirm.confirm": [],
        "confirm.compatible": ([], {}),
        "plan.choose_plans": ([], {}), "confirm.within_memory": ([], {}), "rows.hold_rows": {},
        "graph.search_graph_options": ({}, ()), "model.validate": (None, Anything()), "production.make_bundle": Anything(),
        "production.export_bundle": None, "production.prove": proved, "whole_model.measure_ahead": None,
    }  # fmt: skip
    for name, result in stages.items():
        monkeypatch.setattr(f"autokernel.stages.{name}", lambda *_, _result=result, **__: _result)
    with pytest.raises(AutokernelError, match="the exported bundle did not hold in a fresh process: no entry was hit"):
        pipeline._run_stages(None, "prove")  # type: ignore[arg-type]
