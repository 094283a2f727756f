"""Tables of results, made to be read at 100 columns and up, on a terminal or in a pipe."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autokernel.display.layout import Row, detailed_table, spaced, table
from autokernel.display.results import HotspotRow, graph_options, hotspot_rows, scenario_options
from autokernel.display.words import duration, failures, microseconds, percent, ratio
from autokernel.events import ModelValidated, ScenarioResult
from autokernel.records import Hotspot
from autokernel.tracking.backends import backend_summaries
from autokernel.tracking.journal import bundle_folder
from autokernel.tracking.plans import plan_lines
from autokernel.tracking.summary import ProblemSummary, RunSummary
from autokernel.tracking.titles import config_title, problem_title, with_titles

MAX_UNSEARCHED = 4  # rows of hotspots that nobody searched
REPORT_NAME = "report.html"

_STYLES = {"won": "bold green", "dropped": "yellow", "stock": "", "searched": "cyan", "not searched": "dim"}


def heading(summary: RunSummary) -> Text:
    """Which run this is, and on what."""
    environment = summary.started.environment
    units = "threads" if environment.device == "cpu" else "multiprocessors"
    where = f"{environment.device_name}, {environment.isa}, {environment.num_units} {units}, torch {environment.torch}"
    text = Text.assemble((summary.started.name, "bold"), " ", (f"run {summary.started.run_id}", "cyan"))
    if summary.num_resumes:
        text.append(f" (resumed {summary.num_resumes}×)", "dim")
    text.append(f"\n{where}", "dim")
    return text


def profile_table(summary: RunSummary, limit: int = 20) -> RenderableType:
    """Hotspots ranked by what could be gained, with the roofline they are measured against."""
    profiled = summary.profiled
    if profiled is None:
        return Text("Not profiled yet.")
    shown = table(
        ("#", "right"), ("scenario", "fold"), ("problem (M×N×K)", "fold"), ("calls", "right"), ("us", "right"),
        ("share", "right"), ("roofline us", "right"), ("could gain", "right"), ("between", "fold"), title="Hotspots",
    )  # fmt: skip
    ranked = sorted(profiled.hotspots, key=lambda h: -h.attainable_gain)
    for rank, hotspot in enumerate(ranked[:limit], start=1):
        shown.add_row(
            str(rank),
            hotspot.scenario,
            problem_title(hotspot.problem),
            str(hotspot.num_calls),
            f"{'~' if hotspot.estimated else ''}{microseconds(hotspot.time_us)}",
            percent(hotspot.share),
            microseconds(hotspot.roofline_us),
            percent(hotspot.attainable_gain),
            Text(_neighbours(hotspot), style="dim"),
        )
    steps = ", ".join(f"{name} {microseconds(us)} us" for name, us in profiled.scenario_us.items())
    peaks = ", ".join(f"{dtype} {tflops:.3g} TFLOP/s" for dtype, tflops in profiled.peak_tflops.items())
    layers = profiled.layers
    part = f", reckoned from captures of {layers // 2} and {layers} layers" if layers is not None else ""
    notes = [f"One step: {steps}{part}.", f"Ceilings: {profiled.read_gb_per_s:.3g} GB/s read, {peaks}."]
    notes.append("us and share are of one step of the scenario; could gain is of all scenarios together, at the roofline.")
    if any(hotspot.estimated for hotspot in ranked[:limit]):
        notes.append("~: the roofline and one kernel's launch; the search times what the compiler makes of it.")
    if len(ranked) > limit:
        notes.insert(0, f"{len(ranked) - limit} smaller ones are not shown (--json has them).")
    return Group(shown, Text("\n".join(["", *notes]), style="dim"))


def _neighbours(hotspot: Hotspot) -> str:
    """`silu → · → add`: what feeds it and what uses it, by the last part of each name."""
    before, after = (
        "/".join(dict.fromkeys(_op_name(name) for name in names[:2])) for names in (hotspot.producers, hotspot.consumers)
    )
    return f"{before or '?'} → {after or '?'}" if before or after else ""


def _op_name(target: str) -> str:
    parts = [part for part in target.split(".") if part not in ("default", "Tensor", "Scalar")]
    return parts[-1] if parts else target


def search_table(summary: RunSummary) -> RenderableType:
    """The best candidate of each searched hotspot as screened: before it was confirmed."""
    rows: list[Row] = []
    for row in hotspot_rows(summary):
        if row.num_trials:
            best = row.candidate_us if row.candidate is not None else row.baseline_us
            gain = Text(f"{row.screened:.2f}×", "green" if row.screened > 1 else "") if row.screened else ""
            label = config_title(row.candidate) if row.candidate is not None else "stock is the fastest"
            cells = [row.problem, str(row.num_trials), _us(row.baseline_us), _us(best), gain]
            rows.append((cells, Text(f"{', '.join(row.scenarios)}: {label}", "dim")))
    if not rows:
        return Text("Nothing was searched yet.")
    columns = ("problem (M×N×K)", ("trials", "right"), ("stock us", "right"), ("best us", "right"), ("screened", "right"))
    return Group(detailed_table(*columns, rows=rows, title="Search"), Text(f"\n{_search_note(summary)}", style="dim"))


def _search_note(summary: RunSummary) -> str:
    failed = failures(summary.statuses)
    seconds = summary.stage_seconds.get("search")
    time = f" in {duration(seconds)}" if seconds else ""
    return f"{len(summary.trials)} candidates{time}{f'; failed: {failed}' if failed else ', none failed'}."


def hotspot_table(summary: RunSummary) -> RenderableType:
    """Per hotspot: the baseline, the winner, the speed-up with its interval, the verdict."""
    found = hotspot_rows(summary)
    others = [row for row in found if not row.num_trials]
    rows: list[Row] = []
    for row in (*(r for r in found if r.num_trials), *others[:MAX_UNSEARCHED]):
        share = percent(row.share) if row.share else ""
        verdict = Text(row.verdict, _STYLES[row.verdict])
        cells = [row.problem, share, _us(row.baseline_us), _us(row.candidate_us), _speedup(row), verdict]
        rows.append((cells, _detail(row)))
    columns = (
        "problem (M×N×K)", ("share", "right"), ("stock us", "right"), ("us", "right"), "speed-up [95 %]", "verdict",
    )  # fmt: skip
    shown = detailed_table(*columns, rows=rows, title="Hotspots")
    notes = [_search_note(summary)] if summary.trials else []
    if len(others) > MAX_UNSEARCHED:
        rest = sum(row.share for row in others[MAX_UNSEARCHED:])
        notes.append(f"{len(others) - MAX_UNSEARCHED} more hotspots ({percent(rest)} of the time) were not searched.")
    options, parts = graph_options(summary), scenario_options(summary)
    if options:
        notes.append("Graph options on top: " + _spelled(options) + ".")
    elif parts:
        notes.append("Graph options on top: " + "; ".join(f"{name} {_spelled(own)}" for name, own in parts.items()) + ".")
    elif "graph" in summary.stage_seconds and summary.graph_trials:
        notes.append(f"Graph options: none of {len(summary.graph_trials)} sets helped.")
    return Group(shown, Text("\n".join(["", *notes]), style="dim"))


def _spelled(options: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def kernels_table(summary: RunSummary) -> RenderableType:
    """By scenario: how many kernels won, by how much, whose they are, and how near they are to the roofline."""
    shown = table(
        ("scenario", "fold"), ("searched", "right"), ("won", "right"), ("geo. mean", "right"), ("used", "fold"),
        ("of the roofline", "right"), title="Kernels by scenario",
    )  # fmt: skip
    for row in summary.by_scenario:
        mine = [p for p in summary.problems if p.trials and row.scenario in p.scenarios]
        used = Counter(p.backend or "stock" for p in mine)
        shown.add_row(
            row.scenario,
            str(row.num_searched),
            str(row.num_won),
            f"{row.geometric_mean:.3f}×",
            ", ".join(f"{name} {count}" for name, count in used.most_common()),
            _roofline(mine),
        )
    return Group(shown, Text("\n".join(["", *_machine_notes(summary)]), style="dim"))


def backends_table(summary: RunSummary) -> RenderableType:
    """Which backend is used for how many problems, and by how much the others lost."""
    shown = table(
        "backend", ("timed", "right"), ("used", "right"), ("runner-up takes", "right"), ("elsewhere it takes", "right"),
        title="Backends",
    )  # fmt: skip
    for row in backend_summaries(summary):
        shown.add_row(row.backend, str(row.num_timed), str(row.num_used), _behind(row.lead), _behind(row.behind))
    note = "In problems, as screened. runner-up: of those it is used for; elsewhere: over the kernel that is used there."
    return Group(shown, Text(f"\n{note}", style="dim"))


def _behind(ratio: float | None) -> str:
    return f"{100 * (ratio - 1):+.1f} %" if ratio is not None else ""


def _roofline(problems: Sequence[ProblemSummary]) -> str:
    """`72 → 83 %`: stock and what is used now, of problems for which both are known, by their part of the time."""
    least = stock = now = 0.0
    for problem in problems:
        before = problem.roofline_part(problem.baseline_us)
        won = problem.winner if problem.verdict == "won" else None
        after = problem.roofline_part(won.winner_us) if won is not None else before
        if before and after:
            least, stock, now = least + problem.weight, stock + problem.weight / before, now + problem.weight / after
    return f"{100 * least / stock:.0f} → {100 * least / now:.0f} %" if least else ""


def _machine_notes(summary: RunSummary) -> list[str]:
    """The state of a GPU while confirming, and how busy the search kept it; nothing where nobody knows."""
    notes = ["geo. mean: speed-up over stock of what was searched; of the roofline: stock → used."]
    units = {"clock_mhz": "MHz", "power_w": "W", "temperature_c": "°C"}
    seen = [
        f"{low:,.0f}{f'–{high:,.0f}' if round(high) > round(low) else ''} {units[name]}"
        for name, (low, high) in summary.conditions.items()
        if name in units
    ]
    if seen:
        notes.append(f"While confirming: {', '.join(seen)}.")
    if summary.device_busy is not None:
        notes.append(f"The device was busy for {100 * summary.device_busy:.0f} % of the search.")
    return notes


def _detail(row: HotspotRow) -> Text:
    """Where the problem occurs and which kernel is meant; why it is not used, if it is not."""
    text = Text(", ".join(row.scenarios), "dim")
    if row.candidate is not None:
        text.append(f": {config_title(row.candidate)}", "default" if row.verdict in ("won", "searched") else "dim")
    if row.rows_held:
        text.append(f"; {row.rows_held}", "dim")
    if row.against_max_autotune:
        text.append(f"; {row.against_max_autotune}", "dim")
    if row.why and row.verdict != "won":
        text.append(f"; {row.why}", "yellow" if row.verdict == "dropped" else "dim")
    return text


def _speedup(row: HotspotRow) -> str | Text:
    if row.speedup is not None:
        return Text(ratio(row.speedup), style=_STYLES["won"] if row.verdict == "won" else "dim")
    if row.screened is not None and row.verdict == "searched":
        return Text(f"{row.screened:.2f}× screened", style="dim")
    return ""


def _us(value: float | None) -> str:
    return microseconds(value) if value is not None else ""


def scenario_table(scenarios: Iterable[ScenarioResult], *, best_word: str = "best stock") -> Table:
    """End-to-end times of one step in every mode, and the speed-up over the best stock mode."""
    scenarios = list(scenarios)
    modes = list(dict.fromkeys(mode.mode for result in scenarios for mode in result.modes))
    shown = table(
        ("scenario", "fold"), *((mode, "right") for mode in modes), (f"over {best_word} [95 %]", "left"), ("verdict", "fold"),
        title="End to end, us per step",
    )  # fmt: skip
    for result in scenarios:
        times = {mode.mode: mode.median_us for mode in result.modes}
        cells = [Text(_us(times.get(mode)), style="bold" if mode in (result.best_stock, "bundle") else "") for mode in modes]
        gained = result.speedup.low > 1
        style = "bold green" if gained else "" if result.passed else "red"
        fine = "eager is faster" if result.behind_eager else "not slower"
        verdict = "faster" if gained else fine if result.passed else "slower"
        shown.add_row(result.scenario, *cells, Text(f"{ratio(result.speedup)} {result.best_stock}", style=style), verdict)
    return shown


def eval_table(validated: ModelValidated) -> Table:
    """The model's own metric with stock code and with the bundle."""
    shown = table(
        "metric", ("stock", "right"), ("bundle", "right"), ("worse by", "right"), ("at most", "right"), ("limit", "right"),
        ("samples", "right"), "verdict", title="Quality",
    )  # fmt: skip
    for result in validated.evals:
        shown.add_row(
            result.metric,
            f"{result.stock:.5g}",
            f"{result.bundle:.5g}",
            f"{result.worse_by:+.3%}",
            f"{result.worse_by_high:+.3%}",
            f"{result.limit:.3%}",
            str(result.num_samples),
            Text("within its limit", style="green") if result.passed else Text("worse", style="red"),
        )
    return shown


