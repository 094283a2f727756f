"""The report of a run: one HTML file that needs nothing else, readable in a light and in a dark room."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from autokernel.events import Event
from autokernel.records import Speedup
from autokernel.tracking.plans import plan_lines
from autokernel.tracking.plots import parameter_importance, svg_plots
from autokernel.tracking.summary import ProblemSummary, RunSummary, latency_us, summarize
from autokernel.tracking.titles import config_title

_PLOT_TITLES = {
    "history": "How the search went",
    "importance": "What mattered",
    "speedups": "Speed-up per hotspot",
    "end_to_end": "Before and after",
}


def write_report(events: Iterable[Event], path: Path | str) -> Path:
    """Write the report of a run, finished or not.

    Args:
        events: a journal's.
        path: of the HTML file; replaced in one go, so that a browser never sees half of it.

    Raises:
        ValueError: there is no RunStarted among the events.
        OSError: the file cannot be written.
    """
    path = Path(path)
    html = render_report(summarize(events))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(html, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def render_report(run: RunSummary) -> str:
    """The HTML of the report."""
    import jinja2

    loader = jinja2.PackageLoader("autokernel.tracking", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "us": format_us,
        "interval": format_interval,
        "interval3": functools.partial(format_interval, digits=3),
        "pct": format_pct,
        "dur": format_seconds,
        "config": config_title,
        "plan": lambda trial: plan_lines(run, trial),
    }
    template = environment.get_template("report.html")
    return template.render(
        run=run,
        env=run.started.environment,
        plots=dict.fromkeys(_PLOT_TITLES, "") | svg_plots(run),
        titles=_PLOT_TITLES,
        importance=parameter_importance(run),
        searched=[p for p in run.problems if p.trials],
        unsearched=[p for p in run.problems if not p.trials],
        trials=sorted((row for p in run.problems for row in _trial_rows(p)), key=lambda row: row["number"]),
        regimes=_regimes(run),
        modes=list(dict.fromkeys(m.mode for s in run.validated.scenarios for m in s.modes)) if run.validated else [],
        facts=_facts(run),
        machine=_machine(run),
    )


def _trial_rows(problem: ProblemSummary) -> Iterator[dict[str, Any]]:
    """Every trial of a problem as a row; its speed-up is over the fastest stock choice, as screened."""
    baseline_us = latency_us(problem.baseline) if problem.baseline is not None else None
    for trial in problem.trials:
        evaluation = trial.evaluation
        us = latency_us(trial) if evaluation.measurement is not None else None
        yield {
            "number": trial.number,
            "title": problem.title,
            "backend": evaluation.candidate.backend,
            "config": config_title(evaluation.candidate).partition(" ")[2],
            "origin": trial.origin,
            "status": evaluation.status.value,
            "us": us,
            "spread_us": evaluation.measurement.spread_us if evaluation.measurement is not None else None,
            "speedup": baseline_us / us if us is not None and baseline_us is not None else None,
            "message": evaluation.message,
            "total_s": evaluation.total_s,
        }


def _machine(run: RunSummary) -> dict[str, str]:
    """What the machine was doing while numbers were taken."""
    units = {
        "clock_mhz": ("Clock", "MHz"),
        "power_w": ("Power", "W"),
        "temperature_c": ("Temperature", "°C"),
        "load": ("Load", ""),
    }
    facts = {}
    for name, (low, high) in run.conditions.items():
        word, unit = units.get(name, (name, ""))
        least, most = (f"{value:,.0f}" if unit else f"{value:.1f}" for value in (low, high))
        facts[f"{word} while confirming"] = f"{least if least == most else f'{least} to {most}'} {unit}".rstrip()
    races = [p.finalist.speedup for p in run.problems if p.finalist is not None]
    if races:
        rounds, lost = sum(s.num_rounds for s in races), sum(s.num_discarded for s in races)
        facts["Paired rounds"] = f"{rounds:,} over {len(races)} hotspots, {lost:,} discarded because the baseline drifted"
    if run.device_busy is not None:
        facts["Device busy during the search"] = f"{100 * run.device_busy:.0f} % (builds go on beside it)"
    return facts


def _regimes(run: RunSummary) -> list[str]:
    """How candidates were screened; what differs only in the calls of a sample is one line."""
    calls: dict[str, list[int]] = {}
    for trial in run.trials:
        measurement = trial.evaluation.measurement
        if measurement is not None:
            found = re.fullmatch(r"(.*?)(?:, (\d+) calls a sample)?", measurement.regime, re.DOTALL)
            assert found is not None
            calls.setdefault(found[1], []).extend([int(found[2])] if found[2] else [])
    lines = []
    for regime, counts in sorted(calls.items()):
        span = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}" if counts else ""
        lines.append(f"{regime}, {span} calls a sample" if counts else regime)
    return lines


def _facts(run: RunSummary) -> dict[str, str]:
    """What a reader needs to know where the numbers come from."""
    env, started = run.started.environment, run.started
    units = "threads" if env.device == "cpu" else "multiprocessors"
    facts = {
        "Device": f"{env.device_name} ({env.device}, {env.isa}, {env.num_units} {units})",
        "torch": env.torch,
        "Python": env.python,
        "Platform": env.platform,
        "Driver": env.driver,
        **dict(env.libraries),
        "autokernel": started.version,
        "git commit": started.git_commit,
        "Seed": str(started.seed),
        "Run": started.run_id + (f", resumed {run.num_resumes}×" if run.num_resumes else ""),
        "Experiment digest": started.experiment_digest,
        "Environment digest": env.digest,
    }
    if run.profiled is not None:
        facts["Measured read bandwidth"] = f"{run.profiled.read_gb_per_s:.4g} GB/s"
        peaks = (f"{dtype} {peak:.4g} TFLOP/s" for dtype, peak in run.profiled.peak_tflops.items())
        facts["Measured peaks"] = ", ".join(peaks)
    if run.exported is not None:
        facts["Bundle"] = f"{run.exported.folder} ({run.exported.num_entries} entries, digest {run.exported.digest})"
    return {name: value for name, value in facts.items() if value}


def format_us(value: float | None, digits: int = 4) -> str:
    """Microseconds with that many digits, as ms from 10,000 on."""
    if value is None:
        return "–"
    number, unit = (value / 1000, "ms") if value >= 10_000 else (value, "µs")
    return f"{f'{number:#.{digits}g}'.rstrip('.')}\u00a0{unit}"


def format_interval(speedup: Speedup, digits: int = 2) -> str:
    """`1.31× [1.29, 1.33]`."""
    return f"{speedup.ratio:.{digits}f}× [{speedup.low:.{digits}f}, {speedup.high:.{digits}f}]"


def format_pct(value: float, digits: int = 1) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.{digits}f}\u00a0%"


def format_seconds(value: float) -> str:
    """`4 min 28 s`."""
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{value:.1f} s"
