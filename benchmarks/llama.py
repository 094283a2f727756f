"""The README's tables for a language model on a GPU, from a finished run and from GEMMs measured again by themselves.

    python benchmarks/llama.py RUN                          # tables of the run's own confirmations and end-to-end times
    python benchmarks/llama.py RUN --measure --out benchmarks/results
    python benchmarks/llama.py --print benchmarks/results/llama-....json

RUN is the folder of a run of experiments/llama.yaml. `--measure` builds every GEMM of {qkv, o, gate-up, down, LM head} in every
number of rows that the experiment has, in child processes, in four ways: cuBLAS (one product of all the weights that share an
input), stock (as the model has them), the pick of Inductor's max-autotune for the one product, and the bundle as production
applies it. All are timed in one process against each other: cold L2 by rotation over copies, CUDA graphs of many calls,
events, interleaved in random order; speed-ups are medians of paired ratios with 95 % intervals. Leave the machine alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

from llama_gemms import BUNDLE, CUBLAS, PICK, STOCK, GemmCase, MeasureGemm, cases_of  # noqa: E402

from autokernel.config import LoadedExperiment, load_experiment  # noqa: E402
from autokernel.display.results import graph_options, scenario_options  # noqa: E402
from autokernel.errors import WorkerError  # noqa: E402
from autokernel.export.bundle import Bundle, read_bundle  # noqa: E402
from autokernel.tracking.journal import read_entries  # noqa: E402
from autokernel.tracking.summary import RunSummary, summarize  # noqa: E402
from autokernel.tracking.titles import problem_title  # noqa: E402

_TIMEOUT_S = 300
_SMALL, _MEDIUM = (1, 16), (64, 128)  # rows: where the targets for GEMMs lie


def results_of_run(folder: Path) -> tuple[dict[str, Any], RunSummary]:
    """What is kept of a run; one that did not get to the whole model has its GEMMs."""
    entries = list(read_entries(folder / "journal.jsonl"))
    summary = summarize([entry.event for entry in entries])
    validated, proved, profiled = summary.validated, summary.proved, summary.profiled
    if profiled is None:
        raise SystemExit(f"{folder}: the run was not even profiled; go on with `autokernel run`")
    confirmed = [
        {
            "problem": item.problem.key,
            "title": problem_title(item.problem),
            "scenarios": list(item.scenarios),
            "verdict": item.verdict,
            "winner": item.winner.evaluation.candidate.label if item.winner is not None else None,
            "baseline": item.winner.baseline.label if item.winner is not None else None,
            "baseline_us": item.winner.baseline_us if item.winner is not None else item.baseline_us,
            "winner_us": item.winner.winner_us if item.winner is not None else None,
            "speedup": item.winner.speedup.to_json() if item.winner is not None else None,
            "num_trials": len(item.trials),
        }
        for item in summary.problems
    ]
    run = {
        "date": entries[0].time.isoformat(timespec="seconds"),
        "git_commit": summary.started.git_commit,
        "environment": summary.started.environment.to_json(),
        "seconds": summary.finished.seconds if summary.finished is not None else None,
        "stage_s": {name: round(seconds, 1) for name, seconds in summary.stage_seconds.items()},
        "num_trials": len(summary.trials),
        "device_busy": summary.device_busy,
        "read_gb_per_s": profiled.read_gb_per_s,
        "peak_tflops": dict(profiled.peak_tflops),
        "conditions": {name: list(limits) for name, limits in summary.conditions.items()},
        "scenarios": [scenario.to_json() for scenario in summary.scenarios],
        "profiled_us": dict(profiled.scenario_us),
        "dropped": dict(validated.dropped) if validated is not None else {},
        "confirmed": confirmed,
        "graph_options": graph_options(summary),
        "scenario_options": scenario_options(summary),
        "fresh_process": proved.to_json() if proved is not None else None,
    }
    return run, summary


def measure(cases: Iterable[GemmCase], bundle: Bundle | None, run: Mapping[str, Any], workers: int, rounds: int) -> list[Any]:
    """Every case, some at a time: they compile side by side, and take turns on the device."""
    from autokernel.config import ClusterSection
    from autokernel.environment import physical_cores
    from autokernel.workers.limits import memory_limit, worker_env
    from autokernel.workers.pool import open_pool

    cases = list(cases)
    device, threads = cases[0].device, physical_cores()
    peaks = run.get("peak_tflops", {})
    pool = open_pool(
        ClusterSection(address="inline"),
        device=device,
        num_workers=workers,
        env=worker_env(threads if device == "cpu" else 1),
        memory_limit_bytes=memory_limit(workers),
        preload=("torch",),
    )
    start, results = time.monotonic(), []
    try:
        futures = []
        for case in cases:
            peak = peaks.get(case.dtype)
            ceilings = (run["read_gb_per_s"], peak) if peak else None
            job = MeasureGemm(case=case, bundle=bundle, threads=threads, ceilings=ceilings, rounds=rounds)
            futures.append(pool.submit(job, _TIMEOUT_S))
        for case, future in zip(cases, futures, strict=True):
            try:
                results.append(future.result())
            except (WorkerError, RuntimeError) as error:
                print(f"{case.name} M={case.m}: {error}", file=sys.stderr)
                results.append({"gemm": case.name, "m": case.m, "failure": str(error)[:1000]})
            print(f"{time.monotonic() - start:6.0f} s  {case.name} M={case.m}", file=sys.stderr, flush=True)
    finally:
        pool.close()
    return results


def ratio(speedup: Mapping[str, Any] | None) -> str:
    return f"{speedup['ratio']:.3f} [{speedup['low']:.3f}, {speedup['high']:.3f}]" if speedup else ""


def gemm_table(gemms: Iterable[Mapping[str, Any]]) -> str:
    """Per GEMM: times in every way, the bundle's speed-ups, and how much of the roofline it reaches."""
    head = ["GEMM", "N×K", "M", "cuBLAS us", "stock us", "max-autotune's pick us", "bundle us"]
    head += ["over cuBLAS [95 %]", "over max-autotune's pick [95 %]", "of the roofline", "cuBLAS of it", "entry"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in gemms:
        if "failure" in row:
            lines.append(f"| {row['gemm']} | | {row['m']} | failed: {row['failure'].splitlines()[0][:120]} |")
            continue
        us, least = row["us"], row["roofline_us"]
        share = [f"{least / us[way]:.2f}" if least and way in us else "" for way in (BUNDLE, CUBLAS)]
        cells = [row["gemm"], f"{sum(row['ns'])}×{row['k']}", str(row["m"])]
        cells += [f"{us[way]:.2f}" if way in us else "" for way in (CUBLAS, STOCK, PICK, BUNDLE)]
        cells += [ratio(row["over_cublas"].get(BUNDLE)), ratio(row["over_max_autotune"].get(BUNDLE)), *share]
        lines.append(f"| {' | '.join([*cells, '; '.join(row['entries']) or 'stock'])} |")
    return "\n".join(lines)


def mean_lines(gemms: Iterable[Mapping[str, Any]]) -> str:
    """Geometric means of the bundle's speed-ups by number of rows, and what is below 1."""
    rows = [row for row in gemms if "failure" not in row and BUNDLE in row["us"]]
    lines = []
    groups = {"M <= 16": _SMALL, "M = 64 and 128": _MEDIUM, "all M": tuple({row["m"] for row in rows})}
    for label, ms in groups.items():
        for against, name in (("over_cublas", "cuBLAS"), ("over_max_autotune", "max-autotune's picks")):
            ratios = [row[against][BUNDLE]["ratio"] for row in rows if row["m"] in ms]
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
        f"commit {run['git_commit']}",
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


def markdown(results: Mapping[str, Any]) -> str:
    """All tables."""
    parts = []
    if results.get("run"):
        parts += [run_lines(results["run"]), confirmed_table(results["run"])]
        if results["run"]["scenarios"]:
            parts.append(scenario_table(results["run"]))
    if results.get("gemms"):
        parts += [gemm_table(results["gemms"]), mean_lines(results["gemms"])]
    return "\n\n".join(parts)


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _selected(loaded: LoadedExperiment, arguments: argparse.Namespace) -> list[GemmCase]:
    cases = cases_of(loaded, arguments.device)
    return [
        case
        for case in cases
        if (not arguments.gemms or case.name in arguments.gemms) and (not arguments.rows or case.m in arguments.rows)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run")
    parser.add_argument("--experiment", type=Path, default=ROOT / "experiments" / "llama.yaml")
    parser.add_argument("--bundle", type=Path, default=None, help="default: the run's own")
    parser.add_argument("--measure", action="store_true", help="time the model's GEMMs again, in every way")
    parser.add_argument("--gemms", nargs="*", default=[], help="only these, by name")
    parser.add_argument("--rows", nargs="*", type=int, default=[], metavar="M", help="only these numbers of rows")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 4))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=None, help="folder for the raw results")
    parser.add_argument("--print", type=Path, default=None, metavar="FILE", help="only print the tables of earlier results")
    arguments = parser.parse_args()
    if arguments.print is not None:
        print(markdown(json.loads(arguments.print.read_text())))
        return
    if arguments.run is None and not arguments.measure:
        parser.error("name a run, or --measure, or --print")
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": _commit(),
    }
    results["protocol"] = " ".join((__doc__ or "").split())
    bundle = arguments.bundle
    if arguments.run is not None:
        results["run"], _ = results_of_run(arguments.run)
        bundle = bundle if bundle is not None else arguments.run / "bundle"
    if arguments.measure:
        loaded = load_experiment(arguments.experiment)
        found = read_bundle(bundle) if bundle is not None else None
        run = results.get("run", {})
        results["gemms"] = measure(_selected(loaded, arguments), found, run, arguments.workers, arguments.rounds)
    print(markdown(results))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = results["run"]["environment"]["device_name"] if "run" in results else arguments.device
        hardware = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        path = arguments.out / f"{arguments.experiment.stem}-{hardware}-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
