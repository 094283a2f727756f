"""The bundle on disk: what is written is what is read, and nothing else is."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from autokernel.environment import Environment
from autokernel.errors import BundleError
from autokernel.export.bundle import Bundle, Entry, ScenarioOptions, read_bundle, write_bundle
from autokernel.records import Problem, Speedup, TensorSpec

ENVIRONMENT = Environment(device="cpu", device_name="A CPU", isa="AVX2", num_units=2, torch="2.13.0")


def an_entry(m: int = 1, **config: int | str | bool) -> Entry:
    x = TensorSpec.contiguous((m, 64), "float32")
    weight = TensorSpec(shape=(64, 32), dtype="float32", stride=(1, 64))
    problem = Problem(op="mm", inputs=(x, weight), device="cpu", constants=(1,))
    speedup = Speedup(ratio=1.3, low=1.2, high=1.4, num_rounds=41)
    return Entry(problem=problem, backend="aten", config=config or {"prepack": True}, speedup=speedup, scenario="s")


def a_bundle(*entries: Entry) -> Bundle:
    return Bundle(
        name="test",
        created="2026-01-01T00:00:00+00:00",
        version="0",
        environment=ENVIRONMENT,
        entries=entries,
        graph_options={"freezing": "all"},
        results={"scenarios": [{"scenario": "s", "speedup": 1.25}]},
        provenance={"experiment": "name: test\n"},
    )


def test_options_of_a_scenario_are_for_its_products_alone() -> None:
    part = ScenarioOptions(scenario="s", products=("bfloat16 1x32x64",), options={"combo_kernels": True})
    bundle = replace(a_bundle(), scenario_options=(part,))
    assert bundle.options_of(["bfloat16 1x32x64"]) == {"freezing": "all", "combo_kernels": True}
    for others in ([], ["bfloat16 2x32x64"], ["bfloat16 1x32x64", "bfloat16 2x32x64"]):
        assert bundle.options_of(others) == {"freezing": "all"}
    assert bundle.applied_digest != a_bundle().applied_digest
    assert not replace(bundle, graph_options={}).stock


@pytest.mark.parametrize("form", ["folder", "archive", "document"])
def test_what_is_written_is_read(tmp_path: Path, form: str) -> None:
    part = ScenarioOptions(scenario="s", products=("float32 1x32x64",), options={"freezing": "all"})
    bundle = replace(a_bundle(an_entry(1), an_entry(8, template="cpp_gemm", threads_m=1)), scenario_options=(part,))
    folder, archive = write_bundle(bundle, tmp_path / "bundle")
    path = {"folder": folder, "archive": archive, "document": folder / "bundle.json"}[form]
    assert read_bundle(path) == bundle.sealed()


def test_equal_bundles_are_equal_archives(tmp_path: Path) -> None:
    archives = [write_bundle(a_bundle(an_entry()), tmp_path / name / "bundle")[1].read_bytes() for name in "ab"]
    assert archives[0] == archives[1]


def test_an_edit_is_noticed(tmp_path: Path) -> None:
    folder, _ = write_bundle(a_bundle(an_entry()), tmp_path / "bundle")
    document = folder / "bundle.json"
    document.write_text(document.read_text().replace('"prepack": true', '"prepack": false'))
    with pytest.raises(BundleError, match="digest does not match"):
        read_bundle(folder)
    assert read_bundle(folder, check=False).entries[0].config == {"prepack": False}


def test_an_unknown_format_version_is_refused_with_a_cure(tmp_path: Path) -> None:
    folder, _ = write_bundle(a_bundle(), tmp_path / "bundle")
    data = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**data, "format_version": 99}))
    with pytest.raises(BundleError, match=r"format_version is 99, but this autokernel reads 3; install"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable bundle"),
        ("[]", "not a bundle"),
        ('{"format": "something"}', "not a bundle"),
        ('{"format": "autokernel-bundle", "format_version": 3, "nmae": 1}', "no field"),
        ('{"format": "autokernel-bundle", "format_version": 3, "name": "x"}', "damaged"),
    ],
)
def test_damage_is_a_clear_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bundle.json"
    path.write_text(content)
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(path)
    assert str(path) in str(caught.value)


def test_a_missing_bundle_says_what_a_bundle_is(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no such file; a bundle is a folder with bundle\.json"):
        read_bundle(tmp_path / "nothing")


def test_an_archive_without_document_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.json", "{}")
    with pytest.raises(BundleError, match="not a readable bundle"):
        read_bundle(path)


def test_the_applied_digest_follows_what_is_built_and_nothing_else() -> None:
    bundle = a_bundle(an_entry())
    assert bundle.applied_digest == replace(bundle, results={}, created="later", name="other").applied_digest
    assert bundle.applied_digest != replace(bundle, entries=()).applied_digest
    assert bundle.applied_digest != replace(bundle, graph_options={}).applied_digest
    assert bundle.applied_digest != replace(bundle, entries=(an_entry(1, prepack=False),)).applied_digest


def test_only_an_empty_bundle_is_stock() -> None:
    assert replace(a_bundle(), graph_options={}).stock
    assert not a_bundle().stock
    assert not replace(a_bundle(an_entry()), graph_options={}).stock