def _checks(validated: ModelValidated) -> Text:
    failed = validated.verdict.failures
    if not validated.verdict.checks:
        return Text()
    if not failed:
        return Text(f"The whole model is equivalent to stock; checks passed: {len(validated.verdict.checks)}.", "dim")
    lines = [f"{check.name}: {check.value:.4g}, limit {check.limit:.4g} {check.note}".rstrip() for check in failed]
    return Text("The model did not pass: " + "; ".join(lines), style="red")


def result_view(summary: RunSummary, folder: Path, runs_folder: Path) -> RenderableType:
    """Everything that is known of a run, best first: for `run` and `show`, of a finished run or one under way."""
    parts: list[RenderableType] = [heading(summary)]
    if summary.problems:
        parts.append(hotspot_table(summary) if summary.trials else profile_table(summary))
        if summary.by_scenario and "confirm" in summary.stage_seconds:
            parts.append(kernels_table(summary))
            if len(summary.backends) > 1:
                parts.append(backends_table(summary))
        if summary.plan_trials:
            parts.append(plan_table(summary))
    if summary.scenarios:
        parts.append(scenario_table(summary.scenarios))
    if summary.validated is not None:
        if summary.validated.evals:
            parts.append(eval_table(summary.validated))
        parts.append(_checks(summary.validated))
        if summary.validated.dropped:
            parts.append(_dropped(summary))
    parts.append(places(summary, folder, runs_folder))
    return spaced(parts)


