"""What a run is doing right now: its events folded into the few numbers that a progress display shows. Pure but for a clock."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from autokernel.events import (
    Evaluated,
    Event,
    Profiled,
    RunFinished,
    RunStarted,
    SearchPlanned,
    StageFinished,
    StageProgress,
    StageStarted,
)
from autokernel.records import Candidate, Status
from autokernel.tracking.titles import problem_title

STAGES = ("profile", "search", "confirm", "graph", "validate", "export", "prove")
SOMETIMES = {"plan": "confirm", "rows": "confirm"}  # stages that only some runs have, in order -> behind which one


@dataclass(slots=True, kw_only=True)
class HotspotProgress:
    """One hotspot under search."""

    title: str
    scenario: str = ""
    planned: int = 0
    num_trials: int = 0
    num_failed: int = 0
    stock_us: float | None = None
    best_us: float | None = None
    best: Candidate | None = None

    @property
    def ratio(self) -> float | None:
        """Stock time over best time, as screened."""
        return self.stock_us / self.best_us if self.stock_us and self.best_us else None


@dataclass(slots=True)
class ProgressState:
    """Fed with every event of a run by `take`; knows at any time what goes on."""

    clock: Callable[[], float] = time.monotonic
    name: str = ""
    run_id: str = ""
    machine: str = ""
    resumed: bool = False
    stage: str = ""
    note: str = ""
    done: int = 0
    total: int = 0
    budget_s: float = 0.0
    message: str = ""
    started_at: float = 0.0
    stage_at: float = 0.0
    finished: dict[str, float] = field(default_factory=dict)  # stage -> seconds
    hotspots: dict[str, HotspotProgress] = field(default_factory=dict)  # by problem key, the heaviest first
    current: str = ""  # key of the hotspot that was heard of last
    statuses: Counter[Status] = field(default_factory=Counter)
    outcome: str = ""
    closing: bool = False  # the run is over, its recorders are not

    def take(self, event: Event) -> bool:
        """Fold one event in.

        Returns:
            Whether it is a new best of a hotspot.
        """
        match event:
            case RunStarted():
                environment = event.environment
                self.name, self.run_id, self.resumed = event.name, event.run_id, event.resumed
                units = "threads" if environment.device == "cpu" else "multiprocessors"
                self.machine = f"{environment.device_name}, {environment.num_units} {units}, torch {environment.torch}"
                self.started_at = self.stage_at = self.clock()
            case StageStarted():
                self.stage, self.total, self.budget_s, self.note = event.stage, event.total, event.budget_s, event.note
                self.done, self.message, self.stage_at = 0, "", self.clock()
            case StageProgress():
                self.done, self.total, self.message = event.done, event.total, event.message
            case StageFinished():
                self.finished[event.stage] = event.seconds
                self.stage = "" if event.stage == self.stage else self.stage
            case Profiled():
                self._take_profile(event)
            case SearchPlanned():
                for key, planned in event.trials.items():
                    self._hotspot(key).planned = planned
            case Evaluated():
                return self._take_trial(event)
            case RunFinished():
                self.outcome, self.stage = event.outcome, ""
            case _:
                pass
        return False

    def _take_profile(self, event: Profiled) -> None:
        for hotspot in sorted(event.hotspots, key=lambda h: -h.attainable_gain):
            key = hotspot.problem.key
            if key not in self.hotspots:
                title = problem_title(hotspot.problem)
                self.hotspots[key] = HotspotProgress(title=title, scenario=hotspot.scenario)

    def _take_trial(self, event: Evaluated) -> bool:
        evaluation = event.evaluation
        problem = evaluation.candidate.problem
        hotspot = self._hotspot(problem.key, problem_title(problem))
        self.current = problem.key
        self.statuses[evaluation.status] += 1
        if evaluation.status is not Status.LOST:
            hotspot.num_trials += 1
        if evaluation.measurement is None:
            hotspot.num_failed += 1
            return False
        us = evaluation.measurement.median_us
        if event.origin == "stock":
            hotspot.stock_us = min(us, hotspot.stock_us or us)
        if hotspot.best_us is not None and us >= hotspot.best_us:
            return False
        hotspot.best_us, hotspot.best = us, evaluation.candidate
        return event.origin != "stock"

    def _hotspot(self, key: str, title: str = "") -> HotspotProgress:
        return self.hotspots.setdefault(key, HotspotProgress(title=title or key))

    @property
    def stage_seconds(self) -> float:
        """Time in the current stage."""
        return self.clock() - self.stage_at

    @property
    def seconds(self) -> float:
        """Time since the run was started or resumed."""
        return self.clock() - self.started_at

    @property
    def seconds_left(self) -> float | None:
        """Of the current stage: by its own pace, but never past its budget; None if nothing is known yet."""
        spent = self.stage_seconds
        left = self.budget_s - spent if self.budget_s else None
        if self.done and self.total:
            by_pace = spent * (self.total - self.done) / self.done
            left = by_pace if left is None else min(left, by_pace)
        return max(0.0, left) if left is not None else None

    @property
    def searched(self) -> list[HotspotProgress]:
        """Hotspots that have trials, planned or done."""
        return [h for h in self.hotspots.values() if h.planned or h.num_trials]
