"""How long production compiles: stock and with a bundle, by turns, each in a fresh process with empty caches.

python benchmarks/compile_time.py runs/quickstart/<run>/bundle --scenarios decode-b1 --repeats 2

Unlike the last stage of a run, which compares within one process, this counts all that a first compilation costs.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from autokernel.config import load_experiment
from autokernel.environment import physical_cores
from autokernel.export.bundle import read_bundle
from autokernel.export.prove import Prove
from autokernel.workers.limits import worker_env

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--experiment", type=Path, default=ROOT / "experiments" / "quickstart.yaml")
    parser.add_argument("--scenarios", nargs="*", default=[], help="default: all of the experiment")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    bundle, loaded = read_bundle(arguments.bundle), load_experiment(arguments.experiment)
    device = bundle.environment.device
    threads = bundle.environment.num_units if device == "cpu" else physical_cores()
    os.environ.update(worker_env(threads))
    names = arguments.scenarios or list(loaded.experiment.scenarios)
    ratios = []
    print("scenario             mode     compile s   benchmarks   entries hit")
    for name in names:
        seconds: dict[str, list[float]] = {"default": [], "bundle": []}
        for _ in range(arguments.repeats):
            for mode, which in (("default", None), ("bundle", bundle)):
                proof = Prove(loaded=loaded, scenarios=(name,), device=device, threads=threads, bundle=which, cold=True)()
                (scenario,) = proof.scenarios
                seconds[mode].append(scenario.compile_s)
                hits = sum(count > 0 for count in proof.hits.values())
                print(f"{name:20} {mode:8} {scenario.compile_s:9.1f} {proof.num_benchmarks:12} {hits:13}", flush=True)
        ratios.append((name, statistics.median(seconds["bundle"]) / statistics.median(seconds["default"])))
    for name, ratio in ratios:
        print(f"{name}: the bundle takes {ratio:.2f} times as long as the default (medians of {arguments.repeats})")


if __name__ == "__main__":
    main()