def plan_table(summary: RunSummary) -> RenderableType:
    """Which fusions were tried together where they exclude each other, and with which configs."""
    shown = table(
        ("scenario", "fold"), ("plan", "fold"), ("by", "fold"), ("should save us", "right"), ("over the best [95 %]", "right"),
        ("verdict", "fold"), title="Plans",
    )  # fmt: skip
    for trial in summary.plan_trials:
        speedup = ratio(trial.speedup) if trial.speedup is not None else ""
        plan = Text("\n".join(plan_lines(summary, trial)))
        verdict = Text("chosen", "bold green") if trial.accepted else Text("")
        shown.add_row(trial.scenario, plan, trial.origin, microseconds(trial.saved_us), speedup, verdict)
    return shown


def _dropped(summary: RunSummary) -> RenderableType:
    assert summary.validated is not None
    problems = [item.problem for item in summary.problems]
    shown = table(("dropped", "fold"), ("why", "fold"), title="Winners that the whole model refused")
    for key, why in summary.validated.dropped.items():
        shown.add_row(with_titles(key, problems), Text(with_titles(why, problems), style="yellow"))
    return shown


def outcome_line(summary: RunSummary) -> Text:
    """How the run ended, in a sentence."""
    finished = summary.finished
    if finished is None:
        done = ", ".join(summary.stage_seconds) or "nothing"
        return Text(f"Unfinished; done so far: {done}. `autokernel run` of the same experiment goes on from here.", "yellow")
    style = {"won": "bold green", "stock": "bold", "failed": "bold red"}.get(finished.outcome, "yellow")
    return Text(f"{finished.message} ({duration(finished.seconds)})", style)


