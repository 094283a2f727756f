"""CuTe DSL kernels against each other and cuBLAS: of each kind the ones that the cost model ranks first.

    python benchmarks/cute_race.py --out benchmarks/results [--gemms o qkv] [--rows 16 64 128] [--best 12] [--dry]

The GEMMs are those of Llama 3.1 8B. All cores compile first; then one process checks each kernel against fp32 and times it:
cold L2 by rotation over copies, CUDA graphs of many calls, events. The best eight and cuBLAS are timed again, interleaved in
random order. `--dry` compiles and needs no GPU.
`import_cute.py` puts what is written into the landscapes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import cute_kernels  # noqa: E402
from gemm_kernels import LLAMA, Gemm, llama_gemm  # noqa: E402
from replay import H200  # noqa: E402

from autokernel.search.cost_model import features, kind_of, load_model  # noqa: E402
from autokernel.search.space import names_for  # noqa: E402

_CAREFUL, _ROUNDS = 8, 15
_PROTOCOL = (
    "bf16, cold L2 by rotation over copies of inputs and outputs, CUDA graphs of many calls, events; us: median of 3 replays; "
    f"careful_us: best {_CAREFUL} and cuBLAS, median of {_ROUNDS} replays each, interleaved in random order"
)

Config = dict[str, Any]


def candidates(gemm: Gemm, best: int) -> list[Config]:
    """The first `best` of the cost model of each kind, with longer stages and without."""
    legal = cute_kernels.legal_configs(gemm)
    model = load_model().cost[cute_kernels.BACKEND]
    costs = model.predict(features(names_for(gemm.dims, H200), legal))
    found: list[Config] = []
    taken: dict[tuple[Any, ...], int] = {}
    for i in sorted(range(len(legal)), key=lambda i: float(costs[i])):
        kind = kind_of(legal[i]), bool(legal[i].get("tile_k"))
        taken[kind] = taken.get(kind, 0) + 1
        if taken[kind] <= best:
            found.append(legal[i])
    return found


def compiled(gemms: Sequence[Gemm], configs: dict[str, list[Config]], workers: int) -> dict[str, list[Config]]:
    """Those configs whose kernels compile, with all kernels in the package's cache."""
    keyed = [(g.name, c, cute_kernels.spec_of(g, c)) for g in gemms for c in configs[g.name]]
    failed = cute_kernels.compile_all((spec for _, _, spec in keyed), workers)
    return {g.name: [c for name, c, spec in keyed if name == g.name and cute_kernels.key_of(spec) not in failed] for g in gemms}


def race(gemm: Gemm, configs: Sequence[Config], folder: Path, scratch: Any) -> dict[str, Any]:
    """All kernels of one GEMM, once; the best of them and cuBLAS again."""
    from gemm_device import Bench, WrongResultError

    bench = Bench(gemm, folder, scratch)
    launches = {"cublas": bench.stock_launch()}
    us = {"cublas": bench.quick(launches["cublas"])}
    for config in configs:
        key = json.dumps(config)
        try:
            launches[key] = bench.cute_launch(config)
            us[key] = bench.quick(launches[key])
        except WrongResultError as error:
            print(f"{gemm.name} {config}: {error}", flush=True)
    racing = [*sorted((key for key in us if key != "cublas"), key=lambda key: us[key])[:_CAREFUL], "cublas"]
    graphs = {key: bench.capture(launches[key], us[key]) for key in racing}
    careful = {key: round(time, 4) for key, time in bench.interleaved(graphs, _ROUNDS).items()}
    rows = [
        {"config": json.loads(key), "us": round(time, 4), **({"careful_us": careful[key]} if key in careful else {})}
        for key, time in us.items()
        if key != "cublas"
    ]
    best = min((key for key in careful if key != "cublas"), key=lambda key: careful[key])
    print(f"{gemm.name}: {careful[best]:.2f} us, {careful['cublas'] / careful[best]:.3f} x cuBLAS, {best}", flush=True)
    cublas = {"cublas_us": round(us["cublas"], 4), "cublas_careful_us": careful["cublas"]}
    return {"name": gemm.name, "m": gemm.m, "n": gemm.n, "k": gemm.k, **cublas, "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gemms", nargs="+", choices=sorted(LLAMA), default=list(LLAMA))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--best", type=int, default=12, help="configs of each kind")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    gemms = [llama_gemm(name, m) for name in options.gemms for m in options.rows]
    configs = compiled(gemms, {g.name: candidates(g, options.best) for g in gemms}, options.workers)
    print(", ".join(f"{name} {len(found)}" for name, found in configs.items()), flush=True)
    if options.dry:
        return
    import gemm_device

    scratch = gemm_device.open_device()
    results = (race(gemm, configs[gemm.name], options.out, scratch) for gemm in gemms)
    print(gemm_device.record(options.out, "cute-race", _PROTOCOL, results))


if __name__ == "__main__":
    main()
