"""The job that evaluates one candidate, in a child process: reference, build, check, time, physics, and check again.

Isolation is against crashes and hangs. It is no security sandbox.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autokernel.backends import Backend, BuildError, Built, Refused
from autokernel.environment import current_environment
from autokernel.errors import DeviceFull, JobCrashed, JobLost, JobTimeout, NoRoomError, shortened
from autokernel.evaluate.budget import expectation_bytes
from autokernel.evaluate.caches import cache_bytes
from autokernel.evaluate.call_graphs import CaptureError
from autokernel.evaluate.disk import raise_if_disk
from autokernel.evaluate.numerics import Checker, Expectation, expect, num_references
from autokernel.evaluate.probes import MAX_COPIES, derived_seed, free_bytes, is_cold, make_constants, num_copies_for
from autokernel.evaluate.roofline import Ceilings, may_split_fp32, sound_physics_check
from autokernel.evaluate.room import raise_if_full
from autokernel.evaluate.timing import measure, pin_threads
from autokernel.evaluate.turns import Turns, leave, return_spare_memory, wake
from autokernel.ops import Op
from autokernel.records import Candidate, Check, Evaluation, Measurement, Problem, Status

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_MAX_LOG_CHARS = 4000
_MAX_LINE_CHARS = 500
_MAX_NAMED_CHECKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateCandidate:
    """A job for a pool: everything about one candidate, from build to re-check.

    Args:
        candidate: what to evaluate.
        seed: of the run; the check's own seed follows from it and the candidate's id.
        ceilings: of this machine with these threads; without them there is no physics check.
        deterministic_required: two runs that differ are a failure, not just a remark.
        threads: CPU threads; default: what torch is set to.
        max_copies: most sets of inputs to rotate among; fewer make a build faster and, below twice L2, the caches warm.
        best_us: the best time known for the problem: what a first look finds clearly slower is measured no further.
    """

    candidate: Candidate
    seed: int = 0
    ceilings: Ceilings | None = None
    deterministic_required: bool = False
    threads: int | None = None
    max_copies: int = MAX_COPIES
    best_us: float | None = None

    def __call__(self) -> Evaluation:
        """Evaluate.

        Raises:
            JobLost: the device has no room for it now, beside others.
            Exception: the op or the machine is at fault (an unknown op, a reference that fails), not the candidate.
            SystemExit: the candidate left this process unable to use the device; only a new process can.
        """
        return self.in_phases()[0]

    def in_phases(self) -> tuple[Evaluation, Mapping[str, float]]:
        """The same, and where the time went: seconds of `reference`, `build`, `wait` (for the device) and `device` (alone)."""
        start = time.monotonic()
        problem = self.candidate.problem
        turns = Turns(problem.device)
        phases: dict[str, float] = {}
        with lost_without_room(problem, self.candidate.label):
            evaluation = self._evaluate(turns, phases, start)
        leave(problem.device, evaluation.message)
        phases.update(wait=turns.waited_s, device=turns.alone_s)
        return replace(evaluation, device_s=turns.alone_s, total_s=time.monotonic() - start), phases

    def _evaluate(self, turns: Turns, phases: dict[str, float], start: float) -> Evaluation:
        from autokernel.backends import get_backend
        from autokernel.ops import get_op

        problem = self.candidate.problem
        backend, op = get_backend(self.candidate.backend), get_op(problem.op)
        why_not = backend.unavailable(problem.device) or backend.supports(problem)
        if why_not:
            return _failed(self.candidate, Status.INVALID, why_not, start)
        start_clean(self.threads)
        wake(problem.device)
        seed = derived_seed(self.seed, self.candidate.id)
        # A compiler next to it disturbs a CPU's timing but no GPU's, where the reference itself does.
        on_cpu = problem.device == "cpu"
        with contextlib.ExitStack() as turn:
            turn.enter_context(turns.take("the reference", exclusive=not on_cpu))
            began = time.monotonic()
            task = prepare(op, problem, seed, self.threads, self.max_copies)
            phases["reference"] = time.monotonic() - began
            if task.alone:
                turns.go_on(None)
            else:
                turn.close()
            began = time.monotonic()
            with turns.take("the build", exclusive=False) if on_cpu else contextlib.nullcontext():
                built = build_or_fail(self.candidate, backend, task.constants, start)
            phases["build"] = time.monotonic() - began
            if isinstance(built, Evaluation):
                return built
            if task.alone:
                turns.go_on("checks and timing")
            else:
                turn.enter_context(turns.take("checks and timing", exclusive=True))
            return self._judge(op, built, task, start, phases["build"])

    def _judge(
        self,
        op: Op,
        built: Built,
        task: Task,
        start: float,
        build_s: float,
    ) -> Evaluation:
        """Check, time, physics, check again."""
        checker = Checker(self.candidate.problem, built, task.constants, task.expectation)
        num_copies = len(task.constants)
        measurement = None
        try:
            checker.before_timing()
            if checker.verdict(self.deterministic_required).passed:
                measurement = self._measure(built, checker, num_copies)
                if self.ceilings is not None:
                    checker.add(
                        sound_physics_check(
                            measurement,
                            self.candidate.problem,
                            op,
                            self.ceilings,
                            num_copies,
                            self.threads,
                            split=may_split_fp32(self.candidate),
                        )
                    )
                checker.after_timing()
        except Exception as error:  # the candidate's own code, at the boundary of the child process
            raise_if_full(error)
            if isinstance(error, CaptureError):
                raise SystemExit(one_line(error)) from error
            message = f"running it failed: {one_line(error)}"
            return _failed(self.candidate, Status.RUN_ERROR, message, start, build_s=build_s, log_tail=_trace(error))
        verdict = checker.verdict(self.deterministic_required)
        passed = verdict.passed and measurement is not None
        return Evaluation(
            candidate=self.candidate,
            status=Status.OK if passed else Status.WRONG,
            verdict=verdict,
            measurement=measurement if passed else None,
            message="" if passed else describe_failures(verdict.failures),
            environment=current_environment(self.candidate.problem.device, self.threads).digest,
            build_s=build_s,
            total_s=time.monotonic() - start,
            deterministic=checker.deterministic,
        )

    def _measure(self, built: Built, checker: Checker, num_copies: int) -> Measurement:
        problem = self.candidate.problem
        buffers = checker.timing_inputs()
        return measure(
            built,
            [x for copy in buffers for x in copy],
            device=problem.device,
            threads=self.threads,
            cold=is_cold(problem, num_copies, cache_bytes(problem.device, self.threads)),
            best_us=self.best_us,
            audit=lambda run: checker.audit(buffers, run),
            seed=derived_seed(self.seed, self.candidate.id, "audit"),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What a problem's candidates are given and held to. `alone`: too large for others to have theirs at the same time."""

    constants: list[list[torch.Tensor]]
    expectation: Expectation
    alone: bool


