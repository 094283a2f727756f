"""Recorders that show a run while it goes on: a live panel on a terminal, single lines anywhere else.

They must never break or slow a run: an event is folded into a few numbers, drawing is another thread's work, and a terminal
that goes away silences them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autokernel.display.layout import Row, detailed_table
from autokernel.display.state import SOMETIMES, STAGES, HotspotProgress, ProgressState
from autokernel.display.words import duration, failures, microseconds, one_line
from autokernel.events import (
    Evaluated,
    Event,
    MeasuredRow,
    RowsHeld,
    RunFinished,
    RunStarted,
    ScenarioTimed,
    StageFinished,
    StageStarted,
)
from autokernel.tracking.titles import config_title, problem_title

QUIET_S = 10.0  # a plain display says something at least this often
_MAX_ROWS = 8
_CLOSING = "done; waiting until MLflow has everything"
_GONE = (OSError, ValueError)  # what writing to a closed or vanished terminal raises

Earlier = Callable[[RunStarted], Iterable[Event]]


def _nothing(started: RunStarted) -> Iterable[Event]:
    return ()


def _catch_up(state: ProgressState, event: Event, earlier: Earlier) -> None:
    """A resumed run shows what it had reached before."""
    if isinstance(event, RunStarted) and event.resumed:
        for old in earlier(event):
            state.take(old)


class LiveProgress:
    """A panel on a terminal, redrawn four times a second. A Recorder.

    Args:
        console: of standard error; what is logged through it while the panel is up appears above the panel.
        earlier: gives the events that the journal of a resumed run holds already.
    """

    def __init__(self, console: Console, earlier: Earlier = _nothing) -> None:
        self.state = ProgressState()
        self._earlier = earlier
        self._lock = threading.Lock()
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            vertical_overflow="crop",
        )
        self._up = False

    def record(self, event: Event) -> None:
        """Take one event; the panel goes up with the first."""
        with self._lock:
            _catch_up(self.state, event, self._earlier)
            self.state.take(event)
        if not self._up:
            self._up = True
            with contextlib.suppress(*_GONE):
                self._live.start()

    def close(self) -> None:
        """The run is over, but other recorders may still have to finish: the panel says so until `release`."""
        with self._lock:
            self.state.closing = True

    def release(self) -> None:
        """Take the panel down. Idempotent."""
        with contextlib.suppress(*_GONE):
            self._live.stop()

    def _render(self) -> RenderableType:
        with self._lock:
            return panel(self.state)


class PlainProgress:
    """Lines for pipes and log files: stages, new bests, and a sign of life every ten seconds. A Recorder.

    Args:
        write: takes one line without its end.
        earlier: see `LiveProgress`.
        quiet_s: the longest silence.
    """

    def __init__(self, write: Callable[[str], None], earlier: Earlier = _nothing, quiet_s: float = QUIET_S) -> None:
        self.state = ProgressState()
        self._earlier = earlier
        self._write = write
        self._quiet_s = quiet_s
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._said_at = self.state.clock()
        self._thread = threading.Thread(target=self._beat, name="autokernel-progress", daemon=True)

    def record(self, event: Event) -> None:
        """Take one event."""
        with self._lock:
            _catch_up(self.state, event, self._earlier)
            new_best = self.state.take(event)
            for line in event_lines(self.state, event, new_best):
                self._say(line)
            if self._due:
                self._say(status_line(self.state))
        if isinstance(event, RunStarted) and not self._thread.is_alive():
            self._thread.start()

    def close(self) -> None:
        """See `LiveProgress.close`."""
        with self._lock:
            self.state.closing = True
            if self.state.run_id:
                self._say(_CLOSING)

    def release(self) -> None:
        """Say nothing any more. Idempotent."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    @property
    def _due(self) -> bool:
        return bool(self.state.stage) and self.state.clock() - self._said_at >= self._quiet_s

    def _beat(self) -> None:
        while not self._ended.wait(self._quiet_s / 4):
            with self._lock:
                if self._due:
                    self._say(status_line(self.state))

    def _say(self, line: str) -> None:
        self._said_at = self.state.clock()
        with contextlib.suppress(*_GONE):
            self._write(f"[{duration(self.state.seconds)}] {line}")


def event_lines(state: ProgressState, event: Event, new_best: bool) -> list[str]:
    """What a plain display says about an event, mostly nothing."""
    match event:
        case RunStarted():
            if not event.resumed:
                return [f"{event.name}: run {event.run_id} starts on {state.machine}"]
            trials, done = sum(state.statuses.values()), ", ".join(state.finished) or "none"
            return [f"{event.name}: run {event.run_id} goes on: {trials} trials, stages done: {done}; on {state.machine}"]
        case StageStarted():
            total = f", {event.total} steps" if event.total else ""
            budget = f", at most {duration(event.budget_s)}" if event.budget_s else ""
            return [f"{event.stage}{total}{budget}{f' ({event.note})' if event.note else ''}"]
        case StageFinished():
            failed = failures(state.statuses) if event.stage == "search" else ""
            return [f"{event.stage} done in {duration(event.seconds)}{f'; failed: {failed}' if failed else ''}"]
        case Evaluated() if new_best:
            return [best_line(state.hotspots[state.current])]
        case RowsHeld():
            return [rows_line(event)]
        case ScenarioTimed():
            return [scenario_line(event)]
        case RunFinished():
            return [f"{event.outcome}: {one_line(event.message)}"]
        case _:
            return []


def best_line(hotspot: HotspotProgress) -> str:
    """`decode mm 1×1280×384 bf16: 12.30 us, 1.42× stock (inductor template=cpp_gemm)`."""
    assert hotspot.best_us is not None
    assert hotspot.best is not None
    against = f", {hotspot.ratio:.2f}× stock" if hotspot.ratio is not None else ""
    where = f"{hotspot.scenario} {hotspot.title}".strip()
    return f"  {where}: {microseconds(hotspot.best_us)} us{against} ({config_title(hotspot.best)})"


