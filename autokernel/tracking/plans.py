"""The plans that were tried, in words: for the tables, the report and MLflow. Pure."""

from __future__ import annotations

from autokernel.events import PlanTrial
from autokernel.tracking.summary import RunSummary
from autokernel.tracking.titles import config_title, problem_title


def plan_lines(run: RunSummary, trial: PlanTrial) -> list[str]:
    """What is in a plan: titles of problems, with the config where it is not that of the winner."""
    titles = {problem.problem.key: problem.title for problem in run.problems}
    titles |= {event.problem_key: problem_title(event.candidate.problem) for p in run.problems for event in p.confirmed}
    candidates = {event.candidate.id: event.candidate for p in run.problems for event in p.confirmed}
    lines = []
    for key in trial.keys:
        other = candidates.get(trial.configs.get(key, ""))
        lines.append(titles.get(key, key) + (f" with {config_title(other)}" if other is not None else ""))
    return lines
