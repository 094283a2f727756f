"""What a run on a GPU found, as the tables of docs/results.md: any model's, from the run's journal; and GEMMs by themselves.

    python benchmarks/gpu_run.py RUN --out benchmarks/results             # RUN: a run's folder
    python benchmarks/gpu_run.py --print benchmarks/results/llama-....json ...  # tables of earlier results, side by side
    python benchmarks/gpu_run.py RUN --measure --out benchmarks/results

Of the journal: end-to-end times; each fusion against Inductor's own code for its pattern, losers included; what became of
the regions for which kernels are generated; GEMMs by backend; where a step's time goes (`run_where.py` says what of that is
measured and what is summed). Files are named after the experiment, the card and the run's day.

`--measure` is for the GEMMs of a language model with {qkv, o, gate-up, down, LM head}: it builds each in every
number of rows that the experiment has, in child processes, in five ways: cuBLAS (one product of all the weights that share an
input), stock (as the model has them), Inductor's max-autotune with its pick for the one product and with those for the
products that the model has, and the bundle as production applies it (of a run that exported none, its confirmed winners). All
are timed in one process against each other: cold L2 by rotation over copies, CUDA graphs of many calls, events, interleaved
in random order; speed-ups are medians of paired ratios with 95 % intervals. Inductor's caches are empty at the start, so that
max-autotune picks anew. Leave the machine alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

from llama_gemms import GemmCase, MeasureGemm, cases_of  # noqa: E402
from run_markdown import markdown  # noqa: E402
from run_results import results_of_run  # noqa: E402

from autokernel.config import LoadedExperiment, load_experiment  # noqa: E402
from autokernel.errors import WorkerError  # noqa: E402
from autokernel.export.bundle import Bundle, read_bundle  # noqa: E402
from autokernel.records import Evaluation  # noqa: E402
from autokernel.stages.confirm import compatible, entry_of  # noqa: E402
from autokernel.tracking.journal import read_entries  # noqa: E402
from autokernel.tracking.state import RunState  # noqa: E402

_TIMEOUT_S = 300


def measure(cases: Iterable[GemmCase], bundle: Bundle | None, run: Mapping[str, Any], workers: int, rounds: int) -> list[Any]:
    """Every case, some at a time: they compile side by side, and take turns on the device. Nothing is compiled yet."""
    from autokernel.config import ClusterSection
    from autokernel.environment import physical_cores
    from autokernel.workers.limits import memory_limit, worker_env
    from autokernel.workers.pool import open_pool

    cases = list(cases)
    device, threads = cases[0].device, physical_cores()
    peaks = run.get("peak_tflops", {})
    caches = tempfile.mkdtemp(prefix="autokernel-measure-")
    pool = open_pool(
        ClusterSection(address="inline"),
        device=device,
        num_workers=workers,
        env={**worker_env(threads if device == "cpu" else 1), "TORCHINDUCTOR_CACHE_DIR": caches},
        memory_limit_bytes=memory_limit(workers),
        preload=("torch",),
    )
    start, results = time.monotonic(), []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit leaves what is there, like Ctrl-C
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
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice
        print(f"interrupted: {len(results)} of {len(cases)} were measured", file=sys.stderr)
    finally:
        pool.close()
        shutil.rmtree(caches, ignore_errors=True)
    return results


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def winners_of(folder: Path) -> Bundle:
    """The confirmed winners of a run that has exported nothing yet, as a bundle; kernels that it lacks are compiled."""
    state = RunState.from_entries(read_entries(folder / "journal.jsonl"))
    evaluations: dict[str, list[Evaluation]] = {}
    for evaluation in state.evaluations.values():
        evaluations.setdefault(evaluation.candidate.problem.key, []).append(evaluation)
    winners = [event.winner for event in state.confirmed.values() if event.winner is not None]
    profiled = state.profiled
    kept, _ = compatible(winners, evaluations, profiled.read_gb_per_s if profiled is not None else math.inf)
    started = state.started
    return Bundle(
        name=started.name,
        created="",
        version=started.version,
        environment=started.environment,
        entries=tuple(entry_of(winner) for winner in kept),
    )


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
    parser.add_argument(
        "--print", type=Path, nargs="+", default=[], metavar="FILE", help="only print tables of earlier results"
    )
    parser.add_argument("--most", type=int, default=None, metavar="ROWS", help="rows of the tables printed; default: all")
    arguments = parser.parse_args()
    if arguments.print:
        print(markdown([json.loads(path.read_text()) for path in arguments.print], arguments.most))
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
        results["run"] = results_of_run(arguments.run)
        if bundle is None and (arguments.run / "bundle").exists():
            bundle = arguments.run / "bundle"
    if arguments.measure:
        loaded = load_experiment(arguments.experiment)
        found = None
        if bundle is not None:
            found = replace(read_bundle(bundle), objects=())  # child processes have no files of it: this machine's cache has
        elif arguments.run is not None:
            found = winners_of(arguments.run)
        run = results.get("run", {})
        cases = _selected(loaded, arguments)
        results["gemms"] = measure(cases, found, run, arguments.workers, arguments.rounds)
        if len(results["gemms"]) < len(cases):
            results["interrupted"] = f"{len(results['gemms'])} of {len(cases)} GEMMs were measured"
    print(markdown([results], arguments.most))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / file_name(results, arguments.experiment.stem, arguments.device)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(path, file=sys.stderr)


def file_name(results: Mapping[str, Any], experiment: str, device: str) -> str:
    """`llama-few-nvidia-h200-2026-11-21.json`: the run's experiment, card and day, so that runs of a day do not collide.

    Args:
        results: with or without a run.
        experiment: where there is no run.
        device: likewise.
    """
    run = results.get("run")
    parts = (run["experiment"], run["environment"]["device_name"], run["date"][:10]) if run else None
    name, hardware, day = parts or (experiment, device, results["date"][:10])
    return f"{name}-{re.sub(r'[^a-z0-9]+', '-', hardware.lower()).strip('-')}-{day}.json"


if __name__ == "__main__":
    main()
