"""Results of runs on a GPU as Markdown: of one run or of several side by side; older files have fewer tables. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_gemms import CUBLAS, PICK, PICKS, STOCK
from run_where import KINDS

from autokernel.evaluate.modes import BUNDLE

_SMALL, _MEDIUM = (1, 16), (64, 128)  # rows: where the targets for GEMMs lie
_PROMPT = 2048  # rows from which on a product is one of a prompt
_ORDER = ("shipped", "won alone", "unused", "dropped", "lost", "refused")
_AGAINST = {
    "over_cublas": "cuBLAS",
    "over_max_autotune": "max-autotune's picks",
    "over_max_autotune_apart": "max-autotune's picks for the model's own products",
}
_CUBLAS, _CUTE = "aten", "cutedsl"  # backends


def ratio(speedup: Mapping[str, Any] | None) -> str:
    return f"{speedup['ratio']:.3f} [{speedup['low']:.3f}, {speedup['high']:.3f}]" if speedup else ""


def gemm_table(gemms: Iterable[Mapping[str, Any]]) -> str:
    """Per GEMM: times in every way, the bundle's speed-ups, and how much of the roofline it reaches."""
    head = ["GEMM", "N×K", "M", "cuBLAS us", "stock us", "max-autotune's pick us", "its picks apart us", "bundle us"]
    head += ["over cuBLAS [95 %]", "over max-autotune's pick [95 %]", "of the roofline", "cuBLAS of it", "entry"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in gemms:
        if "failure" in row:
            lines.append(f"| {row['gemm']} | | {row['m']} | failed: {row['failure'].splitlines()[0][:120]} |")
            continue
        us, least = row["us"], row["roofline_us"]
        share = [f"{least / us[way]:.2f}" if least and way in us else "" for way in (BUNDLE, CUBLAS)]
        cells = [row["gemm"], f"{sum(row['ns'])}×{row['k']}", str(row["m"])]
        cells += [f"{us[way]:.2f}" if way in us else "" for way in (CUBLAS, STOCK, PICK, PICKS, BUNDLE)]
        cells += [ratio(row["over_cublas"].get(BUNDLE)), ratio(row["over_max_autotune"].get(BUNDLE)), *share]
        lines.append(f"| {' | '.join([*cells, '; '.join(row['entries']) or 'stock'])} |")
    return "\n".join(lines)


def mean_lines(gemms: Iterable[Mapping[str, Any]]) -> str:
    """Geometric means of the bundle's speed-ups by number of rows, and what is below 1."""
    rows = [row for row in gemms if "failure" not in row and BUNDLE in row["us"]]
    lines = []
    groups = {"M <= 16": _SMALL, "M = 64 and 128": _MEDIUM, "all M": tuple({row["m"] for row in rows})}
    for label, ms in groups.items():
        for against, name in _AGAINST.items():
            ratios = [row[against][BUNDLE]["ratio"] for row in rows if row["m"] in ms and against in row]
            if ratios:
                mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
                lines.append(f"- {label}: {mean:.3f}× {name} (geometric mean of {len(ratios)}, least {min(ratios):.3f}×)")
    slower = [f"{row['gemm']} M={row['m']}" for row in rows if row["over_cublas"][BUNDLE]["high"] < 1]
    lines.append(f"- slower than cuBLAS, interval clear of 1: {', '.join(slower) or 'none'}")
    return "\n".join(lines)


def confirmed_table(run: Mapping[str, Any]) -> str:
    """What a run confirmed, GEMM by GEMM: winners against stock, or, if merged, against the best found for the parts."""
    lines = ["| scenario | GEMM | baseline us | winner us | speed-up [95 %] | kernel |", "|" + "---|" * 6]
    for item in run["confirmed"]:
        if item["winner"] is None:
            continue
        cells = [", ".join(item["scenarios"]), item["title"], f"{item['baseline_us']:.1f}", f"{item['winner_us']:.1f}"]
        lines.append(f"| {' | '.join([*cells, ratio(item['speedup']), item['winner']])} |")
    return "\n".join(lines)


def scenario_table(run: Mapping[str, Any]) -> str:
    """End to end: every scenario in every mode, as serving engines run it."""
    modes = list(dict.fromkeys(mode["mode"] for scenario in run["scenarios"] for mode in scenario["modes"]))
    head = [
        "scenario",
        *(f"{mode} ms" for mode in modes),
        "over the best stock mode [95 %]",
        "over max-autotune",
        "compiling s",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for scenario in run["scenarios"]:
        times = {mode["mode"]: mode["median_us"] for mode in scenario["modes"]}
        compile_s = [f"{mode['mode']} {mode['compile_s']:.0f}" for mode in scenario["modes"] if mode["compile_s"]]
        over = f"{times['max-autotune'] / times['bundle']:.3f}" if {"max-autotune", "bundle"} <= set(times) else ""
        cells = [scenario["scenario"], *(f"{times[mode] / 1000:.3f}" if mode in times else "" for mode in modes)]
        cells += [f"{ratio(scenario['speedup'])} {scenario['best_stock']}", over, ", ".join(compile_s)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run_lines(run: Mapping[str, Any]) -> str:
    """Where, when, and how long."""
    environment, proved = run["environment"], run["fresh_process"]
    seconds = run["seconds"] or sum(run["stage_s"].values())
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run["stage_s"].items())
    lines = [
        f"- {environment['device_name']}, torch {environment['torch']}, driver {environment['driver']}, {run['date']}, "
        f"{run.get('experiment', '')} {run['git_commit']}".rstrip(),
        f"- time to tune: {seconds / 60:.1f} min ({stages}); {run['num_trials']} trials",
    ]
    if run["device_busy"] is not None:
        lines.append(f"- device busy during the search: {run['device_busy']:.0%}")
    if proved is not None:
        lines.append(
            f"- a fresh process with the bundle: compiled in {proved['compile_s']:.1f} s "
            f"(default {proved['stock_compile_s']:.1f} s), {proved['num_benchmarks']} kernels benchmarked, "
            f"{proved['num_hits']} of {proved['num_entries']} entries hit, "
            f"{proved.get('constant_bytes', 0) / 1e9:.2f} GB of merged weights"
        )
    lines.append(
        f"- ceilings: {run['read_gb_per_s']:.0f} GB/s read, "
        + ", ".join(f"{tflops:.0f} TFLOP/s {dtype}" for dtype, tflops in run["peak_tflops"].items())
    )
    limits = ", ".join(f"{name} {low:.0f} to {high:.0f}" for name, (low, high) in run["conditions"].items())
    return "\n".join([*lines, f"- while confirming: {limits}"] if limits else lines)


def fusion_table(rows: Sequence[Mapping[str, Any]], most: int | None) -> str:
    """Each fusion against Inductor's own code for its pattern: what was shipped first, then by the share of a step."""
    ordered = sorted(rows, key=lambda row: (_ORDER.index(row["verdict"]), -row["share"]))
    head = [
        "scenario",
        "fusion",
        "stock us (of the roofline)",
        "best us (of the roofline)",
        "speed-up [95 %]",
        "kernel",
        "verdict",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in _spread(ordered, most):
        cells = [", ".join(row["scenarios"]), row["title"], _us(row["stock_us"], row["stock_of_roofline"])]
        cells += [_us(row["best_us"], row["best_of_roofline"]), _gain(row), row["kernel"], _said(row, short=most is not None)]
        lines.append(f"| {' | '.join(cells)} |")
    counts = ", ".join(f"{count} {verdict}" for verdict in _ORDER if (count := sum(r["verdict"] == verdict for r in rows)))
    note = "Speed-ups without an interval are as screened, the ratio of two medians."
    return "\n".join([*lines, "", f"{len(rows)} fusions were searched: {counts}. {note}"])


def _at_stake(row: Mapping[str, Any]) -> float:
    """Microseconds of a step that stock code takes."""
    return max(row["calls"].values(), default=0) * (row["stock_us"] or 0.0)


def _spread(ordered: Sequence[Mapping[str, Any]], most: int | None) -> list[Mapping[str, Any]]:
    """At most so many rows; a third of them is for what was not shipped."""
    if most is None or len(ordered) <= most:
        return list(ordered)
    shipped = [row for row in ordered if row["verdict"] == "shipped"]
    others = [row for row in ordered if row["verdict"] != "shipped"]
    kept = shipped[: max(most - len(others), most - most // 3)]
    return [*kept, *sorted(others, key=lambda row: -row["share"])[: most - len(kept)]]


def kind_table(rows: Sequence[Mapping[str, Any]], most: int | None) -> str:
    """Fusions by what they do: how many sizes were searched, what became of them, the best against stock code."""
    verdicts = [verdict for verdict in _ORDER if any(row["verdict"] == verdict for row in rows)]
    head = ["fusion", "searched", *verdicts, "best over stock [least, most]", "of the roofline: stock", "best"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -row["share"]):
        kinds.setdefault(row["kind"], []).append(row)
    for kind, mine in list(kinds.items())[:most]:
        gains = [row["speedup"]["ratio"] if row["speedup"] else row["screened"] for row in mine]
        gains = [gain for gain in gains if gain]
        cells = [kind, str(len(mine)), *(str(sum(row["verdict"] == verdict for row in mine) or "") for verdict in verdicts)]
        cells.append(f"{_mean(gains):.2f} [{min(gains):.2f}, {max(gains):.2f}]" if gains else "")
        for name in ("stock_of_roofline", "best_of_roofline"):
            parts = [row[name] for row in mine if row[name]]
            cells.append(f"{_mean(parts):.2f}" if parts else "")
        lines.append(f"| {' | '.join(cells)} |")
    note = "Means are geometric; a best that was not confirmed counts as screened."
    if most is not None and len(kinds) > most:
        note = f"{note} Not shown, since they take least of a step: {', '.join(list(kinds)[most:])}."
    return "\n".join([*lines, "", note])


def _us(us: float | None, part: float | None) -> str:
    return "" if us is None else f"{us:.1f} ({part:.2f})" if part else f"{us:.1f}"


def _gain(row: Mapping[str, Any]) -> str:
    if row["speedup"]:
        return ratio(row["speedup"])
    return f"{row['screened']:.2f} screened" if row["screened"] else ""


def _said(row: Mapping[str, Any], short: bool = False) -> str:
    """The verdict, with its reason where that is no figure of the same line."""
    verdict, why = row["verdict"], row["why"]
    if verdict in ("shipped", "lost") or (short and verdict == "won alone"):
        return str(verdict)
    if short and why.startswith("its nodes go to "):
        why = "the model is faster with others on its nodes"
    if short and "GEMMs take" in why:
        why = "apart they were taken to be faster"
    return f"{verdict}: {why.partition(':')[0] if short else why}"


def generated_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Of the regions for which kernels are generated: how many were found, searched, proved and timed, and won."""
    head = [
        "run",
        "scenario",
        "GEMM calls with a region",
        "regions",
        "searched",
        "kernels",
        "proved and timed",
        "won",
        "shipped",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for run in runs:
        found = run["generated"]
        rows = found["scenarios"] if len(found["scenarios"]) < 2 else [*found["scenarios"], {**found["all"], "scenario": "all"}]
        for row in rows:
            cells = [run["experiment"], row["scenario"], f"{row['gemm_calls_with_region']} of {row['gemm_calls']}"]
            cells += [str(row[name]) for name in ("regions", "searched", "kernels", "proved")]
            lines.append(f"| {' | '.join([*cells, str(len(row['won'])), str(len(row['shipped']))])} |")
    total = [run["generated"]["all"] for run in runs]
    calls, served, regions, searched, kernels, proved = (
        sum(row[name] for row in total)
        for name in ("gemm_calls", "gemm_calls_with_region", "regions", "searched", "kernels", "proved")
    )
    won, shipped = (sum(len(row[name]) for row in total) for name in ("won", "shipped"))
    said = f"{served} of {calls} GEMM calls ({served / max(calls, 1):.1%}) have a region, {regions} regions in all; {searched} "
    said += f"were searched with {kernels} kernels, {proved} of them proved and timed; {won} won, {shipped} were shipped."
    return "\n".join([*lines, "", said])


def generated_winners(runs: Iterable[Mapping[str, Any]]) -> str:
    """Generated kernels that won, by name."""
    lines = []
    for run in runs:
        for row in run["fusions"]:
            if row["kind"].startswith("generated") and row["verdict"] not in ("lost", "refused"):
                lines.append(f"- {', '.join(row['scenarios'])}: {row['title']}: {_gain(row)}, {_said(row, short=True)}")
    return "\n".join(lines)


def where_table(runs: Iterable[Mapping[str, Any]]) -> str:
    """Where a step's time goes before and after, in ms; in brackets what the profiler measured in stock's step."""
    rows = _in_order(row for run in runs for row in run["where"])
    if not rows:
        return ""
    head = ["scenario", "code", *(f"{kind} ms" for kind in KINDS), "rest ms", "step ms"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        for code, name in (("stock", "stock_us"), ("bundle", "bundle_us")):
            cells = [row["scenario"], code]
            for kind in KINDS:
                part = row["kinds"][kind]
                seen = f" ({part['profiled_us'] / 1000:.3f})" if code == "stock" and part["profiled_us"] else ""
                cells.append(f"{part[name] / 1000:.3f}{seen}")
            cells += [f"{row['rest'][name] / 1000:.3f}", f"{row[name.replace('_us', '_step_us')] / 1000:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def backend_table(rows: Iterable[Mapping[str, Any]], least_rows: int = 0, short: bool = False) -> str:
    """Every GEMM by backend: the best of each as screened, and what was confirmed and shipped."""
    rows = [row for row in rows if row["m"] >= least_rows]
    names = list(dict.fromkeys(name for row in rows for name in sorted(row["by_backend"])))
    head = ["scenario", "GEMM", *(f"{'cuBLAS' if name == _CUBLAS else name} us" for name in names)]
    head += ["speed-up over stock [95 %]", "kernel", "verdict"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=_at_stake, reverse=True):
        cells = [", ".join(row["scenarios"]), row["title"]]
        cells += [f"{row['by_backend'][name][0]:.1f}" if name in row["by_backend"] else "" for name in names]
        lines.append(f"| {' | '.join([*cells, _gain(row), row['kernel'], _said(row, short)])} |")
    return "\n".join(lines)


def backend_lines(rows: Iterable[Mapping[str, Any]], least_rows: int = 0) -> str:
    """What is shipped over stock, and what CuTe DSL makes of the same GEMMs over cuBLAS, as geometric means."""
    rows = [row for row in rows if row["m"] >= least_rows]
    shipped = [row["speedup"]["ratio"] if row["verdict"] == "shipped" else 1.0 for row in rows]
    lows = [row["speedup"]["low"] for row in rows if row["verdict"] == "shipped"]
    lines = []
    if rows:
        lines.append(
            f"- as shipped, {len(rows)} GEMMs of at least {least_rows} rows: {_mean(shipped):.3f}× stock (geometric mean; what "
            f"keeps stock counts as 1; {len(lows)} shipped, least lower bound {min(lows, default=1.0):.3f})"
        )
    both = [row for row in rows if {_CUBLAS, _CUTE} <= row["by_backend"].keys()]
    ratios = [row["by_backend"][_CUBLAS][0] / row["by_backend"][_CUTE][0] for row in both]
    if ratios:
        won = sum(row["backend"] == _CUTE and row["verdict"] == "shipped" for row in both)
        lines.append(
            f"- the best CuTe DSL kernel over the best of cuBLAS, as screened, {len(ratios)} GEMMs: {_mean(ratios):.3f}× "
            f"(geometric mean, {min(ratios):.3f} to {max(ratios):.3f}; faster for {sum(r > 1 for r in ratios)}); "
            f"shipped for {won}"
        )
    return "\n".join(lines)


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def scenarios_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """End to end, all runs in one table."""
    return scenario_table({"scenarios": _in_order(scenario for run in runs for scenario in run["scenarios"])})


def _in_order(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By the name of the scenario, numbers in it as numbers."""
    return sorted(rows, key=lambda row: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row["scenario"])])


def markdown(files: Sequence[Mapping[str, Any]], most: int | None = None) -> str:
    """All tables of one file of results or several.

    Args:
        files: as written by `gpu_run.py`.
        most: rows of the long tables; None is all.
    """
    runs = [found["run"] for found in files if found.get("run")]
    new = [run for run in runs if "fusions" in run]
    gemms = [row for run in new for row in run["gemms_by_backend"]]
    parts = [run_lines(run) for run in runs]
    if most is None:
        parts += [confirmed_table(run) for run in runs]
    if any(run["scenarios"] for run in runs):
        parts.append(scenarios_of(runs))
    if new:
        rows = [row for run in new for row in run["fusions"]]
        parts += [where_table(new), kind_table(rows, most), fusion_table(rows, most)]
        parts += [generated_table(new), generated_winners(new)]
        if any(row["m"] >= _PROMPT for row in gemms):
            parts += [backend_table(gemms, _PROMPT, most is not None), backend_lines(gemms, _PROMPT)]
    for found in files:
        if found.get("gemms"):
            parts += [gemm_table(found["gemms"]), mean_lines(found["gemms"])]
    return "\n\n".join(part for part in parts if part)
