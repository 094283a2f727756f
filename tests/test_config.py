"""Experiments: every way to get one wrong is an error that names the file, the key, the value and the cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from autokernel.backends import all_backends
from autokernel.config import BACKENDS, Experiment, LoadedExperiment, load_experiment, parse_yaml_mapping
from autokernel.errors import ConfigError

MODEL = {"factory": "model.py:make"}
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
CALL = {"kind": "call", "inputs": "model.py:inputs"}
GOOD: dict[str, Any] = {"name": "good", "model": MODEL, "scenarios": {"one": CALL}}
LANGUAGE: dict[str, Any] = {
    "name": "language",
    "model": {"config": {"model_type": "llama"}},
    "scenarios": {"prefill": {"kind": "prefill", "length": 16}},
}
CLASS: dict[str, Any] = {
    "name": "class",
    "model": {"class_path": "torch.nn:Linear", "arguments": {"in_features": 8, "out_features": 2}},
    "scenarios": {"one": {"kind": "call", "inputs": {"x": {"shape": ["batch", 8]}}}},
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes an experiment, changed at dotted keys (None removes), and returns its file."""
    (tmp_path / "model.py").write_text("")

    def write(base: dict[str, Any], changes: dict[str, Any] | None = None) -> Path:
        data = yaml.safe_load(yaml.safe_dump(base))
        for dotted, value in (changes or {}).items():
            *parents, last = dotted.split(".")
            target = data
            for parent in parents:
                target = target.setdefault(parent, {})
            if value is None:
                target.pop(last, None)
            else:
                target[last] = value
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_packages_own_experiments_are_good(path: Path) -> None:
    loaded = load_experiment(path)
    assert loaded.experiment.name == path.stem.replace("_", "-")
    assert as_a_fresh_process_gets_it(loaded) == loaded


def as_a_fresh_process_gets_it(loaded: LoadedExperiment) -> LoadedExperiment:
    return LoadedExperiment.model_validate(json.loads(json.dumps(loaded.model_dump(mode="json"))))


def test_the_experiment_with_cute_kernels_is_the_other_one_with_more_to_try() -> None:
    plain, more = (load_experiment(EXPERIMENTS / f"{name}.yaml").experiment.model_dump() for name in ("llama", "llama_cutedsl"))
    assert {key for key in plain if plain[key] != more[key]} == {"name", "backends", "search"}
    assert more["backends"] == (*plain["backends"], "cutedsl")
    assert {key for key in plain["search"] if plain["search"][key] != more["search"][key]} == {
        "trials",
        "seconds",
        "min_trials",
    }


