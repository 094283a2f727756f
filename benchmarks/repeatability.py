"""Two runs of one experiment: are the winners the same, and if not, how much slower is the worse one?

    python benchmarks/repeatability.py RUN RUN [--out FILE]        # folders of two runs, or files that gpu_run.py wrote

First, of folders: the candidates that both runs happened to measure, as screened. With these alone to choose from, does each
run choose the same, and if not, how much slower is its choice by the other run's measurement?

Then the problems for which both runs, or one of them, confirmed a winner: by the winners' times as confirmed, or by the
one winner's speed-up over stock code. The runs may have been on different cards, which then is part of the difference.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

from run_results import results_of_run  # noqa: E402

from autokernel.events import Evaluated  # noqa: E402
from autokernel.records import Status  # noqa: E402
from autokernel.tracking.journal import read_entries  # noqa: E402

_LEAST_SHARED = 3  # candidates: with fewer there is little to choose


def confirmed(path: Path) -> dict[str, dict[str, Any]]:
    """A run's searched problems by key."""
    run = results_of_run(path) if path.is_dir() else json.loads(path.read_text())["run"]
    return {row["problem"]: row for row in run["confirmed"]}


def compare(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both runs, problem by problem, and what is true of all."""
    rows = []
    for key in first.keys() & second.keys():
        pair = first[key], second[key]
        if not any(row["winner"] for row in pair):
            continue
        both = all(row["winner"] for row in pair)
        times = [row["winner_us"] if both else row["speedup"]["ratio"] if row["winner"] else 1.0 for row in pair]
        rows.append(
            {
                "title": pair[0]["title"],
                "scenarios": pair[0]["scenarios"],
                "winners": [row["winner"] for row in pair],
                "winner_us": [row["winner_us"] for row in pair],
                "speedups": [row["speedup"] for row in pair],
                "same": both and pair[0]["winner"] == pair[1]["winner"],
                "worse_by": max(times) / min(times) - 1,
            }
        )
    rows.sort(key=lambda row: -row["worse_by"])
    both = [row for row in rows if all(row["winners"])]
    worse = [row["worse_by"] for row in rows]
    return {
        "problems": rows,
        "num": len(rows),
        "won_in_both": len(both),
        "same_config": sum(row["same"] for row in both),
        "worse_by_median": statistics.median(worse) if worse else None,
        "worse_by_geometric_mean": math.exp(statistics.fmean(math.log1p(w) for w in worse)) - 1 if worse else None,
        "within_2_percent": sum(w <= 0.02 for w in worse),
        "within_5_percent": sum(w <= 0.05 for w in worse),
    }


def common_candidates(first: Path, second: Path) -> dict[str, Any]:
    """What both runs measured: how far apart the times of one candidate are, and whether the fastest is the same one."""
    times = [_screened(path) for path in (first, second)]
    ratios, problems = [], []
    for key in times[0].keys() & times[1].keys():
        shared = times[0][key].keys() & times[1][key].keys()
        ratios += [times[1][key][name] / times[0][key][name] for name in shared]
        if len(shared) < _LEAST_SHARED:
            continue
        choices = [min(shared, key=run[key].__getitem__) for run in times]
        # what the first run's choice takes beyond the second's own, in the second run, and the other way round
        losses = [
            run[key][other] / run[key][own] - 1 for run, own, other in zip(times, choices, reversed(choices), strict=True)
        ]
        problems.append({"problem": key, "candidates": len(shared), "same": choices[0] == choices[1], "lost": max(losses)})
    level = statistics.median(ratios) if ratios else 1.0
    away = sorted(abs(ratio / level - 1) for ratio in ratios)
    return {
        "candidates": len(ratios),
        "level": level,
        "apart_median": statistics.median(away) if away else None,
        "apart_95_percent": away[int(0.95 * (len(away) - 1))] if away else None,
        "problems": len(problems),
        "same_choice": sum(item["same"] for item in problems),
        "lost_median": statistics.median([item["lost"] for item in problems]) if problems else None,
        "lost_most": max((item["lost"] for item in problems), default=None),
        "by_problem": problems,
    }


def _screened(run: Path) -> dict[str, dict[str, float]]:
    """Median us of every candidate that passed, by problem and candidate."""
    found: dict[str, dict[str, float]] = {}
    for entry in read_entries(run / "journal.jsonl"):
        evaluation = entry.event.evaluation if isinstance(entry.event, Evaluated) else None
        if evaluation is not None and evaluation.status is Status.OK and evaluation.measurement is not None:
            times = found.setdefault(evaluation.candidate.problem.key, {})
            times[evaluation.candidate.id] = evaluation.measurement.median_us
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--out", type=Path, default=None, help="file for the raw comparison")
    arguments = parser.parse_args()
    shared: dict[str, Any] = {}
    if all(path.is_dir() for path in arguments.runs):
        shared = common_candidates(*arguments.runs)
        if not shared["candidates"]:
            parser.error("the runs have measured no candidate in common")
        print(
            f"{shared['candidates']} candidates were measured in both, the second time {shared['level']:.3f} times as long in "
            f"the median; apart from that they differ by {shared['apart_median']:.2%} in the median and "
            f"{shared['apart_95_percent']:.1%} at most for 95 % of them."
        )
        if shared["problems"]:
            print(
                f"Of {shared['problems']} problems with {_LEAST_SHARED} of them and more, both runs choose the same for "
                f"{shared['same_choice']}; what the other run chose is slower by {shared['lost_median']:.2%} in the median and "
                f"{shared['lost_most']:.1%} at most.\n"
            )
    found = compare(*(confirmed(path) for path in arguments.runs))
    print("| scenario | problem | first run's winner | second run's | apart | same config |\n|---|---|---|---|---|---|")
    for row in found["problems"]:
        texts = [
            f"{us:.1f} us, {s['ratio']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" if s else "stock"
            for us, s in zip(row["winner_us"], row["speedups"], strict=True)
        ]
        cells = ", ".join(row["scenarios"]), row["title"], *texts, f"{row['worse_by']:.1%}", "yes" if row["same"] else ""
        print(f"| {' | '.join(cells)} |")
    print(
        f"\n{found['num']} problems with a winner in a run, {found['won_in_both']} in both, {found['same_config']} of the same "
        f"config; {found['within_2_percent']} are within 2 % of each other, {found['within_5_percent']} within 5 %; "
        f"{found['worse_by_median'] or 0:.1%} apart in the median."
    )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"candidates": shared, "winners": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
