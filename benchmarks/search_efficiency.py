"""How many configs a search needs, replayed on recorded landscapes: no GPU.

    python benchmarks/search_efficiency.py [--strategies NAME ...] [--seeds 20] [--backends inductor triton] [--out FILE]

For each strategy: evaluations until 95, 96, 98 and 99 % of the best config's speed are reached, failed ones included.
What learns across shapes is trained without the landscape it is judged on, and without those of the same weight
(n, k): production meets shapes that nobody recorded. A strategy of the package runs in the package's own Tuner.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import replay
from landscape_file import FOLDER, Config, Landscape, load_all
from replay import Replay

from autokernel.search.cost_model import CostModel
from autokernel.search.seeds import Seed, SeedContext, seeds_from
from autokernel.search.tuner import SamplerName, Tuner

_MODELS = 4  # trained for each landscape, with other seeds
FRACTIONS = (0.95, 0.96, 0.98, 0.99)
Times = list[float | None]
RESULTS = replay.ROOT / "benchmarks" / "results" / "search_efficiency.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One landscape with what may be learned from the others."""

    replay: Replay
    training: list[Landscape]
    models: list[CostModel]
    limit: int

    def model(self, seed: int) -> CostModel | None:
        """A model trained with another seed for each of the first seeds of a search."""
        return self.models[seed % len(self.models)] if self.models else None


Strategy = Callable[[Case, int], Times]


def in_order(case: Case, order: Iterable[tuple[str, Config]]) -> Times:
    """Times of configs in this order, each once, those of the landscape only."""
    times: Times = []
    seen: set[tuple[str, str]] = set()
    for backend, config in order:
        key = (backend, json.dumps(config, sort_keys=True))
        if key in case.replay.times and key not in seen:
            seen.add(key)
            times.append(case.replay.times[key])
        if len(times) == case.limit:
            break
    return times


def uniform(case: Case, seed: int) -> Times:
    """A random order."""
    times = list(case.replay.times.values())
    random.Random(seed).shuffle(times)
    return times[: case.limit]


