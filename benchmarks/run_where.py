"""Where a step's time goes, with stock code and with the bundle: attention, GEMMs, norms and the rest. Pure.

The two steps are measured end to end. Their parts are summed: what an entry replaces counts its calls times the time that
stock code, or the winner, takes for one when timed alone (cold L2, CUDA graphs of many calls). GEMMs and attention that no
entry replaces count as the profiler saw them in the step; other kernels as stock code was screened, or, if it was not, by
their roofline and a launch. What is left of a step, copies and gaps between kernels among it, is `rest`: also what an entry
leaves of a pattern that it shares nodes with. It may be negative, since a step finds some of its operands in L2; in a long
step the card is hot and its clock lower than in a short measurement, and what that adds is in it, too. `profiled_us` is what
the profiler measured in stock's step: library calls alone, so for attention without the copies of keys and values before it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from autokernel.export.matching import gemm_of
from autokernel.ops import get_op
from autokernel.ops.program import GEMMS, REDUCTIONS, program_of, results_of
from autokernel.ops.rms_norm_linear import weights_of
from autokernel.records import Hotspot, Problem
from autokernel.tracking.summary import ProblemSummary, RunSummary, latency_us

KINDS = ("attention", "GEMMs", "norms", "other")
_STOCK, _BUNDLE = "default", "bundle"

Shape = tuple[int, int, int, int]  # batch, m, n, k


def is_generated(problem: Problem) -> bool:
    return "program" in dict(problem.scalars)


def kind_of(problem: Problem) -> str:
    """Of `KINDS`; whatever is fused with a product is a GEMM."""
    if problem.op == "attention":
        return "attention"
    if gemm_of(problem) is not None or _products_in(problem):
        return "GEMMs"
    lines = {line.op for line in program_of(problem).lines} if is_generated(problem) else set()
    if lines.intersection(GEMMS):
        return "GEMMs"
    return "norms" if problem.op.endswith("norm") or lines.intersection(REDUCTIONS) else "other"


def _products_in(problem: Problem) -> list[Shape]:
    """Shapes of the products that an op of its own has behind or before something else: by the names of its dimensions."""
    if is_generated(problem):
        return []
    dims = get_op(problem.op).dims(problem)
    if not {"m", "n", "k"} <= dims.keys():
        return []
    if "num_parts" in dims:
        return [(1, dims["m"], weight.shape[1], dims["k"]) for weight in weights_of(problem)]
    if "hidden" in dims:
        return [(1, dims["m"], dims["hidden"], dims["k"]), (1, dims["m"], dims["n"], dims["hidden"])]
    return [(1, dims["m"], dims["n"], dims["k"])]


def products_of(problem: Problem) -> Counter[Shape]:
    """Shapes of the products in a problem."""
    gemm = gemm_of(problem)
    if gemm is not None:
        return Counter((gemm.batch, gemm.m, n, gemm.k) for n in gemm.ns)
    found: Counter[Shape] = Counter(_products_in(problem))
    if is_generated(problem):
        results = results_of(problem)
        for line in program_of(problem).lines:
            if line.op in GEMMS:
                *batch, m, k = results[line.operands[-2]].shape
                found[(math.prod(batch), m, results[line.name].shape[-1], k)] += 1
    return found


def hits_of(summary: RunSummary, scenario: str, item: ProblemSummary) -> int:
    """How many places of a scenario a problem's entry serves, by the last end-to-end timing."""
    timed = summary.timed.get(scenario)
    hits = timed.timing.get("hits", {}).get(_BUNDLE, {}) if timed is not None else {}
    return max((int(hits.get(key, 0)) for key in _keys(item)), default=0) if item.verdict == "won" else 0


def _keys(item: ProblemSummary) -> set[str]:
    """Of a problem, and of those that share its entry."""
    keys = {item.problem.key, *(hotspot.problem.key for hotspot in item.hotspots)}
    return keys | {event.candidate.problem.key for event in item.confirmed}


def where_time_goes(summary: RunSummary) -> list[dict[str, Any]]:
    """One row per scenario that was timed with the bundle."""
    profiled = summary.profiled
    assert profiled is not None
    rows = []
    for scenario, step_us in profiled.scenario_us.items():
        result = next((result for result in summary.scenarios if result.scenario == scenario), None)
        times = {mode.mode: mode.median_us for mode in result.modes} if result is not None else {}
        if _STOCK in times and _BUNDLE in times:
            rows.append(_row(summary, scenario, times[_STOCK], times[_BUNDLE], step_us))
    return rows