def test_a_good_experiment_has_its_defaults(write: Any) -> None:
    path = write(GOOD)
    loaded = load_experiment(path)
    assert loaded.experiment.backends == ("aten", "inductor")
    assert loaded.experiment.search.trials == 200
    assert loaded.path == path
    assert loaded.text == path.read_text()
    assert loaded.resolve("model.py") == path.parent / "model.py"
    assert load_experiment(write(LANGUAGE)).experiment.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"serch": {}}, "serch: unknown key; did you mean `search`?"),
        ({"search.trails": 5}, "search.trails: unknown key; did you mean `trials`?"),
        ({"search.zzz": 5}, "search.zzz: unknown key; known keys: all_gemms, hotspots, max_copies, "),
        ({"scenarios.one.lenght": 5}, "scenarios.one.lenght: unknown key; known keys: batch, inputs, kind"),
        ({"validation.eval": {"limt": 1}}, "validation.eval.limt: unknown key; did you mean `limit`?"),
        ({"search.trials": "many"}, "search.trials: 'many' must be a whole number"),
        ({"search.trials": 2.5}, "search.trials: 2.5 must be a whole number"),
        ({"search.trials": [3]}, "search.trials: [3] must be a whole number"),
        ({"search.seconds": "long"}, "search.seconds: 'long' must be a number"),
        ({"search.trials": 0}, "search.trials: 0 must be above 0"),
        ({"search.seeds": ["stock", "luck"]}, "search.seeds.1: 'luck' is none of stock, history, nvmatmul"),
        ({"search.sampler": "best"}, "search.sampler: 'best' is none of auto, model, tpe, random, cmaes, gp"),
        (
            {"search.sampler": "modell"},
            "search.sampler: 'modell' is none of auto, model, tpe, random, cmaes, gp; did you mean model?",
        ),
        ({"search.max_copies": 65}, "search.max_copies: 65 must be at most 64"),
        ({"validation.min_gain": -0.1}, "validation.min_gain: -0.1 must be at least 0"),
        ({"validation.confirm_rounds": 10}, "validation.confirm_rounds: 10 must be at least 11"),
        ({"validation.end_to_end_rounds": 1}, "validation.end_to_end_rounds: 1 must be at least 11"),
        ({"validation.min_gain": 1}, "validation.min_gain: 1 must be below 1"),
        ({"validation.baselines": []}, "validation.baselines: is empty; give at least one"),
        ({"name": "a/b"}, "name: 'a/b': letters, digits, . _ - only, a letter or a digit first"),
        ({"name": 2026}, "name: 2026 must be text: write '2026' in quotes"),
        ({"name": None}, "name: is missing: names the run's folder and the MLflow experiment"),
        (
            {"model": None},
            "model: is missing: a section of arguments, checkpoint, class_path, config, config_overrides, depth_key, ",
        ),
        ({"model": "llama"}, "model: is a section: write keys below it (got 'llama')"),
        ({"model.config": 5}, "model.config: 5 must be a path or a section"),
        ({"model.arguments": [5]}, "model.arguments: is a section: write keys below it (got [5])"),
        ({"model.arguments": {5: 1}}, "model.arguments.5: a key must be text: write '5' in quotes"),
        ({"search": 5}, "search: is a section: write keys below it (got 5)"),
        ({"search": []}, "search: is a section: write keys below it (got [])"),
        ({"search.spaces": 5}, "search.spaces: 5 must be a path"),
        ({"scenarios": {}}, "scenarios: is empty; give at least one"),
        ({"scenarios": None}, "scenarios: is missing: name -> what the model does; each is timed end to end"),
        ({"scenarios": ["one"]}, "scenarios: is a section: write keys below it (got ['one'])"),
        ({"scenarios.new": 3}, "scenarios.new: is a section: write keys below it (got 3)"),
        ({"scenarios.one.kind": "chat"}, "scenarios.one.kind: 'chat' is none of prefill, decode, call"),
        (
            {"scenarios.one.kind": "prefil"},
            "scenarios.one.kind: 'prefil' is none of prefill, decode, call; did you mean prefill?",
        ),
        ({"scenarios.one.kind": None}, "scenarios.one: needs kind: prefill, decode or call"),
        ({"scenarios.one.outputs": "logits"}, "scenarios.one.outputs: 'logits' must be a list: [logits]"),
        ({"device": "gpu"}, "device: 'gpu' is none of auto, cpu, cuda; did you mean cuda?"),
        ({"graph.enabled": "maybe"}, "graph.enabled: 'maybe' must be true or false"),
        ({"backends": "aten"}, "backends: 'aten' must be a list: [aten]"),
        ({"backends": {"aten": True}}, "backends: {'aten': True} must be a list"),
        (
            {"backends": ["aten", "indutor"]},
            "backends.1: 'indutor' is none of aten, inductor, triton, cutedsl; did you mean inductor?",
        ),
        ({"graph.scenarios": ["ome"]}, "graph.scenarios: 'ome' is none of one; did you mean one?"),
        ({"model": {}}, "model: give exactly one of checkpoint, config and factory, not none"),
        (
            {"model.checkpoint": "there"},
            "model: give exactly one of checkpoint, config and factory, not ['checkpoint', 'factory']",
        ),
        ({"model.dtype": "int8"}, "model.dtype: 'int8' is none of float32, bfloat16, float16"),
        ({"model.dtype": "bf16"}, "model.dtype: 'bf16' is none of float32, bfloat16, float16; did you mean bfloat16?"),
        ({"backends": ["inductor"]}, "yaml: backends: must include aten: the stock kernels are always"),
        (
            {"device": "cpu", "backends": ["aten", "triton", "cutedsl"]},
            "yaml: backends: ['cutedsl', 'triton'] need a GPU, but device is cpu: remove them or set `device: cuda`",
        ),
        (
            {"device": "cpu", "validation.baselines": ["reduce-overhead"]},
            "yaml: validation.baselines: reduce-overhead alone leaves nothing to compare with on a CPU: add default",
        ),
        (
            {"validation.eval": {"metric": "perplexity", "data": "x"}},
            "yaml: validation.eval.metric: perplexity is for language models",
        ),
        (
            {"storage": "postgresql://h/db", "tracking": "postgresql://h/db"},
            "yaml: tracking: must be another database than that of `storage`: Optuna and MLflow clash in one",
        ),
        (
            {"storage": "redis://u:secret@h"},
            "yaml: storage: is a URL that begins with one of sqlite://, postgresql://, mysql://, not 'redis'",
        ),
        ({"tracking": "runs/mlflow.db"}, "yaml: tracking: is a URL that begins with one of sqlite://, "),
        ({"search.seconds": float("inf")}, "search.seconds: inf must be a finite number"),
        (
            {"cluster.address": "nowhere"},
            "cluster.address: 'nowhere' is none of local, inline, auto, HOST:PORT, ray://HOST:PORT",
        ),
        ({"validation.eval": {"metric": "luck", "data": "model.py:f"}}, "validation.eval.metric: 'luck' is neither"),
        ({"model.factory": "missing.py:make"}, "missing.py does not exist; it should be a Python file"),
        ({"model.factory": "model"}, "model.factory: 'model' must look like package.module:function or file.py:function"),
        ({"model.factory": "model.py:not-a-name"}, "must look like package.module:function or file.py:function"),
        ({"scenarios.one.inputs": ":inputs"}, "scenarios.one.inputs: ':inputs' must look like"),
        ({"search.spaces": "nowhere"}, "search.spaces: "),
        ({"search.spaces": "nowhere"}, "nowhere does not exist; it should be a folder of <op>.yaml files"),
        ({"validation.eval": {"metric": "accuracy"}}, "'accuracy' is neither bits_per_byte, perplexity nor module:function"),
        ({"validation.eval": {"metric": "missing.py:f"}}, "validation.eval.metric: "),
        ({"validation.eval": {"metric": "model.py:f", "data": "texts"}}, "texts does not exist; it should be a text file"),
    ],
)
def test_mistakes(write: Any, changes: dict[str, Any], said: str) -> None:
    path = write(GOOD, changes)
    message = message_of(path)
    assert said in message
    assert message.startswith(f"{path}: ")
    assert "pydantic" not in message
    assert "Input" not in message
    assert "top level" not in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.arguments": {"a": 1}}, "model: `arguments` belong to `factory` or `class_path`, neither"),
        ({"model": {"checkpoint": "weights"}}, "weights does not exist; it should be a folder with config.json and *.safetens"),
        ({"model": {"checkpoint": "."}}, "holds no config.json"),
        ({"model": {"config": "llama.json"}}, "llama.json does not exist; it should be a config.json"),
        ({"validation.eval": {}}, "validation.eval.data: metric bits_per_byte needs text to be measured on"),
        ({"scenarios.prefill.length": None}, "scenarios.prefill.length: is missing: tokens per sequence"),
        ({"scenarios.prefill.length": -3}, "scenarios.prefill.length: -3 must be above 0"),
        ({"scenarios.prefill.rows": [9, 16]}, "scenarios.prefill.rows: unknown key; known keys: batch, kind, length, logits"),
        *(
            ({"scenarios.step": {"kind": "decode", "batch": 16, "context": 16, "rows": rows}}, f"scenarios.step{message}")
            for rows, message in (
                ([9], ".rows: [9] must be the first and the last number of rows, from 1 to 128, as many as kernels that hold"),
                ([16, 9], ".rows: [16, 9] must be the first and the last number of rows"),
                ([0, 16], ".rows: [0, 16] must be the first and the last number of rows"),
                ([1, 129], ".rows: [1, 129] must be the first and the last number of rows"),
                ([True, 16], ".rows.0: true must be a whole number"),
                (16, ".rows: 16 must be a list: [16]"),
                ([17, 32], ": rows: [17, 32] must hold the batch, 16: a range lies around what is tuned"),
                (
                    [9, 16],
                    ".rows: only kernels of backend triton hold for a range of rows, and backends are aten, inductor: add",
                ),
            )
        ),
        (
            {"scenarios.step": {"kind": "decode", "context": 16, "sample": "argmax", "top_k": 8}},
            "scenarios.step: top_k: 8 is for `sample: top_k`, not `sample: argmax`",
        ),
    ],
)
def test_mistakes_with_language_models(write: Any, changes: dict[str, Any], said: str) -> None:
    assert said in message_of(write(LANGUAGE, changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.factory": "model.py:make"}, "model: give `class_path` or `factory`, not both: a class is built by itself"),
        (
            {"model.config": {"a": 1}},
            "model: a class is built from one of checkpoint, config and arguments, not from ['config', 'arguments']",
        ),
        (
            {"model.depth_key": "n_layers"},
            "model: depth_key is a key of config, config_overrides or arguments with a whole number; 'n_layers' is not among",
        ),
        ({"model.config_overrides": {"a": 1}}, "model: with `class_path`, `config_overrides` belong to `config`, which is not"),
        ({"model.class_path": "missing.py:Net"}, "model.class_path: "),
        ({"model.class_path": "torch.nn.Linear"}, "model.class_path: 'torch.nn.Linear' must look like package.module:function"),
        (
            {"validation.eval": {"metric": "perplexity", "data": "x"}},
            "yaml: validation.eval.metric: perplexity is for language models; a model of your",
        ),
        (
            {"scenarios.one.inputs": {"n": 3}},
            "scenarios.one: `inputs` hold no tensor: a model's inputs are mappings with `shape`",
        ),
        ({"scenarios.one.inputs": 3}, "scenarios.one.inputs: 3 must be a section of inputs by name, or a function"),
        ({"scenarios.one.inputs.x.shape": None}, "scenarios.one.inputs.x.shape: is missing: sizes; `batch` stands for the"),
        ({"scenarios.one.inputs.x.shape": 8}, "scenarios.one.inputs.x.shape: 8 must be a list: [8]"),
        ({"scenarios.one.inputs.x.shape": [2.5]}, "scenarios.one.inputs.x.shape.0: 2.5 must be a whole number or text"),
        ({"scenarios.one.inputs.x.shpe": [1]}, "scenarios.one.inputs.x.shpe: unknown key; did you mean `shape`?"),
        ({"scenarios.one.inputs.x.shape": ["rows", 2]}, "sizes are whole numbers from 1, or the word batch, not ['rows', 2]"),
        ({"scenarios.one.inputs.x.shape": [0]}, "scenarios.one.inputs.x: sizes are whole numbers from 1"),
        ({"scenarios.one.inputs.x.distribution": "gauss"}, "distribution: 'gauss' is none of normal, uniform, integers, "),
        ({"scenarios.one.inputs.x.high": 2}, "scenarios.one.inputs.x: distribution normal takes mean and std, not high"),
        ({"scenarios.one.inputs.x.dtype": "int64"}, "distribution normal makes no int64: use `integers` with low and high"),
        (
            {"scenarios.one.inputs.x": {"shape": [2], "distribution": "integers", "high": 9, "missing": 0.5}},
            "missing values are NaN, which int64 does not have: give a floating-point dtype",
        ),
        (
            {"scenarios.one.inputs.x": {"shape": [2], "distribution": "uniform", "low": 2}},
            "scenarios.one.inputs.x: low must be less than high, not 2 and 1",
        ),
        (
            {"scenarios.one.inputs.x": {"shape": [2], "distribution": "integers", "high": 2.5}},
            "integers lie between whole numbers, not 0 and 2.5",
        ),
        (
            {"scenarios.one.inputs.many": [{"shape": [2], "typo": 1}]},
            "scenarios.one.inputs.many.0.typo: unknown key; did you mean `dtype`?",
        ),
        ({"scenarios.one.inputs.many": [[{"shape": [2]}]]}, "many.0: a list of inputs holds tensors and plain values, but no"),
        ({"scenarios.one.outputs": ["a..b"]}, "scenarios.one: an output is a path such as `logits` or `sample.0`, not 'a..b'"),
        ({"scenarios.one.outputs": [0]}, "scenarios.one.outputs.0: 0 must be text: write '0' in quotes"),
    ],
)
def test_mistakes_with_models_of_a_class(write: Any, changes: dict[str, Any], said: str) -> None:
    message = message_of(write(CLASS, changes))
    assert said in message
    assert "<" not in message
    assert "Input" not in message


