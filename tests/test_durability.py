"""Whole runs that are killed, interrupted, filled up and sabotaged: nothing finished is lost or repeated, and they end."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from autokernel.config import load_experiment
from autokernel.display.dry_run import plan_json
from autokernel.events import Evaluated, Exported, RunFinished, RunStarted, StageFinished, StageStarted, event_to_json
from autokernel.export.bundle import read_bundle
from autokernel.pipeline import run
from autokernel.records import Candidate, Evaluation
from autokernel.tracking.journal import JOURNAL_NAME, find_runs, read_entries, read_journal
from autokernel.tracking.state import RunState

DATA = Path(__file__).parent / "data"
EXPERIMENT = DATA / "tiny.yaml"
PATIENCE_S = 400.0  # what runs of minutes may take on a machine that is three times as busy
SEARCH_S = load_experiment(EXPERIMENT).experiment.search.seconds

pytestmark = [pytest.mark.slow, pytest.mark.clock, pytest.mark.timeout(1200)]


def named(candidate: Candidate) -> str:
    """As sabotage's plan spells it."""
    return " ".join([candidate.problem.op, *(f"{name}={value}" for name, value in sorted(candidate.config.items()))])


def eventually(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_S:g} s"
        time.sleep(0.05)


# --- candidates that misbehave, and processes that are killed while they work

PLAN = {
    "merged_mm merge=none prepack=False": "lose the worker",
    "mm prepack=False": "lose the child",
    "merged_mm merge=none prepack=True": "segfault",
    "merged_mm merge=concat prepack=False": "allocate",
    "addmm prepack=True": "hang",
    "mm prepack=True": "print",
}


