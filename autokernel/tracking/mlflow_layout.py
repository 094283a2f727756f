"""How a run looks in MLflow: names, tags, parameters, rounded metrics and descriptions. Pure; needs no MLflow.

    experiment "<name> - <device name>"
        campaign   one per experiment run: end-to-end metrics, result tables, artifacts
            hotspot    one per problem: `best_latency_us` by step, speed-up with its interval
                trial      one per distinct candidate that came to an end (LOST ones are tried again and not shown)

`ak.kind` tells the three apart, `ak.run_id` holds one campaign together, `ak.key` names a run within it: these three
make mirroring idempotent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autokernel.events import EvalResult, Evaluated, Event, GraphTrial, ModelValidated, PlanTrial, Profiled, Proved, RunStarted
from autokernel.records import ConfigValue, Problem, Speedup, Status, digest_of
from autokernel.tracking.backends import backend_summaries, best_of_each
from autokernel.tracking.plans import plan_lines
from autokernel.tracking.summary import ProblemSummary, RunSummary, latency_us, rounded
from autokernel.tracking.titles import config_title, problem_title
from autokernel.tracking.views import ChartedTrials

MAX_NAME, MAX_TAG = 120, 5000
_STATUSES = {Status.OK: "FINISHED", Status.TIMEOUT: "KILLED", Status.CRASHED: "KILLED", Status.INVALID: "KILLED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One MLflow run to be."""

    key: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    status: str = "RUNNING"


def safe_key(name: str) -> str:
    """MLflow's alphabet for metric and parameter names."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def experiment_name(started: RunStarted) -> str:
    """A slash would be read as a folder."""
    return f"{started.name} - {started.environment.device_name}".replace("/", "-")


def campaign_spec(started: RunStarted) -> RunSpec:
    """The run that stands for the whole experiment run."""
    env = started.environment
    tags = {
        "ak.kind": "campaign",
        "ak.run_id": started.run_id,
        "ak.key": "campaign",
        "ak.status": "running",
        "ak.experiment_digest": started.experiment_digest,
        "ak.version": started.version,
        "ak.device": env.device_name,
        "ak.isa": env.isa,
        "ak.torch": env.torch,
        "ak.python": env.python,
        "ak.platform": env.platform,
        "mlflow.source.name": "autokernel run",
        "mlflow.source.type": "LOCAL",
        **{f"ak.lib.{name}": version for name, version in env.libraries.items()},
    }
    if started.git_commit:
        tags |= {"mlflow.source.git.commit": started.git_commit, "ak.git_commit": started.git_commit}
    if env.driver:
        tags["ak.driver"] = env.driver
    params = {"device": env.device, "isa": env.isa, "units": str(env.num_units), "torch": env.torch, "seed": str(started.seed)}
    return RunSpec(key="campaign", name=f"{started.name} {started.run_id}", tags=_cut(tags), params=params)


def problem_key(problem: Problem) -> str:
    """`ak.key` of a hotspot's run."""
    return digest_of(problem.key)


def hotspot_spec(summary: ProblemSummary, run_id: str) -> RunSpec:
    """The run of one problem, before anything was tried."""
    problem = summary.problem
    tags = {
        "ak.kind": "hotspot",
        "ak.run_id": run_id,
        "ak.key": problem_key(problem),
        "ak.status": "running",
        "ak.problem": problem.key,
        "ak.scenarios": ", ".join(summary.scenarios),
    }
    metrics = {
        "weight_pct": 100 * summary.weight,
        "attainable_gain_pct": 100 * sum(h.attainable_gain for h in summary.hotspots),
    }
    params = {"hotspot": summary.title, "op": problem.op, "dtype": problem.inputs[0].dtype if problem.inputs else ""}
    name = f"{summary.rank:02d} {summary.title}" if summary.hotspots else summary.title
    return RunSpec(key=problem_key(problem), name=name[:MAX_NAME], tags=_cut(tags), params=params, metrics=_finite(metrics))


