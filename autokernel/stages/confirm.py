"""Stage 3: finalists against the strongest stock choice, paired; and which of the winners go into the bundle together."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

from autokernel.backends.aten import is_stock as is_stock_config
from autokernel.evaluate.confirm import Confirmation, ConfirmCandidates, Contender
from autokernel.evaluate.roofline import Ceilings, roofline_us
from autokernel.evaluate.timing import Comparison
from autokernel.events import Confirmed, Profiled, RowsHeld
from autokernel.export.bundle import RANGE, Entry
from autokernel.export.freezing import needs_constant
from autokernel.export.matching import Gemm, gemm_of, parts_of_merged
from autokernel.ops import get_op
from autokernel.ops.base import compute_dtype
from autokernel.records import DTYPE_BYTES, Candidate, Evaluation, Hotspot, Problem, RunnerUp, Status, Winner
from autokernel.search.plans import WITHIN_MODEL
from autokernel.stages.confirmations import confirmations
from autokernel.stages.context import RunContext
from autokernel.stages.picks import asks, is_slower, may_win, over_max_autotune, picked, why_refused
from autokernel.tracking.titles import problem_title

log = logging.getLogger(__name__)

_LIBRARY = "aten"  # whose kernels no bundle has to bring along
# How much slower than stock a finalist may have been as screened, where a GPU's matrix units are the limit. A screen is
# over before the card reaches its power limit, which slows kernels down by how much energy they take: on an H200, products
# within 1 % of each other at 1,980 MHz were 5 and 6 % apart in the seconds of a confirmation, at 1,500.
_HOT_SLACK = 0.05
_RUNNERS_UP = 2  # of a problem, that may be tried in the model in the winner's place


def is_stock(candidate: Candidate) -> bool:
    """What eager PyTorch and `torch.compile` without a bundle would run for this problem."""
    return candidate.backend == "aten" and is_stock_config(candidate.config)


def is_separate(candidate: Candidate) -> bool:
    """A way to run GEMMs that share an input one by one: what merging them has to beat, however each is tuned."""
    return candidate.problem.op == "merged_mm" and candidate.config.get("merge", "none") == "none"


def finalists_of(
    evaluations: Sequence[Evaluation], top: int, slack: float = 0.0
) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
    """(finalists, baselines) of one problem: the fastest by their screening, and every stock choice that works.

    The library's best is always among the finalists: the others have to beat it, too. Of two candidates that are equally fast
    the one with the shorter config comes first.

    Args:
        evaluations: of the problem.
        top: finalists at most, besides the library's best.
        slack: how much slower than the best stock choice one may be, as a fraction.
    """
    good = [e for e in evaluations if e.status is Status.OK and e.measurement is not None]
    good.sort(key=lambda e: (e.measurement.median_us if e.measurement else 0.0, len(e.candidate.config)))
    stock = [e for e in good if is_stock(e.candidate)]
    separate = [e for e in good if is_separate(e.candidate) and not is_stock(e.candidate)][:2]
    baselines = tuple(dict.fromkeys(e.candidate for e in (*stock, *separate)))
    if not stock or not stock[0].measurement:
        return (), baselines
    limit = stock[0].measurement.median_us * (1 + slack)
    rest = [e for e in good if e.candidate not in baselines and e.measurement and e.measurement.median_us < limit]
    library = [e for e in rest if e.candidate.backend == _LIBRARY][:1]
    return tuple(dict.fromkeys(e.candidate for e in (*rest[:top], *library))), baselines


def _without_stock(evaluations: Sequence[Evaluation]) -> str | None:
    """What became of a problem's stock candidates, if none of them works and others do."""
    stock = [e for e in evaluations if is_stock(e.candidate)]
    if any(e.status is Status.OK for e in stock) or not any(e.status is Status.OK for e in evaluations):
        return None
    return "; ".join(dict.fromkeys(f"{e.status}: {e.message}" for e in stock)) or "it was not tried"


def slack_of(problem: Problem, ceilings: Ceilings) -> float:
    """How much slower than stock a finalist may be: nothing, but where a GPU multiplies for longer than it reads."""
    op = get_op(problem.op)
    dtype = compute_dtype(op, problem)
    multiplies_us = roofline_us(op.flops(problem), 0, dtype, ceilings)
    reads_us = roofline_us(0, op.num_bytes(problem), dtype, ceilings)
    return _HOT_SLACK if problem.device != "cpu" and multiplies_us > reads_us else 0.0


