from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autokernel.backends import BuildError
from autokernel.backends.aten import AtenBackend
from autokernel.errors import StorageError
from autokernel.evaluate.candidate import EvaluateCandidate, build_or_fail
from autokernel.evaluate.disk import raise_if_disk
from autokernel.records import Candidate, Evaluation, Problem, Status, TensorSpec
from autokernel.workers.worker import Worker

WEIGHT = TensorSpec(shape=(64, 64), dtype="float32", stride=(1, 64))
PROBLEM = Problem(
    op="mm", inputs=(TensorSpec(shape=(4, 64), dtype="float32", stride=(64, 1)), WEIGHT), constants=(1,), device="cpu"
)


def raised(*texts: str) -> Exception:
    """Errors with these texts, each the cause of the one before it."""
    cause: Exception | None = None
    for text in reversed(texts):
        error = RuntimeError(text)
        error.__cause__ = cause
        cause = error
    assert cause is not None
    return cause


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        raised("it does not compile", "g++: fatal error: error writing to /tmp/x.s: No space left on device"),
        raised("LoweringException: OSError: [Errno 122] Disk quota exceeded"),
        OSError(30, "Read-only file system", "/tmp/torchinductor_me/x.cpp"),
    ],
)
def test_a_disk_that_takes_nothing_is_told_from_a_config_that_does_not_build(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache/of/mine")
    with pytest.raises(StorageError, match=r"^/cache/of/mine and /.*: compilers write .*; free some space there, or set TORCH"):
        raise_if_disk(error)


@pytest.mark.parametrize("error", [BuildError("no such template"), raised("a", "b"), FileNotFoundError(2, "No such file", "x")])
def test_other_errors_are_the_candidates(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(AtenBackend, "build", fail)
    candidate = Candidate(problem=PROBLEM, backend="aten", config={"prepack": False})
    result = build_or_fail(candidate, AtenBackend(), [], time.monotonic())
    assert isinstance(result, Evaluation)
    assert result.status is Status.BUILD_ERROR
    assert str(error).splitlines()[0] in result.message


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        (folder / "cache").mkdir()
        with open(folder / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(b"x" * 4096)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_candidate_on_a_full_disk_is_not_a_failed_candidate(full_disk: Path) -> None:
    job = EvaluateCandidate(candidate=Candidate(problem=PROBLEM, backend="aten", config={"prepack": True}), threads=1)
    worker = Worker(env={"TORCHINDUCTOR_CACHE_DIR": str(full_disk / "cache")}, preload=("torch",))
    try:
        with pytest.raises(StorageError, match="No space left on device"):
            worker.run(job, 120)
        os.unlink(full_disk / "ballast")
        subprocess.run(["mount", "-o", "remount,size=64m", full_disk], check=True)
        assert worker.run(job, 120).status is Status.OK
    finally:
        worker.close()
