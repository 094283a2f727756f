"""Values that YAML makes something else of: read as they were meant, or refused with file, key and cure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from autokernel.config import Experiment, load_experiment, parse_yaml_mapping
from autokernel.errors import ConfigError
from autokernel.model_config import Section

GOOD = """\
name: good
model: {factory: "model.py:make"}
scenarios: {one: {kind: call, inputs: "model.py:inputs"}}
"""
QUOTES = "write it in quotes if it is text"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good experiment's file."""
    (tmp_path / "model.py").write_text("")
    path = tmp_path / "experiment.yaml"
    path.write_text(GOOD)
    return path


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    return str(caught.value)


# --- anchors and aliases


@pytest.mark.parametrize("two", ["*s", "{<<: *s}"])
def test_a_section_that_is_set_leaves_its_aliases_alone(path: Path, two: str) -> None:
    one = "&s {kind: call, batch: 1, inputs: {x: {shape: [batch, 8]}}}"
    path.write_text(f'name: good\nmodel: {{factory: "model.py:make"}}\nscenarios: {{one: {one}, two: {two}}}\n')
    overrides = ("scenarios.two.batch=8", "scenarios.two.inputs.x.std=2", "scenarios.two.inputs.x.mean=3")
    scenarios = load_experiment(path, overrides).experiment.model_dump()["scenarios"]
    assert [scenarios[name]["batch"] for name in ("one", "two")] == [1, 8]
    tensors = [scenarios[name]["inputs"]["x"] for name in ("one", "two")]
    assert [(tensor["mean"], tensor["std"]) for tensor in tensors] == [(0, 1), (3, 2)]


# --- seeds


@pytest.mark.parametrize("key", ["search.seed", "model.seed"])
def test_seeds_lie_where_every_stage_can_use_them(path: Path, key: str) -> None:
    assert f"{path}: {key}: -10 must be at least 0 (from --set {key}=-10)" == message_of(path, f"{key}=-10")
    most = 2**63 - 101
    for seed in (most + 1, 99999999999999999999999999):
        assert f"{key}: {seed} must be below {most + 1} (from" in message_of(path, f"{key}={seed}")
    for seed in (0, most):
        section, name = key.split(".")
        assert load_experiment(path, (f"{key}={seed}",)).experiment.model_dump()[section][name] == seed


# --- values that are not what they look like, or are tagged as

UNREADABLE = [
    ("2026-02-30", f"'2026-02-30' cannot be read as a date: {QUOTES}"),
    ("2024-13-45", f"'2024-13-45' cannot be read as a date: {QUOTES}"),
    ("{a: [2024-13-45]}", f"'2024-13-45' cannot be read as a date: {QUOTES}"),
    ("{2024-13-45: a}", f"'2024-13-45' cannot be read as a date: {QUOTES}"),
    ("2026-01-01T00:00:00+99:99", f"'2026-01-01T00:00:00+99:99' cannot be read as a date: {QUOTES}"),
    ("0b_", f"'0b_' cannot be read as a whole number: {QUOTES}"),
    ("!!int abc", f"'abc' cannot be read as a whole number: {QUOTES}"),
    ("!!int ''", f"'' cannot be read as a whole number: {QUOTES}"),
    ("!!float abc", f"'abc' cannot be read as a number: {QUOTES}"),
    ("!!bool abc", f"'abc' cannot be read as true or false: {QUOTES}"),
    ("!!timestamp abc", f"'abc' cannot be read as a date: {QUOTES}"),
    ("!!map abc", "expected a mapping node, but found scalar"),
    ("1" * 5000, f"'{'1' * 76}... cannot be read as a whole number: {QUOTES}"),
    (f"0x{'1' * 5000}", f"'0x{'1' * 74}... cannot be read as a whole number: {QUOTES}"),
    (":".join("1" * 300) + ".5", f"cannot be read as a number: {QUOTES}"),
    (r'"\ud800"', r"'\ud800' cannot be read as text: write whole characters"),
    (r'"\Uffffffff"', ": write it otherwise"),
    ("[" * 3000, "lists and sections are nested too deeply: write fewer in each other"),
]


@pytest.mark.parametrize(("value", "said"), UNREADABLE, ids=lambda text: text[:30])
def test_unreadable_values(path: Path, value: str, said: str) -> None:
    for key in ("model.arguments.day", "threads"):
        message = message_of(path, f"{key}={value}")
        assert message.startswith(f"--set {key}={value[:100]}")
        assert ": the value is not valid YAML: " in message
        assert said in message
        assert len(message) < 500
    with pytest.raises(ConfigError) as caught:
        parse_yaml_mapping(f"name: good\nthreads: {value}\n", Path("file.yaml"))
    assert str(caught.value).startswith("file.yaml:")
    assert said in str(caught.value)


def test_an_unreadable_value_is_found_by_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^file.yaml:2:7: not valid YAML: '2024-13-45' cannot"):
        parse_yaml_mapping("a: 1\nname: 2024-13-45\n", Path("file.yaml"))


def test_values_beside_unreadable_ones_hide_passwords(path: Path) -> None:
    message = message_of(path, "storage=[postgresql://me:secret@host/db, 2024-13-45]")
    assert "me:***@host/db" in message
    assert "secret" not in message


def test_a_key_given_twice_is_refused_of_overrides_too(path: Path) -> None:
    assert "key 'trials' is given twice" in message_of(path, "search={trials: 1, trials: 2}")


