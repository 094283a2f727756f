"""Short spellings of times, speed-ups and counts; problems and configs have theirs in `tracking.titles`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from autokernel.records import Speedup, Status


def microseconds(value: float) -> str:
    """Four significant digits at most, without exponents: `7.42`, `128.3`, `18,250`."""
    for limit, digits in ((10, 2), (1000, 1)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def ratio(speedup: Speedup) -> str:
    """`1.52× [1.48, 1.56]`."""
    return f"{speedup.ratio:.2f}× {interval(speedup)}"


def interval(speedup: Speedup) -> str:
    return f"[{speedup.low:.2f}, {speedup.high:.2f}]"


def percent(value: float) -> str:
    """A fraction as `12.3 %`."""
    return f"{value * 100:.1f} %"


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def failures(statuses: Mapping[Status, int] | Counter[Status]) -> str:
    """`3 INVALID, 1 WRONG`; empty if nothing failed."""
    return ", ".join(f"{statuses[s]} {s}" for s in Status if s is not Status.OK and statuses.get(s))


def one_line(text: str, width: int = 300) -> str:
    """The first line of a text that has something on it, cut to a width."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    more = len(text.strip()) > len(first)
    return f"{first[: width - 2]} …" if len(first) > width or more else first
