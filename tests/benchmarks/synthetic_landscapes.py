"""Landscapes that are made up: an analytic model of a GPU with quirks, for tests that need no recorded ones."""

from __future__ import annotations

import math
import random
from typing import Any

from landscape_file import Landscape, Row

_UNITS = 132


def made_up_us(m: int, n: int, k: int, config: dict[str, Any]) -> float | None:
    """Microseconds of a config on an imagined device; None where it "does not build"."""
    bm, bn, bk = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    stages, warps = config["num_stages"], config["num_warps"]
    accumulators = bm * bn / (warps * 32)
    if accumulators > 200:
        return None
    tiles = math.ceil(m / bm) * math.ceil(n / bn)
    smem = stages * (bm + bn) * bk * 2
    resident = max(1, min(228 * 1024 // (smem + 1024), 64 // warps))
    waves = math.ceil(tiles / (_UNITS * resident))
    rate = min(1.0, 0.35 + 0.65 * min(bm, 128) / 128) * min(1.0, bn / 128) * (0.8 + 0.2 * (warps in {4, 8}))
    compute = waves * resident * bm * bn * k * 2 / (5.9e6 * rate)
    in_flight = min(tiles, _UNITS * resident) * max(stages - 1, 0.5) * (bm + bn) * bk * 2
    bandwidth = 4.2e6 * min(1.0, in_flight / 6e6) ** 0.7
    memory = 2 * (n * k + m * k * math.ceil(n / bn) * 0.1) / bandwidth
    steps = math.ceil(k / bk) * waves * (0.05 + 0.02 * (stages == 1))
    quirk = random.Random(f"{m} {n} {k} {sorted(config.items())}").uniform(0.97, 1.03)
    return (3 + max(compute, memory) + 0.3 * min(compute, memory) + steps) * quirk


def made_up_landscape(name: str, m: int, n: int, k: int, count: int = 400) -> Landscape:
    """A random part of the space of Inductor's `mm`."""
    from replay import H200, ROOT

    from autokernel.search.space import names_for
    from autokernel.search.space_file import load_space

    names = names_for({"m": m, "n": n, "k": k, "batch": 1, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}, H200)
    configs = [c for c in load_space("mm", ROOT / "search_spaces")["inductor"].enumerate(names) if c["template"] == "mm"]
    chosen = random.Random(name).sample(configs, min(count, len(configs)))
    rows = []
    for config in chosen:
        us = made_up_us(m, n, k, config)
        rows.append(Row(backend="inductor", config=config, status="BUILD_ERROR" if us is None else "OK", us=us))
    rows.append(Row(backend="aten", config={"prepack": False}, status="OK", us=10.0))
    problem = {"op": "mm", "batch": 1, "m": m, "n": n, "k": k, "dtype": "bfloat16", "bias": False, "b": "k-major"}
    header = {
        "hardware": "synthetic",
        "versions": {},
        "date": "",
        "protocol": "made up",
        "legal": len(configs),
        "measured": len(chosen),
    }
    return Landscape(name=name, header={**header, "complete": False}, problem=problem, rows=rows)
