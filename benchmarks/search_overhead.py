"""What the search itself costs per trial: candidates that do nothing, real Optuna storage, a flushed line per trial.

    python benchmarks/search_overhead.py --trials 1000 --json

Prints milliseconds per trial split into ask, tell and the rest (submit, journal line), and the process' memory every 100
trials. The targets: ask and tell at most 20 ms a trial over 1,000 trials, memory flat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from autokernel.records import Candidate, Check, Evaluation, Measurement, Problem, Status, TensorSpec, Verdict
from autokernel.search.seeds import SeedContext, stock_seeds
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space
from autokernel.search.tuner import SamplerName, Tuner

T = TypeVar("T")
DEVICES = {
    "cpu": DeviceFacts(device="cpu", threads=16, isa="AVX512", num_units=16),
    "cuda": DeviceFacts(device="cuda", isa="sm_90", smem_bytes=232448, num_units=132),
}


class InlinePool:
    """Runs a job where it is submitted."""

    num_workers = 1

    def submit(self, job: Callable[[], T], timeout_s: float) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(job())
        return future

    def close(self) -> None:
        """Nothing to free."""


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
    trials: int, device: str, batch: int, sampler: SamplerName, folder: Path, record: Callable[[Evaluation], None]
) -> dict[str, Any]:
    """One search; times in milliseconds per trial, memory in MiB."""
    problem = Problem(
        op="mm",
        device=device,
        inputs=(TensorSpec.contiguous((512, 4096), "bfloat16"), TensorSpec.contiguous((4096, 4096), "bfloat16")),
        constants=(1,),
    )
    names = names_for({"m": 512, "n": 4096, "k": 4096, "dtype_bytes": 2, "has_constant_weight": 1}, DEVICES[device])
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
    process, pool = psutil.Process(), InlinePool()
    spent: dict[str, list[float]] = {"ask": [], "tell": [], "rest": []}
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
            evaluation = pool.submit(NoOp(proposal.candidate), timeout_s=60).result()
            record(evaluation)
            middle = time.perf_counter()
            tuner.tell(proposal.number, evaluation)
            spent["rest"].append(middle - begin)
            spent["tell"].append(time.perf_counter() - middle)
            done += 1
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--device", choices=sorted(DEVICES), default="cpu", help="whose search space; nothing runs on it")
    parser.add_argument("--batch", type=int, default=2, help="proposals in flight")
    parser.add_argument("--sampler", choices=["tpe", "random", "gp", "cmaes"], default="tpe")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "journal.jsonl").open("w", encoding="utf-8") as journal:

            def record(evaluation: Evaluation) -> None:
                journal.write(json.dumps(evaluation.to_json()) + "\n")
                journal.flush()

            result = run(arguments.trials, arguments.device, arguments.batch, arguments.sampler, folder, record)
    if arguments.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:24} {value}")


if __name__ == "__main__":
    main()
