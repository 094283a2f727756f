"""What is kept of a run on a GPU: its journal as plain data, for `run_markdown.py` and for readers. Pure.

Besides what the run itself says: every fusion against Inductor's own code for its pattern, losers included; what became of
the regions for which kernels are generated; every GEMM by backend; and where a step's time goes (`run_where.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from run_where import hits_of, is_generated, where_time_goes

from autokernel.display.results import graph_options, scenario_options
from autokernel.events import Evaluated
from autokernel.export.matching import gemm_of
from autokernel.records import Candidate, Problem, Status
from autokernel.tracking.journal import read_entries
from autokernel.tracking.program_titles import program_title
from autokernel.tracking.summary import ProblemSummary, RunSummary, latency_us, summarize
from autokernel.tracking.titles import problem_title, with_titles

_KINDS_OF_KERNEL = ("kernel", "template", "source", "implementation", "mode", "merge")


def results_of_run(folder: Path) -> dict[str, Any]:
    """Of a run that was profiled at least; what it did not get to is empty.

    Raises:
        SystemExit: it was not even profiled.
    """
    entries = list(read_entries(folder / "journal.jsonl"))
    summary = summarize([entry.event for entry in entries])
    validated, proved, profiled = summary.validated, summary.proved, summary.profiled
    if profiled is None:
        raise SystemExit(f"{folder}: the run was not even profiled; go on with `autokernel run`")
    return {
        "experiment": summary.started.name,
        "run_id": summary.started.run_id,
        "outcome": summary.outcome,
        "date": entries[0].time.isoformat(timespec="seconds"),
        "git_commit": summary.started.git_commit,
        "environment": summary.started.environment.to_json(),
        "seconds": summary.finished.seconds if summary.finished is not None else None,
        "stage_s": {name: round(seconds, 1) for name, seconds in summary.stage_seconds.items()},
        "num_trials": len(summary.trials),
        "device_busy": summary.device_busy,
        "read_gb_per_s": profiled.read_gb_per_s,
        "peak_tflops": dict(profiled.peak_tflops),
        "conditions": {name: list(limits) for name, limits in summary.conditions.items()},
        "scenarios": [scenario.to_json() for scenario in summary.scenarios],
        "profiled_us": dict(profiled.scenario_us),
        "profiled_layers": profiled.layers,
        "checks": [check.to_json() for check in validated.verdict.checks] if validated is not None else [],
        "evals": [result.to_json() for result in validated.evals] if validated is not None else [],
        "dropped": dict(validated.dropped) if validated is not None else {},
        "confirmed": [_confirmed(item) for item in summary.problems],
        "fusions": fusions(summary),
        "generated": generated(summary),
        "gemms_by_backend": gemms_by_backend(summary),
        "where": where_time_goes(summary),
        "graph_options": graph_options(summary),
        "scenario_options": scenario_options(summary),
        "fresh_process": proved.to_json() if proved is not None else None,
    }


def _confirmed(item: ProblemSummary) -> dict[str, Any]:
    winner = item.winner
    return {
        "problem": item.problem.key,
        "title": problem_title(item.problem),
        "scenarios": list(item.scenarios),
        "verdict": item.verdict,
        "winner": winner.evaluation.candidate.label if winner is not None else None,
        "baseline": winner.baseline.label if winner is not None else None,
        "baseline_us": item.baseline_us,
        "winner_us": winner.winner_us if winner is not None else None,
        "speedup": winner.speedup.to_json() if winner is not None else None,
        "num_trials": len(item.trials),
    }


def is_fusion(problem: Problem) -> bool:
    """Whether it is more than one plain product: an op with a pattern, a merged GEMM, or a GEMM with what follows it."""
    return gemm_of(problem) is None or problem.op == "merged_mm" or bool(problem.epilogue)


def fusions(summary: RunSummary) -> list[dict[str, Any]]:
    """Every fusion that was searched, the best that was found against stock code for the same pattern."""
    return [_against_stock(item, summary) for item in summary.problems if is_fusion(item.problem) and item.trials]


def gemms_by_backend(summary: RunSummary) -> list[dict[str, Any]]:
    """Every GEMM that was searched, with the best time of each backend as screened."""
    rows = []
    for item in summary.problems:
        gemm = gemm_of(item.problem)
        if gemm is None or not item.trials:
            continue
        best = {name: (latency_us(trial), kernel_name(trial.evaluation.candidate)) for name, trial in item.by_backend.items()}
        row = _against_stock(item, summary)
        rows.append({**row, "m": gemm.m, "backend": item.backend, "by_backend": {name: list(of) for name, of in best.items()}})
    return rows


def _against_stock(item: ProblemSummary, summary: RunSummary) -> dict[str, Any]:
    """One row. `speedup` is confirmed (paired, interleaved), `screened` the ratio of two medians; `share` is what stock code
    for it takes of a step, alone.
    """
    winner, stock = item.winner, item.baseline
    candidate, best_us, speedup = _best_other(item)
    if winner is not None:
        candidate, best_us, speedup = winner.evaluation.candidate, winner.winner_us, winner.speedup
    stock_us, step_us = item.baseline_us, summary.profiled.scenario_us if summary.profiled is not None else {}
    baseline = winner.baseline if winner is not None else stock.evaluation.candidate if stock is not None else None
    verdict, why = _verdict(item, summary)
    return {
        "problem": item.problem.key,
        "title": problem_title(item.problem),
        "kind": _kind(item.problem),
        "scenarios": list(item.scenarios),
        "calls": (calls := {hotspot.scenario: hotspot.num_calls for hotspot in item.hotspots}),
        "share": max((calls[name] * (stock_us or 0.0) / step_us.get(name, math.inf) for name in calls), default=0.0),
        "num_trials": len(item.trials),
        "statuses": dict(Counter(trial.evaluation.status.value for trial in item.trials)),
        "stock_us": stock_us,
        "stock": kernel_name(baseline) if baseline is not None else "",
        "best_us": best_us,
        "kernel": kernel_name(candidate) if candidate is not None else "",
        "config": candidate.label if candidate is not None else "",
        "speedup": speedup.to_json() if speedup is not None else None,
        "screened": stock_us / best_us if stock_us and best_us else None,
        "roofline_us": item.roofline_us,
        "stock_of_roofline": item.roofline_part(stock_us),
        "best_of_roofline": item.roofline_part(best_us),
        "verdict": verdict,
        "why": with_titles(why, [other.problem for other in summary.problems]),
    }


def _kind(problem: Problem) -> str:
    """What it does, whatever its sizes."""
    if is_generated(problem):
        return f"{problem.op} {program_title(problem).words}"
    return "".join((problem.op, *(f" +{name}" for name in problem.epilogue)))


def _best_other(item: ProblemSummary) -> tuple[Candidate | None, float | None, Any]:
    """Where nothing won: the finalist that came nearest, or what was the fastest besides stock."""
    others = [trial for trial in item.timed if trial.origin != "stock"]
    final = item.finalist
    if final is not None:
        timed = [trial for trial in others if trial.evaluation.candidate.id == final.candidate.id]
        return final.candidate, latency_us(timed[-1]) if timed else None, final.speedup
    best = min(others, key=latency_us, default=None)
    return (best.evaluation.candidate, latency_us(best), None) if best is not None else (None, None, None)


def _verdict(item: ProblemSummary, summary: RunSummary) -> tuple[str, str]:
    """("shipped", "dropped", "unused", "won alone", "lost" or "refused", why)."""
    if item.verdict == "dropped":
        return "dropped", item.reason
    if item.verdict == "won":
        if summary.validated is None:
            return "won alone", "the run ended before the whole model was validated"
        hits = sum(hits_of(summary, scenario, item) for scenario in summary.timed)
        return ("shipped", item.reason) if hits else ("unused", "other entries take its nodes, or nothing is built from it")
    others = [trial for trial in item.trials if trial.origin != "stock"]
    if others and all(trial.evaluation.status is not Status.OK for trial in others):
        return "refused", f"no candidate passed its checks: {_first_message(others)}"
    return "lost", item.reason


def _first_message(trials: Iterable[Evaluated]) -> str:
    return next((trial.evaluation.message.split(";")[0] for trial in trials if trial.evaluation.message), "")


def generated(summary: RunSummary) -> dict[str, Any]:
    """What became of the regions for which kernels are generated, per scenario, and in all scenarios together.

    A GEMM has a region if a generated problem shares nodes with it. A region is proved if one of its kernels passed all
    checks.
    """
    profiled = summary.profiled
    assert profiled is not None
    rows = [_generated_in(summary, (name,)) for name in profiled.scenario_us]
    return {"scenarios": rows, "all": _generated_in(summary, tuple(profiled.scenario_us))}


def _generated_in(summary: RunSummary, scenarios: tuple[str, ...]) -> dict[str, Any]:
    profiled = summary.profiled
    assert profiled is not None
    hotspots = [hotspot for hotspot in profiled.hotspots if hotspot.scenario in scenarios]
    generated_keys = {hotspot.problem.key for hotspot in hotspots if is_generated(hotspot.problem)}
    gemms = [h for h in hotspots if gemm_of(h.problem) is not None and h.problem.op != "merged_mm"]
    served = [h for h in gemms if generated_keys.intersection(h.rivals)]
    items = [item for item in summary.problems if is_generated(item.problem) and set(item.scenarios) & set(scenarios)]
    searched = [item for item in items if any(trial.origin != "stock" for trial in item.trials)]
    proved = [item for item in searched if any(trial.origin != "stock" for trial in item.timed)]
    won = [item for item in proved if item.winner is not None]
    trials = [trial for item in searched for trial in item.trials if trial.origin != "stock"]
    return {
        "scenario": ", ".join(scenarios),
        "gemm_calls": sum(h.num_calls for h in gemms),
        "gemm_calls_with_region": sum(h.num_calls for h in served),
        "gemms": len({h.problem.key for h in gemms}),
        "gemms_with_region": len({h.problem.key for h in served}),
        "without_region": sorted({problem_title(h.problem) for h in gemms if h not in served}),
        "regions": len(items),
        "searched": len(searched),
        "proved": len(proved),
        "kernels": len(trials),
        "kernels_by_status": dict(Counter(trial.evaluation.status.value for trial in trials)),
        "won": [problem_title(item.problem) for item in won],
        "shipped": [problem_title(item.problem) for item in won if _verdict(item, summary)[0] == "shipped"],
    }


def kernel_name(candidate: Candidate) -> str:
    """`triton generated_mm vector`: the backend, and what kind of kernel."""
    config = candidate.config
    words = [str(config[name]) for name in _KINDS_OF_KERNEL if config.get(name) not in (None, "", "none")]
    return " ".join((candidate.backend, *words))
