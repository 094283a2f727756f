"""A run is resumed only if the experiment and everything that it names are what they were."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from autokernel.config import Experiment, load_experiment
from autokernel.fingerprint import checkpoint_bytes, experiment_digest, file_digests
from autokernel.tracking.journal import JOURNAL_NAME, Journal, find_runs, run_folder
from autokernel.tracking.mlflow_env import default_artifact_folder, default_tracking_uri

DATA = Path(__file__).parent / "data"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    for name in ("gated.py", "gated.yaml"):
        shutil.copy(DATA / name, tmp_path / name)
    shutil.copytree(DATA / "spaces", tmp_path / "spaces")
    return tmp_path / "gated.yaml"


def test_reading_it_again_changes_nothing(experiment: Path) -> None:
    assert experiment_digest(load_experiment(experiment)) == experiment_digest(load_experiment(experiment))


def test_a_comment_is_no_change_but_a_setting_is(experiment: Path) -> None:
    before = experiment_digest(load_experiment(experiment))
    experiment.write_text("# a comment\n" + experiment.read_text())
    assert experiment_digest(load_experiment(experiment)) == before
    assert experiment_digest(load_experiment(experiment, ("search.trials=13",))) != before


def test_what_a_later_version_may_say_besides_changes_nothing_where_it_is_not_said(experiment: Path) -> None:
    """A run that was begun before an update is resumed, and not begun anew without a word."""

    class Later(Experiment):
        profile_twice: bool = False

    loaded = load_experiment(experiment)
    given = loaded.experiment.model_dump(exclude_unset=True)
    later, said = (
        loaded.model_copy(update={"experiment": Later.model_validate(values)})
        for values in (given, {**given, "profile_twice": True})
    )
    assert experiment_digest(later) == experiment_digest(loaded)
    assert experiment_digest(said) != experiment_digest(loaded)


def test_the_model_s_code_counts(experiment: Path) -> None:
    before = experiment_digest(load_experiment(experiment))
    code = experiment.with_name("gated.py")
    code.write_text(code.read_text().replace("hidden: int = 1024", "hidden: int = 512"))
    assert experiment_digest(load_experiment(experiment)) != before


def test_a_folder_that_is_named_counts_with_its_files(experiment: Path) -> None:
    overrides = ("search.spaces=spaces",)
    before = experiment_digest(load_experiment(experiment, overrides))
    space = experiment.parent / "spaces" / "mm.yaml"
    space.write_text(space.read_text() + "\n# touched\n")
    assert experiment_digest(load_experiment(experiment, overrides)) != before


def test_of_a_folder_of_spaces_only_the_spaces_count(experiment: Path) -> None:
    """`search.spaces=/tmp` must not read all that lies there."""
    overrides = ("search.spaces=spaces",)
    before = experiment_digest(load_experiment(experiment, overrides))
    (experiment.parent / "spaces" / "deep").mkdir()
    for name in ("notes.txt", "deep/mm.yaml"):
        (experiment.parent / "spaces" / name).write_text("op: mm")
    assert experiment_digest(load_experiment(experiment, overrides)) == before
    shutil.copy(experiment.parent / "spaces" / "mm.yaml", experiment.parent / "spaces" / "bmm.yaml")
    assert experiment_digest(load_experiment(experiment, overrides)) != before


def test_which_file_changed_is_told_by_its_key(experiment: Path) -> None:
    overrides = ("search.spaces=spaces",)
    before = file_digests(load_experiment(experiment, overrides))
    named = {"search.spaces", "model.factory", "scenarios.one.inputs", "scenarios.four.inputs", "validation.eval.metric"}
    assert set(before) == named
    space = experiment.parent / "spaces" / "mm.yaml"
    space.write_text(space.read_text() + "\n# touched\n")
    after = file_digests(load_experiment(experiment, overrides))
    assert {key for key in before if before[key] != after[key]} == {"search.spaces"}
    code = experiment.with_name("gated.py")
    code.write_text(code.read_text() + "\n# touched\n")
    last = file_digests(load_experiment(experiment, overrides))
    assert {key for key in after if after[key] != last[key]} == named - {"search.spaces"}


@pytest.mark.parametrize("runs", ["runs", "deep/in/it", "."])
def test_runs_in_a_folder_that_is_named_do_not_count(experiment: Path, runs: str) -> None:
    """What a run writes there must not keep it from being resumed."""
    overrides = ("validation.eval.data=.",)
    before = experiment_digest(load_experiment(experiment, overrides))
    files = file_digests(load_experiment(experiment, overrides))
    folder = run_folder(experiment.parent / runs, "gated", "20260101-000000-aa")
    Journal(folder).close()
    (folder / JOURNAL_NAME).write_text("{}")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "bundle.json").write_text("{}")
    database = Path(default_tracking_uri(experiment.parent / runs).removeprefix("sqlite:///"))
    for written in (
        database,
        Path(f"{database}-journal"),
        default_artifact_folder(experiment.parent / runs) / "1" / "plot.png",
    ):
        written.parent.mkdir(exist_ok=True, parents=True)
        written.write_text("x")
    assert experiment_digest(load_experiment(experiment, overrides)) == before
    assert file_digests(load_experiment(experiment, overrides)) == files
    folder.with_name("prompts.txt").write_text("beside a run, but not of one")
    assert experiment_digest(load_experiment(experiment, overrides)) != before


def test_a_run_s_folder_that_is_named_itself_counts(experiment: Path) -> None:
    runs = experiment.parent / "runs"
    Journal(run_folder(runs, "gated", "20260101-000000-aa")).close()
    (folder,) = find_runs(runs)
    overrides = (f"validation.eval.data={folder}",)
    before = experiment_digest(load_experiment(experiment, overrides))
    (folder / "prompts.txt").write_text("more")
    assert experiment_digest(load_experiment(experiment, overrides)) != before


def test_files_that_vanish_meanwhile_are_no_failure(experiment: Path) -> None:
    folder = experiment.parent / "data"
    (folder / "kept").mkdir(parents=True)
    (folder / "kept" / "prompts.txt").write_text("text")
    loaded = load_experiment(experiment, ("validation.eval.data=data",))
    before = experiment_digest(loaded)
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            for number in range(50):
                (folder / f"{number}").mkdir()
                (folder / f"{number}" / "file").write_text("x")
            for number in range(50):
                shutil.rmtree(folder / f"{number}")

    changing = threading.Thread(target=come_and_go)
    changing.start()
    try:
        for _ in range(100):
            experiment_digest(loaded)
    finally:
        ended.set()
        changing.join()
    assert experiment_digest(loaded) == before


def test_a_checkpoint_is_as_large_as_its_weights(tmp_path: Path) -> None:
    for name, size in (("config.json", 2), ("model-00001-of-00002.safetensors", 300), ("model-00002-of-00002.safetensors", 44)):
        (tmp_path / name).write_bytes(b"x" * size)
    loaded = load_experiment(DATA / "gated.yaml")
    assert checkpoint_bytes(loaded) == 0
    model = loaded.experiment.model.model_copy(update={"factory": None, "checkpoint": tmp_path})
    changed = loaded.experiment.model_copy(update={"model": model})
    assert checkpoint_bytes(loaded.model_copy(update={"experiment": changed})) == 344