def trial_spec(event: Evaluated, baseline_us: float | None, run_id: str) -> RunSpec:
    """The run of one candidate.

    Args:
        event: the trial; not LOST.
        baseline_us: the fastest stock choice of the same problem among the trials up to this one.
        run_id: the campaign's.
    """
    evaluation = event.evaluation
    candidate, status = evaluation.candidate, evaluation.status
    title = problem_title(candidate.problem)
    tags = {
        "ak.kind": "trial",
        "ak.run_id": run_id,
        "ak.key": candidate.id,
        "ak.status": status.value,
        "ak.backend": candidate.backend,
        "ak.hotspot": title,
        "ak.origin": event.origin,
        "mlflow.note.content": trial_note(event),
    }
    params = {"backend": candidate.backend, "origin": event.origin, "hotspot": title, "status": status.value}
    params |= {safe_key(name): str(value)[:MAX_TAG] for name, value in candidate.config.items()}
    metrics = {"trial": float(event.number), "build_s": evaluation.build_s, "total_s": evaluation.total_s}
    if evaluation.device_s:
        metrics["device_s"] = evaluation.device_s
    if evaluation.measurement is not None:
        metrics |= {"latency_us": evaluation.measurement.median_us, "spread_us": evaluation.measurement.spread_us}
        if baseline_us is not None:
            metrics["speedup"] = baseline_us / evaluation.measurement.median_us
    if evaluation.verdict is not None:
        used = [c.value / c.limit for c in evaluation.verdict.checks if c.limit > 0]
        if used:
            metrics["limit_used"] = max(used)
    return RunSpec(
        key=candidate.id,
        name=f"#{event.number:03d} {config_title(candidate)}"[:MAX_NAME],
        tags=_cut(tags),
        params=params,
        metrics=_finite(metrics),
        status=_STATUSES.get(status, "FAILED"),
    )


def hotspot_result(summary: ProblemSummary) -> tuple[dict[str, float], dict[str, str]]:
    """(metrics, tags) of what came of a problem: its verdict, whose kernel is used, how near the roofline that is."""
    values: dict[str, float] = {}
    used_us = summary.winner.winner_us if summary.verdict == "won" and summary.winner is not None else summary.baseline_us
    if summary.baseline_us is not None:
        values["baseline_us"] = summary.baseline_us
    for name, us in (("roofline_stock_pct", summary.baseline_us), ("roofline_pct", used_us)):
        part = summary.roofline_part(us)
        if part is not None:
            values[name] = 100 * part
    tags = {"ak.status": summary.verdict, "ak.used": summary.backend}
    if summary.rows is not None and summary.verdict == "won":
        values |= {"rows_min": float(summary.rows.held[0]), "rows_max": float(summary.rows.held[1])}
    if summary.runner_up is not None:
        other, factor = summary.runner_up
        values["runner_up_pct"] = 100 * (factor - 1)
        tags["ak.runner_up"] = other.evaluation.candidate.backend
    if summary.finalist is not None:
        values |= speedup_metrics("", summary.finalist.speedup)
        values |= {
            name.removeprefix("after_"): v for name, v in summary.finalist.conditions.items() if name.startswith("after_")
        }
    return _finite(values), tags


def campaign_totals(run: RunSummary) -> dict[str, float]:
    """What only the whole journal tells: counts, the means of scenarios, how busy the device was."""
    values = {"trials": float(len(run.trials)), "winners": float(len(run.winners))}
    values |= {f"trials.{name}": float(count) for name, count in run.statuses.items()}
    values |= {f"kernels.{row.scenario}.speedup": row.geometric_mean for row in run.by_scenario}
    if run.device_busy is not None:
        values["device_busy_pct"] = 100 * run.device_busy
    for name, (low, high) in run.conditions.items():
        values |= {f"{name}.min": low, f"{name}.max": high}
    if run.finished is not None:
        values["seconds"] = round(run.finished.seconds)
    return _finite(values)


def charted_trials(run: RunSummary, params: Sequence[str]) -> ChartedTrials | None:
    """The largest set of timed trials of one problem and backend that have the same parameters; None if there are none.

    Parameters that are the same in all of them are left out.

    Args:
        run: to choose from.
        params: all parameters, the most telling first.
    """
    groups: dict[tuple[str, str, frozenset[str]], list[Mapping[str, ConfigValue]]] = {}
    for problem in run.problems:
        for trial in problem.timed:
            candidate = trial.evaluation.candidate
            groups.setdefault((problem.title, candidate.backend, frozenset(candidate.config)), []).append(candidate.config)
    if not groups:
        return None
    (title, backend, names), configs = max(groups.items(), key=lambda item: (len(item[1]), len(item[0][2])))
    varied = {safe_key(name) for name in names if len({config[name] for config in configs}) > 1}
    return ChartedTrials(hotspot=title, backend=backend, params=tuple(name for name in params if name in varied))


