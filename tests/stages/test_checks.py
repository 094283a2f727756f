"""What is found out about an experiment before anything is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.errors import ConfigError
from autokernel.search.space_file import default_spaces_folder
from autokernel.stages.checks import check_experiment, left_out_backends, ops_without_space, resolve_device

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    for name in ("gated.py", "gated.yaml"):
        shutil.copy(DATA / name, tmp_path / name)
    return tmp_path / "gated.yaml"


def loaded(path: Path, *overrides: str) -> LoadedExperiment:
    return load_experiment(path, overrides)


def test_an_experiment_that_is_in_order_has_its_device(experiment: Path) -> None:
    assert check_experiment(loaded(experiment)) == "cpu"
    shutil.copytree(default_spaces_folder(), experiment.parent / "mine")
    whole = loaded(experiment, "search.spaces=mine", "graph.enabled=true")
    assert check_experiment(whole) == "cpu"
    assert ops_without_space(whole) == []


def test_ops_that_there_are_not(experiment: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_experiment(loaded(experiment, "search.without=[mm, atention]"))
    said = str(caught.value)
    assert said.startswith(f"{experiment}: search.without: 'atention' is no op; there are merged_mm, mm, ")
    assert said.endswith("; did you mean attention? (from --set search.without=[mm, atention])")


def test_spaces_of_ones_own(experiment: Path) -> None:
    folder = experiment.parent / "mine"
    folder.mkdir()

    def message(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check_experiment(loaded(experiment, "search.spaces=mine", *overrides))
        return str(caught.value)

    assert message() == (
        f"{experiment}: search.spaces: {folder} has no mm.yaml, which nearly every model needs; it has no *.yaml at all: copy "
        "the package's search_spaces/ and change the copy, or leave that op alone with `search.without: [mm]` "
        "(from --set search.spaces=mine)"
    )
    some = loaded(experiment, "search.spaces=mine", "search.without=[mm]")
    assert check_experiment(some) == "cpu"
    assert "mm" not in ops_without_space(some)
    assert {"addmm", "attention"} <= set(ops_without_space(some))
    shutil.copy(DATA / "spaces" / "mm.yaml", folder)
    assert check_experiment(loaded(experiment, "search.spaces=mine")) == "cpu"
    (folder / "bmm.yaml").write_text("op: bmm\nbackends: {inducter: {cpu: {choices: {a: [1]}, default: {a: 1}}}}\n")
    assert f"{folder}/bmm.yaml: backends.inducter: is none of aten, " in message()
    assert check_experiment(loaded(experiment, "search.spaces=mine", "search.without=[bmm]")) == "cpu", "nobody reads it"
    (folder / "bmm.yaml").unlink()
    (folder / "graph.yaml").write_text("gpu: []\n")
    assert f"{folder}/graph.yaml: gpu: unknown section; there are cpu and cuda" in message("graph.enabled=true")
    assert check_experiment(loaded(experiment, "search.spaces=mine", "graph.enabled=false")) == "cpu"


@pytest.mark.parametrize(
    ("missing", "override", "said"),
    [
        ({"cmaes"}, "search.sampler=cmaes", "search.sampler: cmaes needs a package that is not installed: pip install cmaes ("),
        (
            {"psycopg2", "psycopg"},
            "storage=postgresql://me:secret@host/db",
            "storage: PostgreSQL needs a driver that is not installed: pip install -c constraints.txt -e '.[postgresql]' (",
        ),
    ],
)
def test_packages_that_only_some_experiments_need(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, missing: set[str], override: str, said: str
) -> None:
    monkeypatch.setattr("autokernel.stages.checks.find_spec", lambda name: None if name in missing else "there")
    assert check_experiment(loaded(experiment)) == "cpu"
    with pytest.raises(ConfigError) as caught:
        check_experiment(loaded(experiment, override))
    assert str(caught.value).startswith(f"{experiment}: {said}")
    assert "secret" not in str(caught.value)
    monkeypatch.setattr("autokernel.stages.checks.find_spec", lambda name: "there")
    assert check_experiment(loaded(experiment, override)) == "cpu"


def test_devices(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"gated.yaml: device: cuda, but torch .* sees no GPU here; install .*device=cuda\)$"):
        check_experiment(loaded(experiment, "device=cuda"))
    assert check_experiment(loaded(experiment, "device=cuda", "cluster.address=ray://far:10001")) == "cuda"
    assert resolve_device(loaded(experiment, "device=auto")) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert resolve_device(loaded(experiment, "device=auto")) == "cuda"


def test_backends_that_cannot_be_used_are_said(experiment: Path) -> None:
    some = ("backends=[aten,triton]", "device=auto")
    (sentence,) = left_out_backends(loaded(experiment, *some), "cpu")
    assert sentence.startswith(f"{experiment}: backends: triton is left out: the Triton kernels are for NVIDIA GPUs: tune with")
    assert left_out_backends(loaded(experiment, *some, "cluster.address=ray://far:10001"), "cpu") == []
