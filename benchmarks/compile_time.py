"""How long production compiles: stock and with a bundle, by turns, each in a fresh process with empty caches.

python benchmarks/compile_time.py runs/quickstart/<run>/bundle --scenario decode-b1 --repeats 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from autokernel.config import load_experiment
from autokernel.export.bundle import read_bundle
from autokernel.export.prove import Prove
from autokernel.workers.limits import worker_env

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--experiment", type=Path, default=ROOT / "experiments" / "quickstart.yaml")
    parser.add_argument("--scenario", default="decode-b1")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    bundle, loaded = read_bundle(arguments.bundle), load_experiment(arguments.experiment)
    device, threads = bundle.environment.device, bundle.environment.num_units
    os.environ.update(worker_env(threads))
    print("mode     compile s   step us   benchmarks   entries hit")
    for _ in range(arguments.repeats):
        for which in (None, bundle):
            proof = Prove(loaded=loaded, scenario=arguments.scenario, device=device, threads=threads, bundle=which)()
            hits = sum(count > 0 for count in proof.hits.values())
            print(f"{proof.mode:8} {proof.compile_s:9.1f} {proof.step_us:9.0f} {proof.num_benchmarks:12} {hits:13}", flush=True)


if __name__ == "__main__":
    main()