class Killer:
    """Kills a process that a candidate has named, as soon as it has."""

    def __init__(self, file: Path, position: int) -> None:
        self.killed = 0
        self._file, self._position = file, position
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(AssertionError):
            eventually(self._file.exists, str(self._file))
            self.killed = int(self._file.read_text().split()[self._position])
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.ray
def test_bad_candidates_and_killed_processes_cost_one_candidate_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    monkeypatch.setenv("AK_SABOTAGE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(DATA / "sabotage"))
    monkeypatch.setattr("autokernel.workers.limits.memory_limit", lambda num_workers, model_bytes=0: 2 << 30)
    worker, child = Killer(tmp_path / "lose the worker.pids", 1), Killer(tmp_path / "lose the child.pids", 0)
    overrides = ("cluster.address=local", "search.workers=2", "search.trial_timeout_s=60")
    outcome = run(EXPERIMENT, overrides=overrides, runs_folder=tmp_path / "runs", until="export")
    assert worker.killed
    assert child.killed
    found: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations(outcome.folder):
        found.setdefault(named(evaluation.candidate), []).append(evaluation)
    assert {name: [str(e.status) for e in tries] for name, tries in found.items()} == {
        "merged_mm merge=none prepack=False": ["LOST", "OK"],
        "merged_mm merge=none prepack=True": ["CRASHED"],
        "merged_mm merge=concat prepack=False": ["CRASHED"],
        "merged_mm merge=concat prepack=True": ["OK"],
        "addmm prepack=False": ["OK"],
        "addmm prepack=True": ["TIMEOUT"],
        "mm prepack=False": ["CRASHED"],
        "mm prepack=True": ["OK"],
    }
    said = {name: tries[0].message for name, tries in found.items()}
    assert "the worker or its node went away" in said["merged_mm merge=none prepack=False"]
    assert "was killed by SIGSEGV" in said["merged_mm merge=none prepack=True"]
    assert "deadline of 60 s" in said["addmm prepack=True"]
    assert "more than its memory limit of 2.00 GiB" in said["merged_mm merge=concat prepack=False"]
    assert "was killed by SIGKILL" in said["mm prepack=False"]
    assert (outcome.folder / JOURNAL_NAME).stat().st_size < 1 << 20, "what candidates print does not pile up"
    assert outcome.bundle is not None
    assert read_bundle(outcome.bundle).stock == (outcome.outcome == "stock")


# --- runs that are stopped in every way, and resumed by the same command


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one that is profiled: what the tests below go on from."""
    runs = tmp_path_factory.mktemp("profiled")
    run(EXPERIMENT, runs_folder=runs, until="profile")
    return runs


def adopt(profiled: Path, runs: Path) -> Path:
    """A copy of the profiled run in another folder of runs; MLflow's database is made again from its journal."""
    shutil.copytree(profiled / "tiny", runs / "tiny")
    (folder,) = find_runs(runs, "tiny")
    return folder


class Driver:
    """`autokernel run`, or a part of it, in a process of its own."""

    def __init__(self, runs: Path, *prefix: str, part: str = "run") -> None:
        words = [*prefix, sys.executable, "-m", "autokernel", part, str(EXPERIMENT), "--runs", str(runs)]
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Until the condition comes true, which has to be before the driver ends."""

        def alive_or_true() -> bool:
            if condition():
                return True
            assert self.process.poll() is None, f"the driver ended before {what}: {self.process.communicate()[1]}"
            return False

        try:
            eventually(alive_or_true, what)
        except AssertionError:
            self.process.kill()
            raise

    def end(self) -> tuple[int, str]:
        """Exit code and what it said."""
        _, said = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, said


def evaluations(folder: Path) -> list[Evaluation]:
    return [event.evaluation for event in read_journal(folder) if isinstance(event, Evaluated)]


def one_more(folder: Path) -> Callable[[], bool]:
    """Whether another candidate was finished since this was called."""
    before = len(evaluations(folder))
    return lambda: len(evaluations(folder)) > before


def descendants(driver: Driver) -> list[psutil.Process]:
    return psutil.Process(driver.process.pid).children(recursive=True)


def check_nothing_lost_or_repeated(folder: Path) -> None:
    events = read_journal(folder)
    tried = Counter(e.candidate.id for e in evaluations(folder))
    assert len(tried) == 8
    assert set(tried.values()) == {1}
    assert [e.stage for e in events if isinstance(e, StageFinished)].count("profile") == 1


def check_whole(folder: Path) -> None:
    check_nothing_lost_or_repeated(folder)
    events = read_journal(folder)
    assert sum(isinstance(e, Exported) for e in events) == 1
    assert isinstance(events[-1], RunFinished)
    assert events[-1].outcome in ("won", "stock")


def test_a_run_that_is_killed_interrupted_and_locked_out_goes_on_each_time(profiled: Path, tmp_path: Path) -> None:
    folder = adopt(profiled, tmp_path)

    # kill -9
    driver = Driver(tmp_path)
    driver.wait_for(one_more(folder), "a candidate")
    started = descendants(driver)
    driver.process.kill()
    driver.end()
    eventually(
        lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started), "the end of its children"
    )
    saved = read_journal(folder)

    # Ctrl-C
    driver = Driver(tmp_path)
    driver.wait_for(one_more(folder), "another candidate")
    driver.process.send_signal(signal.SIGINT)
    at = time.monotonic()
    code, said = driver.end()
    assert code == 130, said
    assert time.monotonic() - at < 15
    num_saved = sum(isinstance(event, Evaluated) for event in saved)
    assert f"tiny: run {folder.name} goes on: {num_saved} trials, stages done: profile" in said
    assert said.splitlines()[-1] == f"Interrupted; this goes on from here: autokernel run {EXPERIMENT} --runs {tmp_path}"
    assert "Traceback" not in said
    events = read_journal(folder)
    assert events[: len(saved)] == saved
    assert isinstance(events[-1], RunFinished)
    assert events[-1].outcome == "interrupted"

    # the folder becomes read-only while the model is validated
    driver = Driver(tmp_path, *obeying_permissions())
    driver.wait_for(
        lambda: any(isinstance(e, StageStarted) and e.stage == "validate" for e in read_journal(folder)), "validation"
    )
    folder.chmod(0o555)
    try:
        code, said = driver.end()
        assert code == 1, said
        assert f"{folder}/bundle: the bundle cannot be written: " in said
        assert "Permission denied" in said
        assert "make the folder writable" in said
        assert "Traceback" not in said
        for file in folder.glob("journal.*"):
            file.chmod(0o444)
        code, said = Driver(tmp_path, *obeying_permissions()).end()
        assert code == 1, said
        needs = (
            "a run needs a folder it can write its journal to: Permission denied; make it writable, or name another with --runs"
        )
        assert said == f"{folder}: {needs}\n"
    finally:
        for path in (folder, *folder.glob("journal.*")):
            path.chmod(0o755)

    code, said = Driver(tmp_path).end()
    assert code == 0, said
    check_whole(folder)
    check_search_time(folder)
    assert [e.resumed for e in read_journal(folder) if isinstance(e, RunStarted)] == [False, True, True, True, True]
    plan = plan_json(load_experiment(EXPERIMENT), tmp_path, fresh=False)
    assert plan["resumes"] is None, "a finished run is not resumed: the next one is new"


def check_search_time(folder: Path) -> None:
    """Every process gets what the ones before it left of the experiment's seconds."""
    entries = list(read_entries(folder))
    budgets = []
    for position, entry in enumerate(entries):
        if isinstance(entry.event, StageStarted) and entry.event.stage == "search":
            spent = RunState.from_entries(entries[:position]).stage_seconds.get("search", 0.0)
            assert entry.event.budget_s == pytest.approx(SEARCH_S - spent, abs=0.1)
            budgets.append(entry.event.budget_s)
    assert len(budgets) == 3
    assert budgets[0] == SEARCH_S
    assert budgets[0] > budgets[1] > budgets[2] > 0


def test_a_run_that_was_stopped_goes_on_unless_it_shall_be_fresh(profiled: Path, tmp_path: Path) -> None:
    folder = adopt(profiled, tmp_path)
    before = len(read_journal(folder))
    again = run(EXPERIMENT, runs_folder=tmp_path, until="profile")
    assert (again.folder, again.outcome, again.bundle) == (folder, "stopped", None)
    added = read_journal(folder)[before:]
    assert [event.resumed for event in added if isinstance(event, RunStarted)] == [True]
    assert not [event for event in added if isinstance(event, StageFinished)], "and does not profile again"
    other = run(EXPERIMENT, runs_folder=tmp_path, until="profile", fresh=True)
    assert other.folder != folder
    assert [event.resumed for event in read_journal(other.folder) if isinstance(event, RunStarted)] == [False]


def test_time_that_was_used_up_before_an_interruption_is_not_given_again(profiled: Path, tmp_path: Path) -> None:
    folder = adopt(profiled, tmp_path)
    last = list(read_entries(folder))[-1].time
    with open(folder / JOURNAL_NAME, "a", encoding="utf-8") as f:
        for second, event in (
            (1, StageStarted(stage="search", budget_s=SEARCH_S)),
            (SEARCH_S + 2, RunFinished(outcome="interrupted", message="Ctrl-C", seconds=SEARCH_S + 2)),
        ):
            time_text = (last + datetime.timedelta(seconds=second)).isoformat(timespec="milliseconds")
            f.write(json.dumps({"time": time_text, **event_to_json(event)}) + "\n")
    outcome = run(EXPERIMENT, runs_folder=tmp_path, until="search")
    assert outcome.folder == folder
    assert "search" in RunState.from_events(read_journal(folder)).stages_done
    assert evaluations(folder) == []


def obeying_permissions() -> list[str]:
    """What to put before a command so that even root may not write where permissions forbid it."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write anywhere, and there is no setpriv to take that from it")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(file: Path) -> None:
    """Until not even a byte fits."""
    with open(file, "wb", buffering=0) as f:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    f.write(b"x" * size)


def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(profiled: Path, small_disk: Path) -> None:
    folder = adopt(profiled, small_disk / "runs")
    driver = Driver(small_disk / "runs")
    driver.wait_for(one_more(folder), "a candidate")
    ballast = small_disk / "ballast"
    fill(ballast)
    code, said = driver.end()
    assert code == 1, said
    assert str(folder) in said.splitlines()[-1]
    assert "free some space" in said.splitlines()[-1]
    assert "Traceback" not in said
    saved = read_journal(folder)
    assert evaluations(folder)

    ballast.unlink()  # what follows on the search is no other than after an interruption
    code, said = Driver(small_disk / "runs", part="search").end()
    assert code == 0, said
    assert f"goes on: {sum(isinstance(event, Evaluated) for event in saved)} trials, stages done: profile" in said
    assert read_journal(folder)[: len(saved)] == saved
    check_nothing_lost_or_repeated(folder)
