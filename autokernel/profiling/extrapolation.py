"""A scenario of a deep model from captures of the same model with fewer layers. Pure.

Layers are alike, or their kinds take turns: each more of them, or each more turn, adds the same calls, and about the same time.
Two captures, of different depths, tell what it adds and what is there once. Times of single calls are those of the deeper
capture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from autokernel.profiling.capture import CapturedScenario


def period_of(kinds: Sequence[object]) -> int | None:
    """After how many layers their kinds come again; 1: all are alike, None: not twice in a row."""
    for period in range(1, len(kinds) // 2 + 1):
        if all(kind == kinds[i - period] for i, kind in enumerate(kinds) if i >= period):
            return period
    return None


def depths_of(most: int, layers: int, period: int) -> tuple[int, int] | None:
    """Two numbers of layers, the second about twice the first where that can be, that differ from the whole by whole turns.

    Args:
        most: layers to capture.
        layers: of the whole model.
        period: layers of a turn.

    Returns:
        Ascending; None: so few layers have no whole turn with something before it.
    """
    many = most - (most - layers) % period
    few = many - period * max(1, (many + 1) // 2 // period)
    return (few, many) if few > 0 else None


def extrapolated(
    fewer: CapturedScenario, more: CapturedScenario, depths: tuple[int, int], layers: int, period: int = 1
) -> CapturedScenario | None:
    """What a capture of the whole model would say; None where layers are not alike, so that it cannot be told.

    Args:
        fewer: the capture with the first of the depths.
        more: the capture with the second one. Its sites stand for those of all layers; `num_calls` says how many there are.
        depths: numbers of layers, ascending.
        layers: of the whole model; as `depths_of` has them.
        period: layers of a turn.
    """
    few, many = depths
    before, behind = (Counter(site.problem.key for site in captured.sites) for captured in (fewer, more))
    num_calls = {}
    for key in {*before, *behind}:
        added, rest = divmod(behind[key] - before[key], (many - few) // period)
        if rest or added < 0 or not behind[key]:
            return None
        num_calls[key] = behind[key] + added * ((layers - many) // period)

    def further(first: float, second: float) -> float:
        return second + max(0.0, second - first) / (many - few) * (layers - many)

    step_us = further(fewer.step_us, more.step_us)
    return replace(
        more,
        step_us=step_us,
        step_spread_us=more.step_spread_us * step_us / more.step_us,
        kernel_us=min(step_us, further(fewer.kernel_us, more.kernel_us)),
        num_calls=num_calls,
        peak_bytes=round(further(fewer.peak_bytes, more.peak_bytes)),
    )
