"""What an evaluation costs on a GPU: candidates a second with many workers, and where their time goes.

    python benchmarks/gpu_overhead.py --workers 14 --candidates 40 --m 16 --n 6144 --k 4096

Candidates are stock, each space's default, and random configs of the spaces for `mm`. The first candidate of each worker
pays for starting up and is listed apart.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path

from autokernel.backends import all_backends
from autokernel.environment import current_environment
from autokernel.errors import WorkerError
from autokernel.evaluate.candidate import EvaluateCandidate, evaluation_of_failure
from autokernel.evaluate.roofline import Ceilings, MeasureCeilings
from autokernel.ops import get_op
from autokernel.records import Candidate, Evaluation, Problem, Status, TensorSpec
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space
from autokernel.workers.limits import memory_limit, worker_env
from autokernel.workers.pool import LocalPool

Result = tuple[Evaluation, Mapping[str, float], float]  # with its phases and when it was done, in seconds from the start
_L2_BYTES, _SMEM_BYTES = 60 << 20, 232_448  # Hopper's


def problem_of(m: int, n: int, k: int) -> Problem:
    """One linear layer in bfloat16."""
    x = TensorSpec.contiguous((m, k), "bfloat16")
    weight = TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))
    return Problem(op="mm", inputs=(x, weight), device="cuda", constants=(1,))


def candidates_of(problem: Problem, count: int, seed: int) -> list[Candidate]:
    """Distinct ones: stock, the defaults, then random configs of every space in turn."""
    facts = DeviceFacts(device="cuda", isa="sm_90", l2_bytes=_L2_BYTES, smem_bytes=_SMEM_BYTES, num_units=132)
    names = names_for(get_op("mm").dims(problem), facts)
    rng = random.Random(seed)
    found: dict[str, Candidate] = {}
    spaces = load_space("mm")
    bound = {}
    for backend in all_backends():
        why_not = backend.unavailable("cuda") or backend.supports(problem)
        if why_not or backend.name not in spaces:
            print(f"without {backend.name}: {why_not or 'there is no space for it'}")
            continue
        bound[backend.name] = spaces[backend.name].bind(names)
        config = bound[backend.name].default()
        if config is not None:
            candidate = Candidate(problem=problem, backend=backend.name, config=config)
            found.setdefault(candidate.id, candidate)
    for _ in range(20 * count):
        for name, space in bound.items():
            config = space.random(rng) if len(found) < count else None
            if config is not None:
                candidate = Candidate(problem=problem, backend=name, config=config)
                found.setdefault(candidate.id, candidate)
    return list(found.values())


def evaluate(pool: LocalPool, candidates: Sequence[Candidate], ceilings: Ceilings, best_us: float | None) -> list[Result]:
    """All of them, as many at a time as there are workers."""
    start = time.monotonic()
    jobs = [EvaluateCandidate(candidate=c, ceilings=ceilings, threads=1, max_copies=32, best_us=best_us) for c in candidates]
    futures = {pool.submit(job.in_phases, 180): job.candidate for job in jobs}
    results: list[Result] = []
    for future in as_completed(futures):
        try:
            evaluation, phases = future.result()
        except WorkerError as error:
            evaluation, phases = evaluation_of_failure(futures[future], error), {}
        results.append((evaluation, phases, time.monotonic() - start))
    return results


def report(title: str, results: Sequence[Result], seconds: float) -> None:
    """Totals and medians of one round."""
    print(f"\n{title}: {len(results)} candidates in {seconds:.1f} s, {len(results) / seconds:.2f} a second")
    held = sum(evaluation.device_s for evaluation, _, _ in results)
    print(f"  device held {held:.2f} s: busy {held / seconds:.0%} of the time")
    for phase in ("reference", "build", "wait", "device"):
        values = sorted(phases[phase] for _, phases, _ in results if phase in phases)
        if values:
            print(f"  {phase:10} median {statistics.median(values):7.3f} s, most {values[-1]:7.3f} s")
    print("  " + ", ".join(f"{status} {n}" for status, n in Counter(e.status for e, _, _ in results).items()))
    good = [e for e, _, _ in results if e.status is Status.OK and e.measurement is not None]
    for evaluation in sorted(good, key=lambda e: e.measurement.median_us if e.measurement else 0.0)[:5]:
        m = evaluation.measurement
        assert m is not None
        print(f"  {m.median_us:8.2f} us (spread {m.spread_us:.2f}, {m.num_samples} samples)  {evaluation.candidate.label}")
    for evaluation, _, _ in results:
        if evaluation.status is not Status.OK:
            print(f"  {evaluation.status}: {evaluation.candidate.label}: {evaluation.message[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("workers", 14), ("candidates", 40), ("m", 16), ("n", 6144), ("k", 4096), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="write every evaluation there, as JSON")
    arguments = parser.parse_args()
    problem = problem_of(arguments.m, arguments.n, arguments.k)
    pool = LocalPool(
        arguments.workers, env=worker_env(1), memory_limit_bytes=memory_limit(arguments.workers), preload=("torch",)
    )
    try:
        start = time.monotonic()
        ceilings = pool.submit(MeasureCeilings(device="cuda", dtypes=("bfloat16",), budget_s=1.0), 120).result()
        print(f"{problem.key}\n{current_environment('cuda').device_name}; {ceilings.read_gb_per_s:.0f} GB/s read, "
              f"{ceilings.tflops.get('bfloat16', 0):.0f} TFLOP/s, measured in {time.monotonic() - start:.1f} s")  # fmt: skip
        stock = Candidate(problem=problem, backend="aten", config={"prepack": False})
        start = time.monotonic()
        warm = evaluate(pool, [stock] * arguments.workers, ceilings, None)
        report("start-up: stock on every worker", warm, time.monotonic() - start)
        best_us = min((e.measurement.median_us for e, _, _ in warm if e.measurement is not None), default=None)
        candidates = candidates_of(problem, arguments.candidates, arguments.seed)
        start = time.monotonic()
        results = evaluate(pool, candidates, ceilings, best_us)
        report(f"search, best known {best_us or 0:.2f} us", results, time.monotonic() - start)
    finally:
        pool.close()
    if arguments.out is not None:
        rows = [{**e.to_json(), "phases": dict(phases), "done_s": done} for e, phases, done in (*warm, *results)]
        arguments.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