def nvmatmul(case: Case, _seed: int) -> Times:
    """nvMatmulHeuristics' proposals from the first to the last, each as the nearest config of the landscape."""
    from autokernel.search.nvmatmul import ask_library
    from autokernel.search.nvmatmul_library import query_for

    query = query_for(case.replay.problem, dict(case.replay.names))
    if isinstance(query, str):
        return []
    order = []
    for backend, space in case.replay.spaces.items():
        bound = space.bind(case.replay.names)
        for row in ask_library(query):
            tile = {"BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "BLOCK_K": row.block_k, "GROUP_M": row.group_m}
            found = bound.nearest({**tile, "num_stages": row.num_stages, "num_warps": row.num_warps})
            order += [(backend, found)] if found is not None else []
    return in_order(case, order)


def tuner(
    case: Case, seed: int, *, sampler: SamplerName | Literal["auto"], seeds: Sequence[str] = (), in_flight: int = 1
) -> Times:
    """The package's Tuner."""
    search = Tuner(
        problem=case.replay.problem, spaces=case.replay.spaces, names=case.replay.names, sampler=sampler, seed=seed,
        max_trials=case.limit, cost_model=case.model(seed),
    )  # fmt: skip
    search.enqueue(_seeds(case, seeds))
    return case.replay.drive(search, case.limit, in_flight)


def _seeds(case: Case, names: Sequence[str]) -> list[Seed]:
    context = SeedContext(problem=case.replay.problem, spaces=case.replay.spaces, names=case.replay.names)
    found = [seed for seed in seeds_from(names, context) if seed.candidate.backend in case.replay.spaces]
    return [Seed(candidate=seed.candidate, origin="seed") for seed in found]  # the tuner would leave some origins out


def ranked(case: Case, seed: int) -> Times:
    """The cost model's order, never corrected."""
    model = case.model(seed)
    assert model is not None
    order: list[tuple[float, str, Config]] = []
    for backend, space in case.replay.spaces.items():
        configs = list(space.bind(case.replay.names).enumerate())
        cost = model.predict(backend, case.replay.names, configs)
        if cost is not None:
            fails = model.fails(backend, case.replay.names, configs)
            order += [(float(c + (f > 0.5)), backend, config) for c, f, config in zip(cost, fails, configs, strict=True)]
    return in_order(case, ((backend, config) for _, backend, config in sorted(order, key=lambda item: item[0])))


def portfolio(case: Case, _seed: int) -> Times:
    """The configs that together cover the other landscapes best, greedily; those of the same class of M first."""
    own = _m_class(case.replay.landscape)
    same = [landscape for landscape in case.training if _m_class(landscape) == own]
    order = [*_cover(same or case.training, case.limit), *_cover(case.training, case.limit)]
    moved = []
    for backend, config in order:
        if backend in case.replay.spaces:
            near = case.replay.spaces[backend].bind(case.replay.names).nearest(config)
            moved += [(backend, near)] if near is not None else []
    return in_order(case, moved)


def _m_class(landscape: Landscape) -> tuple[str, int]:
    said = landscape.problem
    return ("bmm" if said["op"] == "bmm" else "mm"), sum(said["m"] > edge for edge in (32, 256))


def _cover(landscapes: Sequence[Landscape], count: int) -> list[tuple[str, Config]]:
    """Greedy: each config in turn that raises the mean over landscapes of the best speed so far most."""
    keys: dict[tuple[str, str], int] = {}
    entries: list[tuple[int, int, float]] = []
    for i, landscape in enumerate(landscapes):
        times = [row.best_us for row in landscape.rows if row.backend != "aten" and row.best_us is not None]
        for row in landscape.rows:
            if row.backend != "aten" and row.best_us is not None:
                place = keys.setdefault((row.backend, json.dumps(row.config, sort_keys=True)), len(keys))
                entries.append((i, place, min(times) / row.best_us))
    speeds = np.zeros((len(landscapes), len(keys)))
    for i, place, speed in entries:
        speeds[i, place] = speed
    names = list(keys)
    reached = np.zeros(len(landscapes))
    order = []
    for _ in range(min(count, len(keys))):
        best = int(np.maximum(speeds, reached[:, None]).sum(axis=0).argmax())
        reached = np.maximum(reached, speeds[:, best])
        speeds[:, best] = 0.0
        order.append((names[best][0], json.loads(names[best][1])))
    return order


STRATEGIES: dict[str, Strategy] = {
    "random": uniform,
    "nvmatmul": nvmatmul,
    "tpe": partial(tuner, sampler="tpe"),
    "tpe+seeds": partial(tuner, sampler="tpe", seeds=("stock", "nvmatmul")),
    "gp": partial(tuner, sampler="gp"),
    "gp+seeds": partial(tuner, sampler="gp", seeds=("stock", "nvmatmul")),
    "cmaes": partial(tuner, sampler="cmaes"),
    "cmaes+seeds": partial(tuner, sampler="cmaes", seeds=("stock", "nvmatmul")),
    "portfolio": portfolio,
    "ranked": ranked,
    "model": partial(tuner, sampler="model"),
    "model+seeds": partial(tuner, sampler="model", seeds=("stock", "nvmatmul")),
    "model, 16 in flight": partial(tuner, sampler="model", in_flight=16),
}
ONE_SEED = ("nvmatmul", "portfolio")  # always the same
LEARNED = ("portfolio", "ranked", "model", "model+seeds", "model, 16 in flight")


def others(landscape: Landscape, landscapes: Sequence[Landscape]) -> list[Landscape]:
    """What may be learned from: other shapes, and not another M of the same weight either."""

    def weight(one: Landscape) -> tuple[Any, ...]:
        return one.problem["op"] == "bmm", one.problem["n"], one.problem["k"]

    return [other for other in landscapes if weight(other) != weight(landscape)]


def study(
    landscape: Landscape, training: list[Landscape], names: Sequence[str], seeds: int, limit: int, backends: Sequence[str]
) -> dict[str, Any]:
    """Evaluations needed by each strategy on one landscape: strategy -> fraction -> one number for each seed."""
    from train_cost_model import train

    learned = bool(training) and any(name in LEARNED for name in names)
    models = [train(training, seed) for seed in range(min(seeds, _MODELS))] if learned else []
    case = Case(replay=Replay(landscape, backends), training=training, models=models, limit=limit)
    found: dict[str, Any] = {}
    for name in names:
        if name in LEARNED and not training:
            continue
        begun = time.monotonic()
        runs = [STRATEGIES[name](case, seed) for seed in range(1 if name in ONE_SEED else seeds)]
        needed = {str(f): [_finite(case.replay.needed(times, f)) for times in runs] for f in FRACTIONS}
        reached = {str(c): statistics.median(case.replay.reached(times, c) for times in runs) for c in (8, 16, 24)}
        found[name] = {"needed": needed, "reached": reached, "seconds": round(time.monotonic() - begun, 2)}
    return found


def summary(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Median and worst over landscapes and seeds, and the median of the fraction reached."""
    of = [found[name] for found in results.values() if name in found]
    every = {f: [x for one in of for x in _padded(one["needed"][f], 20)] for f in map(str, FRACTIONS)}
    reached = {c: statistics.median(one["reached"][c] for one in of) for c in ("8", "16", "24")}
    return {
        "median": {f: statistics.median(xs) for f, xs in every.items()},
        "worst": {f: max(xs) for f, xs in every.items()},
        "share": {f: sum(math.isfinite(x) for x in xs) / len(xs) for f, xs in every.items()},
        "reached": reached,
    }


def _finite(needed: float) -> float | None:
    return needed if math.isfinite(needed) else None


def _padded(xs: list[float | None], count: int) -> list[float]:
    known = [math.inf if x is None else x for x in xs]
    return known * count if len(known) == 1 else known  # a strategy without chance weighs as much as the others


def _lines(said: dict[str, Any]) -> str:
    """JSON with one line for each strategy on each landscape."""
    *head, (_, results) = said.items()
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head]
    blocks = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(s)}: {json.dumps(found, allow_nan=False)}" for s, found in one.items())
        + "\n  }"
        for name, one in results.items()
    ]
    return "{\n" + "\n".join(lines) + '\n "landscapes": {\n' + ",\n".join(blocks) + "\n }\n}\n"


def _number(x: float) -> str:
    return f"{x:.0f}" if math.isfinite(x) else "never"


def table(results: dict[str, dict[str, Any]], names: Sequence[str], limit: int) -> str:
    """The summary of all strategies as Markdown."""
    lines = [
        f"| strategy | 95 % | 96 % | 98 % | 99 % | 99 % within {limit} | worst 96 % | reached after 8, 16, 24 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if not any(name in found for found in results.values()):
            continue
        s = summary(results, name)
        cells = [_number(s["median"][str(f)]) for f in FRACTIONS]
        reached = ", ".join(f"{s['reached'][c]:.3f}" for c in ("8", "16", "24"))
        lines.append(f"| {name} | {' | '.join(cells)} | {s['share']['0.99']:.0%} | {_number(s['worst']['0.96'])} | {reached} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="*", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--limit", type=int, default=64, help="evaluations a search may use")
    parser.add_argument("--backends", nargs="+", default=["inductor"], help="whose configs are searched: inductor, triton")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of landscapes to judge on; all are learned from")
    parser.add_argument("--out", type=Path, help=f"JSON to write or add to, e.g. {RESULTS.relative_to(replay.ROOT)}")
    options = parser.parse_args()
    landscapes = load_all(FOLDER)
    judged = [one for one in landscapes if one.of(options.backends) and (not options.only or one.name in options.only)]
    if not judged:
        sys.exit(f"{FOLDER}: no landscapes; record some with benchmarks/record_landscapes.py")
    results: dict[str, dict[str, Any]] = {}
    if options.out is not None and options.out.is_file():
        results = json.loads(options.out.read_text())["landscapes"]
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = {
            one.name: pool.submit(
                study, one, others(one, landscapes), options.strategies, options.seeds, options.limit, options.backends
            )
            for one in judged
        }
        for name, job in jobs.items():
            results.setdefault(name, {}).update(job.result())
            line = "  ".join(
                f"{s}: {_number(statistics.median(_padded(r['needed']['0.99'], 1)))}" for s, r in results[name].items()
            )
            print(f"{name}: 99 % after  {line}", flush=True)
            if options.out is not None:
                said = {"backends": options.backends, "limit": options.limit, "seeds": options.seeds, "landscapes": results}
                options.out.write_text(_lines(said))
    print(table(results, list(STRATEGIES), options.limit))


if __name__ == "__main__":
    main()
