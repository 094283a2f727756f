"""A run's results as rows and as JSON: what the tables show and what scripts read. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autokernel.display.lookup import summary_of
from autokernel.errors import StorageError
from autokernel.events import Evaluated
from autokernel.records import Candidate, Speedup
from autokernel.tracking.backends import backend_summaries
from autokernel.tracking.journal import bundle_folder
from autokernel.tracking.summary import ProblemSummary, RunSummary, latency_us
from autokernel.tracking.titles import config_title, problem_title


@dataclass(frozen=True, slots=True, kw_only=True)
class HotspotRow:
    """One problem in the table of results. `speedup` is confirmed, with its interval; `screened` is a mere ratio of medians."""

    key: str
    problem: str
    scenarios: tuple[str, ...]
    share: float  # of all scenarios together
    num_trials: int
    baseline_us: float | None
    candidate: Candidate | None  # the winner, or the best of those that were refused
    candidate_us: float | None
    speedup: Speedup | None
    screened: float | None
    verdict: str  # "won", "dropped", "stock", "searched" (not judged yet) or "not searched"
    why: str
    roofline: tuple[float | None, float | None]  # the part of it that stock reaches, and that the candidate does
    by_backend: Mapping[str, float]  # time of each backend's fastest, as screened, in us
    rows: tuple[int, int] | None  # that the winner holds for, where other rows than its own were asked for
    rows_held: str  # the same in words
    over_max_autotune: Speedup | None  # of what was confirmed, in the same race
    max_autotune: str  # what it runs for the problem, or why that did not take part
    against_max_autotune: str  # both in words
    runner_up: tuple[str, float] | None  # the best other backend, and its time over that of the one that is used


def hotspot_rows(summary: RunSummary) -> list[HotspotRow]:
    """One row per problem, in order of what could be gained."""
    judged = "confirm" in summary.stage_seconds
    return [_row(problem, judged) for problem in summary.problems]


def _row(problem: ProblemSummary, judged: bool) -> HotspotRow:
    baseline, best, final = problem.baseline, problem.best, problem.finalist
    baseline_us = problem.baseline_us
    candidate = best.evaluation.candidate if best is not None else None
    candidate_us = latency_us(best) if best is not None else None
    speedup = None
    if problem.winner is not None:
        candidate, candidate_us = problem.winner.evaluation.candidate, problem.winner.winner_us
        speedup = problem.winner.speedup
    elif final is not None:
        candidate, candidate_us, speedup = final.candidate, _screened_us(problem, final.candidate), final.speedup
    elif best is not None and baseline is not None and best.evaluation.candidate == baseline.evaluation.candidate:
        candidate = candidate_us = None  # stock itself is the fastest
    verdict, why = _verdict(problem, judged)
    second = problem.runner_up
    return HotspotRow(
        key=problem.problem.key,
        problem=problem_title(problem.problem),
        scenarios=problem.scenarios,
        share=problem.weight,
        num_trials=len(problem.trials),
        baseline_us=baseline_us,
        candidate=candidate,
        candidate_us=candidate_us,
        speedup=speedup,
        screened=baseline_us / candidate_us if baseline_us and candidate_us else None,
        verdict=verdict,
        why=why,
        roofline=(problem.roofline_part(baseline_us), problem.roofline_part(candidate_us)),
        by_backend={name: latency_us(trial) for name, trial in problem.by_backend.items()},
        rows=problem.rows.held if problem.rows is not None and problem.verdict == "won" else None,
        rows_held=problem.rows_held,
        over_max_autotune=final.over_max_autotune if final is not None else None,
        max_autotune=final.max_autotune if final is not None else "",
        against_max_autotune=problem.against_max_autotune,
        runner_up=(second[0].evaluation.candidate.backend, second[1]) if second is not None else None,
    )


def _verdict(problem: ProblemSummary, judged: bool) -> tuple[str, str]:
    if problem.verdict in ("won", "dropped"):
        return problem.verdict, problem.reason
    if problem.confirmed:
        return "stock", problem.reason
    if not problem.trials:
        return "not searched", problem.reason
    return ("stock", problem.reason) if judged else ("searched", "")


def _screened_us(problem: ProblemSummary, candidate: Candidate) -> float | None:
    found = [e for e in problem.timed if e.evaluation.candidate == candidate]
    return latency_us(found[-1]) if found else None


def status_counts(trials: tuple[Evaluated, ...]) -> dict[str, int]:
    """How many trials ended how, by the status's name."""
    counts: dict[str, int] = {}
    for trial in trials:
        name = trial.evaluation.status.value
        counts[name] = counts.get(name, 0) + 1
    return counts


