"""What a run costs the driver per trial: candidates that do nothing, and everything else for real.

    python benchmarks/search_overhead.py --trials 1000 --json

Optuna on SQLite, jobs dispatched to a child process, the journal with its fsync, and the MLflow mirror. Prints milliseconds
per trial split into ask, dispatch (submit, child process, result), record (journal and mirror) and tell; the process'
memory every 100 trials; and how long MLflow took to catch up after the last trial. The targets: at most 50 ms per trial in
all over 1,000 trials, memory flat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from autokernel.environment import current_environment
from autokernel.events import Evaluated, Event, RunStarted
from autokernel.records import Candidate, Check, Evaluation, Measurement, Problem, Status, TensorSpec, Verdict
from autokernel.search.seeds import SeedContext, stock_seeds
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space
from autokernel.search.tuner import SamplerName, Tuner
from autokernel.tracking.journal import Journal
from autokernel.tracking.mlflow_mirror import MlflowMirror
from autokernel.workers.pool import LocalPool, Pool

DEVICES = {
    "cpu": DeviceFacts(device="cpu", threads=16, isa="AVX512", num_units=16),
    "cuda": DeviceFacts(device="cuda", isa="sm_90", smem_bytes=232448, num_units=132),
}


class Warm:
    """Starts the child process, so that no trial pays for it."""

    def __call__(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class NoOp:
    """A job that measures nothing and returns a time that depends on the config alone, one in ten failing."""

    candidate: Candidate

    def __call__(self) -> Evaluation:
        luck = int(self.candidate.id, 16) % 1000 / 1000
        if luck < 0.1:
            return Evaluation(candidate=self.candidate, status=Status.BUILD_ERROR, message="one in ten fails")
        numbers = [float(v) for v in self.candidate.config.values() if isinstance(v, (int, float))]
        return Evaluation(
            candidate=self.candidate,
            status=Status.OK,
            verdict=Verdict(checks=(Check(name="none", value=0, limit=1, passed=True),)),
            measurement=Measurement(median_us=50 + sum(numbers) % 97 + luck, spread_us=1, num_samples=5, regime="no-op"),
        )


def run(
    trials: int, device: str, batch: int, sampler: SamplerName, folder: Path, pool: Pool, record: Callable[[Event], None]
) -> dict[str, Any]:
    """One search; times in milliseconds per trial, memory in MiB."""
    problem = Problem(
        op="mm",
        device=device,
        inputs=(TensorSpec.contiguous((512, 4096), "bfloat16"), TensorSpec.contiguous((4096, 4096), "bfloat16")),
        constants=(1,),
    )
    names = names_for(
        {"m": 512, "n": 4096, "k": 4096, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}, DEVICES[device]
    )
    spaces = load_space("mm")
    start = time.perf_counter()
    tuner = Tuner(
        problem=problem,
        spaces=spaces,
        names=names,
        storage=f"sqlite:///{folder / 'study.db'}",
        sampler=sampler,
        max_trials=trials,
    )
    tuner.enqueue(stock_seeds(SeedContext(problem=problem, spaces=spaces, names=names)))
    opened = time.perf_counter() - start
    process = psutil.Process()
    spent: dict[str, list[float]] = {"ask": [], "dispatch": [], "record": [], "tell": []}
    memory: list[float] = []
    done = 0
    while True:
        begin = time.perf_counter()
        proposals = tuner.ask(batch)
        spent["ask"] += [(time.perf_counter() - begin) / max(len(proposals), 1)] * len(proposals)
        if not proposals:
            break
        for proposal in proposals:
            begin = time.perf_counter()
            evaluation = pool.submit(NoOp(proposal.candidate), 60).result()
            evaluated = time.perf_counter()
            done += 1
            record(Evaluated(evaluation=evaluation, origin=proposal.origin, number=done))
            recorded = time.perf_counter()
            tuner.tell(proposal.number, evaluation)
            spent["dispatch"].append(evaluated - begin)
            spent["record"].append(recorded - evaluated)
            spent["tell"].append(time.perf_counter() - recorded)
            if done % 100 == 0:
                memory.append(round(process.memory_info().rss / 2**20, 1))
    tuner.close()
    per_trial = {name: round(1e3 * statistics.fmean(times), 2) for name, times in spent.items()}
    last = {name: round(1e3 * statistics.fmean(times[-100:]), 2) for name, times in spent.items()}
    return {
        "trials": done, "device": device, "sampler": sampler, "batch": batch, "open_ms": round(1e3 * opened, 1),
        "ms_per_trial": per_trial, "ms_per_trial_last_100": last, "driver_ms": round(sum(per_trial.values()), 2),
        "ask_and_tell_ms": round(per_trial["ask"] + per_trial["tell"], 2), "rss_mib": memory,
        "rss_growth_mib": round(memory[-1] - memory[0], 1) if memory else 0.0,
    }  # fmt: skip


def started() -> RunStarted:
    """The first line of a journal."""
    environment = current_environment("cpu")
    return RunStarted(
        run_id="run", name="overhead", experiment="name: overhead\n", experiment_digest="", environment=environment, seed=0,
        version="0",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--device", choices=sorted(DEVICES), default="cpu", help="whose search space; nothing runs on it")
    parser.add_argument("--batch", type=int, default=2, help="proposals in flight")
    parser.add_argument("--sampler", choices=["tpe", "random", "gp", "cmaes"], default="tpe")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # a job's class must be importable in the child, so not this script's `__main__`
    from search_overhead import Warm as ImportedWarm
    from search_overhead import run as run_search

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "overhead" / "run"
        journal, mirror = Journal(folder), MlflowMirror(folder)
        pool = LocalPool(1)

        def record(event: Event) -> None:
            journal.record(event)
            mirror.record(event)

        record(started())
        pool.submit(ImportedWarm(), 60).result()
        result = run_search(arguments.trials, arguments.device, arguments.batch, arguments.sampler, folder, pool, record)
        pool.close()
        journal.close()
        begin = time.perf_counter()
        mirror.close()
        result["mlflow_caught_up_s"] = round(time.perf_counter() - begin, 1)
        result["mlflow_complete"] = mirror.complete
    if arguments.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:24} {value}")


if __name__ == "__main__":
    main()
