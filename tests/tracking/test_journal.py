from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autokernel.errors import StorageError
from autokernel.events import Event, Exported, StageProgress
from autokernel.tracking.journal import (
    Journal,
    bundle_folder,
    find_runs,
    is_being_written,
    new_run_id,
    read_entries,
    read_journal,
    run_folder,
)

pytestmark = pytest.mark.clock

_TESTS = str(Path(__file__).parent.parent)
_WRITER = f"""
import sys
sys.path.insert(0, {_TESTS!r})
import synthetic_runs
from autokernel.tracking.journal import Journal
journal = Journal(sys.argv[1])
events = synthetic_runs.make_events(600)
print("ready", flush=True)
for event in events:
    journal.record(event)
    print(len(events), flush=True)
print("all", flush=True)
input()
"""


def _start_writer(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _write(folder: Path, events: list[Event]) -> None:
    journal = Journal(folder)
    for event in events:
        journal.record(event)
    journal.close()


def test_what_is_recorded_is_read_back(tmp_path: Path, synthetic_events: list[Event]) -> None:
    _write(tmp_path, [*synthetic_events, StageProgress(stage="search", done=1, total=2)])
    assert read_journal(tmp_path) == synthetic_events
    assert read_journal(tmp_path / "journal.jsonl") == synthetic_events
    times = [entry.time for entry in read_entries(tmp_path)]
    assert times == sorted(times)
    assert times[0].tzinfo is not None


def test_each_event_is_in_the_file_when_record_returns(tmp_path: Path, synthetic_events: list[Event]) -> None:
    journal = Journal(tmp_path)
    for count, event in enumerate(synthetic_events, start=1):
        journal.record(event)
        assert (tmp_path / "journal.jsonl").read_bytes().count(b"\n") == count
    journal.close()


def test_torn_tail_is_cut_off_and_never_glued_onto(
    tmp_path: Path, synthetic_events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, synthetic_events[:10])
    with open(tmp_path / "journal.jsonl", "ab") as f:
        f.write(b'{"time":"2026-11-21T01:49:00+00:00","type":"Evalu')
    assert read_journal(tmp_path) == synthetic_events[:10]
    with caplog.at_level(logging.WARNING):
        _write(tmp_path, synthetic_events[10:])
    assert "torn" in caplog.text
    assert read_journal(tmp_path) == synthetic_events
    assert (tmp_path / "journal.torn").read_bytes().startswith(b'{"time"')


def test_tail_longer_than_a_block_is_cut_off(tmp_path: Path, synthetic_events: list[Event]) -> None:
    _write(tmp_path, synthetic_events[:3])
    with open(tmp_path / "journal.jsonl", "ab") as f:
        f.write(b"x" * 200_000)
    _write(tmp_path, synthetic_events[3:5])
    assert read_journal(tmp_path) == synthetic_events[:5]


def test_first_line_torn_leaves_an_empty_journal(tmp_path: Path, synthetic_events: list[Event]) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b'{"time":')
    assert read_journal(tmp_path) == []
    _write(tmp_path, synthetic_events[:2])
    assert read_journal(tmp_path) == synthetic_events[:2]


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, synthetic_run: Callable[..., list[Event]]) -> None:
    expected = synthetic_run(600)
    for attempt, lines in enumerate((3, 57, 211)):
        folder = tmp_path / str(attempt)
        writer = _start_writer(folder)
        assert writer.stdout is not None
        acknowledged = -1
        for _ in range(lines + 1):
            assert writer.stdout.readline()
            acknowledged += 1
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += sum(1 for line in writer.stdout if line.strip().isdigit())
        writer.wait()
        events = read_journal(folder)
        assert len(events) >= acknowledged
        assert events == expected[: len(events)]
        _write(folder, expected[len(events) :])  # the lock went with the process
        assert read_journal(folder) == expected


@pytest.mark.parametrize("line", [b"[]", b"{}", b"not json", b'{"time":"2026-11-21T01:49:00+00:00","type":"Nonsense"}'])
def test_damage_before_the_end_is_an_error_with_its_line(tmp_path: Path, synthetic_events: list[Event], line: bytes) -> None:
    _write(tmp_path, synthetic_events[:4])
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    with pytest.raises(StorageError, match=r"journal\.jsonl:3: .*head -n 2"):
        read_journal(tmp_path)


def test_missing_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read: No such file"):
        read_journal(tmp_path / "nowhere.jsonl")