def test_declared_inputs_survive_json(write: Any) -> None:
    loaded = load_experiment(write(CLASS, {"scenarios.one.inputs.many": [{"shape": [2]}, 3, None]}))
    assert as_a_fresh_process_gets_it(loaded) == loaded


@pytest.mark.parametrize("sample", [{}, {"sample": "argmax"}, {"sample": "top_k"}, {"sample": "top_k", "top_k": 8}])
def test_decoding_survives_json(write: Any, sample: dict[str, Any]) -> None:
    loaded = load_experiment(write(LANGUAGE, {"scenarios.step": {"kind": "decode", "context": 16, **sample}}))
    assert as_a_fresh_process_gets_it(loaded) == loaded


def test_all_mistakes_are_told_at_once(write: Any) -> None:
    message = message_of(write(GOOD, {"search.trials": 0, "serch": {}, "name": "?"}))
    assert len(message.splitlines()) == 3


def test_files(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("")
    assert message_of(tmp_path / "missing.yaml") == f"{tmp_path / 'missing.yaml'}: no such file; in that folder: other.yaml"
    assert message_of(tmp_path / "none" / "missing.yaml").endswith("missing.yaml: no such file")
    assert "cannot be read" in message_of(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message_of(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "file.yaml:1:8: not valid YAML: "),
        ("name: a\nname: b\n", "file.yaml:2:1: not valid YAML: key 'name' is given twice"),
        ("a: {b: 1, b: 2}\n", "file.yaml:1:11: not valid YAML: key 'b' is given twice"),
        ("- a\n- b\n", "file.yaml: must hold keys and values, not list"),
        ("", "file.yaml: must hold keys and values, not NoneType"),
        ("a: \x07\n", "file.yaml: not valid YAML: "),
        ("? [a]\n: 1\n", "file.yaml:1:3: not valid YAML: a key must be a plain value"),
        ("a: !!python/object:os.system {}\n", "file.yaml:1:4: not valid YAML: could not determine a constructor"),
    ],
)
def test_yaml(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml_mapping(text, Path("file.yaml"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("search", "search: is a section: write keys below it"),
        ("device", "device: has no value: write auto, cpu or cuda"),
        ("backends", "backends: has no value: write a list"),
        ("name", "name: has no value: write text"),
    ],
)
def test_keys_without_a_value(write: Any, key: str, said: str) -> None:
    path = write(GOOD, {key: None})
    path.write_text(f"{path.read_text()}{key}:\n")
    assert message_of(path) == f"{path}: {said}"


def test_merge_keys_still_work() -> None:
    assert parse_yaml_mapping("a: &x {p: 1}\nb: {<<: *x, q: 2}\n", Path("f"))["b"] == {"p": 1, "q": 2}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search.trials", "--set search.trials: must look like search.trials=50"),
        ("=5", "--set =5: must look like search.trials=50"),
        ("name.first=5", "--set name.first=5: `name` is not a section"),
        ("name.first.second=5", "--set name.first.second=5: `first` lies below something that is not a section"),
        ("search.trials=[", "--set search.trials=[: the value is not valid YAML"),
        ("search.trials=some", "search.trials: 'some' must be a whole number (from --set search.trials=some)"),
        ("search.trils=5", "search.trils: unknown key; did you mean `trials`? (from --set search.trils=5)"),
        ("search={trils: 5}", "search.trils: unknown key; did you mean `trials`? (from --set search={trils: 5})"),
        (
            "model.config=x.json",
            "model: give exactly one of checkpoint, config and factory, not ['config', 'factory'] (from --set ",
        ),
        (
            "backends=[inductor]",
            "backends: must include aten: the stock kernels are always in the candidate set (from --set back",
        ),
        ("model.factory=gone.py:f", "gone.py does not exist; it should be a Python file (from --set model.factory=gone.py:f)"),
        ("search.spaces=gone", "gone does not exist; it should be a folder of <op>.yaml files (from --set search.spaces=gone)"),
    ],
)
def test_wrong_overrides(write: Any, override: str, said: str) -> None:
    assert said in message_of(write(GOOD), override)