def prepare(op: Op, problem: Problem, seed: int, threads: int | None, max_copies: int) -> Task:
    """Weights, references and budgets, made on the problem's device.

    Many workers share a GPU's memory. Each may keep a quarter of what it finds free while it builds; a problem whose
    references take more keeps its turn through the build.
    """
    num_copies = num_copies_for(problem, cache_bytes(problem.device, threads), max_copies)
    kept_bytes = expectation_bytes(op, problem, num_references(op, num_copies))
    alone = problem.device != "cpu" and 4 * kept_bytes > free_bytes(problem.device)
    constants = make_constants(problem, seed, num_copies)
    expectation = expect(op, problem, constants, seed)
    return_spare_memory(problem.device)
    return Task(constants=constants, expectation=expectation, alone=alone)


def evaluation_of_failure(candidate: Candidate, error: BaseException) -> Evaluation:
    """What a pool's failure says about the candidate.

    Raises:
        BaseException: the error itself, if it is none of JobTimeout, JobCrashed and JobLost: then the machinery is broken.
    """
    for kind, status in ((JobTimeout, Status.TIMEOUT), (JobCrashed, Status.CRASHED), (JobLost, Status.LOST)):
        if isinstance(error, kind):
            notes = "\n".join(getattr(error, "__notes__", ()))
            return Evaluation(candidate=candidate, status=status, message=one_line(error), log_tail=notes[-_MAX_LOG_CHARS:])
    raise error


