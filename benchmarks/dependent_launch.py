"""What programmatic dependent launch gives a chain of one-row products, in the sizes of a decoding step of Llama 3.1 8B.

    python benchmarks/dependent_launch.py [--out benchmarks/results]

Sixteen layers of norm; q, k, v; as many bytes as 2,080 keys and values; o; norm; gate and up; down, each with weights of
its own, as plain Triton kernels in one CUDA graph. Four ways, by turns, with each product's fastest two configs: launched
one behind the other; launched while the one in front runs, with a wait at the start; the same with the first block of weights
loaded before the wait; the same with two blocks of weights prefetched into L2. Results must be the same bits. Needs an idle GPU
of compute capability 9.0 or more.
"""

# Triton compiles statements.
# ruff: noqa: N803
from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

LAYERS = 16
SHAPES = {"q k v": (6144, 4096), "keys": (1040, 4096), "o": (4096, 4096), "gate up": (28672, 4096), "down": (4096, 14336)}
WAYS = ("one behind the other", "wait first", "weights first", "prefetch into L2")
Config = tuple[int, int, int, int]  # BLOCK_N, BLOCK_K, stages, warps


@triton.jit
def product(x, w, y, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WAY: tl.constexpr):
    """BLOCK_N numbers of y = w @ x; w is [N, K], row-major."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = w + n[:, None] * K + k[None, :]
    x_at = x + k
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if WAY >= 1:
        gdc_launch_dependents()
    if WAY == 2:
        first = tl.load(w_at, eviction_policy="evict_first")
    if WAY == 3:
        lines = w + n[:, None] * K + tl.arange(0, 2 * BLOCK_K // 64)[None, :] * 64
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )
    if WAY >= 1:
        gdc_wait()
    start = 0
    if WAY == 2:
        total += first.to(tl.float32) * tl.load(x_at, eviction_policy="evict_last").to(tl.float32)[None, :]
        w_at += BLOCK_K
        x_at += BLOCK_K
        start = 1
    for _ in tl.range(start, K // BLOCK_K, num_stages=STAGES):
        weights = tl.load(w_at, eviction_policy="evict_first").to(tl.float32)
        total += weights * tl.load(x_at, eviction_policy="evict_last").to(tl.float32)[None, :]
        w_at += BLOCK_K
        x_at += BLOCK_K
    tl.store(y + n, tl.sum(total, axis=1).to(y.dtype.element_ty))


@triton.jit
def norm(x, gain, y, K: tl.constexpr, WAY: tl.constexpr):
    """RMS norm of one row."""
    k = tl.arange(0, K)
    if WAY >= 1:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(x + k).to(tl.float32)
    row = row * tl.rsqrt(tl.sum(row * row) / K + 1e-5)
    tl.store(y + k, (row * tl.load(gain + k).to(tl.float32)).to(y.dtype.element_ty))


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of it, after a run on a stream of its own."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def us_of(graph: torch.cuda.CUDAGraph) -> float:
    """Time of a replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


class Chain:
    """Sixteen layers and what they write."""

    def __init__(self) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5

        self.weights = {name: [random(*shape) for _ in range(LAYERS)] for name, shape in SHAPES.items()}
        self.out = {name: torch.zeros(max(n, 4096), device="cuda", dtype=torch.bfloat16) for name, (n, _) in SHAPES.items()}
        self.gain = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
        self.given, self.x, self.normed = random(4096), torch.empty_like(self.gain), torch.empty_like(self.gain)

    def best_configs(self, name: str, count: int) -> list[Config]:
        """The fastest of a product by itself."""
        x = torch.randn(SHAPES[name][1], device="cuda", dtype=torch.bfloat16)
        found = []
        for config in itertools.product((4, 8, 16), (256, 512, 1024), (1, 3), (4, 8)):
            if 2048 <= config[0] * config[1] <= 8192:
                graph = graph_of(lambda config=config: [self._product(name, i, x, config, 0) for i in range(LAYERS)])  # type: ignore[misc]
                found.append((min(us_of(graph) for _ in range(7)), config))
        return [config for _, config in sorted(found)[:count]]

    def _product(self, name: str, layer: int, x: torch.Tensor, config: Config, way: int) -> torch.Tensor:
        (n, k), (block_n, block_k, stages, warps) = SHAPES[name], config
        early = {"launch_pdl": True} if way else {}
        kernel: Any = product
        kernel[(n // block_n,)](
            x, self.weights[name][layer], self.out[name], k, block_n, block_k, stages, way, num_warps=warps, **early
        )
        return self.out[name]

    def run(self, way: int, configs: dict[str, Config]) -> None:
        """All layers."""
        early = {"launch_pdl": True} if way else {}
        normalise: Any = norm
        self.x.copy_(self.given)
        hidden = self.x
        for layer in range(LAYERS):
            normalise[(1,)](hidden, self.gain, self.normed, 4096, min(way, 1), num_warps=8, **early)
            hidden = self._product("q k v", layer, self.normed, configs["q k v"], way)
            hidden = self._product("keys", layer, hidden, configs["keys"], way)
            hidden = self._product("o", layer, hidden, configs["o"], way)
            normalise[(1,)](hidden, self.gain, self.normed, 4096, min(way, 1), num_warps=8, **early)
            hidden = self._product("gate up", layer, self.normed, configs["gate up"], way)
            hidden = self._product("down", layer, hidden, configs["down"], way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=None, help="folder for the raw results")
    arguments = parser.parse_args()
    chain, rows = Chain(), []
    best = {name: chain.best_configs(name, 2) for name in SHAPES}
    for rank in range(2):
        configs = {name: found[rank] for name, found in best.items()}
        graphs, results = [], []
        for way in range(len(WAYS)):
            graphs.append(graph_of(lambda way=way, configs=configs: chain.run(way, configs)))  # type: ignore[misc]
            graphs[-1].replay()
            results.append(chain.out["down"].clone())
        times: list[list[float]] = [[] for _ in WAYS]
        for _ in range(arguments.rounds):
            for way, graph in enumerate(graphs):
                times[way].append(us_of(graph) / LAYERS)
        for way, name in enumerate(WAYS):
            ratio = statistics.median(a / b for a, b in zip(times[0], times[way], strict=True))
            same = bool(torch.equal(results[0], results[way]))
            rows.append({"configs": configs, "way": name, "us": statistics.median(times[way]), "over": ratio, "same": same})
            print(
                f"{name:22} {rows[-1]['us']:7.2f} us a layer  {ratio:.3f} times as fast  {'' if same else 'OTHER BITS'}",
                flush=True,
            )
    if arguments.out is not None:
        device = torch.cuda.get_device_name()
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        path = arguments.out / f"dependent-launch-{device.lower().replace(' ', '-')}-{day}.json"
        path.write_text(
            json.dumps({"device": device, "torch": torch.__version__, "triton": triton.__version__, "ways": rows}, indent=1)
        )
        print(path)


if __name__ == "__main__":
    main()
