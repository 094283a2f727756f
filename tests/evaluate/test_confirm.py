"""Finalists are compared with the strongest baseline only, and whoever fails a check drops out."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from autokernel.errors import JobLost, NoRoomError
from autokernel.evaluate import candidate as candidate_module
from autokernel.evaluate import confirm as confirm_module
from autokernel.evaluate.confirm import Confirmation, ConfirmCandidates
from autokernel.evaluate.roofline import Ceilings
from autokernel.records import Candidate, Check, Status

pytestmark = pytest.mark.clock

linear_of = torch.nn.functional.linear


def delayed(us: float) -> Any:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        end = time.perf_counter_ns() + us * 1000
        out = linear_of(x, w)
        while time.perf_counter_ns() < end:
            pass
        return out

    return kernel


def broken(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape[0], w.shape[0])


def raising(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such instruction")


def greedy(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("tried to allocate 1002 MiB")


KERNELS = {
    "greedy": greedy,
    "slow": delayed(1200),
    "strong": delayed(600),
    "fast": delayed(150),
    "broken": broken,
    "raising": raising,
}


@pytest.fixture
def candidate(backend: Any, linear: Any, wrap: Any) -> Any:
    backend.make = lambda c, constants: wrap(c.problem, constants, KERNELS[c.config["kernel"]])
    problem = linear()
    return lambda kernel, note=0: Candidate(problem=problem, backend="fake", config={"kernel": kernel, "note": note})


def confirm(candidate: Any, finalists: list[Any], baselines: list[Any], **options: Any) -> Confirmation:
    problem = candidate("slow").problem
    return ConfirmCandidates(
        problem=problem, finalists=tuple(finalists), baselines=tuple(baselines), rounds=15, threads=1, max_copies=2, **options
    )()


def test_each_is_held_against_what_its_own_products_allow(candidate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def physics(*given: Any, split: bool) -> Check:
        asked.append(split)
        return Check(name="physics", value=0, limit=1, passed=True)

    monkeypatch.setattr(confirm_module, "sound_physics_check", physics)
    exact = replace(candidate("fast"), config={**candidate("fast").config, "precision": "ieee"})
    ceilings = Ceilings(read_gb_per_s=5000, tflops={"float32": 100})
    result = confirm(candidate, [exact], [candidate("slow")], ceilings=ceilings)
    assert len(result.finalists) == 1
    assert sorted(asked) == [False, True]


def test_a_candidate_without_room_is_to_blame_only_where_it_is_alone(candidate: Any) -> None:
    finalists, baselines = [candidate("greedy"), candidate("fast")], [candidate("slow")]
    with pytest.raises(JobLost, match=r"had no room for its confirmation beside the other workers: .*1002 MiB"):
        confirm(candidate, finalists, baselines)
    result = confirm(candidate, finalists, baselines, alone=True)
    assert [(one.candidate, one.status) for one in result.failures] == [(candidate("greedy"), Status.RUN_ERROR)]
    assert [contender.candidate for contender in result.finalists] == [candidate("fast")]


def test_no_memory_for_two_copies_is_the_devices_affair_on_a_gpu(candidate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise NoRoomError("2 copies of its inputs must fit")

    monkeypatch.setattr(candidate_module, "num_copies_for", full)
    with pytest.raises(NoRoomError):
        confirm(candidate, [candidate("fast")], [candidate("slow")])
    problem = replace(candidate("slow").problem, device="cuda")
    on_gpu = [replace(candidate(kernel), problem=problem) for kernel in ("slow", "fast")]
    monkeypatch.setattr(confirm_module, "wake", lambda device: None)
    monkeypatch.setattr(candidate_module, "cache_bytes", lambda *_: 1)
    job = ConfirmCandidates(problem=problem, finalists=(on_gpu[1],), baselines=(on_gpu[0],), threads=1)
    with pytest.raises(JobLost, match="2 copies"):
        job()


def test_speedup_is_over_the_strongest_baseline(candidate: Any) -> None:
    finalists = [candidate("fast"), candidate("slow", 1), candidate("strong", 1)]
    result = confirm(candidate, finalists, [candidate("slow"), candidate("strong")])
    assert result.baseline == candidate("strong")
    assert [c.candidate.config["kernel"] for c in result.baselines] == ["slow", "strong"]
    fast, slow, equal = result.finalists
    # 4, 0.5 and 1 on a quiet machine; intervals are wide on a busy one
    assert fast.speedup.ratio > 2
    assert slow.speedup.ratio < 0.8
    assert equal.speedup.low < 1.2
    assert 150 <= fast.measurement.median_us < 600
    assert fast.measurement.regime.endswith("interleaved")
    assert fast.verdict.passed
    assert "repeat_fresh" in {check.name for check in fast.verdict.checks}
    assert not result.failures
    assert result.comparison is not None
    assert result.comparison.num_rounds == 15
    assert Confirmation.from_json(result.to_json()) == result
    assert pickle.loads(pickle.dumps(result)) == result


def test_whoever_fails_drops_out(candidate: Any) -> None:
    result = confirm(candidate, [candidate("broken"), candidate("fast")], [candidate("raising"), candidate("slow")])
    assert result.baseline == candidate("slow")
    assert [c.candidate for c in result.finalists] == [candidate("fast")]
    assert {e.candidate.config["kernel"]: e.status for e in result.failures} == {
        "broken": Status.WRONG,
        "raising": Status.RUN_ERROR,
    }


def test_a_finalist_that_is_the_baseline_is_not_compared_with_itself(candidate: Any) -> None:
    result = confirm(candidate, [candidate("strong"), candidate("fast")], [candidate("strong"), candidate("slow")])
    assert [c.candidate for c in result.finalists] == [candidate("fast")]


def test_without_a_sound_baseline_nothing_is_compared(candidate: Any) -> None:
    result = confirm(candidate, [candidate("fast")], [candidate("broken")])
    assert result.baseline is None
    assert not result.finalists
    assert len(result.failures) == 1


def test_impossible_times_drop_out(candidate: Any) -> None:
    ceilings = Ceilings(read_gb_per_s=1e-3, tflops={"float32": 100}, threads=1)
    result = confirm(candidate, [candidate("fast")], [candidate("slow")], ceilings=ceilings)
    assert result.baseline == candidate("slow")  # a second look at the ceilings clears the honest
    assert len(result.finalists) == 1


def test_candidates_must_fit_the_problem(candidate: Any, linear: Any) -> None:
    other = Candidate(problem=linear(m=64), backend="fake")
    with pytest.raises(ValueError, match="must be for"):
        confirm(candidate, [other], [candidate("slow")])
    with pytest.raises(ValueError, match="no baseline"):
        confirm(candidate, [candidate("fast")], [])