@contextlib.contextmanager
def lost_without_room(problem: Problem, what: str) -> Iterator[None]:
    """No room on a device that workers share is nobody's fault.

    Args:
        problem: whose job it is.
        what: there is no room for, if there is none.

    Raises:
        DeviceFull: the device's memory is full for now.
        NoRoomError: a CPU's never was enough: it is the machine that is too small.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, NoRoomError) as error:
        if isinstance(error, NoRoomError) and problem.device == "cpu":
            raise
        message = f"{problem.key}: the device had no room for {what} beside the other workers: {one_line(error)}"
        raise DeviceFull(message) from None


def start_clean(threads: int | None) -> None:
    """Forget what an earlier job in this process compiled (it counts against recompilation limits), and pin threads."""
    import torch

    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    pin_threads(threads)


def build_or_fail(
    candidate: Candidate, backend: Backend, constants: list[list[torch.Tensor]], start: float, *, alone: bool = False
) -> Built | Evaluation:
    """What the backend built, or what its failure says about the candidate.

    Args:
        candidate: what to build.
        backend: who builds it.
        constants: per copy, the constant inputs.
        start: `time.monotonic()` at the job's start.
        alone: no other job is on the device, so that a candidate for which there is no room needs too much.

    Raises:
        StorageError: the compiler's disk is full.
        torch.OutOfMemoryError: the device is full, and others are on it.
    """
    building = time.monotonic()
    try:
        built = backend.build(candidate, constants)
    except Refused as error:
        return _failed(candidate, Status.INVALID, one_line(error), start)
    except Exception as error:  # noqa: BLE001  compilers raise what they like, at the boundary of the child process
        raise_if_disk(error)
        if not alone:
            raise_if_full(error)
        message = one_line(error) if isinstance(error, BuildError) else f"building it failed: {one_line(error)}"
        seconds = time.monotonic() - building
        return _failed(candidate, Status.BUILD_ERROR, message, start, build_s=seconds, log_tail=_trace(error))
    if built.num_copies != len(constants):
        message = f"built for {built.num_copies} copies of the problem, but asked for {len(constants)}"
    elif built.hits == 0:
        message = "none of the candidate's entries was hit: stock code ran in its place"
        if built.notes:
            message += " (" + "; ".join(f"{name}: {value}" for name, value in built.notes.items()) + ")"
    else:
        return built
    return _failed(candidate, Status.BUILD_ERROR, message, start, build_s=time.monotonic() - building)


def describe_failures(failures: Iterable[Check]) -> str:
    """One sentence: which checks failed, with values and limits."""
    failed = list(failures)
    named = [
        f"{check.name} is {check.value:.4g}, limit {check.limit:.4g}" + (f" ({check.note})" if check.note else "")
        for check in failed[:_MAX_NAMED_CHECKS]
    ]
    more = len(failed) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more > 0 else "")


def one_line(error: BaseException) -> str:
    """The error's own first line, or its type where it says nothing."""
    name, lines = type(error).__name__, str(error).strip().splitlines()
    if not lines:
        return name
    said = shortened(lines[0], _MAX_LINE_CHARS)
    return said if isinstance(error, (Refused, BuildError)) else f"{name}: {said}"


def _failed(
    candidate: Candidate, status: Status, message: str, start: float, *, build_s: float = 0.0, log_tail: str = ""
) -> Evaluation:
    _log.info("%s: %s: %s", candidate.label, status, message)
    return Evaluation(
        candidate=candidate,
        status=status,
        message=message,
        log_tail=log_tail,
        build_s=build_s,
        total_s=time.monotonic() - start,
    )


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-_MAX_LOG_CHARS:]
