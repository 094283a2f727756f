"""Every way an evaluation can end, through the job itself; real backends where it is OK."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from autokernel.backends import BuildError, Built, Refused
from autokernel.errors import JobCrashed, JobLost, JobTimeout
from autokernel.evaluate import budget
from autokernel.evaluate import candidate as candidate_module
from autokernel.evaluate.call_graphs import CaptureError
from autokernel.evaluate.candidate import EvaluateCandidate, describe_failures, evaluation_of_failure
from autokernel.evaluate.numerics import num_references
from autokernel.evaluate.probes import make_constants
from autokernel.evaluate.roofline import Ceilings
from autokernel.records import Candidate, Check, Evaluation, Status

pytestmark = pytest.mark.clock


def job_for(problem: Any, **options: Any) -> EvaluateCandidate:
    return EvaluateCandidate(candidate=Candidate(problem=problem, backend="fake"), threads=1, max_copies=3, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ok(dtype: str, backend: Any, linear: Any) -> None:
    ceilings = Ceilings(read_gb_per_s=5000, tflops={dtype: 100})
    evaluation = job_for(linear(dtype), ceilings=ceilings)()
    assert evaluation.status is Status.OK, evaluation.message
    assert evaluation.measurement is not None
    assert evaluation.measurement.regime.startswith("cpu, 1 threads, ")
    assert evaluation.verdict is not None
    assert {"physics", "audit_while_timing", "repeat_fresh"} <= {c.name for c in evaluation.verdict.checks}
    assert evaluation.deterministic
    assert evaluation.environment
    assert 0 < evaluation.total_s < 20
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_it_is_held_against_what_its_own_products_allow(
    precision: str, backend: Any, linear: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def physics(*given: Any, split: bool) -> Check:
        asked.append(split)
        return Check(name="physics", value=0, limit=1, passed=True)

    monkeypatch.setattr(candidate_module, "sound_physics_check", physics)
    job = job_for(linear(), ceilings=Ceilings(read_gb_per_s=5000, tflops={"float32": 100}))
    assert replace(job, candidate=replace(job.candidate, config={"precision": precision}))().status is Status.OK
    assert asked == [precision == "tf32x3"]


def test_job_survives_pickling(linear: Any) -> None:
    job = job_for(linear(), ceilings=Ceilings(read_gb_per_s=1, tflops={"float32": 1.0}))
    again = pickle.loads(pickle.dumps(job))
    assert again.candidate == job.candidate
    assert again.ceilings == job.ceilings


def test_fresh_seed_per_candidate_and_run(backend: Any, linear: Any) -> None:
    seen: list[float] = []

    def make(candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        seen.append(float(constants[0][0].sum()))
        raise Refused("only looking")

    backend.make = make
    problem = linear()
    for seed, config in ((1, {}), (1, {"a": 1}), (2, {}), (1, {})):
        candidate = Candidate(problem=problem, backend="fake", config=config)
        EvaluateCandidate(candidate=candidate, seed=seed, max_copies=2)()
    assert len(set(seen)) == 3
    assert seen[0] == seen[3]


def test_invalid(backend: Any, linear: Any) -> None:
    def refuse(candidate: Candidate, constants: Any) -> Built:
        raise Refused("block_m must divide 32, not 7")

    backend.make = refuse
    evaluation = job_for(linear())()
    assert (evaluation.status, evaluation.message) == (Status.INVALID, "block_m must divide 32, not 7")
    backend.missing = "needs a GPU: set `device: cuda`"
    assert job_for(linear())().message == "needs a GPU: set `device: cuda`"
    backend.missing, backend.unsupported = None, "only float16"
    evaluation = job_for(linear())()
    assert (evaluation.status, evaluation.message) == (Status.INVALID, "only float16")


def test_build_error(backend: Any, linear: Any) -> None:
    def fail(error: Exception) -> Any:
        def make(candidate: Candidate, constants: Any) -> Built:
            raise error

        return make

    backend.make = fail(BuildError("the compiler ran out of registers"))
    evaluation = job_for(linear())()
    assert (evaluation.status, evaluation.message) == (Status.BUILD_ERROR, "the compiler ran out of registers")
    backend.make = fail(KeyError("oops"))
    evaluation = job_for(linear())()
    assert evaluation.status is Status.BUILD_ERROR
    assert evaluation.message == "building it failed: KeyError: 'oops'"
    assert "Traceback" in evaluation.log_tail


def test_stock_code_in_its_place_is_a_build_error(backend: Any, linear: Any) -> None:
    backend.make = lambda c, constants: Built(run=lambda *x: x, num_copies=len(constants), hits=0, notes={"reason": "dtype"})
    evaluation = job_for(linear())()
    assert evaluation.status is Status.BUILD_ERROR
    assert evaluation.message == "none of the candidate's entries was hit: stock code ran in its place (reason: dtype)"


def test_wrong_number_of_copies_is_a_build_error(backend: Any, linear: Any) -> None:
    backend.make = lambda c, constants: Built(run=lambda *x: x, num_copies=1)
    assert job_for(linear())().message == "built for 1 copies of the problem, but asked for 3"


def test_run_error(backend: Any, linear: Any, wrap: Any) -> None:
    def explode(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("misaligned address\nand more")

    backend.make = lambda c, constants: wrap(c.problem, constants, explode)
    evaluation = job_for(linear())()
    assert evaluation.status is Status.RUN_ERROR
    assert evaluation.message == "running it failed: RuntimeError: misaligned address"
    assert "explode" in evaluation.log_tail


def test_wrong_names_checks_values_and_limits(backend: Any, linear: Any, wrap: Any) -> None:
    backend.make = lambda c, constants: wrap(c.problem, constants, lambda x, w: torch.zeros(x.shape[0], w.shape[0]))
    evaluation = job_for(linear())()
    assert evaluation.status is Status.WRONG
    assert evaluation.message.startswith("error_max[model] is ")
    assert ", limit " in evaluation.message
    assert evaluation.message.endswith(" more")
    text = describe_failures([Check(name="no_alias", value=1, limit=0, passed=False, note="output 0 shares memory")])
    assert text == "no_alias is 1, limit 0 (output 0 shares memory)"


@pytest.mark.parametrize(
    ("error", "status"),
    [(JobTimeout("3 s"), Status.TIMEOUT), (JobCrashed("signal 11"), Status.CRASHED), (JobLost("node"), Status.LOST)],
)
def test_failures_of_the_pool(error: Exception, status: Status, linear: Any) -> None:
    error.add_note("End of its log:\nboom")
    evaluation = evaluation_of_failure(Candidate(problem=linear(), backend="fake"), error)
    assert evaluation.status is status
    assert str(error) in evaluation.message
    assert "boom" in evaluation.log_tail


def test_broken_machinery_is_raised(backend: Any, linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        evaluation_of_failure(Candidate(problem=linear(), backend="fake"), ZeroDivisionError("driver"))
    import autokernel.ops

    monkeypatch.setattr(autokernel.ops, "get_op", {}.__getitem__, raising=False)
    with pytest.raises(KeyError):
        job_for(linear())()


def test_reference_comes_before_the_build_and_locks_do_not_nest(
    backend: Any, linear: Any, wrap: Any, ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    import autokernel.ops
    import autokernel.workers.device_lock as module

    events: list[str] = []

    class Watched(type(ops["linear"])):  # type: ignore[misc]
        def reference(self, problem: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            events.append("reference")
            return super().reference(problem, *inputs)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def lock(device: str, *, exclusive: bool) -> Any:
        events.append("exclusive" if exclusive else "shared")
        yield
        events.append("released")

    def make(candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        events.append("build")
        return wrap(candidate.problem, constants, torch.nn.functional.linear)  # type: ignore[no-any-return]

    backend.make = make
    monkeypatch.setattr(autokernel.ops, "get_op", lambda name: Watched(), raising=False)
    monkeypatch.setattr(module, "device_lock", lock)
    assert job_for(linear())().status is Status.OK
    compact = [e for i, e in enumerate(events) if i == 0 or e != events[i - 1]]
    assert compact == ["shared", "reference", "released", "shared", "build", "released", "exclusive", "released"]


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_problem_that_keeps_its_turn_builds_for_as_long_as_it_takes(
    confirmed: bool, backend: Any, linear: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    import autokernel.evaluate.confirm as confirm_module
    import autokernel.evaluate.turns as turns_module

    events: list[str] = []

    @contextlib.contextmanager
    def watched(seconds: float | None, what: str) -> Any:
        assert seconds is not None
        events.append(what)
        yield
        events.append(f"end of {what}")

    def make(candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        events.append("build")
        return Built(run=lambda *x: x, num_copies=len(constants))

    def judged(job: EvaluateCandidate, *_: Any) -> Evaluation:
        return Evaluation(candidate=job.candidate, status=Status.WRONG, message="only looking")

    backend.make = make
    problem = replace(linear(), device="cuda")
    task = candidate_module.Task(constants=[[], []], expectation=None, alone=True)  # type: ignore[arg-type]
    monkeypatch.setattr(turns_module, "deadline", watched)
    monkeypatch.setattr(EvaluateCandidate, "_judge", judged)
    monkeypatch.setattr(confirm_module, "Checker", lambda *_: None)
    monkeypatch.setattr(confirm_module.ConfirmCandidates, "_keep", lambda *_: [])
    for module in (candidate_module, confirm_module):
        monkeypatch.setattr(module, "prepare", lambda *_: task)
        monkeypatch.setattr(module, "wake", lambda device: None)
        monkeypatch.setattr(module, "leave", lambda *_: None)
    stock = Candidate(problem=problem, backend="fake")
    if confirmed:
        confirm_module.ConfirmCandidates(problem=problem, finalists=(), baselines=(stock,), threads=1)()
    else:
        EvaluateCandidate(candidate=stock, threads=1)()
    rest = "the confirmation" if confirmed else "checks and timing"
    assert events == ["the reference", "end of the reference", "build", rest, f"end of {rest}"]


def test_what_the_device_was_held_for_is_told(backend: Any, linear: Any) -> None:
    result, phases = job_for(linear()).in_phases()
    assert set(phases) == {"reference", "build", "wait", "device"}
    assert 0 < result.device_s == phases["device"] < result.total_s


def test_a_failed_capture_ends_the_process(backend: Any, linear: Any, wrap: Any) -> None:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        raise CaptureError("it cannot be captured")

    backend.make = lambda c, constants: wrap(c.problem, constants, kernel)
    with pytest.raises(SystemExit, match="it cannot be captured"):
        job_for(linear())()


def test_no_room_beside_other_workers_is_nobodys_fault(backend: Any, linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(candidate_module, "make_constants", full)
    with pytest.raises(JobLost, match="had no room"):
        job_for(linear())()


def test_a_problem_too_large_to_wait_keeps_its_turn_through_the_build(
    backend: Any, linear: Any, ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = linear()
    needed = budget.expectation_bytes(ops["linear"], problem, num_references(ops["linear"], 2))
    for device, free, alone in (("cuda", 4 * needed - 1, True), ("cuda", 4 * needed, False), ("cpu", 1, False)):
        monkeypatch.setattr(candidate_module, "free_bytes", lambda device, free=free: free)
        monkeypatch.setattr(candidate_module, "return_spare_memory", lambda device: None)
        monkeypatch.setattr(candidate_module, "num_copies_for", lambda *_: 2)
        monkeypatch.setattr(candidate_module, "cache_bytes", lambda *_: 1)
        monkeypatch.setattr(candidate_module, "make_constants", lambda p, seed, n: make_constants(p, seed, n, device="cpu"))
        monkeypatch.setattr(candidate_module, "expect", lambda *_: None)
        assert candidate_module.prepare(ops["linear"], replace(problem, device=device), 0, 1, 2).alone is alone
