"""The events of a run, put together for people: what the report, the plots, MLflow and the command line show. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from autokernel.events import (
    Confirmed,
    Evaluated,
    Event,
    Exported,
    GraphTrial,
    ModelValidated,
    PlanTrial,
    Profiled,
    Proved,
    RowsHeld,
    RunFinished,
    RunStarted,
    ScenarioResult,
    ScenarioTimed,
    StageFinished,
    StageStarted,
)
from autokernel.export.matching import gemm_of
from autokernel.records import Hotspot, Problem, Speedup, Status
from autokernel.tracking.planned import as_planned
from autokernel.tracking.problem import ProblemSummary, latency_us
from autokernel.tracking.titles import with_titles

__all__ = ["ProblemSummary", "RunSummary", "ScenarioKernels", "latency_us", "rounded", "summarize"]

T = TypeVar("T")


def rounded(value: float, digits: int = 4) -> float:
    """To significant digits, since MLflow shows every digit it is given."""
    return float(f"{value:.{digits}g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioKernels:
    """How the problems of one scenario fared."""

    scenario: str
    num_searched: int
    num_won: int
    geometric_mean: float  # of the speed-ups over stock of what was searched; what kept stock counts as 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A whole run, finished or not."""

    started: RunStarted
    num_resumes: int
    profiled: Profiled | None
    problems: tuple[ProblemSummary, ...]
    graph_trials: tuple[GraphTrial, ...]
    plan_trials: tuple[PlanTrial, ...] = ()
    validated: ModelValidated | None
    exported: Exported | None
    proved: Proved | None
    finished: RunFinished | None
    stage_seconds: Mapping[str, float]  # of the stages that came to their end
    timed: Mapping[str, ScenarioTimed] = field(default_factory=dict)  # the last time of each scenario
    search_device_s: float = 0.0  # that candidates held the device for, in searches that came to their end

    @property
    def scenarios(self) -> tuple[ScenarioResult, ...]:
        """End-to-end times: those of the verdict, or of a run without one the last that were taken."""
        if self.validated is not None:
            return self.validated.scenarios
        order = self.profiled.scenario_us if self.profiled is not None else self.timed
        results = (self.timed[name].result for name in order if name in self.timed)
        return tuple(result for result in results if result is not None)

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
    def by_scenario(self) -> tuple[ScenarioKernels, ...]:
        """Scenarios with a searched problem, in the order in which they were profiled."""
        out = []
        for name in self.profiled.scenario_us if self.profiled is not None else ():
            mine = [p for p in self.problems if p.trials and name in p.scenarios]
            won = [p.winner.speedup.ratio for p in mine if p.verdict == "won" and p.winner is not None]
            if mine:
                mean = math.exp(math.fsum(map(math.log, won)) / len(mine))
                out.append(ScenarioKernels(scenario=name, num_searched=len(mine), num_won=len(won), geometric_mean=mean))
        return tuple(out)

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends with a timed trial, in order of appearance."""
        return tuple(dict.fromkeys(t.evaluation.candidate.backend for p in self.problems for t in p.timed))

    @property
    def device_busy(self) -> float | None:
        """Part of the search in which a candidate held the device; None where nobody kept count.

        Of the processes that ended their search: how long one searched that was interrupted, its events do not say.
        """
        seconds = self.stage_seconds.get("search", 0.0)
        return self.search_device_s / seconds if self.search_device_s and seconds else None

    @property
    def conditions(self) -> dict[str, tuple[float, float]]:
        """Least and most of clock (`clock_mhz`), power (`power_w`) and temperature (`temperature_c`) while confirming."""
        found: dict[str, list[float]] = {}
        for problem in self.problems:
            for event in problem.confirmed:
                for name, value in event.conditions.items():
                    found.setdefault(name.removeprefix("before_").removeprefix("after_"), []).append(value)
        return {name: (min(values), max(values)) for name, values in found.items()}

    @property
    def outcome(self) -> str:
        """ "won", "stock", "failed", "interrupted", or "unfinished" while there is no last line."""
        return self.finished.outcome if self.finished is not None else "unfinished"

    @property
    def end_to_end(self) -> Mapping[str, Speedup]:
        """Scenario -> speed-up of the bundle over the best stock mode."""
        return {s.scenario: s.speedup for s in self.scenarios}

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
        said = self.finished.message.removeprefix(self.outcome).lstrip(":; ") if self.finished is not None else ""
        return f"The run is {self.outcome}{f': {said}' if said else ''}. So far {tried}."


def summarize(events: Iterable[Event]) -> RunSummary:
    """Put a journal's events together.

    Raises:
        ValueError: there is no RunStarted among them.
    """
    started: RunStarted | None = None
    last: dict[str, Event] = {}
    trials: dict[str, Evaluated] = {}
    confirmed: dict[str, Confirmed] = {}
    rows: dict[str, RowsHeld] = {}
    graph_trials: list[GraphTrial] = []
    plan_trials: list[PlanTrial] = []
    timed: dict[str, ScenarioTimed] = {}
    seconds: Counter[str] = Counter()
    held_s = search_device_s = 0.0  # since the search was last started; in all that came to their end
    num_starts = 0
    for event in events:
        match event:
            case RunStarted():
                started, num_starts = started or event, num_starts + 1
                last.pop("RunFinished", None)
            case Evaluated():
                trials[event.evaluation.candidate.id] = event
                held_s += event.evaluation.device_s
            case Confirmed():
                confirmed[event.candidate.id] = event
            case RowsHeld():
                rows[event.candidate.id] = event
            case GraphTrial():
                graph_trials.append(event)
            case PlanTrial():
                plan_trials.append(event)
            case ScenarioTimed():
                timed[event.scenario] = event
            case StageFinished():
                seconds[event.stage] += int(event.seconds * 1000)
                if event.stage == "search":
                    search_device_s += held_s
            case StageStarted() if event.stage == "search":
                held_s = 0.0
            case _:
                last[type(event).__name__] = event
    if started is None:
        raise ValueError("a run begins with RunStarted, and none is among these events")
    summary = RunSummary(
        started=started,
        num_resumes=num_starts - 1,
        problems=(),
        graph_trials=tuple(graph_trials),
        plan_trials=tuple(plan_trials),
        profiled=_get(last, Profiled),
        validated=_get(last, ModelValidated),
        exported=_get(last, Exported),
        proved=_get(last, Proved),
        finished=_get(last, RunFinished),
        stage_seconds={k: v / 1000 for k, v in seconds.items()},
        search_device_s=search_device_s,
        timed=timed,
    )
    return replace(summary, problems=_problems(summary, trials.values(), as_planned(confirmed.values(), plan_trials), rows))


def _get(last: Mapping[str, Event], kind: type[T]) -> T | None:
    event = last.get(kind.__name__)
    return event if isinstance(event, kind) else None


def _problems(
    summary: RunSummary, trials: Iterable[Evaluated], confirmed: Iterable[Confirmed], rows: Mapping[str, RowsHeld]
) -> tuple[ProblemSummary, ...]:
    """Profiled problems by attainable gain, then those that only trials know of.

    GEMMs that differ in their epilogue alone share one search and one entry (`export.matching`): they are one problem here,
    under the name of that which was searched.
    """
    groups: dict[object, _Group] = {}
    ranked = sorted(summary.profiled.hotspots, key=lambda h: -h.attainable_gain) if summary.profiled is not None else []
    for hotspot in ranked:
        _group(groups, hotspot.problem).hotspots.append(hotspot)
    for trial in sorted(trials, key=lambda t: t.number):
        group = _group(groups, trial.evaluation.candidate.problem)
        if not group.trials:
            group.problem = trial.evaluation.candidate.problem
        group.trials.append(trial)
    for event in confirmed:
        _group(groups, event.candidate.problem).confirmed.append(event)
    order = sorted(groups.values(), key=lambda group: -sum(h.attainable_gain for h in group.hotspots))
    problems = [hotspot.problem for hotspot in ranked] + [group.problem for group in order]
    dropped = summary.validated.dropped if summary.validated is not None else {}
    return tuple(
        ProblemSummary(
            problem=group.problem,
            rank=rank,
            hotspots=tuple(group.hotspots),
            trials=tuple(group.trials),
            confirmed=tuple(group.confirmed),
            rows=next((rows[c.candidate.id] for c in group.confirmed if c.accepted and c.candidate.id in rows), None),
            dropped=with_titles(dropped.get(group.problem.key, ""), problems),
        )
        for rank, group in enumerate(order, start=1)
    )


@dataclass(slots=True)
class _Group:
    """A problem while its events are gathered."""

    problem: Problem
    hotspots: list[Hotspot] = field(default_factory=list)
    trials: list[Evaluated] = field(default_factory=list)
    confirmed: list[Confirmed] = field(default_factory=list)


def _group(groups: dict[object, _Group], problem: Problem) -> _Group:
    return groups.setdefault(gemm_of(problem) or problem.key, _Group(problem))
