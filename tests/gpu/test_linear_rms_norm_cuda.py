"""Products with the norm behind them on the card: sums and their squares, in graphs, on streams, and in compiled models."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from autokernel.cutedsl.cache import ObjectCache
from autokernel.cutedsl.compiler import unavailable
from autokernel.cutedsl.objects import load
from autokernel.cutedsl.spec import KernelSpec
from autokernel.environment import current_environment
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.export.apply import BundleBackend, backend
from autokernel.export.bundle import Bundle, Entry, write_bundle
from autokernel.export.cutedsl import with_objects
from autokernel.ops import get_op
from autokernel.ops.linear_rms_norm import norm_of_squares
from autokernel.records import Candidate, ConfigValue, Problem, Status, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]

Config = dict[str, ConfigValue]
COOPERATIVE: Config = {"source": "quack", "tile_m": 128, "tile_n": 128, "cluster_n": 2}
PINGPONG: Config = {**COOPERATIVE, "pingpong": True}
SWAP: Config = {**PINGPONG, "swap": True}
CONFIGS: dict[str, Config] = {
    "cooperative": COOPERATIVE,
    "large": {**COOPERATIVE, "tile_m": 256, "tile_n": 192, "cluster_m": 2, "cluster_n": 1},
    "no power of two": {**COOPERATIVE, "tile_m": 256, "tile_n": 208, "cluster_n": 1},
    "wide": {**COOPERATIVE, "tile_n": 256, "cluster_m": 2},
    "small": {**COOPERATIVE, "tile_m": 64, "tile_n": 64, "cluster_n": 1},
    "pingpong": PINGPONG,
    "pingpong, 192": {**PINGPONG, "tile_m": 192, "cluster_m": 2, "cluster_n": 1},
    "pingpong, small and wide": {**PINGPONG, "tile_m": 64, "tile_n": 256},
    "swap": {**COOPERATIVE, "swap": True},
    "swap, large": {**COOPERATIVE, "swap": True, "tile_m": 256, "cluster_m": 2, "cluster_n": 1},
    "swap, pingpong": SWAP,
    "swap, small": {**SWAP, "tile_m": 64, "tile_n": 64, "cluster_m": 2},
}
SIZES = ((1, 520, 256), (16, 4096, 512), (130, 1160, 1024), (1003, 2056, 136), (2300, 4104, 512))  # M, N, K
LIMITS = {"bfloat16": 4e-3, "float16": 5e-4}  # relative to the norm: what rounding the result costs, and as much again
SQUARES_LIMIT = 5e-4  # squares are summed before anything is rounded; the fewest are eight


def kernel_spec(config: Config, residual: bool = True, dtype: str = "bfloat16", b_major: str = "k") -> KernelSpec:
    return KernelSpec(
        config=config,
        dtype=dtype,
        out_dtype=dtype,
        a_major="k",
        b_major=b_major,
        epilogue=("add", "squares") if residual else ("squares",),
        num_units=torch.cuda.get_device_properties(0).multi_processor_count,
    )


def all_cases() -> dict[str, dict[str, Any]]:
    """Name -> arguments of `kernel_spec`: everything that has a code path of its own."""
    cases: dict[str, dict[str, Any]] = {name: {"config": config} for name, config in CONFIGS.items()}
    for name in ("cooperative", "pingpong", "swap", "swap, pingpong"):
        cases[f"{name}, no residual"] = {"config": CONFIGS[name], "residual": False}
        cases[f"{name}, half"] = {"config": CONFIGS[name], "dtype": "float16"}
        cases[f"{name}, b by rows"] = {"config": CONFIGS[name], "b_major": "n"}
    return cases


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ObjectCache:
    """With the kernels of all cases, compiled on all cores."""
    filled = ObjectCache(tmp_path_factory.mktemp("objects"))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as processes:
        list(processes.map(filled.get_or_compile, [kernel_spec(**case) for case in all_cases().values()]))
    return filled


def draw(shape: tuple[int, ...], dtype: str, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, device="cuda") * scale).to(getattr(torch, dtype))


def operands(kernel: KernelSpec, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    rows = draw((k, n) if kernel.b_major == "n" else (n, k), kernel.dtype, k**-0.5)
    added = [draw((m, n), kernel.dtype, 2.0, seed=1)] if "add" in kernel.epilogue else []
    return draw((m, k), kernel.dtype), rows if kernel.b_major == "n" else rows.mT, added


def exact(a: torch.Tensor, b: torch.Tensor, added: list[torch.Tensor], tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums in double precision, and the sums of squares of their tiles."""
    total = a.double() @ b.double() + sum(x.double() for x in added)
    return total, torch.stack([part.square().sum(-1) for part in total.split(tile, dim=1)], dim=1)