def rows_line(event: RowsHeld) -> str:
    """`mm 16×4096×4096 bf16: holds for 9 to 16 rows of 5 to 16; at 8 it does not: 0.91× stock [0.90, 0.92]`."""
    (first, last), measured = event.held, {row.m: row for row in event.measured}
    ends = [max((m for m in measured if m < first), default=None), min((m for m in measured if m > last), default=None)]
    why = [f"; at {m} it does not: {_row(measured[m])}" for m in ends if m is not None and not measured[m].holds]
    title = problem_title(event.candidate.problem)
    return f"  {title}: holds for {first} to {last} rows of {event.wanted[0]} to {event.wanted[1]}{''.join(why)}"


def _row(row: MeasuredRow) -> str:
    if row.speedup is None:
        return one_line(row.message)
    return f"{row.speedup.ratio:.2f}× stock [{row.speedup.low:.2f}, {row.speedup.high:.2f}]"


def scenario_line(event: ScenarioTimed) -> str:
    """`decode-b1: bundle 5.102 ms, 1.043× default [1.041, 1.046]`."""
    if event.result is None:
        return f"  {event.scenario}: the model does not run with the bundle"
    tuned = next(mode.median_us for mode in event.result.modes if mode.mode == "bundle")
    speedup = event.result.speedup
    against = f"{speedup.ratio:.3f}× {event.result.best_stock} [{speedup.low:.3f}, {speedup.high:.3f}]"
    return f"  {event.scenario}: bundle {tuned / 1000:.3f} ms, {against}{'' if event.result.passed else ', which is slower'}"


def status_line(state: ProgressState) -> str:
    """`search 34/120, failed: 3 INVALID, 6:10 left: ...`."""
    parts = [f"{state.stage} {state.done}/{state.total}" if state.total else state.stage]
    if state.stage == "search" and failures(state.statuses):
        parts.append(f"failed: {failures(state.statuses)}")
    left = state.seconds_left
    parts.append(f"{duration(left)} left" if left is not None else f"for {duration(state.stage_seconds)}")
    return ", ".join(parts) + (f": {one_line(state.message, 120)}" if state.message else "")


def panel(state: ProgressState) -> RenderableType:
    """The live panel: which run, which stage, how far, how long still, and the hotspots' bests."""
    head = Text.assemble((state.name, "bold"), " ", (state.run_id, "cyan"), ("  resumed" if state.resumed else "", "yellow"))
    head.append(f"  {state.machine}", "dim")
    head.no_wrap, head.overflow = True, "ellipsis"
    parts: list[RenderableType] = [head, _stages(state)]
    if state.closing:
        parts.append(Text(_CLOSING, "dim"))
    elif state.stage:
        parts.append(_bar(state))
        message = Text(one_line(state.message or state.note, 200), style="dim", no_wrap=True, overflow="ellipsis")
        parts.append(message)
    if state.stage == "search" and state.searched and not state.closing:
        parts.append(_bests(state))
        if failures(state.statuses):
            parts.append(Text(f"failed: {failures(state.statuses)}", style="yellow"))
    return Group(*parts)


def _stages(state: ProgressState) -> Text:
    """`✓ profile 0:12  ▶ search  · confirm ...`."""
    text = Text(no_wrap=True, overflow="ellipsis")
    seen = [stage for stage in SOMETIMES if stage == state.stage or stage in state.finished]
    for stage in [name for usual in STAGES for name in (usual, *(rare for rare in seen if SOMETIMES[rare] == usual))]:
        if stage == state.stage:
            text.append(f"▶ {stage}  ", "bold cyan")
        elif stage in state.finished:
            text.append(f"✓ {stage} {duration(state.finished[stage])}  ", "green")
        else:
            text.append(f"· {stage}  ", "dim")
    return text


def _bar(state: ProgressState) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    total = state.total or None
    left = state.seconds_left
    steps = f"{state.done}/{state.total}" if state.total else ""
    time = f"{duration(state.stage_seconds)} used" + (f", {duration(left)} left" if left is not None else "")
    grid.add_row(
        Text(state.stage, "bold"), ProgressBar(total=total, completed=state.done, width=32, pulse=total is None), steps, time
    )
    return grid


def _bests(state: ProgressState) -> RenderableType:
    found, current = state.searched, state.hotspots.get(state.current)
    shown = found[:_MAX_ROWS]
    if current is not None and current in found[_MAX_ROWS:]:
        shown[-1] = current
    rows: list[Row] = []
    for hotspot in shown:
        ratio = hotspot.ratio
        cells: list[str | Text] = [
            Text(f"{'▶' if hotspot is current else ' '} {hotspot.title}"),
            hotspot.scenario,
            f"{hotspot.num_trials}/{hotspot.planned}" if hotspot.planned else str(hotspot.num_trials),
            microseconds(hotspot.stock_us) if hotspot.stock_us is not None else "",
            microseconds(hotspot.best_us) if hotspot.best_us is not None else "",
            Text(f"{ratio:.2f}×", "green" if ratio > 1.02 else "dim") if ratio is not None else "",
        ]
        rows.append((cells, Text(config_title(hotspot.best), "dim") if hotspot.best is not None else ""))
    columns = ("  hotspot", "scenario", ("trials", "right"), ("stock us", "right"), ("best us", "right"), ("gain", "right"))
    made = detailed_table(*columns, rows=rows, one_line=True)
    rest = len(found) - _MAX_ROWS
    return Group(made, Text(f"  and {rest} more", "dim")) if rest > 0 else made
