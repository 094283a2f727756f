"""The events of a run, put together for people: what the report, the plots, MLflow and the command line show. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from autokernel.events import (
    Confirmed,
    Evaluated,
    Event,
    Exported,
    GraphTrial,
    ModelValidated,
    Profiled,
    Proved,
    RunFinished,
    RunStarted,
    StageFinished,
)
from autokernel.records import Hotspot, Problem, Speedup, Status, Winner

T = TypeVar("T")
_SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def rounded(value: float, digits: int = 4) -> float:
    """To significant digits, since MLflow shows every digit it is given."""
    return float(f"{value:.{digits}g}")


def problem_title(problem: Problem) -> str:
    """Short and readable: `mm 512x256 . 256x768 bf16 +add`; `problem.key` says everything."""
    shapes = " · ".join("×".join(map(str, spec.shape)) for spec in problem.inputs)
    dtypes = list(dict.fromkeys(_SHORT_DTYPES.get(spec.dtype, spec.dtype) for spec in problem.inputs))
    epilogue = "".join(f" +{name}" for name in problem.epilogue)
    return f"{problem.op} {shapes} {'/'.join(dtypes)}{epilogue}"


def latency_us(event: Evaluated) -> float:
    """Of a trial that has a measurement."""
    assert event.evaluation.measurement is not None
    return event.evaluation.measurement.median_us


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSummary:
    """One problem: where it occurs, what was tried, what came of it."""

    problem: Problem
    rank: int  # from 1, by what could be gained
    hotspots: tuple[Hotspot, ...]  # one per scenario that has it
    trials: tuple[Evaluated, ...] = ()
    confirmed: tuple[Confirmed, ...] = ()
    dropped: str = ""  # why the whole-model gates took the winner out again

    @property
    def title(self) -> str:
        return problem_title(self.problem)

    @property
    def scenarios(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(h.scenario for h in self.hotspots))

    @property
    def weight(self) -> float:
        """Part of all scenarios together."""
        return sum(h.weight for h in self.hotspots)

    @property
    def timed(self) -> tuple[Evaluated, ...]:
        """Trials with status OK, in the order they were tried."""
        return tuple(e for e in self.trials if e.evaluation.status is Status.OK)

    @property
    def baseline(self) -> Evaluated | None:
        """The fastest stock choice, as screened."""
        return min((e for e in self.timed if e.origin == "stock"), key=latency_us, default=None)

    @property
    def best(self) -> Evaluated | None:
        """The fastest trial, as screened: not yet a winner."""
        return min(self.timed, key=latency_us, default=None)

    @property
    def winner(self) -> Winner | None:
        """The confirmed winner, also if it was dropped later; with several, the one that gains most."""
        winners = [c.winner for c in self.confirmed if c.accepted and c.winner is not None]
        return max(winners, key=lambda w: w.speedup.ratio, default=None)

    @property
    def finalist(self) -> Confirmed | None:
        """The confirmation that decided: the winner's, or the best of those refused."""
        return max(self.confirmed, key=lambda c: (c.accepted, c.speedup.ratio), default=None)

    @property
    def baseline_us(self) -> float | None:
        """As confirmed where there is a winner, as screened otherwise."""
        if self.winner is not None:
            return self.winner.baseline_us
        return latency_us(self.baseline) if self.baseline is not None else None

    @property
    def verdict(self) -> str:
        """One of "won", "dropped", "kept stock", "not confirmed", "not searched"."""
        if self.dropped:
            return "dropped"
        if self.winner is not None:
            return "won"
        if self.confirmed:
            return "kept stock"
        return "not confirmed" if self.trials else "not searched"

    @property
    def reason(self) -> str:
        """Why the verdict is what it is."""
        if self.dropped:
            return self.dropped
        if self.finalist is not None:
            return self.finalist.reason
        return "no candidate was clearly faster in screening" if self.timed else ""

    def best_so_far(self) -> list[tuple[int, float]]:
        """(number of the trial within this problem from 1, lowest latency in us until then), one per trial once timed."""
        out: list[tuple[int, float]] = []
        low = float("inf")
        for index, event in enumerate(self.trials, start=1):
            if event.evaluation.status is Status.OK:
                low = min(low, latency_us(event))
            if low < float("inf"):
                out.append((index, low))
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A whole run, finished or not."""

    started: RunStarted
    num_resumes: int
    profiled: Profiled | None
    problems: tuple[ProblemSummary, ...]
    graph_trials: tuple[GraphTrial, ...]
    validated: ModelValidated | None
    exported: Exported | None
    proved: Proved | None
    finished: RunFinished | None
    stage_seconds: Mapping[str, float]

    @property
    def trials(self) -> tuple[Evaluated, ...]:
        """All trials in the order they finished."""
        return tuple(sorted((t for p in self.problems for t in p.trials), key=lambda t: t.number))

    @property
    def statuses(self) -> dict[Status, int]:
        """How many trials ended how; statuses that did not occur are left out."""
        counts = Counter(t.evaluation.status for t in self.trials)
        return {status: counts[status] for status in Status if counts[status]}

    @property
    def winners(self) -> tuple[ProblemSummary, ...]:
        return tuple(p for p in self.problems if p.verdict == "won")

    @property
    def outcome(self) -> str:
        """ "won", "stock", "failed", "interrupted", or "unfinished" while there is no last line."""
        return self.finished.outcome if self.finished is not None else "unfinished"

    @property
    def end_to_end(self) -> Mapping[str, Speedup]:
        """Scenario -> speed-up of the bundle over the best stock mode."""
        return {s.scenario: s.speedup for s in self.validated.scenarios} if self.validated is not None else {}

    @property
    def sentence(self) -> str:
        """The run in one or two sentences."""
        where = f"{self.started.environment.device_name}, torch {self.started.environment.torch}"
        tried = f"{len(self.trials)} candidates over {len(self.problems)} problems on {where}"
        if self.outcome == "stock":
            return f"Nothing beat the stock kernels by enough, which is a normal outcome: {tried}; stock code stays."
        if self.outcome == "won":
            gains = ", ".join(f"{name} {s.ratio:.2f}× [{s.low:.2f}, {s.high:.2f}]" for name, s in self.end_to_end.items())
            share = f"{len(self.winners)} of {len(self.problems)} problems have a proven faster kernel"
            return f"{share}; end to end over the best stock mode: {gains or 'not validated'}. {tried}."
        note = f": {self.finished.message}" if self.finished is not None and self.finished.message else ""
        return f"The run is {self.outcome}{note}. So far {tried}."


def summarize(events: Iterable[Event]) -> RunSummary:
    """Put a journal's events together.

    Raises:
        ValueError: there is no RunStarted among them.
    """
    started: RunStarted | None = None
    last: dict[str, Event] = {}
    trials: dict[str, Evaluated] = {}
    confirmed: dict[str, Confirmed] = {}
    graph_trials: list[GraphTrial] = []
    seconds: Counter[str] = Counter()
    num_starts = 0
    for event in events:
        match event:
            case RunStarted():
                started, num_starts = started or event, num_starts + 1
                last.pop("RunFinished", None)
            case Evaluated():
                trials[event.evaluation.candidate.id] = event
            case Confirmed():
                confirmed[event.candidate.id] = event
            case GraphTrial():
                graph_trials.append(event)
            case StageFinished():
                seconds[event.stage] += int(event.seconds * 1000)
            case _:
                last[type(event).__name__] = event
    if started is None:
        raise ValueError("a run begins with RunStarted, and none is among these events")
    summary = RunSummary(
        started=started,
        num_resumes=num_starts - 1,
        problems=(),
        graph_trials=tuple(graph_trials),
        profiled=_get(last, Profiled),
        validated=_get(last, ModelValidated),
        exported=_get(last, Exported),
        proved=_get(last, Proved),
        finished=_get(last, RunFinished),
        stage_seconds={k: v / 1000 for k, v in seconds.items()},
    )
    return replace(summary, problems=_problems(summary, trials.values(), confirmed.values()))


def _get(last: Mapping[str, Event], kind: type[T]) -> T | None:
    event = last.get(kind.__name__)
    return event if isinstance(event, kind) else None


def _problems(summary: RunSummary, trials: Iterable[Evaluated], confirmed: Iterable[Confirmed]) -> tuple[ProblemSummary, ...]:
    """Profiled problems by attainable gain, then those that only trials know of."""
    hotspots: dict[str, list[Hotspot]] = {}
    problems: dict[str, Problem] = {}
    ranked = sorted(summary.profiled.hotspots, key=lambda h: -h.attainable_gain) if summary.profiled is not None else []
    for hotspot in ranked:
        problems.setdefault(hotspot.problem.key, hotspot.problem)
        hotspots.setdefault(hotspot.problem.key, []).append(hotspot)
    by_problem: dict[str, list[Evaluated]] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        problem = trial.evaluation.candidate.problem
        problems.setdefault(problem.key, problem)
        by_problem.setdefault(problem.key, []).append(trial)
    finals: dict[str, list[Confirmed]] = {}
    for event in confirmed:
        finals.setdefault(event.problem_key, []).append(event)
    gain = {key: sum(h.attainable_gain for h in found) for key, found in hotspots.items()}
    order = sorted(problems, key=lambda key: -gain.get(key, 0.0))
    dropped = summary.validated.dropped if summary.validated is not None else {}
    return tuple(
        ProblemSummary(
            problem=problems[key],
            rank=rank,
            hotspots=tuple(hotspots.get(key, ())),
            trials=tuple(by_problem.get(key, ())),
            confirmed=tuple(finals.get(key, ())),
            dropped=dropped.get(key, ""),
        )
        for rank, key in enumerate(order, start=1)
    )