def hotspot_json(row: HotspotRow) -> dict[str, Any]:
    """One row for scripts."""
    return {
        "problem": row.key,
        "short": row.problem,
        "scenarios": list(row.scenarios),
        "share": row.share,
        "num_trials": row.num_trials,
        "baseline_us": row.baseline_us,
        "backend": row.candidate.backend if row.candidate is not None else None,
        "config": dict(row.candidate.config) if row.candidate is not None else None,
        "label": config_title(row.candidate) if row.candidate is not None else None,
        "candidate_us": row.candidate_us,
        "speedup": row.speedup.to_json() if row.speedup is not None else None,
        "over_max_autotune": row.over_max_autotune.to_json() if row.over_max_autotune is not None else None,
        "max_autotune": row.max_autotune,
        "screened_ratio": row.screened,
        "verdict": row.verdict,
        "why": row.why,
        "rows": list(row.rows) if row.rows is not None else None,
        "roofline_stock": row.roofline[0],
        "roofline": row.roofline[1],
        "by_backend_us": dict(row.by_backend),
        "runner_up": {"backend": row.runner_up[0], "takes": row.runner_up[1]} if row.runner_up is not None else None,
    }


def profile_json(summary: RunSummary) -> list[dict[str, Any]]:
    """Hotspots as profiled."""
    found = summary.profiled.hotspots if summary.profiled is not None else ()
    return [{**h.to_json(), "key": h.problem.key, "attainable_gain": h.attainable_gain} for h in found]


def result_json(summary: RunSummary, folder: Path) -> dict[str, Any]:
    """The whole run for scripts. Keys are there whatever the run's state; what is not known yet is null or empty."""
    validated, exported, finished = summary.validated, summary.exported, summary.finished
    return {
        "outcome": summary.outcome,
        "message": finished.message if finished is not None else "",
        "run_id": summary.started.run_id,
        "experiment": summary.started.name,
        "folder": str(folder),
        "bundle": str(bundle_folder(folder, exported)) if exported is not None else None,
        "seconds": finished.seconds if finished is not None else None,
        "environment": summary.started.environment.to_json(),
        "stages_done": list(summary.stage_seconds),
        "num_trials": len(summary.trials),
        "statuses": status_counts(summary.trials),
        "profile": profile_json(summary),
        "hotspots": [hotspot_json(row) for row in hotspot_rows(summary)],
        "graph_options": graph_options(summary),
        "scenario_options": scenario_options(summary),
        "scenarios": [s.to_json() for s in summary.scenarios],
        "evals": [e.to_json() for e in validated.evals] if validated is not None else [],
        "dropped": dict(validated.dropped) if validated is not None else {},
        "backends": [asdict(row) for row in backend_summaries(summary)],
        "conditions": {name: list(span) for name, span in summary.conditions.items()},
        "device_busy": summary.device_busy,
        "proved": summary.proved.to_json() if summary.proved is not None else None,
    }


def graph_options(summary: RunSummary) -> Mapping[str, Any]:
    """The graph-level options that were accepted last: those are exported."""
    accepted = [dict(t.options) for t in summary.graph_trials if t.accepted]
    return accepted[-1] if accepted else {}


def scenario_options(summary: RunSummary) -> Mapping[str, Mapping[str, Any]]:
    """The graph-level options that were accepted for single scenarios."""
    return {name: dict(trial.options) for trial in summary.graph_trials for name in trial.accepted_for}


def failure_json(folder: Path | None) -> dict[str, Any]:
    """What a run that failed leaves for scripts: its journal's results if it got that far, the same keys in any case."""
    if folder is not None:
        with contextlib.suppress(StorageError):
            return result_json(summary_of(folder), folder)
    return {"folder": None, "bundle": None, "seconds": None, "hotspots": [], "scenarios": [], "evals": []}