def _row(summary: RunSummary, scenario: str, stock_us: float, bundle_us: float, profiled_us: float) -> dict[str, Any]:
    hotspots = [h for item in summary.problems for h in item.hotspots if h.scenario == scenario]
    entries = [(item, hits) for item in summary.problems if (hits := hits_of(summary, scenario, item))]
    parts = [*_replaced(entries), *_other_gemms(entries, hotspots), *_other_kernels(summary, entries, hotspots)]
    kinds = {}
    for kind in KINDS:
        mine = [part for part in parts if part["kind"] == kind]
        seen = [h.time_us for h in hotspots if not h.estimated and _is_library_call(h) and kind_of(h.problem) == kind]
        kinds[kind] = {
            "stock_us": sum(part["stock_us"] for part in mine),
            "bundle_us": sum(part["bundle_us"] for part in mine),
            "profiled_us": sum(seen) if seen else None,
            "parts": [{name: value for name, value in part.items() if name != "kind"} for part in mine],
        }
    return {
        "scenario": scenario,
        "stock_step_us": stock_us,
        "bundle_step_us": bundle_us,
        "profiled_step_us": profiled_us,
        "kinds": kinds,
        "rest": {
            "stock_us": stock_us - sum(kind["stock_us"] for kind in kinds.values()),
            "bundle_us": bundle_us - sum(kind["bundle_us"] for kind in kinds.values()),
        },
    }


def _is_library_call(hotspot: Hotspot) -> bool:
    """Whether the profiler saw it as it is: a plain product, or attention."""
    problem = hotspot.problem
    return problem.op == "attention" or (gemm_of(problem) is not None and problem.op != "merged_mm")


def _part(kind: str, title: str, calls: int, stock_us: float, bundle_us: float, how: str) -> dict[str, Any]:
    return {"kind": kind, "title": title, "calls": calls, "stock_us": stock_us, "bundle_us": bundle_us, "how": how}


def _replaced(entries: Iterable[tuple[ProblemSummary, int]]) -> list[dict[str, Any]]:
    parts = []
    for item, hits in entries:
        winner, stock_us = item.winner, _stock_us(item)
        if winner is not None and stock_us is not None:
            kind = kind_of(item.problem)
            parts.append(_part(kind, item.title, hits, hits * stock_us, hits * winner.winner_us, "an entry, alone times calls"))
    return parts


def _stock_us(item: ProblemSummary) -> float | None:
    """One call of stock code: as confirmed, unless the baseline was a tuned one; then as screened."""
    stock, winner = item.baseline, item.winner
    ids = {trial.evaluation.candidate.id for trial in item.timed if trial.origin == "stock"}
    if winner is not None and winner.baseline.id in ids:
        return winner.baseline_us
    return latency_us(stock) if stock is not None else None


def _other_gemms(entries: Iterable[tuple[ProblemSummary, int]], hotspots: Iterable[Hotspot]) -> list[dict[str, Any]]:
    """Products that no entry replaces, shape by shape, as profiled."""
    calls: Counter[Shape] = Counter()
    times: Counter[Shape] = Counter()
    for hotspot in hotspots:
        if _is_library_call(hotspot) and hotspot.problem.op != "attention":
            (shape,) = products_of(hotspot.problem)
            calls[shape] += hotspot.num_calls
            times[shape] += hotspot.time_us  # type: ignore[assignment]
    left = Counter(calls)
    for item, hits in entries:
        for shape, count in products_of(item.problem).items():
            left[shape] -= hits * count
    return [
        _part("GEMMs", _gemm_title(shape), count, us := times[shape] / calls[shape] * count, us, "as before, as profiled")
        for shape, count in left.items()
        if count > 0
    ]


def _gemm_title(shape: Shape) -> str:
    batch, m, n, k = shape
    return f"{f'{batch}·' if batch > 1 else ''}{m}×{n}×{k}"


def _other_kernels(
    summary: RunSummary, entries: Iterable[tuple[ProblemSummary, int]], hotspots: Iterable[Hotspot]
) -> list[dict[str, Any]]:
    """Attention, norms and other patterns that no entry replaces; of those that share nodes, the longest."""
    owners = {hotspot.problem.key: item for item in summary.problems for hotspot in item.hotspots}
    taken = {key for item, _ in entries for key in _keys(item)}
    parts = []
    for hotspot in sorted(hotspots, key=lambda h: -h.time_us):
        key, problem = hotspot.problem.key, hotspot.problem
        if kind_of(problem) == "GEMMs" or is_generated(problem) or key in taken or taken.intersection(hotspot.rivals):
            continue
        taken.add(key)
        alone = owners[key].baseline
        if problem.op == "attention":
            us, how = hotspot.time_us, "as before, as profiled"
        elif alone is not None:
            us, how = latency_us(alone) * hotspot.num_calls, "as before, alone times calls"
        else:
            us, how = hotspot.time_us, "as before, estimated"
        parts.append(_part(kind_of(problem), owners[key].title, hotspot.num_calls, us, us, how))
    return parts
