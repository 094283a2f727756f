"""The job that confirms finalists: against the strongest stock choice, in one process, interleaved, on fresh inputs.

What max-autotune makes of the problem takes part where it is asked for, and so does what Inductor picked, as a finalist. To
know it is a compilation in which Inductor builds and times its whole list for each product. On a GPU that list has some twenty
kernels, each reckoned as a second of one core, in which others have the device, and a tenth of a second of the device alone:
twenty seconds of a worker and two of the device for each product. Its timings stay in Inductor's own file: what finds a product
there, like rehearsals and validation, neither builds nor times it again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autokernel.backends import Built
from autokernel.evaluate.caches import cache_bytes
from autokernel.evaluate.candidate import (
    Task,
    build_or_fail,
    describe_failures,
    lost_without_room,
    one_line,
    prepare,
    start_clean,
)
from autokernel.evaluate.numerics import Checker
from autokernel.evaluate.probes import MAX_COPIES, derived_seed, is_cold
from autokernel.evaluate.roofline import Ceilings, may_split_fp32, sound_physics_check
from autokernel.evaluate.room import raise_if_full
from autokernel.evaluate.timing import Comparison, Step, compare, describe_regime, make_step
from autokernel.evaluate.turns import Turns, leave, wake
from autokernel.evaluate.whole_model import JobTurns
from autokernel.events import MeasuredRow
from autokernel.ops import Op
from autokernel.records import Candidate, Evaluation, Measurement, Problem, Record, Speedup, Status, Verdict

if TYPE_CHECKING:
    import torch

_MIN_CHOOSING_ROUNDS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender(Record):
    """A candidate that passed its checks again, with its time; `speedup` is over the strongest baseline."""

    candidate: Candidate
    verdict: Verdict
    measurement: Measurement
    deterministic: bool
    speedup: Speedup | None = None  # None for baselines


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation(Record):
    """Finalists against the strongest baseline.

    The baseline was chosen on rounds of its own (`baselines` holds those times, and the chosen one's from the comparison
    itself). It is None if no baseline passed its checks; then nothing was compared. `failures` are the candidates of either
    kind that dropped out.

    `max_autotune` is what max-autotune makes of the problem, in the same race, where it was asked and passed its checks.
    `picked` says in words what that is, `asked_s` how long it took to know.
    """

    problem: Problem
    baseline: Candidate | None
    baselines: tuple[Contender, ...] = ()
    finalists: tuple[Contender, ...] = ()
    failures: tuple[Evaluation, ...] = ()
    comparison: Comparison | None = None
    max_autotune: Contender | None = None
    picked: str = ""
    asked_s: float = 0.0


def measured_row(m: int, confirmation: Confirmation) -> MeasuredRow:
    """What the confirmation of one finalist at m rows says of it there."""
    contender = next(iter(confirmation.finalists), None)
    if contender is not None and contender.speedup is not None:
        return MeasuredRow(m=m, speedup=contender.speedup)
    if confirmation.baseline is None:
        return MeasuredRow(m=m, message="no stock choice passed its checks; nothing is claimed")
    return MeasuredRow(m=m, message="; ".join(f"{failure.status}: {failure.message}" for failure in confirmation.failures))


@dataclass(slots=True, kw_only=True, eq=False)
class _Runner:
    candidate: Candidate
    built: Built
    checker: Checker
    step: Step | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Answer:
    """What max-autotune makes of a problem: built, and its picks as far as they may be finalists."""

    rival: Candidate
    built: Built
    picks: tuple[Candidate, ...]
    text: str
    seconds: float


def _run_once(runner: _Runner) -> None:
    runner.built.run(*(x for copy in runner.checker.timing_inputs() for x in copy))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmCandidates:
    """A job for a pool.

    Args:
        problem: of all candidates.
        finalists: what may win.
        baselines: stock choices; the strongest of them is what finalists are compared with.
        rounds: paired rounds.
        seed: fresh for every confirmation.
        threads: CPU threads; default: what torch is set to.
        ceilings: for the physics check.
        deterministic_required: drop candidates whose output differs between two runs.
        max_copies: most sets of inputs to rotate among.
        alone: no other job is on the device, so that a candidate for which there is no room needs too much.
        max_autotune: have what max-autotune makes of the problem take part.
        pick_may_win: its pick is a finalist, if an entry can stand for it.
    """

    problem: Problem
    finalists: tuple[Candidate, ...]
    baselines: tuple[Candidate, ...]
    rounds: int = 41
    seed: int = 0
    threads: int | None = None
    ceilings: Ceilings | None = None
    deterministic_required: bool = False
    max_copies: int = MAX_COPIES
    alone: bool = False
    max_autotune: bool = False
    pick_may_win: bool = False

    def __post_init__(self) -> None:
        strangers = [c.label for c in (*self.finalists, *self.baselines) if c.problem != self.problem]
        if strangers or not self.baselines:
            wrong = f"not so: {', '.join(strangers)}" if strangers else "there is no baseline"
            raise ValueError(f"all candidates must be for {self.problem.key}, and one at least be a baseline; {wrong}")

    def __call__(self) -> Confirmation:
        """Confirm.

        Raises:
            JobLost: the device has no room for it now, beside others.
            Exception: the op or the machine is at fault, not a candidate.
        """
        from autokernel.ops import get_op

        with lost_without_room(self.problem, "its confirmation"):
            confirmation = self._confirm(get_op(self.problem.op))
        leave(self.problem.device, "; ".join(failure.message for failure in confirmation.failures))
        return confirmation

    def _confirm(self, op: Op) -> Confirmation:
        start_clean(self.threads)
        device = self.problem.device
        wake(device)
        turns = Turns(device)
        seed = derived_seed(self.seed, self.problem.key, "confirm")
        failures: list[Evaluation] = []
        on_cpu = device == "cpu"
        with contextlib.ExitStack() as turn:
            turn.enter_context(turns.take("the reference", exclusive=not on_cpu))
            task = prepare(op, self.problem, seed, self.threads, self.max_copies)
            if task.alone:
                turns.go_on(None)
            else:
                turn.close()
            answer = self._ask_max_autotune(task, turns, failures) if self.max_autotune else None
            picks = answer.picks if answer is not None else ()
            with turns.take("the builds", exclusive=False) if on_cpu else contextlib.nullcontext():
                built = self._build_all(task.constants, failures, picks)
            if answer is not None:
                built.append((answer.rival, answer.built))
            if task.alone:
                turns.go_on("the confirmation")
            else:
                turn.enter_context(turns.take("the confirmation", exclusive=True))
            runners = [
                _Runner(candidate=c, built=b, checker=Checker(self.problem, b, task.constants, task.expectation))
                for c, b in built
            ]
            runners = self._keep(runners, lambda r: r.checker.before_timing(), failures)
            return self._compare(op, runners, failures, len(task.constants), answer)

    def _ask_max_autotune(self, task: Task, turns: Turns, failures: list[Evaluation]) -> _Answer | None:
        """Compile the problem under max-autotune, and on a GPU run it once: that is when coordinate descent tunes its kernels.

        Whatever Inductor times, it times alone on the device. None if it does not compile or run.
        """
        from autokernel.backends import get_backend
        from autokernel.backends.max_autotune import listening, max_autotune_of

        rival, began = max_autotune_of(self.problem), time.monotonic()
        jobs = JobTurns(self.problem.device)
        on_gpu = self.problem.device == "cuda"
        ours = on_gpu and not task.alone  # else this job has the device already, or takes all of it
        with (
            jobs.building() if ours else contextlib.nullcontext(),
            turns.take("max-autotune", exclusive=True) if not on_gpu else contextlib.nullcontext(),
        ):
            with listening(self.problem) as picks:
                built = build_or_fail(rival, get_backend(rival.backend), task.constants, began, alone=self.alone)
            if not isinstance(built, Built):
                failures.append(built)
                return None
            runner = _Runner(
                candidate=rival, built=built, checker=Checker(self.problem, built, task.constants, task.expectation)
            )
            if on_gpu:
                with jobs.alone(patient=True) if ours else contextlib.nullcontext():
                    if not self._keep([runner], _run_once, failures):
                        return None
        return _Answer(
            rival=rival,
            built=built,
            picks=tuple(picks.candidates) if self.pick_may_win else (),
            text=picks.text,
            seconds=time.monotonic() - began,
        )

    def _build_all(
        self, constants: list[list[torch.Tensor]], failures: list[Evaluation], picks: Sequence[Candidate]
    ) -> list[tuple[Candidate, Built]]:
        """Every distinct candidate that builds; all share the same weights."""
        from autokernel.backends import get_backend

        built = []
        for candidate in dict.fromkeys((*self.baselines, *self.finalists, *picks)):
            backend = get_backend(candidate.backend)
            result = build_or_fail(candidate, backend, constants, time.monotonic(), alone=self.alone)
            if isinstance(result, Built):
                built.append((candidate, result))
            else:
                failures.append(result)
        return built

    def _keep(self, runners: Sequence[_Runner], action: Callable[[_Runner], None], failures: list[Evaluation]) -> list[_Runner]:
        """The runners that survive an action with all checks passed; the others become failures."""
        kept = []
        for runner in runners:
            try:
                action(runner)
            except Exception as error:  # noqa: BLE001  the candidate's own code, at the boundary of the child process
                if not self.alone:
                    raise_if_full(error)
                message = f"running it failed: {one_line(error)}"
                failures.append(Evaluation(candidate=runner.candidate, status=Status.RUN_ERROR, message=message))
                continue
            verdict = runner.checker.verdict(self.deterministic_required)
            if verdict.passed:
                kept.append(runner)
            else:
                message = describe_failures(verdict.failures)
                failures.append(Evaluation(candidate=runner.candidate, status=Status.WRONG, verdict=verdict, message=message))
        return kept

    def _compare(
        self, op: Op, runners: list[_Runner], failures: list[Evaluation], num_copies: int, answer: _Answer | None
    ) -> Confirmation:
        finalists = (*self.finalists, *(answer.picks if answer is not None else ()))
        rival = answer.rival if answer is not None else None
        if not any(r.candidate in self.baselines for r in runners):
            return Confirmation(problem=self.problem, baseline=None, failures=tuple(failures))
        inputs = [x for copy in runners[0].checker.timing_inputs() for x in copy]

        def prepare(runner: _Runner) -> None:
            runner.step = make_step(runner.built, inputs, device=self.problem.device)

        runners = self._keep(runners, prepare, failures)
        stock = [r for r in runners if r.candidate in self.baselines]
        chosen, choosing = self._strongest(stock)
        baseline = chosen.candidate
        racing = [r for r in runners if r is chosen or r.candidate in finalists or r.candidate == rival]
        comparison = self._race(racing, chosen, self.rounds, "race")
        medians = {**choosing.medians_us, **comparison.medians_us}
        spreads = {**choosing.spreads_us, **comparison.spreads_us}
        contenders = {}

        def finish(runner: _Runner) -> None:
            name = runner.candidate.id
            measurement = self._measurement(runner, medians[name], spreads[name], num_copies)
            if self.ceilings is not None:
                split = may_split_fp32(runner.candidate)
                runner.checker.add(
                    sound_physics_check(measurement, self.problem, op, self.ceilings, num_copies, self.threads, split=split)
                )
            runner.checker.after_timing()
            contenders[name] = Contender(
                candidate=runner.candidate,
                verdict=runner.checker.verdict(self.deterministic_required),
                measurement=measurement,
                deterministic=runner.checker.deterministic,
                speedup=comparison.speedups.get(name),
            )

        sound = self._keep(runners, finish, failures)
        if chosen not in sound:  # times were taken against something that turned out wrong
            return Confirmation(problem=self.problem, baseline=None, failures=tuple(failures), comparison=comparison)
        return Confirmation(
            problem=self.problem,
            baseline=baseline,
            baselines=tuple(contenders[r.candidate.id] for r in sound if r.candidate in self.baselines),
            finalists=tuple(contenders[r.candidate.id] for r in sound if r.candidate in finalists and r is not chosen),
            failures=tuple(failures),
            comparison=comparison,
            max_autotune=next((contenders[r.candidate.id] for r in sound if r.candidate == rival), None),
            picked=answer.text if answer is not None else "",
            asked_s=answer.seconds if answer is not None else 0.0,
        )

    def _strongest(self, stock: list[_Runner]) -> tuple[_Runner, Comparison]:
        """The fastest baseline, by rounds that count for nothing else."""
        comparison = self._race(stock, stock[0], max(_MIN_CHOOSING_ROUNDS, self.rounds // 3), "choose")
        return min(stock, key=lambda r: comparison.medians_us[r.candidate.id]), comparison

    def _race(self, runners: Sequence[_Runner], baseline: _Runner, rounds: int, purpose: str) -> Comparison:
        steps: Mapping[str, Step] = {r.candidate.id: r.step for r in runners if r.step is not None}
        return compare(
            {name: step.run for name, step in steps.items()},
            baseline.candidate.id,
            rounds,
            device=self.problem.device,
            seed=derived_seed(self.seed, self.problem.key, purpose),
            replays=self.problem.device == "cuda",
            calls_per_sample={name: step.num_calls for name, step in steps.items()},
        )

    def _measurement(self, runner: _Runner, median_us: float, spread_us: float, num_copies: int) -> Measurement:
        assert runner.step is not None
        cold = is_cold(self.problem, num_copies, cache_bytes(self.problem.device, self.threads))
        return Measurement(
            median_us=median_us,
            spread_us=spread_us,
            num_samples=self.rounds,
            regime=describe_regime(self.problem.device, "graph", cold, runner.step.num_calls) + ", interleaved",
        )
