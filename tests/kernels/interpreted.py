"""Runs skinny_mm in Triton's interpreter, on the CPU in fp16, against fp64. One line for each case that is wrong."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from autokernel.kernels.config import SkinnyConfig
from autokernel.kernels.op import launch

SWAP = {"mode": "swap", "block_m": 16, "block_n": 32, "block_k": 32}
ROWS = {**SWAP, "mode": "rows"}
VECTOR = {"mode": "vector", "block_m": 1, "block_n": 4, "block_k": 32}
CASES = (  # config, m, n, k, bias
    (SWAP, 5, 70, 96, True),
    ({**SWAP, "split_k": 3, "tile_first": True}, 17, 64, 160, True),
    ({**ROWS, "split_k": 2}, 16, 100, 96, False),
    ({**ROWS, "waves": 1}, 16, 100, 160, True),
    ({**SWAP, "waves": 2}, 20, 90, 160, False),
    ({**SWAP, "waves": 5}, 1, 32, 160, False),
    ({**VECTOR, "waves": 2}, 1, 42, 160, False),
    ({**VECTOR, "split_k": 2, "num_stages": 1}, 1, 42, 128, True),
    ({**VECTOR, "split_k": 2}, 1, 42, 128, True),
    ({**ROWS, "split_k": 2, "tma": True}, 5, 90, 96, True),
    ({**SWAP, "waves": 2, "tma": True}, 5, 90, 160, False),
)
NUM_UNITS = 3


def run(config: SkinnyConfig, m: int, n: int, k: int, with_bias: bool) -> str | None:
    """What is wrong with two launches in a row, None if nothing is."""
    rule = config.problem(m, n, k)
    if rule:
        return rule
    x, w = torch.randn(m, k).half(), (torch.randn(n, k) / k**0.5).half()
    bias = torch.randn(n).half() if with_bias else None
    parts = torch.full((max(1, config.num_parts(m, n, k, NUM_UNITS)),), float("nan"))
    counters = torch.zeros(max(1, config.num_counters(m, n)), dtype=torch.int32)
    expected = x.double() @ w.double().t() + (0 if bias is None else bias.double())
    for _ in range(2):
        y = torch.full((m, n), float("nan"), dtype=torch.float16)
        launch(config, x, w, bias, y, parts, counters, num_units=NUM_UNITS)
        error = float((y.double() - expected).abs().max())
        if not error < 4e-3:
            return f"error {error}"
        if counters.any():
            return "counters are not zero"
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    for fields, *shape in CASES:
        wrong = run(SkinnyConfig(**fields), *shape)
        if wrong:
            print(fields, shape, wrong)
    print("done")
