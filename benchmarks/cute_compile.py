"""How long CuTe DSL kernels take to compile, cold and from the cache: 24 of nvidia-cutlass-operators, 44 of quack.

    python benchmarks/cute_compile.py [--processes N] [--out benchmarks/results]

Every config that either source offers for a bf16 GEMM of row-major x and nn.Linear's weight on SM90 is compiled to a shared
object, in child processes with an empty cache; then all are asked for again, in fresh processes and in this one, with the
cache that this left. The compilers are imported once, by the server that the children are forked from. Needs the `cutedsl`
extra and a C compiler, and no GPU, which is hidden where there is one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cute_kernels import context_with_compilers  # noqa: E402

from autokernel.cutedsl.cache import ObjectCache  # noqa: E402
from autokernel.cutedsl.compiler import unavailable, versions  # noqa: E402
from autokernel.cutedsl.config import OPERATORS_TILES  # noqa: E402
from autokernel.cutedsl.spec import KernelSpec, ObjectInfo  # noqa: E402
from autokernel.environment import current_environment  # noqa: E402
from autokernel.records import ConfigValue  # noqa: E402

# those of `quack.gemm_config.get_all_configs` for SM90
_QUACK_COOPERATIVE = ((256, 128), (256, 160), (256, 192), (256, 208), (128, 224), (128, 256))
_QUACK_PINGPONG = ((128, 128), (128, 160), (128, 192), (128, 208), (192, 128))


def configs() -> list[dict[str, ConfigValue]]:
    """All that either source offers by itself for one problem."""
    found: list[dict[str, ConfigValue]] = [
        {"source": "operators", "tile_m": m, "tile_n": n, "cluster_m": cm, "cluster_n": cn}
        for m, n in OPERATORS_TILES
        for cm in (1, 2)
        for cn in (1, 2)
    ]
    found += [
        {"source": "quack", "tile_m": m, "tile_n": n, "pingpong": pingpong, "cluster_m": cm, "cluster_n": cn, "swap": swap}
        for pingpong, tiles in ((False, _QUACK_COOPERATIVE), (True, _QUACK_PINGPONG))
        for m, n in tiles
        for cm, cn in ((1, 2), (2, 1))
        for swap in (False, True)
    ]
    return found


def build(folder: str, spec: KernelSpec) -> tuple[str, float, float]:
    """In a child process: (source, seconds to compile it when that was done, seconds until it was there)."""
    start = time.perf_counter()
    info: ObjectInfo = ObjectCache(Path(folder)).get_or_compile(spec)[0]
    return str(spec.config["source"]), info.compile_s, time.perf_counter() - start


def timed(
    folder: str, specs: Sequence[KernelSpec], processes: int, context: BaseContext
) -> tuple[float, float, list[tuple[str, float, float]]]:
    """Seconds until the first process was there, seconds for all in that many processes, and what each spec took."""
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        pool.submit(os.getpid).result()
        ready_s = time.perf_counter() - start
        results = list(pool.map(build, [folder] * len(specs), specs))
    return ready_s, time.perf_counter() - start, results


def area(spec: KernelSpec) -> int:
    """Elements of a tile: the more, the longer it is compiled."""
    return spec.cute.tile_m * spec.cute.tile_n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if (reason := unavailable()) is not None:
        raise SystemExit(reason)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a context for each process would take seconds, too
    facts: dict[str, Any] = {"dtype": "bfloat16", "out_dtype": "bfloat16", "a_major": "k", "b_major": "k"}
    specs = sorted((KernelSpec(config=config, **facts) for config in configs()), key=area, reverse=True)
    with tempfile.TemporaryDirectory() as folder:
        with context_with_compilers() as context:
            imports_s, cold_s, cold = timed(folder, specs, arguments.processes, context)
        _, warm_s, warm = timed(folder, specs, arguments.processes, multiprocessing.get_context("spawn"))
        start = time.perf_counter()
        for spec in specs:
            ObjectCache(Path(folder)).get_or_compile(spec)
        in_process_s = time.perf_counter() - start
        num_bytes = ObjectCache(Path(folder)).statistics().num_bytes
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": current_environment("cpu").to_json(),
        "versions": versions(),
        "processes": arguments.processes,
        "num_kernels": len(specs),
        "num_bytes": num_bytes,
        "cold_s": round(cold_s, 2),
        "imports_s": round(imports_s, 2),  # of cold_s
        "warm_fresh_processes_s": round(warm_s, 2),
        "warm_one_process_s": round(in_process_s, 3),
        "compile_s": {
            source: {"num": len(each), "median": sorted(each)[len(each) // 2], "max": max(each)}
            for source in ("operators", "quack")
            if (each := [round(seconds, 2) for name, seconds, _ in cold if name == source])
        },
        "warm_slowest_s": round(max(seconds for _, _, seconds in warm), 3),
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        name = f"cute-compile-{arguments.processes}-processes-{result['date'][:10]}.json"
        (arguments.out / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