def test_second_writer_is_told_who_holds_the_journal(tmp_path: Path) -> None:
    writer = _start_writer(tmp_path)
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(StorageError, match=f"pid {writer.pid} "):
            Journal(tmp_path)
    finally:
        writer.kill()
        writer.wait()
    deadline = time.monotonic() + 5
    while True:  # the kernel lets go of the lock with the process
        try:
            Journal(tmp_path).close()
            break
        except StorageError:
            assert time.monotonic() < deadline


def test_lock_holds_within_one_process_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(StorageError, match=f"pid {os.getpid()} "):
        Journal(tmp_path)
    assert is_being_written(tmp_path)
    journal.close()
    journal.close()
    assert not is_being_written(tmp_path)
    assert not is_being_written(tmp_path / "nowhere")
    Journal(tmp_path).close()


def test_nothing_is_recorded_after_close(tmp_path: Path, synthetic_events: list[Event]) -> None:
    journal = Journal(tmp_path)
    journal.close()
    with pytest.raises(StorageError, match="closed"):
        journal.record(synthetic_events[0])


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(journal: Journal, events: list[Event]) -> tuple[int, str]:
    for count, event in enumerate(events):
        try:
            journal.record(event)
        except StorageError as error:
            return count, str(error)
    raise AssertionError("the disk did not fill up")


def test_full_disk_says_what_is_saved_and_resumes(
    full_disk: Path, tmp_path: Path, synthetic_run: Callable[..., list[Event]]
) -> None:
    events = synthetic_run(600)
    ballast = full_disk / "ballast"
    ballast.write_bytes(b"x" * 20_000)
    folder = full_disk / "run"
    journal = Journal(folder)
    count, message = _fill(journal, events)
    journal.close()
    assert "No space left" in message
    assert "free some space" in message
    assert f"({count} events" in message
    assert (folder / "journal.jsonl").read_bytes().endswith(b"\n")
    assert read_journal(folder) == events[:count]
    ballast.unlink()
    _write(folder, events[count : count + 3])
    assert read_journal(folder) == events[: count + 3]


def test_quota_says_what_is_saved(tmp_path: Path, synthetic_run: Callable[..., list[Event]]) -> None:
    events = synthetic_run(60)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        count, message = _fill(journal, events)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.close()
    assert "File too large" in message
    assert read_journal(tmp_path) == events[:count]


def test_unwritable_folder_is_named_with_the_cure() -> None:
    with pytest.raises(StorageError, match="/proc/autokernel: a run needs a folder it can write"):
        Journal("/proc/autokernel")


def test_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError, match="a run needs a folder"):
        Journal(tmp_path / "runs" / "x")


def test_runs_are_found_newest_first(tmp_path: Path, synthetic_events: list[Event]) -> None:
    for run_id in ("20261120-000000-aaaa", "20261121-000000-aaaa"):
        _write(run_folder(tmp_path, "one", run_id), synthetic_events[:1])
    _write(run_folder(tmp_path, "two", "20261120-120000-bbbb"), synthetic_events[:1])
    (tmp_path / "one" / "no-journal").mkdir()
    names = [folder.name for folder in find_runs(tmp_path)]
    assert names == ["20261121-000000-aaaa", "20261120-120000-bbbb", "20261120-000000-aaaa"]
    assert [folder.name for folder in find_runs(tmp_path, "two")] == ["20261120-120000-bbbb"]
    assert find_runs(tmp_path / "nowhere") == []


def test_run_ids_differ() -> None:
    assert len({new_run_id() for _ in range(20)}) > 15


def test_lines_are_plain_json(tmp_path: Path, synthetic_events: list[Event]) -> None:
    _write(tmp_path, synthetic_events)
    first = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])
    assert first["type"] == "RunStarted"
    assert list(first)[:2] == ["time", "type"]


def test_the_bundle_of_a_run_that_was_moved(tmp_path: Path) -> None:
    there = Exported(folder="/elsewhere/run/bundle", archive="", digest="", num_entries=1, stock=False)
    assert bundle_folder(tmp_path, there) == Path("/elsewhere/run/bundle")
    assert bundle_folder(tmp_path, replace(there, folder="bundle")) == tmp_path / "bundle"
    (tmp_path / "bundle").mkdir()
    assert bundle_folder(tmp_path, there) == tmp_path / "bundle"