def error_of(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


def poison(m: int, n: int) -> None:
    """NaN where the allocator will put the next results: what is not written shows."""
    for size in (m * n, m * -(-n // 64), m * -(-n // 128)):
        torch.full((size,), float("nan"), device="cuda")
        torch.full((size,), float("nan"), device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", all_cases())
def test_sums_and_their_squares_are_right(name: str, sizes: tuple[int, int, int], cache: ObjectCache) -> None:
    """With rows, columns and depths that no tile divides: what lies outside adds nothing to a sum of squares."""
    spec, (m, n, k) = kernel_spec(**all_cases()[name]), sizes
    kernel = load(str(cache.get_or_compile(spec)[1]))
    a, b, added = operands(spec, m, n, k)
    poison(m, n)
    total, squares = kernel(a, b, added)
    tile = spec.squared_columns
    assert (total.shape, total.is_contiguous()) == ((m, n), True)
    assert (squares.shape, squares.dtype, squares.is_contiguous()) == ((m, -(-n // tile)), torch.float32, True)
    right, right_squares = exact(a, b, added, tile)
    assert error_of(total, right) <= LIMITS[spec.out_dtype]
    assert float(((squares.double() - right_squares).abs() / right_squares).max()) <= SQUARES_LIMIT
    for _ in range(3):
        again = kernel(a, b, added)
        assert torch.equal(again[0], total)
        assert torch.equal(again[1], squares)


@pytest.mark.parametrize(("rounded", "offset"), [("early", 0.0), ("late", 0.0), ("late", 1.0)])
def test_the_norm_of_them_is_within_the_budget(rounded: str, offset: float, cache: ObjectCache) -> None:
    m, n, k = 130, 4104, 1024
    spec = kernel_spec(PINGPONG)
    a, b, added = operands(spec, m, n, k)
    gain = draw((n,), "bfloat16", 0.5)
    total, squares = load(str(cache.get_or_compile(spec)[1]))(a, b, added)
    mine = norm_of_squares(total, squares, gain, eps=1e-5, rounded=rounded, offset=offset)
    problem = norm_problem((m,), n, k, late=rounded == "late", offset=bool(offset))
    own = get_op(problem.op).reference(problem, a, b, gain, *added)[1]
    right = get_op(problem.op).reference(problem, *(x.double() for x in (a, b, gain, *added)))[1]
    assert error_of(mine, right) <= 2 * error_of(own, right) + 1e-6


@pytest.mark.parametrize("config", [PINGPONG, SWAP], ids=["plain", "swap"])
def test_a_captured_graph_follows_its_inputs(config: Config, cache: ObjectCache) -> None:
    spec = kernel_spec(config)
    kernel = load(str(cache.get_or_compile(spec)[1]))
    a, b, added = operands(spec, 96, 4096, 1024)
    kernel(a, b, added)  # loads the code, which cannot happen during capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, squares = kernel(a, b, added)
    for seed in range(5):
        a.copy_(draw(tuple(a.shape), "bfloat16", seed=seed))
        added[0].copy_(draw(tuple(added[0].shape), "bfloat16", seed=10 + seed))
        total.fill_(float("nan"))
        squares.fill_(float("nan"))
        graph.replay()
        right, right_squares = exact(a, b, added, spec.squared_columns)
        assert error_of(total, right) <= LIMITS["bfloat16"]
        assert error_of(squares, right_squares) <= SQUARES_LIMIT


def test_it_runs_on_the_current_stream_and_waits_for_nothing(cache: ObjectCache) -> None:
    spec = kernel_spec(SWAP)
    kernel = load(str(cache.get_or_compile(spec)[1]))
    a, b, added = operands(spec, 16, 4096, 4096)
    reference = kernel(a, b, added)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late = a * 1
        start = time.perf_counter()
        found = kernel(late, b, added)
        issued_s = time.perf_counter() - start
        assert not side.query()
    assert issued_s < 0.02
    side.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, reference, strict=True))


def norm_problem(
    rows: tuple[int, ...], n: int, k: int, *, dtype: str = "bfloat16", residual: bool = True, late: bool = False,
    offset: bool = False,
) -> Problem:  # fmt: skip
    x, gain = TensorSpec.contiguous((*rows, k), dtype), TensorSpec.contiguous((n,), dtype)
    matrix = TensorSpec(shape=(k, n), dtype=dtype, stride=(1, k))
    added = [TensorSpec.contiguous((*rows, n), dtype)] * residual
    return Problem(
        op="linear_rms_norm",
        inputs=(x, matrix, gain, *added),
        device="cuda",
        constants=(1, 2),
        scalars=(*[("offset", 1.0)] * offset, *[("rounded", "late")] * late, ("residual", residual), ("eps", 1e-5)),
    )


EVALUATED: dict[str, tuple[Problem, Config]] = {
    "prompt": (norm_problem((2, 1024), 4096, 4096), PINGPONG),
    "prompt, swizzle": (norm_problem((1, 2048), 4096, 1024), {**PINGPONG, "swizzle": 2}),
    "prompt, large tile": (norm_problem((2048,), 4096, 1024), CONFIGS["large"]),
    "no residual, rounded late": (norm_problem((3, 333), 2056, 1024, residual=False, late=True), COOPERATIVE),
    "decode, from zero": (norm_problem((16, 1), 2560, 2048, residual=False, late=True, offset=True), SWAP),
    "half": (norm_problem((512,), 4096, 1024, dtype="float16"), PINGPONG),
    "half, swap": (norm_problem((4, 16), 4096, 1024, dtype="float16", late=True), SWAP),
    "decode": (norm_problem((16, 1), 4096, 4096), SWAP),
    "one row": (norm_problem((1, 1), 4096, 4096), CONFIGS["swap, small"]),
}


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("AUTOKERNEL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "norm-cache"))


@pytest.mark.usefixtures("own_cache", "own_locks_and_clean_device")
@pytest.mark.parametrize("name", EVALUATED)
def test_candidates_are_evaluated(name: str) -> None:
    problem, config = EVALUATED[name]
    candidate = Candidate(problem=problem, backend="cutedsl", config=config)
    evaluation = EvaluateCandidate(candidate=candidate, seed=1, max_copies=4)()
    assert evaluation.status is Status.OK, evaluation.message
    assert evaluation.deterministic
    stock = Candidate(problem=problem, backend="aten", config={"implementation": "stock"})
    baseline = EvaluateCandidate(candidate=stock, seed=1, max_copies=4)()
    assert baseline.status is Status.OK, baseline.message
    assert evaluation.measurement is not None
    assert baseline.measurement is not None
    print(f"{name}: {evaluation.measurement.median_us:.1f} us, stock {baseline.measurement.median_us:.1f} us")


class Layer(torch.nn.Module):
    """Two ends of a transformer's half layers, one behind the other: each sum goes on, and what is normed is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Linear(1024, 1024, bias=False)
        self.up = torch.nn.Linear(1024, 2048, bias=False)
        self.down = torch.nn.Linear(2048, 1024, bias=False)
        self.gains = torch.nn.ParameterList([torch.rand(1024), torch.rand(1024)])

    def norm(self, x: torch.Tensor, index: int) -> torch.Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        return self.gains[index] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def forward(self, x: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stream = stream + self.out(x)
        hidden = torch.nn.functional.silu(self.up(self.norm(stream, 0)))
        stream = stream + self.down(hidden)
        return stream, self.norm(stream, 1)


ROWS = ((3, 48), (144,))  # one time as a batch of sequences, one time as rows: Inductor's graphs differ


def layer_and_inputs(rows: tuple[int, ...]) -> tuple[Layer, list[torch.Tensor]]:
    torch.manual_seed(0)
    torch.compiler.reset()
    inputs = [torch.randn(*rows, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return Layer().to("cuda", torch.bfloat16).eval().requires_grad_(False), inputs


def bundle_of(rows: tuple[int, ...], config: Config) -> Bundle:
    problems = [norm_problem(rows, 1024, k) for k in (1024, 2048)]
    entries = tuple(Entry(problem=problem, backend="cutedsl", config=config) for problem in problems)
    return Bundle(name="norms", created="", version="", environment=current_environment("cuda"), entries=entries)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("config", [PINGPONG, {**SWAP, "swizzle": 4}], ids=["plain", "swap"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_compiled_models_use_a_bundles_kernels(rows: tuple[int, ...], config: Config) -> None:
    layer, inputs = layer_and_inputs(rows)
    used = BundleBackend(bundle_of(rows, config))
    with torch.no_grad():
        eager = layer(*inputs)
        compiled = torch.compile(layer, backend=used, fullgraph=True, dynamic=False)
        found = [x.clone() for x in compiled(*inputs)]
        usage = {key: (item.hits, item.reasons) for key, item in used.usage().items()}
        assert list(usage.values()) == [(1, []), (1, [])], usage
        graph, static = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        with torch.cuda.graph(graph):
            replayed = compiled(*static)
        for factor in (1.0, 0.5):
            for x, given in zip(static, inputs, strict=True):
                x.copy_(given * factor)
            graph.replay()
            again = compiled(*[x.clone() for x in static])
            assert all(torch.equal(x, y) for x, y in zip(replayed, again, strict=True))
        right = layer.double()(*(x.double() for x in inputs))
    for mine, own, reference in zip(found, eager, right, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (own.shape, own.stride(), own.dtype)
        assert error_of(mine, reference) <= 2 * error_of(own, reference)


@pytest.mark.usefixtures("own_cache")
def test_production_loads_a_bundle_without_a_compiler(tmp_path: Path) -> None:
    bundle, files = with_objects(bundle_of(ROWS[0], PINGPONG))
    assert len(files) == 1  # sizes are arguments
    _, archive = write_bundle(bundle, tmp_path / "bundle", files)
    layer, inputs = layer_and_inputs(ROWS[0])
    with torch.no_grad():
        total = float(torch.compile(layer, backend=backend(archive), dynamic=False)(*inputs)[1].float().sum())
    script = f"""
import json, os, sys
os.environ["AUTOKERNEL_CACHE_DIR"] = {str(tmp_path / "nothing here")!r}
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
import torch
from test_linear_rms_norm_cuda import ROWS, layer_and_inputs
import autokernel
layer, inputs = layer_and_inputs(ROWS[0])
used = autokernel.backend({str(archive)!r})
with torch.no_grad():
    y = torch.compile(layer, backend=used, dynamic=False)(*inputs)[1]
hits = [item.hits for item in used.usage().values()]
compilers = [name for name in sys.modules if name.split(".")[0] in ("cutlass", "quack")]
print(json.dumps([hits, compilers, float(y.float().sum())]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    hits, compilers, theirs = json.loads(done.stdout.splitlines()[-1])
    assert (hits, compilers) == ([1, 1], [])
    assert theirs == pytest.approx(total)


@pytest.mark.usefixtures("own_cache")
def test_inductor_runs_one_kernel_behind_the_product() -> None:
    """As this version of torch writes it: the norm, and nothing else between the product and what takes the norm."""
    from torch._inductor.utils import run_and_get_code

    def end(x: torch.Tensor, w: torch.Tensor, gain: torch.Tensor, added: torch.Tensor) -> Any:
        total = x @ w.t() + added
        wide = total.float()
        return total, gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    rows, n, k = (2, 512), 4096, 1024
    given = [draw((*rows, k), "bfloat16"), draw((n, k), "bfloat16"), draw((n,), "bfloat16"), draw((*rows, n), "bfloat16")]
    for config in (PINGPONG, SWAP):
        torch.compiler.reset()
        entry = Entry(problem=norm_problem(rows, n, k), backend="cutedsl", config=config)
        bundle = Bundle(name="n", created="", version="", environment=current_environment("cuda"), entries=(entry,))
        compiled = torch.compile(end, backend=BundleBackend(bundle), fullgraph=True, dynamic=False)
        with torch.no_grad():
            _, (code,) = run_and_get_code(compiled, *given)
        assert code.count("cute_gemm.squares(") == 1
        assert code.count("async_compile.triton(") == 1, code
