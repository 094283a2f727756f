"""Which runs are a run's history."""

from __future__ import annotations

from pathlib import Path

import pytest

from autokernel.tracking.history import MAX_RUNS, earlier_runs
from autokernel.tracking.journal import JOURNAL_NAME


def test_a_run_is_not_in_its_own_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs folder as it is typed, relative or through a link; the run's own as the pipeline has it, resolved."""
    runs = tmp_path / "on another disk"
    for name in ("tiny", "llama"):
        for day in range(11, 20):
            folder = runs / name / f"202611{day}-014900-{name}"
            folder.mkdir(parents=True)
            (folder / JOURNAL_NAME).touch()
    (tmp_path / "runs").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    own = (runs / "tiny" / "20261119-014900-tiny").resolve()
    for typed in (Path("runs"), Path("./on another disk"), runs):
        found = earlier_runs(typed, own)
        assert own not in [folder.resolve() for folder in found]
        assert [folder.name[6:8] for folder in found] == ["19", *[str(day) for day in (18, 17, 16, 15) for _ in range(2)], "14"]
        assert len(found) == MAX_RUNS
    assert earlier_runs(tmp_path / "none", own) == []
