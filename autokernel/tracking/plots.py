"""The pictures of a run, with matplotlib: for MLflow as PNG, for the report as SVG that follows its light or dark theme."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autokernel.events import ScenarioResult
from autokernel.records import Status
from autokernel.tracking.summary import ProblemSummary, RunSummary, latency_us

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any kind of colour vision. The three greys stand for what the theme decides.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"
INK, MUTED, GRID = "#1b1f24", "#6e7782", "#d5dae0"
_THEMED = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)"}
_MODE_COLOURS = {"eager": "#9aa3ad", "default": SKY, "reduce-overhead": GREEN, "max-autotune": ORANGE, "bundle": BLUE}
_VERDICT_COLOURS = {"won": BLUE, "dropped": VERMILION, "kept stock": "#9aa3ad"}
_MAX_PANELS, _MAX_ROWS, _WIDTH_IN = 12, 40, 9.0


@contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib

    settings: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    with matplotlib.rc_context(settings):
        yield


def _figure(height_in: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06))
    FigureCanvasAgg(figure)  # no pyplot: no global state and no display
    return figure


def history_figure(run: RunSummary) -> Figure | None:
    """Optimisation history of the hotspots with most to gain: every timed trial, the best so far, the fastest stock choice."""
    shown = [p for p in run.problems if p.timed][:_MAX_PANELS]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = ceil(len(shown) / columns)
    figure = _figure(0.5 + 2.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, problem in zip(grid.flat, shown, strict=False):
        _history_panel(axes, problem)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("trial of this hotspot", fontsize=9, color=MUTED)
    handles: dict[str, Any] = {}
    for axes in grid.flat[: len(shown)]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=len(handles), fontsize=9)
    return figure


def _history_panel(axes: Axes, problem: ProblemSummary) -> None:
    from matplotlib.ticker import MaxNLocator

    index = {t.evaluation.candidate.id: i for i, t in enumerate(problem.trials, start=1)}
    for name, colour, marker in (("stock", ORANGE, "D"), ("searched", SKY, "o")):
        timed = [t for t in problem.timed if (t.origin == "stock") == (name == "stock")]
        x, y = [index[t.evaluation.candidate.id] for t in timed], [latency_us(t) for t in timed]
        if timed:
            axes.scatter(x, y, s=16, color=colour, marker=marker, linewidths=0, label=name, zorder=3)
    best = problem.best_so_far()
    axes.step([i for i, _ in best], [us for _, us in best], where="post", color=BLUE, linewidth=1.6, label="best so far")
    low, high = min(us for _, us in best), sorted(latency_us(t) for t in problem.timed)[-1]
    # A few very slow candidates would flatten everything else: the axis ends at three times the best.
    top = min(high, 3 * low)
    pad = 0.08 * (top - low) or 0.05 * top
    axes.set_ylim(low - pad, top + pad)
    failed = [index[t.evaluation.candidate.id] for t in problem.trials if t.evaluation.status is not Status.OK]
    if failed:
        transform = axes.get_xaxis_transform()
        axes.scatter(
            failed, [1.0] * len(failed), s=18, color=VERMILION, marker="x", transform=transform, clip_on=False, label="failed"
        )
    if problem.baseline is not None:
        axes.axhline(latency_us(problem.baseline), color=ORANGE, linestyle=(0, (4, 3)), linewidth=1, label="fastest stock")
    axes.set_title(problem.title, fontsize=7, fontweight="normal", pad=8)
    axes.set_ylabel("µs")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="y")


def parameter_importance(run: RunSummary) -> dict[str, float]:
    """How much of the spread of the latencies each parameter explains by itself, from 0 to 1.

    For every problem and backend, the searched trials are grouped by the parameter's value, and the explained share of the
    variance of log latency is taken as omega squared: the one-way analysis of variance's estimate, which subtracts what
    groups of that size would explain by chance. The mean over problems is weighted by their number of trials. Interactions
    are not seen (a full fANOVA would need a model); a parameter that only matters together with another ranks low.
    """
    explained: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for problem in run.problems:
        groups: dict[str, list[tuple[Mapping[str, object], float]]] = defaultdict(list)
        for trial in problem.timed:
            candidate = trial.evaluation.candidate
            if trial.origin != "stock":
                groups[candidate.backend].append((candidate.config, log(latency_us(trial))))
        for trials in groups.values():
            for name in sorted({key for config, _ in trials for key in config}):
                by_value: dict[str, list[float]] = defaultdict(list)
                for config, value in trials:
                    by_value[str(config.get(name))].append(value)
                share = _omega_squared(list(by_value.values()))
                if share is not None:
                    explained[name].append((share, len(trials)))
    totals = {name: sum(s * n for s, n in found) / sum(n for _, n in found) for name, found in explained.items()}
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _omega_squared(groups: Sequence[Sequence[float]]) -> float | None:
    """None where there is nothing to compare: one group, no repeats, or no spread."""
    num, k = sum(len(g) for g in groups), len(groups)
    if k < 2 or num <= k:
        return None
    mean = sum(sum(g) for g in groups) / num
    between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups)
    total = sum((x - mean) ** 2 for g in groups for x in g)
    within = (total - between) / (num - k)
    return max(0.0, (between - (k - 1) * within) / (total + within)) if total + within > 0 else None


def importance_figure(run: RunSummary) -> Figure | None:
    """`parameter_importance` as bars."""
    shares = dict(list(parameter_importance(run).items())[:12])
    if not shares:
        return None
    figure = _figure(0.9 + 0.28 * len(shares))
    axes = figure.subplots()
    names = list(reversed(shares))
    bars = axes.barh(names, [100 * shares[n] for n in names], color=BLUE, height=0.62)
    axes.bar_label(bars, labels=[f" {100 * shares[n]:.0f} %" for n in names], color=INK, padding=2)
    axes.set_xlim(0, min(100, max(40, 125 * max(shares.values()))))
    axes.set_xlabel("% of the spread in latency explained by this parameter alone")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    return figure


def speedup_figure(run: RunSummary) -> Figure | None:
    """Confirmed speed-up over the strongest stock choice, with its confidence interval, of the hotspots with most to gain."""
    shown = [(p, p.finalist) for p in run.problems if p.finalist is not None][:_MAX_ROWS]
    if not shown:
        return None
    figure = _figure(1.1 + 0.34 * len(shown))
    axes = figure.subplots()
    seen = set()
    for y, (problem, final) in enumerate(reversed(shown)):
        assert final is not None
        s, colour = final.speedup, _VERDICT_COLOURS.get(problem.verdict, MUTED)
        label = problem.verdict if problem.verdict not in seen else None
        seen.add(problem.verdict)
        axes.plot([s.low, s.high], [y, y], color=colour, linewidth=3, solid_capstyle="butt", alpha=0.55)
        axes.plot([s.ratio], [y], "o", color=colour, markersize=7, label=label, linestyle="none")
        axes.annotate(f"{s.ratio:.2f}×", (s.high, y), xytext=(7, 0), textcoords="offset points", va="center", color=INK)
    axes.axvline(1.0, color=MUTED, linewidth=1.2)
    axes.set_yticks(range(len(shown)), [p.title for p, _ in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.margins(x=0.12)
    note = "times faster than the strongest stock choice (dot: median of paired ratios; bar: 95 % interval)"
    figure.supxlabel(note, fontsize=9, color=MUTED)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def scenarios_figure(run: RunSummary) -> Figure | None:
    """Before and after: one step of every scenario in every mode, end to end."""
    scenarios = run.validated.scenarios if run.validated is not None else ()
    if not scenarios:
        return None
    columns = 1 if len(scenarios) <= 3 else 2
    rows = ceil(len(scenarios) / columns)
    most = max(len(s.modes) for s in scenarios)
    figure = _figure(0.6 + rows * (0.55 + 0.27 * most))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, scenario in zip(grid.flat, scenarios, strict=False):
        _scenario_panel(axes, scenario, compact=columns > 1)
    for axes in grid.flat[len(scenarios) :]:
        axes.set_visible(False)
    figure.supxlabel("ms a step (median; whisker: interquartile spread)", fontsize=9, color=MUTED)
    return figure


def _scenario_panel(axes: Axes, scenario: ScenarioResult, compact: bool) -> None:
    modes = list(reversed(scenario.modes))
    times = [m.median_us / 1000 for m in modes]
    colours = [_MODE_COLOURS.get(m.mode, PURPLE) for m in modes]
    error = [m.spread_us / 2000 for m in modes]
    bars = axes.barh(
        [m.mode for m in modes], times, color=colours, height=0.7, xerr=error, error_kw={"ecolor": MUTED, "lw": 1.2}
    )
    axes.bar_label(bars, labels=[f"{t:.4g}{'' if compact else ' ms'}" for t in times], color=INK, padding=5)
    s = scenario.speedup
    gain = f"{s.ratio:.2f}× [{s.low:.2f}, {s.high:.2f}]"
    if compact:
        axes.set_title(f"{scenario.scenario}: {gain}", fontsize=8)
    else:
        axes.set_title(f"{scenario.scenario}: bundle {gain} over {scenario.best_stock}")
    axes.margins(x=0.2 if compact else 0.14)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)


FIGURES: Mapping[str, Callable[[RunSummary], Figure | None]] = {
    "end_to_end": scenarios_figure,
    "speedups": speedup_figure,
    "history": history_figure,
    "importance": importance_figure,
}


def write_plots(run: RunSummary, folder: Path | str) -> list[Path]:
    """Every figure the run has data for, as `<folder>/<name>.png`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        with _style(name):
            figure = draw(run)
            if figure is not None:
                paths.append(folder / f"{name}.png")
                figure.savefig(paths[-1], dpi=140, facecolor="white")
    return paths


def svg_plots(run: RunSummary) -> dict[str, str]:
    """Every figure the run has data for as an inline SVG element, by name.

    Its greys are `currentColor`, `var(--muted)` and `var(--line)` of the page, its background is transparent.
    """
    out = {}
    for name, draw in FIGURES.items():
        with _style(name):
            figure = draw(run)
            if figure is not None:
                buffer = io.StringIO()
                figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
                out[name] = _inline(buffer.getvalue(), name)
    return out


def _inline(document: str, name: str) -> str:
    """The <svg> element of a document: themed colours, width by the page, ids that do not clash with other figures'."""
    text = document[document.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for size in ("height", "width"):
        text = re.sub(rf'(<svg [^>]*?){size}="[^"]*"', r"\1", text, count=1)
    for colour, themed in _THEMED.items():
        text = text.replace(colour, themed)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    return text.replace("<svg ", f'<svg class="plot" role="img" aria-label="{name}" ', 1)
