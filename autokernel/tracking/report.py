"""The report of a run: one HTML file that needs nothing else, readable in a light and in a dark room."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autokernel.events import Event
from autokernel.records import Evaluation, Speedup
from autokernel.tracking.plots import parameter_importance, svg_plots
from autokernel.tracking.summary import ProblemSummary, RunSummary, summarize

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
    environment.filters |= {"us": format_us, "interval": format_interval, "pct": format_pct, "dur": format_seconds}
    template = environment.get_template("report.html")
    return template.render(
        run=run,
        env=run.started.environment,
        plots=dict.fromkeys(_PLOT_TITLES, "") | svg_plots(run),
        titles=_PLOT_TITLES,
        importance=parameter_importance(run),
        trials=[_trial_row(run, t.evaluation, t.origin, t.number) for t in run.trials],
        regimes=sorted({t.evaluation.measurement.regime for t in run.trials if t.evaluation.measurement is not None}),
        modes=list(dict.fromkeys(m.mode for s in run.validated.scenarios for m in s.modes)) if run.validated else [],
        facts=_facts(run),
        notes={p.problem.key: _short_reason(p) for p in run.problems},
    )


def _trial_row(run: RunSummary, evaluation: Evaluation, origin: str, number: int) -> dict[str, Any]:
    problem = next(p for p in run.problems if p.problem.key == evaluation.candidate.problem.key)
    baseline_us, measurement = problem.baseline, evaluation.measurement
    speedup = None
    if measurement is not None and baseline_us is not None and baseline_us.evaluation.measurement is not None:
        speedup = baseline_us.evaluation.measurement.median_us / measurement.median_us
    return {
        "number": number,
        "rank": problem.rank,
        "title": problem.title,
        "backend": evaluation.candidate.backend,
        "config": "  ".join(f"{k}={v}" for k, v in sorted(evaluation.candidate.config.items())),
        "origin": origin,
        "status": evaluation.status.value,
        "us": measurement.median_us if measurement is not None else None,
        "spread_us": measurement.spread_us if measurement is not None else None,
        "speedup": speedup,
        "message": evaluation.message,
        "total_s": evaluation.total_s,
    }


def _short_reason(problem: ProblemSummary) -> str:
    return problem.reason if problem.verdict != "won" else ""


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


def format_us(value: float | None) -> str:
    """Microseconds with four digits, as ms from 10,000 on."""
    if value is None:
        return "–"
    return f"{value / 1000:.4g}\u00a0ms" if value >= 10_000 else f"{value:.4g}\u00a0µs"


def format_interval(speedup: Speedup) -> str:
    """`1.31× [1.29, 1.33]`."""
    return f"{speedup.ratio:.2f}× [{speedup.low:.2f}, {speedup.high:.2f}]"


def format_pct(value: float, digits: int = 1) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.{digits}f}\u00a0%"


def format_seconds(value: float) -> str:
    """`4 min 28 s`."""
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{value:.1f} s"
