"""One problem of a run, put together for people. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from autokernel.events import Confirmed, Evaluated, RowsHeld
from autokernel.records import Hotspot, Problem, Status, Winner
from autokernel.tracking.titles import problem_title


def latency_us(event: Evaluated) -> float:
    """Of a trial that has a measurement."""
    assert event.evaluation.measurement is not None
    return event.evaluation.measurement.median_us


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSummary:
    """One problem: where it occurs, what was tried, what came of it."""

    problem: Problem
    rank: int  # from 1, by what could be gained
    hotspots: tuple[Hotspot, ...]  # one per scenario that has it
    trials: tuple[Evaluated, ...] = ()
    confirmed: tuple[Confirmed, ...] = ()
    rows: RowsHeld | None = None  # for which rows the winner is used, where more than its own were asked for
    dropped: str = ""  # why the whole-model gates took the winner out again

    @property
    def title(self) -> str:
        return problem_title(self.problem)

    @property
    def scenarios(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(h.scenario for h in self.hotspots))

    @property
    def weight(self) -> float:
        """Part of all scenarios together."""
        return sum(h.weight for h in self.hotspots)

    @property
    def timed(self) -> tuple[Evaluated, ...]:
        """Trials with status OK, in the order they were tried."""
        return tuple(e for e in self.trials if e.evaluation.status is Status.OK)

    @property
    def baseline(self) -> Evaluated | None:
        """The fastest stock choice, as screened."""
        return min((e for e in self.timed if e.origin == "stock"), key=latency_us, default=None)

    @property
    def best(self) -> Evaluated | None:
        """The fastest trial, as screened: not yet a winner."""
        return min(self.timed, key=latency_us, default=None)

    @property
    def winner(self) -> Winner | None:
        """The confirmed winner, or what a plan has instead, also if it was dropped later; of several that which gains most."""
        winners = [c.winner for c in self.confirmed if c.accepted and c.winner is not None]
        return max(winners, key=lambda w: w.speedup.ratio, default=None)

    @property
    def rows_held(self) -> str:
        """`holds for 9 to 16 rows` of a winner that was measured for others than its own; else empty."""
        if self.rows is None or self.verdict != "won":
            return ""
        (first, last), asked = self.rows.held, self.rows.wanted
        short = "" if self.rows.held == asked else f" ({asked[0]} to {asked[1]} were asked for)"
        return f"holds for {first} to {last} rows{short}" if first < last else f"holds for its own rows alone{short}"

    @property
    def finalist(self) -> Confirmed | None:
        """The confirmation that decided: the winner's, or the best of those refused."""
        return max(self.confirmed, key=lambda c: (c.accepted, c.speedup.ratio), default=None)

    @property
    def against_max_autotune(self) -> str:
        """`1.02× [1.01, 1.03] max-autotune (aten mm)` of the confirmation that decided; else why it is not known, or empty."""
        final = self.finalist
        if final is None or not final.max_autotune:
            return ""
        over = final.over_max_autotune
        if over is None:
            return f"max-autotune: {final.max_autotune}"
        return f"{over.ratio:.2f}× [{over.low:.2f}, {over.high:.2f}] max-autotune ({final.max_autotune})"

    @property
    def baseline_us(self) -> float | None:
        """As confirmed where there is a winner, as screened otherwise."""
        if self.winner is not None:
            return self.winner.baseline_us
        return latency_us(self.baseline) if self.baseline is not None else None

    @property
    def by_backend(self) -> dict[str, Evaluated]:
        """The fastest trial of each backend, as screened; fastest first."""
        found: dict[str, Evaluated] = {}
        for trial in sorted(self.timed, key=latency_us):
            found.setdefault(trial.evaluation.candidate.backend, trial)
        return found

    @property
    def backend(self) -> str:
        """Whose kernel is used in the end; "" as long as nothing was timed."""
        if self.verdict == "won" and self.winner is not None:
            return self.winner.evaluation.candidate.backend
        return self.baseline.evaluation.candidate.backend if self.baseline is not None else ""

    @property
    def runner_up(self) -> tuple[Evaluated, float] | None:
        """The fastest trial of any other backend, and its time over that of the backend that is used, both as screened."""
        found = self.by_backend
        used = found.get(self.backend)
        others = [trial for name, trial in found.items() if name != self.backend]
        return (others[0], latency_us(others[0]) / latency_us(used)) if used is not None and others else None

    @property
    def roofline_us(self) -> float | None:
        """Least time of one call that the measured ceilings allow."""
        heaviest = max(self.hotspots, key=lambda h: h.weight, default=None)
        return heaviest.roofline_us / heaviest.num_calls if heaviest is not None and heaviest.num_calls else None

    def roofline_part(self, us: float | None) -> float | None:
        """How much of the roofline a kernel that takes so long reaches: 1 is all of it."""
        return self.roofline_us / us if self.roofline_us is not None and us else None

    @property
    def verdict(self) -> str:
        """One of "won", "dropped", "kept stock", "not confirmed", "not searched"."""
        if self.dropped:
            return "dropped"
        if self.winner is not None:
            return "won"
        if self.confirmed or (self.timed and self.best is self.baseline):
            return "kept stock"
        return "not confirmed" if self.trials else "not searched"

    @property
    def reason(self) -> str:
        """Why the verdict is what it is."""
        if self.dropped:
            return self.dropped
        if self.finalist is not None:
            return self.finalist.reason
        others = [t for t in self.trials if t.origin != "stock"]
        if not self.trials:
            return "its share is too small for this budget, or no backend can serve it"
        if not others:
            return "nothing else was tried within the budget"
        if all(t.origin == "stock" for t in self.timed):
            return "no other candidate passed its checks"
        if self.best is not self.baseline:
            return "faster in screening, but not confirmed (autokernel.log may say why)"
        return "nothing was faster in screening"

    def best_so_far(self) -> list[tuple[int, float]]:
        """(number of the trial within this problem from 1, lowest latency in us until then), one per trial once timed."""
        out: list[tuple[int, float]] = []
        low = float("inf")
        for index, event in enumerate(self.trials, start=1):
            if event.evaluation.status is Status.OK:
                low = min(low, latency_us(event))
            if low < float("inf"):
                out.append((index, low))
        return out
