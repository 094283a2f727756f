"""A device that is full for now is held against no candidate; a kernel that no device has room for is."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from autokernel.backends import BuildError, Built, compiled
from autokernel.backends.aten import AtenBackend
from autokernel.errors import DeviceFull
from autokernel.evaluate.call_graphs import CaptureError
from autokernel.evaluate.candidate import EvaluateCandidate, build_or_fail
from autokernel.evaluate.confirm import ConfirmCandidates
from autokernel.evaluate.room import raise_if_full
from autokernel.records import Candidate, Evaluation, Problem, Status, TensorSpec

FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB"
GREEDY = "out of resource: triton_mm Required: 262144 Hardware limit:232448 Reducing block sizes or `num_stages` may help."
WEIGHT = TensorSpec(shape=(64, 64), dtype="float32", stride=(1, 64))
PROBLEM = Problem(
    op="mm", inputs=(TensorSpec(shape=(4, 64), dtype="float32", stride=(64, 1)), WEIGHT), constants=(1,), device="cpu"
)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 20 GiB"),
        caused(BuildError("it does not compile"), torch.OutOfMemoryError(FULL)),
        RuntimeError(f"LoweringException: OutOfMemoryError: {FULL}\n  target: aten.cat.default"),
        caused(CaptureError("it cannot be captured in a CUDA graph"), torch.OutOfMemoryError(FULL)),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_device_is_told_however_it_is_wrapped(error: Exception) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        raise_if_full(error)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(GREEDY),
        caused(RuntimeError(f"No valid triton configs. OutOfMemoryError: {GREEDY}"), torch.OutOfMemoryError(GREEDY)),
        RuntimeError("misaligned address"),
    ],
)
def test_a_kernel_that_is_too_large_for_any_device_is_not(error: Exception) -> None:
    raise_if_full(error)


def test_no_room_for_what_inductor_folds_reads_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` gives no cause for what its backend raised."""

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(compiled, "compile_fx", full)
    candidate = Candidate(problem=PROBLEM, backend="aten", config={"prepack": False})
    constants = [[torch.randn(64, 64).t()]]
    with pytest.raises(torch.OutOfMemoryError, match=r"20\.00 GiB"):
        build_or_fail(candidate, AtenBackend(), constants, time.monotonic())
    result = build_or_fail(candidate, AtenBackend(), constants, time.monotonic(), alone=True)
    assert isinstance(result, Evaluation)
    assert result.status is Status.BUILD_ERROR


@pytest.mark.parametrize("when", ["build", "run", "capture"])
def test_a_candidate_is_lost_at_whatever_step_the_device_is_full(when: str, backend: Any, linear: Any, wrap: Any) -> None:
    full = torch.OutOfMemoryError(FULL)

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        raise full if when == "run" else caused(CaptureError("it cannot be captured"), full)

    def make(candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        if when == "build":
            raise full
        return wrap(candidate.problem, constants, kernel)

    backend.make = make
    job = EvaluateCandidate(candidate=Candidate(problem=linear(), backend="fake"), threads=1, max_copies=3)
    with pytest.raises(DeviceFull, match=r"the device had no room for fake .*beside the other workers: .*20\.00 GiB"):
        job()


def test_finalists_meet_no_weaker_baseline_because_the_device_is_full(backend: Any, linear: Any, wrap: Any) -> None:
    def make(candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        if candidate.config["kernel"] == "strong":
            raise torch.OutOfMemoryError(FULL)
        return wrap(candidate.problem, constants, torch.nn.functional.linear)

    backend.make = make
    problem = linear()
    strong, weak, own = [Candidate(problem=problem, backend="fake", config={"kernel": k}) for k in ("strong", "weak", "own")]

    def job(alone: bool) -> ConfirmCandidates:
        return ConfirmCandidates(
            problem=problem, finalists=(own,), baselines=(strong, weak), rounds=7, threads=1, max_copies=2, alone=alone
        )

    with pytest.raises(DeviceFull, match="had no room for its confirmation"):
        job(alone=False)()
    result = job(alone=True)()
    assert result.baseline == weak
    assert [(failure.candidate, failure.status) for failure in result.failures] == [(strong, Status.BUILD_ERROR)]
