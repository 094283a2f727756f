"""A scenario of a deep model from captures of the same model with fewer layers. Pure.

Layers are alike: each more of them adds the same calls, and about the same time. Two captures, of different depths, tell what
one layer adds and what is there once. Times of single calls are those of the deeper capture.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from autokernel.profiling.capture import CapturedScenario


def extrapolated(
    fewer: CapturedScenario, more: CapturedScenario, depths: tuple[int, int], layers: int
) -> CapturedScenario | None:
    """What a capture of the whole model would say; None where layers are not alike, so that it cannot be told.

    Args:
        fewer: the capture with the first of the depths.
        more: the capture with the second one. Its sites stand for those of all layers; `num_calls` says how many there are.
        depths: numbers of layers, ascending.
        layers: of the whole model.
    """
    few, many = depths
    before, behind = (Counter(site.problem.key for site in captured.sites) for captured in (fewer, more))
    num_calls = {}
    for key in {*before, *behind}:
        added, rest = divmod(behind[key] - before[key], many - few)
        if rest or added < 0 or not behind[key]:
            return None
        num_calls[key] = behind[key] + added * (layers - many)

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