def campaign_metrics(event: Event) -> dict[str, float]:
    """What an event adds to the campaign's metrics; empty for most."""
    values: dict[str, float] = {}
    match event:
        case Profiled():
            values = {f"profile.{name}_us": us for name, us in event.scenario_us.items()}
            values["machine.read_gb_per_s"] = event.read_gb_per_s
            values |= {f"machine.{dtype}_tflops": peak for dtype, peak in event.peak_tflops.items()}
        case GraphTrial():
            values = {"graph.score": event.score}
        case ModelValidated():
            for scenario in event.scenarios:
                values |= {f"e2e.{scenario.scenario}.{m.mode}_us": m.median_us for m in scenario.modes}
                values |= speedup_metrics(f"e2e.{scenario.scenario}.", scenario.speedup)
            if event.scenarios:
                logs = [math.log(s.speedup.ratio) for s in event.scenarios]
                values["e2e.speedup"] = math.exp(sum(logs) / len(logs))
            for result in event.evals:
                values |= _eval_metrics(result)
        case Proved():
            values = {
                "prove.hits": event.num_hits,
                "prove.entries": event.num_entries,
                "prove.compile_s": event.compile_s,
                "prove.stock_compile_s": event.stock_compile_s,
            }
    return _finite(values)


def speedup_metrics(prefix: str, speedup: Speedup) -> dict[str, float]:
    """A speed-up with both ends of its interval."""
    values = {"speedup": speedup.ratio, "speedup_low": speedup.low, "speedup_high": speedup.high}
    return _finite({prefix + name: value for name, value in values.items()})


def _eval_metrics(result: EvalResult) -> dict[str, float]:
    prefix = f"eval.{result.metric}"
    worse = 100 * result.worse_by
    # Six digits: a metric is compared with itself, and four would hide what the gate saw.
    return {f"{prefix}.stock": result.stock, f"{prefix}.bundle": result.bundle, f"{prefix}.worse_by_pct": worse}


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    digits = {name: 6 if name.startswith("eval.") else 4 for name in values}
    return {safe_key(k): rounded(float(v), digits[k]) for k, v in values.items() if math.isfinite(v)}


def _cut(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value if len(value) <= MAX_TAG else value[: MAX_TAG - 1] + "…" for name, value in tags.items()}


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in rows)])


def _interval(speedup: Speedup) -> str:
    return f"{speedup.ratio:.3f}× [{speedup.low:.3f}, {speedup.high:.3f}]"


def _behind(ratio: float | None) -> str:
    return f"{100 * (ratio - 1):+.1f} %" if ratio is not None else "–"


def experiment_note(started: RunStarted) -> str:
    """The description above the table of runs."""
    return (
        f"**{started.name}** on {started.environment.device_name}. The saved views (button *Views*, or the links that "
        f"`autokernel ui` prints) show results, hotspots and trials; the campaign run holds `report.html` and the bundle."
    )


def campaign_note(run: RunSummary) -> str:
    """The result, as Markdown."""
    parts = [run.sentence]
    rows: list[tuple[object, ...]] = []
    for p in run.problems:
        final = p.finalist
        baseline = f"{p.baseline_us:.4g}" if p.baseline_us is not None else "–"
        winner = f"{p.winner.winner_us:.4g}" if p.winner is not None else "–"
        gain = _interval(final.speedup) if final is not None else "–"
        parts_of = [p.roofline_part(us) for us in (p.baseline_us, p.winner.winner_us if p.winner is not None else None)]
        near = " → ".join(f"{100 * part:.0f}" for part in parts_of if part is not None)
        used = p.backend if p.trials else ""
        rows.append((p.title, f"{100 * p.weight:.1f} %", len(p.trials), baseline, winner, gain, near, used, p.verdict))
    head = ("hotspot", "weight", "trials", "stock µs", "winner µs", "speed-up [95 %]", "% of roofline", "used", "verdict")
    parts += ["#### Hotspots", _table(head, rows)] if rows else []
    rows = [(r.scenario, r.num_searched, r.num_won, f"{r.geometric_mean:.3f}×") for r in run.by_scenario]
    head_of_scenarios = ("scenario", "searched", "won", "geometric mean over stock")
    parts += ["#### Kernels by scenario", _table(head_of_scenarios, rows)] if rows else []
    rows = [(b.backend, b.num_timed, b.num_used, _behind(b.lead), _behind(b.behind)) for b in backend_summaries(run)]
    head_of_backends = ("backend", "problems timed", "used for", "runner-up takes", "elsewhere it takes")
    parts += ["#### Backends", _table(head_of_backends, rows)] if len(rows) > 1 else []
    rows = [_plan_row(run, trial) for trial in run.plan_trials]
    head_of_plans = ("scenario", "plan", "proposed by", "should save µs", "over the one to beat [95 %]", "chosen")
    parts += ["#### Plans", _table(head_of_plans, rows)] if rows else []
    if run.validated is not None:
        scenarios = run.validated.scenarios
        modes = list(dict.fromkeys(m.mode for s in scenarios for m in s.modes))
        times = [{m.mode: f"{m.median_us:.4g}" for m in s.modes} for s in scenarios]
        rows = [
            (s.scenario, *(by_mode.get(m, "–") for m in modes), f"{_interval(s.speedup)} over {s.best_stock}")
            for s, by_mode in zip(scenarios, times, strict=True)
        ]
        parts += ["#### End to end, µs a step", _table(("scenario", *modes, "bundle over best stock [95 %]"), rows)]
        rows = [
            (e.metric, f"{e.stock:.6g}", f"{e.bundle:.6g}", f"{100 * e.worse_by:+.3f} %", f"{100 * e.limit:.2g} %")
            for e in run.validated.evals
        ]
        parts += ["#### Quality", _table(("metric", "stock", "bundle", "worse by", "limit"), rows)] if rows else []
    if run.exported is not None:
        parts.append(f"Bundle `{run.exported.folder}`, {run.exported.num_entries} entries, digest `{run.exported.digest}`.")
    return "\n\n".join(parts)


