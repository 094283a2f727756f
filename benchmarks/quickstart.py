"""Where the README's table comes from: runs the quickstart with empty caches, several times, and prints its table.

    python benchmarks/quickstart.py --runs 2 --out benchmarks/results

Each run is `autokernel run experiments/quickstart.yaml` in a process of its own. What is kept of a run, as JSON: hardware,
versions, date, commit, every confirmed hotspot, every scenario's times with the speed-up's interval, the metric, and how long
it all took. The protocol is docs/measuring.md. Leave the machine alone while it runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from autokernel.display.results import graph_options, scenario_options
from autokernel.tracking.journal import find_runs, read_entries
from autokernel.tracking.summary import summarize

ROOT = Path(__file__).resolve().parent.parent


def one_run(experiment: Path, folder: Path) -> dict[str, Any]:
    """Run the experiment with empty caches and say what came out.

    Raises:
        RuntimeError: the run failed.
    """
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    command = [sys.executable, "-m", "autokernel", "run", str(experiment), "--runs", str(folder / "runs")]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    wall_s = time.monotonic() - start
    if done.returncode != 0:
        raise RuntimeError(f"the run failed with code {done.returncode}:\n{done.stderr[-2000:]}")
    (run_folder,) = find_runs(folder / "runs")
    return {"wall_s": round(wall_s, 1), **results_of(run_folder)}


def results_of(run_folder: Path) -> dict[str, Any]:
    """What is kept of a finished run."""
    entries = list(read_entries(run_folder / "journal.jsonl"))
    summary = summarize([entry.event for entry in entries])
    started, validated, proved = summary.started, summary.validated, summary.proved
    assert started is not None
    assert validated is not None
    return {
        "stage_s": {name: round(seconds, 1) for name, seconds in summary.stage_seconds.items()},
        "date": entries[0].time.isoformat(timespec="seconds"),
        "git_commit": started.git_commit,
        "environment": started.environment.to_json(),
        "num_trials": len(summary.trials),
        "scenarios": [scenario.to_json() for scenario in validated.scenarios],
        "evals": [result.to_json() for result in validated.evals],
        "winners": [
            {
                "problem": winner.hotspot.problem.key,
                "scenario": winner.hotspot.scenario,
                "winner": winner.evaluation.candidate.label,
                "baseline": winner.baseline.label,
                "baseline_us": winner.baseline_us,
                "winner_us": winner.winner_us,
                "speedup": winner.speedup.to_json(),
            }
            for winner in (problem.winner for problem in summary.winners)
            if winner is not None
        ],
        "graph_options": graph_options(summary),
        "scenario_options": scenario_options(summary),
        "fresh_process": proved.to_json() if proved is not None else None,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """The README's table, in Markdown: every run, every scenario."""
    lines = ["| run | scenario | eager | Inductor default | max-autotune | bundle | over the best stock mode [95 %] |"]
    lines.append("|---|---|---|---|---|---|---|")
    for number, run in enumerate(runs, 1):
        for scenario in run["scenarios"]:
            times = {mode["mode"]: f"{mode['median_us'] / 1000:.2f} ms" for mode in scenario["modes"]}
            s = scenario["speedup"]
            cells = [str(number), scenario["scenario"], *(times[m] for m in ("eager", "default", "max-autotune", "bundle"))]
            lines.append(f"| {' | '.join(cells)} | **{s['ratio']:.2f}×** [{s['low']:.2f}, {s['high']:.2f}] |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=None, help="new runs; default: 2, and none with --finished")
    parser.add_argument("--experiment", type=Path, default=ROOT / "experiments" / "quickstart.yaml")
    parser.add_argument("--out", type=Path, default=None, help="folder for the raw results")
    parser.add_argument(
        "--finished",
        type=Path,
        nargs="*",
        default=[],
        metavar="RUN",
        help="folders of runs made by hand, the same way",
    )
    parser.add_argument("--print", type=Path, default=None, metavar="FILE", help="only print the table of earlier results")
    arguments = parser.parse_args()
    if arguments.print is not None:
        print(table(json.loads(arguments.print.read_text())))
        return
    wanted = arguments.runs if arguments.runs is not None else 0 if arguments.finished else 2
    runs = [results_of(folder) for folder in arguments.finished]
    for _ in range(wanted):
        with tempfile.TemporaryDirectory(prefix="autokernel-bench-") as name:
            runs.append(one_run(arguments.experiment, Path(name)))
        print(f"run {len(runs)}: {runs[-1]['wall_s']:.0f} s", file=sys.stderr)
    print(table(runs))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        hardware = re.sub(r"[^a-z0-9]+", "-", runs[0]["environment"]["device_name"].lower()).strip("-")
        path = arguments.out / f"{arguments.experiment.stem}-{hardware}-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(runs, indent=1) + "\n")
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