# --- what JSON does not have


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{x: !!binary gIE=}", r"x: b'\x80\x81' must be text in quotes, a number, true, false, null, a list or a section"),
        ("{x: {y: [1, !!binary gIE=]}}", r"x.y.1: b'\x80\x81' must be text in quotes, a number"),
        ("{x: {!!binary gIE=: 1}}", r"x: b'\x80\x81' must be text in quotes, a number"),
        ("{x: !!set {a}}", "x: {'a'} must be text in quotes, a number"),
        ("{x: 2026-02-28}", "x: datetime.date(2026, 2, 28) is no value of JSON: write '2026-02-28' in quotes"),
        ("{x: [.inf]}", "x.0: inf must be a finite number"),
        ("{x: .nan}", "x: nan must be a finite number"),
        ("&a {x: *a}", "x.x: {'x': {...}} holds itself: write it out, without the alias"),
        ("{x: &a [*a]}", "x.0: [[...]] holds itself: write it out, without the alias"),
        (f"{{x: {'[' * 120 + ']' * 120}}}", "lies in 100 lists and sections: write fewer in each other"),
    ],
)
def test_values_that_json_cannot_hold(path: Path, value: str, said: str) -> None:
    sections = ("model.arguments", "model.config", "model.config_overrides", "validation.eval.arguments")
    for key in sections:
        lines = [line for line in message_of(path, f"{key}={value}").splitlines() if f": {key}." in line]
        assert len(lines) == 1, f"{key}: {lines}"
        assert said in lines[0]
        assert lines[0].startswith(f"{path}: {key}.x")
        assert lines[0].endswith(f" (from --set {key}={value})")


def test_values_that_json_holds(path: Path) -> None:
    value = "{a: [1, 2.5, null, {b: true, 3: c}], d: '2026-02-28', shared: &s {x: 1}, again: [*s, *s]}"
    loaded = load_experiment(path, (f"model.arguments={value}",))
    assert loaded.experiment.model.arguments["again"] == [{"x": 1}, {"x": 1}]
    assert json.dumps(loaded.model_dump(mode="json"), allow_nan=False)


# --- booleans


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search.trials=on", "search.trials: true must be a whole number (from --set search.trials=on)"),
        ("threads=yes", "threads: true must be a whole number (from --set threads=yes)"),
        ("validation.confirm_top=true", "validation.confirm_top: true must be a whole number"),
        ("validation.ablation_layers=off", "validation.ablation_layers: false must be a whole number"),
        ("search.seed=no", "search.seed: false must be a whole number"),
        ("search.seconds=true", "search.seconds: true must be a number"),
        ("cluster.gpus_per_worker=yes", "cluster.gpus_per_worker: true must be a number"),
        ("scenarios.one.batch=yes", "scenarios.one.batch: true must be a whole number"),
        ("scenarios.one.inputs={x: {shape: [yes]}}", "scenarios.one.inputs.x.shape.0: true must be a whole number or text"),
    ],
)
def test_booleans_are_no_numbers(path: Path, override: str, said: str) -> None:
    assert f"{path}: {said}" in message_of(path, override)


def test_booleans_are_booleans(path: Path) -> None:
    overrides = ("graph.enabled=off", "validation.ablation=yes", "scenarios.one.inputs={x: {shape: [2]}, mask: on}")
    experiment = load_experiment(path, overrides).experiment
    assert not experiment.graph.enabled
    assert experiment.validation.ablation
    assert experiment.model_dump()["scenarios"]["one"]["inputs"]["mask"] is True


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    for below in section.__subclasses__():
        yield below
        yield from _sections(below)


def _number_fields() -> list[Any]:
    found = []
    defs = Experiment.model_json_schema()["$defs"]
    for section in _sections(Section):
        for name, field in defs.get(section.__name__, {"properties": {}})["properties"].items():
            kinds = {part.get("type") for part in (field, *field.get("anyOf", ()))}
            if kinds & {"integer", "number"} and "boolean" not in kinds:
                found.append(pytest.param(section, name, id=f"{section.__name__}.{name}"))
    return found


@pytest.mark.parametrize(("section", "name"), _number_fields())
def test_no_number_of_any_section_may_be_a_boolean(section: type[Section], name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(section).validate_python({name: True})
    wrong = [item for item in caught.value.errors() if item["loc"] == (name,)]
    assert [item["type"] in ("int_type", "float_type") for item in wrong] == [True]


# --- names of files


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("~nouser/m.py", "'~nouser/m.py' cannot be looked up (Could not determine home directory.); it should be "),
        (r"a\0b.py", r"'a\x00b.py' cannot be looked up (embedded null byte); it should be "),
        (f"{'a' * 300}.py", f"'{'a' * 76}... cannot be looked up (File name too long); it should be "),
    ],
)
def test_names_that_no_file_can_have(path: Path, name: str, said: str) -> None:
    for key, value in (("model.factory", f"{name}:f"), ("scenarios.one.inputs", f"{name}:f"), ("search.spaces", name)):
        assert message_of(path, f'{key}="{value}"').startswith(f"{path}: {key}: {said}")
    assert message_of(path, f'model={{config: "{name}"}}').startswith(f"{path}: model.config: {said}a config.json")
    assert message_of(path, f'model={{checkpoint: "{name}"}}').startswith(f"{path}: model.checkpoint: {said}a folder")


@pytest.mark.parametrize("name", ["~nouser/x.yaml", "a\0b.yaml", "a" * 300])
def test_experiments_of_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no path: |cannot be read: "):
        load_experiment(name)
