"""A run on a GPU, made up at random from a seed: six scenarios, three backends. Nothing here was measured."""

from __future__ import annotations

import random
from collections.abc import Iterator

import synthetic_events as synthetic
from synthetic_runs import Config, Draw, Setting, story

from autokernel.environment import Environment
from autokernel.events import Event
from autokernel.records import Hotspot

_GPU_SCENARIOS = {  # tokens in a step
    "decode-b1": 1,
    "decode-b16": 16,
    "decode-b64": 64,
    "decode-b128": 128,
    "prefill-1x2048": 2048,
    "prefill-4x2048": 8192,
}
_GPU_GEMMS = (  # Ns, K, calls a step, cuBLAS's part of the roofline for few tokens
    ((4096, 1024, 1024), 4096, 32, 0.72),
    ((4096,), 4096, 32, 0.58),
    ((14336, 14336), 4096, 32, 0.92),
    ((4096,), 14336, 32, 0.80),
    ((128256,), 4096, 1, 0.93),
)
_READ_GB_PER_S, _TFLOPS = 4260.0, 770.0


def _gpu_hotspots() -> tuple[list[Hotspot], list[float]]:
    """Five GEMMs in six scenarios, and how long cuBLAS takes for one call."""
    spots, stock_us = [], []
    for name, m in _GPU_SCENARIOS.items():
        times = []
        for ns, k, calls, part in _GPU_GEMMS:
            n = sum(ns)
            roofline_us = max(2 * (m * k + n * k + m * n) / _READ_GB_PER_S * 1e-3, 2 * m * n * k / _TFLOPS * 1e-6)
            times.append((roofline_us, roofline_us / (part if m <= 128 else 0.88), calls))
        total = sum(us * calls for _, us, calls in times) / 0.8
        for (ns, k, _, _), (roofline_us, us, calls) in zip(_GPU_GEMMS, times, strict=True):
            problem = synthetic.gemm(m, ns[0], k, device="cuda") if len(ns) == 1 else synthetic.merged(m, ns, k, "cuda")
            share = us * calls / total
            spots.append(synthetic.hotspot(problem, name, share, us * calls, roofline_us / us, len(_GPU_SCENARIOS), calls))
            stock_us.append(us)
    return spots, stock_us


def _gpu_draws(spots: list[Hotspot], rng: random.Random) -> Iterator[tuple[int, Draw]]:
    """Stock, then Inductor's templates and, for few tokens, a kernel of our own; hotspots in turn."""
    for index, spot in enumerate(spots):
        merging: Config = {"merge": "none"} if spot.problem.op == "merged_mm" else {}
        yield index, Draw(backend="aten", config={"prepack": False, **merging}, origin="stock", factor=1.0)
    for index, spot in enumerate(spots):
        if spot.problem.op == "merged_mm":
            yield index, Draw(backend="aten", config={"prepack": False, "merge": "concat"}, origin="default", factor=0.97)
    while True:
        for index, spot in enumerate(spots):
            tokens = _GPU_SCENARIOS[spot.scenario]
            merging = {"merge": "concat"} if spot.problem.op == "merged_mm" else {}
            tiles: Config = {
                "BLOCK_M": rng.choice([16, 32, 64] if tokens <= 64 else [64, 128, 256]),
                "BLOCK_N": rng.choice([32, 64, 128, 256]),
                "BLOCK_K": rng.choice([32, 64, 128]),
                "num_stages": rng.choice([3, 4, 5]),
                "num_warps": rng.choice([4, 8]),
            }
            origin = rng.choice(["nvmatmul", "tpe", "tpe", "history"])
            if tokens <= 128 and rng.random() < 0.4:
                config: Config = {"kernel": "skinny_mm", **tiles, "SPLIT_K": rng.choice([1, 2, 4, 8]), **merging}
                split = 0.1 * abs(int(config["SPLIT_K"]) - 4) / 4
                factor = (0.85 if tokens <= 16 else 0.97) + split
                yield index, Draw(backend="triton", config=config, origin=origin, factor=factor * rng.uniform(0.98, 1.3))
                continue
            template = rng.choice(["mm", "mm_persistent_tma", "decompose_k"] if tokens <= 128 else ["mm", "mm_persistent_tma"])
            config = {"template": template, **({"k_split": 8} if template == "decompose_k" else {**tiles, "GROUP_M": 8})}
            good = 0.05 * (tiles["BLOCK_N"] == 128) + 0.04 * (template == "mm_persistent_tma")
            yield (
                index,
                Draw(backend="inductor", config=config | merging, origin=origin, factor=(1.02 - good) * rng.uniform(0.97, 1.6)),
            )


def make_gpu_events(num_evaluations: int = 720, seed: int = 3, run_id: str = "20261121-060000-9a7c51e0") -> list[Event]:
    """6 scenarios, 30 hotspots, three backends; clocks, power and temperature with every confirmation."""
    rng = random.Random(seed)
    spots, stock_us = _gpu_hotspots()
    steps: dict[str, float] = {}
    for spot in spots:
        steps[spot.scenario] = steps.get(spot.scenario, 0.0) + spot.time_us / 0.8
    gains = dict(zip(_GPU_SCENARIOS, (1.11, 1.08, 1.04, 1.03, 1.01, 1.005), strict=True))
    setting = Setting(
        name="llama",
        experiment="# synthetic\nname: llama\ndevice: cuda\n",
        environment=Environment(
            device="cuda",
            device_name="NVIDIA H200",
            isa="sm_90",
            num_units=132,
            torch="2.11.0+cu130",
            python="3.12.3",
            platform="Linux-synthetic",
            driver="580.65",
            libraries={"triton": "3.6.0", "cuda": "13.0", "transformers": "5.23.0"},
        ),
        spots=tuple(spots),
        stock_us=tuple(stock_us),
        step_us=steps,
        read_gb_per_s=_READ_GB_PER_S,
        peak_tflops={"bfloat16": _TFLOPS, "float32": 51.0},
        regime="cuda, graph replay, cold L2, 20 calls a sample",
        gains=tuple((name, us, gains[name]) for name, us in steps.items()),
        best_stock="default",
        mode_factors=(1.3, 1.0, 1.12),
        dropped=8,
    )
    return story(setting, _gpu_draws(spots, rng), num_evaluations, rng, run_id, True)