def confirm(context: RunContext, profiled: Profiled, evaluations: Mapping[str, Sequence[Evaluation]]) -> list[Winner]:
    """Winners, the heaviest hotspot first."""
    settings = context.experiment.validation
    hotspots: dict[str, Hotspot] = {}
    for hotspot in profiled.hotspots:
        hotspots.setdefault(hotspot.problem.key, hotspot)
    earlier = context.state.confirmed if context.state is not None else {}
    winners = [event.winner for event in earlier.values() if event.winner is not None]
    if context.state is not None and "confirm" in context.state.stages_done:
        return _by_weight(winners, evaluations)  # what was lost stays so: later stages have judged what there was
    decided = {event.problem_key for event in earlier.values()}
    jobs: list[tuple[Hotspot, ConfirmCandidates]] = []
    ceilings = Ceilings.from_json(profiled.ceilings)
    for key, found in evaluations.items():
        if key in decided or key not in hotspots:
            continue
        problem = hotspots[key].problem
        finalists, baselines = finalists_of(found, settings.confirm_top, slack_of(problem, ceilings))
        # on a GPU, what max-autotune picks may be faster than stock where nothing was that the search tried
        # (of GEMMs by themselves: of fusions without a finalist there may be a hundred)
        pick_alone = gemm_of(problem) is not None and problem.device == "cuda" and may_win(context.experiment, problem)
        pick_alone = pick_alone and any(map(is_stock, baselines))
        if (finalists or pick_alone) and baselines:
            job = ConfirmCandidates(
                problem=problem,
                finalists=finalists,
                baselines=baselines,
                rounds=settings.confirm_rounds,
                seed=context.seed + 1,
                threads=context.threads,
                ceilings=ceilings,
                deterministic_required=settings.deterministic,
                max_copies=context.experiment.search.max_copies,
                max_autotune=asks(context.experiment, problem),
                pick_may_win=may_win(context.experiment, problem),
            )
            jobs.append((hotspots[key], job))
        elif (why := _without_stock(found)) is not None:
            log.warning("%s stays with stock code, for that was not measured: %s", problem_title(problem), why)
    with context.stage("confirm", total=len(jobs)):
        for hotspot, confirmation in confirmations(context, jobs):
            if confirmation.asked_s:
                log.info("%s: max-autotune took %.1f s", problem_title(hotspot.problem), confirmation.asked_s)
            # the winner first: whoever resumes takes a problem for decided by any line of it, and the next one may be lost
            for event in sorted(_judge(hotspot, confirmation, settings.min_gain), key=lambda event: not event.accepted):
                context.emit(event)
                if event.winner is not None:
                    winners.append(event.winner)
        context.progress("confirm", len(jobs), len(jobs))
    return _by_weight(winners, evaluations)


def _judge(hotspot: Hotspot, confirmation: Confirmation, min_gain: float) -> list[Confirmed]:
    """One event per finalist; at most one of them carries a winner."""
    for failed in confirmation.failures:
        log.warning("%s: %s was not confirmed: %s", hotspot.problem.key, failed.candidate.label, failed.message)
    if confirmation.baseline is None:
        log.warning("%s: no stock choice passed its checks; nothing is claimed", hotspot.problem.key)
        return []
    baseline = next(c for c in confirmation.baselines if c.candidate == confirmation.baseline)
    over = {c.candidate.id: over_max_autotune(confirmation, c) for c in confirmation.finalists}
    level = [c for c in confirmation.finalists if not is_slower(over[c.candidate.id])]
    passed = [c for c in level if c.speedup is not None and c.speedup.low > 1 + min_gain]
    best = _simplest(passed, level, confirmation.comparison, min_gain)
    events = []
    for contender in confirmation.finalists:
        speedup = contender.speedup
        if speedup is None:
            continue
        winner = None
        if contender is best:
            evaluation = _evaluation_of(contender)
            winner = Winner(
                hotspot=hotspot,
                evaluation=evaluation,
                baseline=baseline.candidate,
                baseline_us=baseline.measurement.median_us,
                winner_us=contender.measurement.median_us,
                speedup=speedup,
                runners_up=_runners_up(contender, passed, confirmation.comparison),
            )
            reason = f"lower bound {speedup.low:.3f} is above {1 + min_gain:.3f}"
        elif contender in passed:
            reason = "another finalist of this hotspot is faster, or simpler and as fast"
        elif speedup.low > 1 + min_gain and (slower := over[contender.candidate.id]) is not None:
            reason = why_refused(confirmation, slower)
        else:
            reason = f"lower bound {speedup.low:.3f} is not above {1 + min_gain:.3f}"
        events.append(
            Confirmed(
                problem_key=hotspot.problem.key,
                candidate=contender.candidate,
                baseline=baseline.candidate,
                speedup=speedup,
                accepted=winner is not None,
                reason=reason,
                winner=winner,
                conditions=confirmation.comparison.conditions if confirmation.comparison is not None else {},
                over_max_autotune=over[contender.candidate.id],
                max_autotune=picked(confirmation),
            )
        )
    return events


