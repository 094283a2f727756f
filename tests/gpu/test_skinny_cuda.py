"""The skinny GEMM kernel on the card: every mode right, the same bits twice, in graphs, and in Inductor's code.

Packages with it inside: `test_aoti_cuda.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from autokernel.environment import current_environment
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle, Entry
from autokernel.kernels.config import SkinnyConfig
from autokernel.kernels.op import launch, num_units_of
from autokernel.records import ConfigValue, Problem, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SWAP = SkinnyConfig(mode="swap", block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4)
VECTOR = SkinnyConfig(mode="vector", block_m=1, block_n=4, block_k=512, num_warps=4, num_stages=1)
CASES = [  # config, m, n, k
    (SWAP, 1, 512, 1024),
    (replace(SWAP, split_k=4), 16, 1024, 2048),
    (replace(SWAP, split_k=3, tile_first=True), 5, 1000, 2048),
    (replace(SWAP, split_k=4, tma=True), 16, 1024, 2048),
    (replace(SWAP, waves=2), 16, 1000, 2048),
    (replace(SWAP, waves=1, tma=True, block_m=64), 64, 1536, 2048),
    (replace(SWAP, mode="rows", block_m=128, block_n=128, block_k=64, num_warps=8, split_k=4), 128, 1024, 2048),
    (replace(SWAP, mode="rows", block_m=64, block_n=128, block_k=64, waves=1, tma=True), 100, 1024, 2048),
    (replace(SWAP, mode="rows", block_m=16, block_n=32, num_warps=2, split_k=2), 7, 1024, 2048),
    (VECTOR, 1, 1023, 2048),
    (replace(VECTOR, split_k=2, num_stages=3), 1, 1024, 2048),
    (replace(VECTOR, waves=3), 1, 1024, 2048),
]


def tensors(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator(device="cuda").manual_seed(m + n)
    x, w, b = (torch.randn(size, generator=draw, device="cuda") for size in ((m, k), (n, k), (n,)))
    return x.to(dtype), (w * k**-0.5).to(dtype), b.to(dtype)


def error_of(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("config", "m", "n", "k"), CASES, ids=lambda value: str(value)[:200])
def test_the_error_is_eagers_and_the_bits_are_the_same_twice(
    config: SkinnyConfig, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    x, w, b = tensors(m, n, k, dtype)
    expected = x.double() @ w.double().t() + b.double()
    outputs = [torch.ops.autokernel.skinny_mm(x, w.t(), b, config.to_ints()) for _ in range(5)]
    allowed = 2 * error_of(torch.addmm(b, x, w.t()), expected) + 1e-5
    assert error_of(outputs[0], expected) <= allowed
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("config", [replace(SWAP, split_k=4), replace(SWAP, waves=2)], ids=["split-K", "stream-K"])
def test_one_buffer_of_counters_serves_many_replays_of_a_graph(config: SkinnyConfig) -> None:
    m, n, k = 16, 4096, 4096
    x, w, _ = tensors(m, n, k)
    units = num_units_of(x.device)
    y = torch.empty(m, n, device="cuda", dtype=x.dtype)
    parts = torch.empty(config.num_parts(m, n, k, units), device="cuda")
    counters = torch.zeros(config.num_counters(m, n), dtype=torch.int32, device="cuda")
    launch(config, x, w, None, y, parts, counters, num_units=units)  # loads the kernel
    first = y.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            launch(config, x, w, None, y, parts, counters, num_units=units)
    for _ in range(50):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, first)
    assert not counters.any()


@pytest.mark.parametrize("config", [replace(SWAP, split_k=4), replace(SWAP, tma=True, waves=2)], ids=["pointers", "TMA"])
def test_the_operator_compiles(config: SkinnyConfig) -> None:
    x, w, b = tensors(16, 1024, 2048)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.ops.autokernel.skinny_mm(x, w.t(), b, config.to_ints()))

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x), rtol=2e-2, atol=2e-2)


class Layer(torch.nn.Module):
    """Three GEMMs, two of which share their input; one has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(1024, 2048, bias=False)
        self.up = torch.nn.Linear(1024, 2048, bias=False)
        self.down = torch.nn.Linear(2048, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return out


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def weight(k: int, n: int) -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))


def entries(merged: bool, **changes: ConfigValue) -> tuple[Entry, ...]:
    config: dict[str, ConfigValue] = {
        "kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "split_k": 4,
        "num_warps": 4, "num_stages": 4, **changes,
    }  # fmt: skip
    gate = Problem(op="mm", inputs=(spec(16, 1024), weight(1024, 2048)), device="cuda", constants=(1,))
    both = replace(gate, op="merged_mm", inputs=(*gate.inputs, gate.inputs[1]), constants=(1, 2))
    down = Problem(op="addmm", inputs=(spec(1024), spec(16, 2048), weight(2048, 1024)), device="cuda", constants=(0, 2))
    first = Entry(problem=both, backend="triton", config={**config, "merge": "concat"}) if merged else None
    first = first or Entry(problem=gate, backend="triton", config=config)
    return first, Entry(problem=down, backend="triton", config=config)


def bundle_of(items: tuple[Entry, ...]) -> Bundle:
    return Bundle(name="skinny", created="", version="", environment=current_environment("cuda"), entries=items)


@pytest.mark.parametrize("changes", [{}, {"tma": True}, {"split_k": 1, "waves": 2}], ids=str)
@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_a_bundles_entries_are_what_runs(merged: bool, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Layer().to("cuda", torch.bfloat16).eval().requires_grad_(False)
    x = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
    backend = BundleBackend(bundle_of(entries(merged, **changes)))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        out = compiled(x)
        expected = model(x)
        usage = [(item.hits, item.reasons) for item in backend.usage().values()]
        assert usage == [(1 if merged else 2, []), (1, [])]
        torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            compiled(x)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events()]
        assert sum("skinny_mm_kernel" in name for name in names) == (2 if merged else 3), names
        assert not [name for name in names if "gemm" in name.lower() or "copy_kernel" in name.lower() or "Memcpy" in name], (
            names
        )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(x)
        for _ in range(10):
            graph.replay()
        assert torch.equal(captured, out)
