"""What of a GEMM's time is hidden where its calls follow each other: kernels behind themselves, and behind others.

    python benchmarks/launch_overlap.py --out benchmarks/results [--gemms o qkv] [--rows 16 64 128] [--best 2] [--dry]

A kernel that is launched programmatically (`pdl`, which quack's can be) starts while the one in front of it ends, if that one
lets it: its own calls do, one behind the other. In a model a small kernel is in between, which lets nothing start, or does so
at once. Of each GEMM of Llama 3.1 8B: the fastest kernels of quack in the landscapes, with and without `pdl`, the fastest of
our own, and cuBLAS, in these three places; and the small kernels by themselves. Cold L2 by rotation, CUDA graphs of many
calls, interleaved in random order. `--dry` compiles and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import cute_kernels  # noqa: E402
from gemm_kernels import LLAMA, Gemm, llama_gemm  # noqa: E402
from landscape_file import FOLDER, load  # noqa: E402

_ROUNDS = 15
_OTHERS = 20.0  # us of a call beside the small kernel, for how many calls a graph has
PLACES = ("behind itself", "behind a small kernel", "behind a small kernel that lets it start")

Config = dict[str, Any]


def contenders(gemm: Gemm, best: int, folder: Path = FOLDER / "nvidia-h200") -> list[tuple[Config, bool]]:
    """Configs and whether they are launched programmatically: the first `best` of quack, both ways, and one of our own."""
    rows = [row for row in load(folder / f"{gemm.name}.json.gz").rows if row.backend == cute_kernels.BACKEND]
    timed = sorted((row for row in rows if row.best_us is not None), key=lambda row: row.best_us or 0.0)
    quack = [row.config for row in timed if row.config["source"] == "quack"][:best]
    own = [row.config for row in timed if row.config["source"] == "cluster"][:1]
    return [(config, pdl) for config in quack for pdl in (True, False)] + [(config, False) for config in own]


def measure(gemm: Gemm, configs: list[tuple[Config, bool]], folder: Path, scratch: Any) -> dict[str, Any]:
    """Microseconds of a call of each, in each place."""
    from gemm_device import Bench

    bench = Bench(gemm, folder, scratch)
    launches = {"cublas": bench.stock_launch()}
    for config, pdl in configs:
        launches[json.dumps({**config, "pdl": pdl})] = bench.cute_launch(config, pdl=pdl)
    graphs = {}
    for name, launch in launches.items():
        us = bench.quick(launch)
        graphs[name, PLACES[0]] = bench.capture(launch, us)
        for place, lets_start in zip(PLACES[1:], (False, True), strict=True):
            graphs[name, place] = bench.capture(bench.behind_small(launch, lets_start=lets_start), us)
    for place, lets_start in zip(PLACES[1:], (False, True), strict=True):
        graphs["small", place] = bench.capture(bench.behind_small(None, lets_start=lets_start), _OTHERS)
    found = bench.interleaved(graphs, _ROUNDS)
    us_of = {name: {place: round(found[name, place], 4) for place in PLACES if (name, place) in found} for name, _ in graphs}
    for name, times in us_of.items():
        print(f"{gemm.name} {name}: " + ", ".join(f"{place} {us:.2f} us" for place, us in times.items()), flush=True)
    return {"name": gemm.name, "m": gemm.m, "n": gemm.n, "k": gemm.k, "us": us_of}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gemms", nargs="+", choices=sorted(LLAMA), default=list(LLAMA))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--best", type=int, default=2, help="kernels of quack")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    gemms = {gemm.name: gemm for gemm in (llama_gemm(name, m) for name in options.gemms for m in options.rows)}
    configs = {name: contenders(gemm, options.best) for name, gemm in gemms.items()}
    specs = [cute_kernels.spec_of(gemms[name], config, pdl=pdl) for name, own in configs.items() for config, pdl in own]
    if cute_kernels.compile_all(specs, options.workers):
        sys.exit("not all of the kernels compile")
    if options.dry:
        return
    import gemm_device

    scratch = gemm_device.open_device()
    results = (measure(gemm, configs[name], options.out, scratch) for name, gemm in gemms.items())
    print(gemm_device.record(options.out, "launch-overlap", " ".join((__doc__ or "").split()), results))


if __name__ == "__main__":
    main()