def _simplest(
    passed: Sequence[Contender], finalists: Sequence[Contender], comparison: Comparison | None, min_gain: float
) -> Contender | None:
    """The fastest by paired rounds; where it gains next to nothing over the library's own kernels, the best of those.

    None where that one gains next to nothing over stock: then stock is as good as either.
    """
    best = max(passed, key=_ratio, default=None)
    library = max((c for c in finalists if c.candidate.backend == _LIBRARY), key=_ratio, default=None)
    if best is None or library is None or best is library or comparison is None:
        return best
    gained = comparison.faster(best.candidate.id, library.candidate.id)
    if gained.low > 1 + min_gain:
        return best
    return library if library in passed else None


def _runners_up(winner: Contender, passed: Sequence[Contender], comparison: Comparison | None) -> tuple[RunnerUp, ...]:
    """Who could not be told from the winner, or lost by no more than a model may make of it."""
    found = []
    for one in sorted(passed, key=_ratio, reverse=True):
        if one is winner or one.speedup is None or winner.speedup is None:
            continue
        close = one.speedup.high >= winner.speedup.low
        if not close and comparison is not None:
            close = comparison.faster(winner.candidate.id, one.candidate.id).low <= 1 + WITHIN_MODEL
        if close:
            found.append(RunnerUp(evaluation=_evaluation_of(one), speedup=one.speedup))
    return tuple(found[:_RUNNERS_UP])


def _evaluation_of(contender: Contender) -> Evaluation:
    """What its confirmation says of it."""
    return Evaluation(
        candidate=contender.candidate,
        status=Status.OK,
        verdict=contender.verdict,
        measurement=contender.measurement,
        deterministic=contender.deterministic,
    )


def _ratio(contender: Contender) -> float:
    return contender.speedup.ratio if contender.speedup is not None else 0.0


def _by_weight(winners: Sequence[Winner], searched: Iterable[str]) -> list[Winner]:
    """The heaviest first; of equal ones that which was searched first, for confirmations end in any order."""
    position = {key: number for number, key in enumerate(searched)}
    return sorted(winners, key=lambda w: (-w.hotspot.weight, position.get(w.hotspot.problem.key, len(position))))


def entry_of(winner: Winner, rows: RowsHeld | None = None) -> Entry:
    """What the bundle says about a winner.

    Args:
        winner: to be exported.
        rows: what it holds for; default: the rows of its problem alone.
    """
    from autokernel.backends import get_backend

    candidate = winner.evaluation.candidate
    return Entry(
        problem=candidate.problem,
        backend=candidate.backend,
        config={**get_backend(candidate.backend).export(candidate), **_range(rows)},
        scenario=winner.hotspot.scenario,
        baseline=winner.baseline.label,
        baseline_us=winner.baseline_us,
        winner_us=winner.winner_us,
        speedup=winner.speedup,
        regime=winner.evaluation.measurement.regime if winner.evaluation.measurement else "",
        deterministic=winner.evaluation.deterministic,
    )


def _range(rows: RowsHeld | None) -> dict[str, int]:
    return dict(zip(RANGE, rows.held, strict=True)) if rows is not None and rows.held[0] < rows.held[1] else {}