def _plan_row(run: RunSummary, trial: PlanTrial) -> tuple[object, ...]:
    gain = _interval(trial.speedup) if trial.speedup is not None else "–"
    chosen = "yes" if trial.accepted else ""
    return trial.scenario, "; ".join(plan_lines(run, trial)), trial.origin, f"{trial.saved_us:.4g}", gain, chosen


def hotspot_note(p: ProblemSummary) -> str:
    """What was found about one problem, as Markdown."""
    parts = [f"`{p.problem.key}`", f"**{p.verdict}**" + (f": {p.reason}" if p.reason else "")]
    if p.rows_held:
        parts.append(f"The winner {p.rows_held}.")
    if p.against_max_autotune:
        parts.append(f"Confirmed: {p.against_max_autotune}.")
    if p.hotspots:
        head = ("scenario", "calls", "µs a step", "share", "roofline µs", "sites")
        rows: list[tuple[object, ...]] = [
            (
                h.scenario,
                h.num_calls,
                f"{h.time_us:.4g}",
                f"{100 * h.share:.1f} %",
                f"{h.roofline_us:.4g}",
                ", ".join(h.sites[:3]),
            )
            for h in p.hotspots
        ]
        parts.append(_table(head, rows))
    best = best_of_each(p)
    if len(best) > 1:
        rows = [(name, config_title(b.candidate), f"{b.us:.4g}", _behind(b.behind)) for name, b in best.items()]
        parts += [f"Of each backend, as screened ({p.backend} is used):", _table(("backend", "kernel", "µs", "takes"), rows)]
    fastest = sorted(p.timed, key=latency_us)[:5]
    if fastest:
        rows = [(f"#{e.number}", config_title(e.evaluation.candidate), f"{latency_us(e):.4g}", e.origin) for e in fastest]
        parts += ["Fastest as screened:", _table(("trial", "candidate", "µs", "proposed by"), rows)]
    return "\n\n".join(parts)


def trial_note(event: Evaluated) -> str:
    """One candidate, as Markdown: its checks, or why it failed."""
    evaluation = event.evaluation
    parts = [f"`{evaluation.candidate.label}` for `{evaluation.candidate.problem.key}`"]
    if evaluation.message:
        parts.append(f"**{evaluation.status}**: {evaluation.message}")
    if evaluation.measurement is not None:
        m = evaluation.measurement
        parts.append(f"{m.median_us:.4g} µs (spread {m.spread_us:.2g}, {m.num_samples} samples; {m.regime})")
    if evaluation.verdict is not None:
        rows: list[tuple[object, ...]] = [
            (c.name, f"{c.value:.3g}", f"{c.limit:.3g}", "yes" if c.passed else "**no**") for c in evaluation.verdict.checks
        ]
        parts.append(_table(("check", "value", "limit", "holds"), rows))
    if evaluation.log_tail:
        parts.append("```\n" + evaluation.log_tail[-1500:] + "\n```")
    return "\n\n".join(parts)
