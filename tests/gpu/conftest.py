"""What several test modules on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autokernel.evaluate.turns import leave


@pytest.fixture
def own_locks_and_clean_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Device locks of this test alone; in the end, nothing that it compiled keeps memory of the device."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    leave("cuda")