def places(summary: RunSummary, folder: Path, runs_folder: Path) -> RenderableType:
    """The verdict, where things lie, and the commands that go on from here."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    if summary.exported is not None:
        bundle = bundle_folder(folder, summary.exported)
        num = summary.exported.num_entries
        kind = "changes nothing" if summary.exported.stock else f"{num} {'entry' if num == 1 else 'entries'}"
        here = bundle.is_dir()
        grid.add_row("bundle", f"{bundle} ({kind})" + ("" if here else " (not here)"))
        if here:
            grid.add_row("use it", f'torch.compile(model, backend=autokernel.backend("{bundle}"))')
    proved = summary.proved
    if proved is not None:
        hits = f"{proved.num_hits} of {proved.num_entries} entries hit, {proved.num_benchmarks} kernels benchmarked"
        # production's whole first compilation is measured by benchmarks/compile_time.py, in processes of their own
        times = f"compiled in {proved.compile_s:.1f} s (stock {proved.stock_compile_s:.1f} s, by turns in one process)"
        if proved.constant_bytes:
            times += f", {proved.constant_bytes / 1e6:,.0f} MB of weights copied into constants"
        said = f"{hits}, {times}" if proved.passed else f"failed: {proved.message}"
        grid.add_row("fresh process", Text(said, style="" if proved.passed else "red"))
    if (folder / REPORT_NAME).exists():
        grid.add_row("report", str(folder / REPORT_NAME))
    grid.add_row("run folder", str(folder))
    grid.add_row("MLflow", Text(f"autokernel ui --runs {shlex.quote(str(runs_folder))}", style="bold"))
    return Group(outcome_line(summary), grid)