def test_overrides_are_blamed_for_their_own_mistakes_alone(write: Any) -> None:
    path = write(GOOD, {"search.trials": 0, "backends": ["aten", "triton"]})
    assert message_of(path, "search.seconds=x", "search.workers=2").splitlines() == [
        f"{path}: search.trials: 0 must be above 0",
        f"{path}: search.seconds: 'x' must be a number (from --set search.seconds=x)",
    ]
    several = message_of(path, "search.trials=5", "device=cpu")
    assert several.endswith("or set `device: cuda` (from --set search.trials=5, --set device=cpu)"), "any may be to blame"
    several = message_of(path, "search.trials=5", "backends=[inductor]")
    assert several.endswith("in the candidate set (from --set backends=[inductor])")


def test_passwords_are_not_told(write: Any) -> None:
    path = write(GOOD)
    for override in ("storage=redis://me:secret@host/db", "storage=[postgresql://me:secret@host/db]"):
        message = message_of(path, override)
        assert "secret" not in message
        assert "me:***@host/db" in message
    assert load_experiment(path, ("storage=postgresql://me:secret@h/db",)).overrides == ("storage=postgresql://me:***@h/db",)


def test_what_was_set_is_known_of_a_loaded_experiment(write: Any) -> None:
    path = write(GOOD)
    loaded = load_experiment(path, ("search.trials=7",))
    assert loaded.overrides == ("search.trials=7",)
    assert as_a_fresh_process_gets_it(loaded) == loaded
    assert str(loaded.wrong("search.trials", "no")) == f"{path}: search.trials: no (from --set search.trials=7)"
    assert str(loaded.wrong("search.seconds", "no")) == f"{path}: search.seconds: no"
    assert str(loaded.wrong("search.trial", "no")) == f"{path}: search.trial: no"


def test_overrides_are_yaml_and_later_ones_win(write: Any) -> None:
    overrides = ("search.trials=7", "search.trials=8", "search.seeds=[stock]", "graph.enabled=false", "threads=2")
    experiment = load_experiment(write(GOOD), overrides).experiment
    assert (experiment.search.trials, experiment.search.seeds, experiment.threads) == (8, ("stock",), 2)
    assert not experiment.graph.enabled


def test_the_backends_that_an_experiment_may_name_are_those_that_there_are() -> None:
    assert tuple(backend.name for backend in all_backends()) == BACKENDS


def test_the_schema_documents_every_field_of_the_sections() -> None:
    schema = Experiment.model_json_schema()
    assert schema["additionalProperties"] is False
    search = schema["$defs"]["SearchSection"]["properties"]
    assert search["trials"]["description"]
    assert {"name", "model", "scenarios"} == set(schema["required"])
