"""Behind the winners: for which other numbers of rows those of our own kernels hold that scenarios ask for (`rows`).

A range is measured, not guessed: every number of rows where there are few, else both ends, what lies around the edges of tiles,
and enough between them. Each is checked and raced against stock as any confirmation, and the entry gets the widest run of
measured rows around its own in which it is right and no slower than stock.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from autokernel.backends.aten import stock_config
from autokernel.evaluate.confirm import ConfirmCandidates, measured_row
from autokernel.evaluate.roofline import Ceilings
from autokernel.events import MeasuredRow, Profiled, RowMeasured, RowsHeld
from autokernel.export.bundle import Bundle
from autokernel.export.matching import Gemm, gemm_of, with_rows
from autokernel.kernels.config import KERNEL, SkinnyConfig
from autokernel.records import Candidate, Hotspot, Winner
from autokernel.stages.confirmations import confirmations
from autokernel.stages.context import RunContext
from autokernel.tracking.titles import problem_title

log = logging.getLogger(__name__)

ALL_OF = 32  # numbers of rows: of ranges no longer than this, each is measured
MAX_GAP = 8  # from one that is measured to the next, in longer ones


def hold_rows(context: RunContext, profiled: Profiled, winners: Sequence[Winner]) -> dict[str, RowsHeld]:
    """By problem key, what each winner holds for; none for those of which nothing more was asked."""
    wanted = {w.evaluation.candidate.id: span for w in winners if (span := wanted_rows(context, profiled, w)) is not None}
    asked = [winner for winner in winners if winner.evaluation.candidate.id in wanted]
    earlier = context.state.rows_held if context.state is not None else {}
    held = {id: event for id, event in earlier.items() if wanted.get(id) == event.wanted}
    left = [winner for winner in asked if winner.evaluation.candidate.id not in held]
    _say_where_nothing_is_asked(context, profiled, asked)
    if left:
        jobs = [job for winner in left for job in _jobs(context, profiled, winner, wanted[winner.evaluation.candidate.id])]
        with context.stage("rows", total=len(jobs), note="winners at other numbers of rows"):
            found = _measure(context, jobs)
            for winner in left:
                candidate = winner.evaluation.candidate
                event = _judged(winner, wanted[candidate.id], found.get(candidate.id, {}))
                context.emit(event)
                held[candidate.id] = event
            context.progress("rows", len(jobs), len(jobs))
    return {w.hotspot.problem.key: held[w.evaluation.candidate.id] for w in asked}


def wanted_rows(context: RunContext, profiled: Profiled, winner: Winner) -> tuple[int, int] | None:
    """The first and the last number of rows that a winner is to hold for; None if only its own, or its kernel takes no other.

    Ranges of several scenarios with the same product are one. Rows that the experiment tunes by themselves, in other scenarios,
    end it: what was decided for those, stock code included, was decided by a search of their own.
    """
    candidate = winner.evaluation.candidate
    gemm = gemm_of(candidate.problem)
    if gemm is None or candidate.backend != "triton" or candidate.config.get("kernel") != KERNEL:
        return None
    scenarios = context.experiment.scenarios
    spans = [getattr(scenarios.get(name), "rows", None) for name in _scenarios_with(gemm, profiled.hotspots)]
    fitting = [span for span in spans if span is not None and span[0] <= gemm.m <= span[1]]
    if not fitting:
        return None
    others = {other.m for other in _gemms(profiled.hotspots) if other.m != gemm.m and _sizes(other) == _sizes(gemm)}
    first = max([min(span[0] for span in fitting), *(m + 1 for m in others if m < gemm.m)])
    last = min([max(span[1] for span in fitting), *(m - 1 for m in others if m > gemm.m)])
    config, n = SkinnyConfig.from_entry(candidate.config), sum(gemm.ns)
    while first < gemm.m and config.problem(first, n, gemm.k):
        first += 1
    while last > gemm.m and config.problem(last, n, gemm.k):
        last -= 1
    return (first, last) if first < last else None


def _scenarios_with(gemm: Gemm | None, hotspots: Sequence[Hotspot]) -> list[str]:
    return list(dict.fromkeys(hotspot.scenario for hotspot in hotspots if gemm_of(hotspot.problem) == gemm))


def _gemms(hotspots: Sequence[Hotspot]) -> set[Gemm]:
    return {gemm for hotspot in hotspots if (gemm := gemm_of(hotspot.problem)) is not None}


def _sizes(gemm: Gemm) -> Gemm:
    """Without its rows; merged products in any order are the same."""
    return replace(gemm, m=0, ns=tuple(sorted(gemm.ns)))


def _say_where_nothing_is_asked(context: RunContext, profiled: Profiled, asked: Sequence[Winner]) -> None:
    served = {name for winner in asked for name in _scenarios_with(gemm_of(winner.hotspot.problem), profiled.hotspots)}
    for name, scenario in context.experiment.scenarios.items():
        if getattr(scenario, "rows", None) is not None and name not in served:
            log.warning("scenarios.%s.rows: none of its winners is a kernel of backend triton that could hold for them", name)


def rows_to_measure(first: int, last: int, tuned: int, block_m: int) -> list[int]:
    """Which numbers of rows of a range are measured, but the tuned one.

    All of up to `ALL_OF`. Of more: both ends, the neighbours of the tuned one, the last rows of full tiles with those before
    and behind them, where a tile more or less decides, and the middle of what is left until two are `MAX_GAP` apart at most.

    Args:
        first, last: of the range.
        tuned: what was measured already.
        block_m: rows of the kernel's tile.
    """
    if last - first < ALL_OF:
        return [m for m in range(first, last + 1) if m != tuned]
    edges = [edge + step for edge in range(block_m, last + 1, block_m) for step in (-1, 0, 1)]
    chosen = sorted({first, last, *(m for m in (tuned - 1, tuned, tuned + 1, *edges) if first <= m <= last)})
    at = 0
    while at + 1 < len(chosen):
        low, high = chosen[at : at + 2]
        if high - low > MAX_GAP:
            chosen.insert(at + 1, (low + high) // 2)
        else:
            at += 1
    return [m for m in chosen if m != tuned]


def widest(tuned: int, asked: Sequence[int], held: Collection[int]) -> tuple[int, int]:
    """The first and the last of the run of measured rows around the tuned ones in which all hold.

    Args:
        tuned: what is known to hold.
        asked: all that were to be measured.
        held: those of them that hold; what was not measured does not.
    """
    first = last = tuned
    for m in sorted((m for m in asked if m < tuned), reverse=True):
        if m not in held:
            break
        first = m
    for m in sorted(m for m in asked if m > tuned):
        if m not in held:
            break
        last = m
    return first, last


def _asked_of(winner: Winner, span: tuple[int, int]) -> list[int]:
    candidate = winner.evaluation.candidate
    gemm = gemm_of(candidate.problem)
    assert gemm is not None
    return rows_to_measure(*span, gemm.m, SkinnyConfig.from_entry(candidate.config).block_m)


def _jobs(
    context: RunContext, profiled: Profiled, winner: Winner, span: tuple[int, int]
) -> list[tuple[tuple[Candidate, int], ConfirmCandidates]]:
    """One for each number of rows, told apart by winner and rows; what an earlier process measured is in the state."""
    settings, candidate = context.experiment.validation, winner.evaluation.candidate
    jobs = []
    for m in _asked_of(winner, span):
        problem = with_rows(candidate.problem, m)
        job = ConfirmCandidates(
            problem=problem,
            finalists=(Candidate(problem=problem, backend=candidate.backend, config=candidate.config),),
            baselines=(Candidate(problem=problem, backend="aten", config=stock_config(problem.op)),),
            rounds=settings.confirm_rounds,
            seed=context.seed + 1,
            threads=context.threads,
            ceilings=Ceilings.from_json(profiled.ceilings),
            deterministic_required=settings.deterministic,
            max_copies=context.experiment.search.max_copies,
        )
        jobs.append(((candidate, m), job))
    return jobs


def _measure(
    context: RunContext, jobs: Sequence[tuple[tuple[Candidate, int], ConfirmCandidates]]
) -> dict[str, dict[int, MeasuredRow]]:
    """By winner and number of rows; what was lost with its worker is not among them."""
    earlier = context.state.rows if context.state is not None else {}
    found = {id: dict(rows) for id, rows in earlier.items()}
    new = [(tag, job) for tag, job in jobs if tag[1] not in found.get(tag[0].id, {})]
    for (candidate, m), confirmation in confirmations(context, new, "rows"):
        row = measured_row(m, confirmation)
        context.emit(RowMeasured(candidate=candidate, row=row))
        found.setdefault(candidate.id, {})[m] = row
    return found


def _judged(winner: Winner, span: tuple[int, int], found: Mapping[int, MeasuredRow]) -> RowsHeld:
    candidate, asked = winner.evaluation.candidate, _asked_of(winner, span)
    gemm = gemm_of(candidate.problem)
    assert gemm is not None
    measured = tuple(found[m] for m in asked if m in found)
    held = widest(gemm.m, asked, {row.m for row in measured if row.holds})
    log.info("%s holds for %d to %d rows; asked were %d to %d", problem_title(candidate.problem), *held, *span)
    return RowsHeld(candidate=candidate, wanted=span, held=held, measured=measured)


def evidence_of(rows: Mapping[str, RowsHeld], bundle: Bundle) -> dict[str, object]:
    """What a bundle says of its entries for ranges of rows: each that was measured, by problem key."""
    return {
        entry.key: {"measured": [row.to_json() for row in rows[entry.key].measured]}
        for entry in bundle.entries
        if entry.rows is not None and entry.key in rows
    }