def within_memory(context: RunContext, winners: Sequence[Winner]) -> tuple[list[Winner], dict[str, str]]:
    """Winners whose copies of weights fit into what the experiment allows, and why others do not."""
    return fitting(winners, context.experiment.validation.max_copied_gb * 1e9)


def fitting(winners: Sequence[Winner], limit_bytes: float) -> tuple[list[Winner], dict[str, str]]:
    """Winners whose copies of weights fit together, and why others do not: those that gain most for their bytes come first.

    A graph that is compiled keeps its packed and merged weights beside the model's own.
    """
    gains = {w.hotspot.problem.key: w.hotspot.weight * (1 - w.winner_us / w.baseline_us) for w in winners}
    sizes = {w.hotspot.problem.key: copied_bytes(w) for w in winners}
    left, dropped = limit_bytes, {}
    for key in sorted((key for key in sizes if sizes[key]), key=lambda key: -gains[key] / sizes[key]):
        if sizes[key] > left:
            dropped[key] = (
                f"it copies {sizes[key] / 1e9:.3g} GB of weights, of {limit_bytes / 1e9:.3g} GB {left / 1e9:.3g} are left "
                "(validation.max_copied_gb)"
            )
        else:
            left -= sizes[key]
    return [winner for winner in winners if winner.hotspot.problem.key not in dropped], dropped


def copied_bytes(winner: Winner) -> int:
    """Bytes of weights that a winner's entry copies, in all its places of one scenario."""
    if not needs_constant(entry_of(winner)):
        return 0
    problem = winner.hotspot.problem
    return winner.hotspot.num_calls * sum(problem.inputs[i].num_bytes for i in problem.constants)


def _behind_us(merged: Problem, read_gb_per_s: float) -> float:
    """What a kernel takes at least that computes what follows merged GEMMs from their separate results."""
    if not merged.epilogue:
        return 0.0
    rows, columns = merged.inputs[0].shape[0], [weight.shape[1] for weight in merged.inputs[1:]]
    moved = rows * (sum(columns) + columns[0])  # reads all results, writes one
    return moved * DTYPE_BYTES[merged.inputs[0].dtype] / (read_gb_per_s * 1e3)


def compatible(
    winners: Sequence[Winner], evaluations: Mapping[str, Sequence[Evaluation]], read_gb_per_s: float
) -> tuple[list[Winner], dict[str, str]]:
    """Winners that go together, and why others do not.

    Merging takes its GEMMs away from their own entries: it must be faster than those, as they were confirmed. A GEMM without
    an entry stays stock, and takes its share of what merging was confirmed against. What follows all of them together
    (`silu(gate) * up`) is a kernel of its own where they are apart. Screened times are good for shares alone: a card that
    confirms long kernels is hot, and its clock lower.

    Args:
        winners: as they were confirmed.
        evaluations: of all candidates, by problem key.
        read_gb_per_s: of the device: what a kernel behind GEMMs takes.
    """
    kept, dropped = [], {}
    own = {gemm_of(w.hotspot.problem): w for w in winners if w.hotspot.problem.op != "merged_mm"}
    screened: dict[Gemm | None, float] = {}
    for found in evaluations.values():
        for evaluation in found:
            if evaluation.status is Status.OK and evaluation.measurement is not None and is_stock(evaluation.candidate):
                screened[gemm_of(evaluation.candidate.problem)] = evaluation.measurement.median_us
    for winner in winners:
        problem = winner.hotspot.problem
        parts = [gemm_of(part) for part in parts_of_merged(problem)] if problem.op == "merged_mm" else []
        if any(part in own for part in parts):
            known = all(part in screened for part in parts)
            stock = [screened[part] if known else math.prod(part.ns) if part is not None else 1.0 for part in parts]
            behind_us = _behind_us(problem, read_gb_per_s)
            share = max(winner.baseline_us - behind_us, 0.0) / sum(stock)
            pairs = zip(stock, parts, strict=True)
            apart_us = behind_us + sum(own[part].winner_us if part in own else us * share for us, part in pairs)
            if apart_us <= winner.winner_us:
                dropped[problem.key] = f"its GEMMs take {apart_us:.1f} us apart, {winner.winner_us:.1f} us merged"
                continue
        kept.append(winner)
    return kept, dropped
