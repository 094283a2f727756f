"""Inductor's Triton templates on a GPU: exactly the entry's tile is built, with its epilogue, and nothing is benchmarked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import autokernel
from autokernel.export.bundle import Entry
from autokernel.export.lookup_table import lookup_table
from autokernel.records import ConfigValue, Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

if torch.cuda.is_available():
    from gpu.llama_like import bundle_of, spec, weight

F = torch.nn.functional
K, N = 4096, 6144
# None of these is in Inductor's own lists.
SMALL: dict[str, ConfigValue] = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256, "num_stages": 4, "num_warps": 4, "GROUP_M": 1,
}  # fmt: skip
LARGE: dict[str, ConfigValue] = {
    "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_stages": 3, "num_warps": 4, "GROUP_M": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def tensor(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def mm_problem(m: int, n: int = N, k: int = K) -> Problem:
    return Problem(op="mm", inputs=(spec(m, k), weight(k, n)), device="cuda", constants=(1,))


def entry(problem: Problem, **config: ConfigValue) -> Entry:
    return Entry(problem=problem, backend="inductor", config=config)


def check(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], out: torch.Tensor) -> None:
    """At most twice eager's own error, as everywhere."""
    exact = function(*(x.double() for x in inputs))
    own = (function(*inputs).double() - exact).abs()
    error = (out.double() - exact).abs()
    assert error.max() <= 2 * own.max() + 1e-6 * exact.abs().max()
    assert error.norm() <= 2 * own.norm() + 1e-6 * exact.norm()


def compile_and_check(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], *entries: Entry) -> tuple[str, Any]:
    """Generated code, and what became of the entries."""
    backend = autokernel.backend(bundle_of(*entries))
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    out, (code, *_) = torch._inductor.utils.run_and_get_code(compiled, *inputs)
    check(function, inputs, out)
    assert counters["inductor"]["select_algorithm_autotune"] == 0
    return code, list(backend.usage().values())


def assert_pinned(code: str, usage: Any, config: dict[str, ConfigValue], num_kernels: int = 1) -> None:
    assert [(item.hits, item.reasons) for item in usage] == [(num_kernels, [])]
    assert len(re.findall(r"^def triton_tem_", code, re.MULTILINE)) == num_kernels
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"):
        assert f"{name} : tl.constexpr = {config[name]}\n" in code
    assert re.search(rf"num_stages={config['num_stages']},\s*num_warps={config['num_warps']},", code)
    assert "extern_kernels." not in code


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w)


@pytest.mark.parametrize("template", ["mm", "mm_persistent_tma"])
@pytest.mark.parametrize("m", [1, 16, 64, 128, 512])
def test_products_by_a_transposed_weight(m: int, template: str) -> None:
    tile = SMALL if m <= 16 else LARGE
    inputs = [tensor(0, m, K), tensor(1, N, K)]
    code, usage = compile_and_check(linear, inputs, entry(mm_problem(m), template=template, **tile))
    assert_pinned(code, usage, tile)
    assert ("make_tensor_descriptor" in code) == (template == "mm_persistent_tma")


def test_k_that_blocks_do_not_divide() -> None:
    k = K + 64
    inputs = [tensor(0, 16, k), tensor(1, N, k)]
    code, usage = compile_and_check(linear, inputs, entry(mm_problem(16, k=k), template="mm", **SMALL))
    assert_pinned(code, usage, SMALL)
    assert "EVEN_K : tl.constexpr = False" in code


def test_k_is_decomposed_where_inductor_would_not() -> None:
    n, k = 4096, 14336
    inputs = [tensor(0, 16, k), tensor(1, n, k)]
    code, usage = compile_and_check(linear, inputs, entry(mm_problem(16, n, k), template="decompose_k", k_split=7))
    assert [(item.hits, item.reasons) for item in usage] == [(1, [])]
    assert "extern_kernels.bmm_dtype" in code
    assert "triton_tem" not in code


@pytest.mark.parametrize("biased", [False, True])
def test_one_row_is_a_reduction(biased: bool) -> None:
    n, k = 4096, 14336
    problem = mm_problem(1, n, k)
    if biased:
        problem = replace(problem, op="addmm", inputs=(spec(n), *problem.inputs), constants=(0, 2))
    inputs = [tensor(0, 1, k), tensor(1, n, k), *([tensor(2, n)] if biased else [])]
    code, usage = compile_and_check(F.linear, inputs, entry(problem, template="reduction"))
    assert [(item.hits, item.reasons) for item in usage] == [(1, [])]
    assert "extern_kernels." not in code
    assert "triton_red_" in code


@pytest.mark.parametrize("template", ["mm", "mm_persistent_tma"])
def test_bias(template: str) -> None:
    problem = Problem(op="addmm", inputs=(spec(N), spec(64, K), weight(K, N)), device="cuda", constants=(0, 2))
    inputs = [tensor(0, N), tensor(1, 64, K), tensor(2, N, K)]

    def biased(b: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w, b)

    code, usage = compile_and_check(biased, inputs, entry(problem, template=template, **LARGE))
    assert_pinned(code, usage, LARGE)


@pytest.mark.parametrize("template", ["mm", "mm_persistent_tma"])
def test_epilogues_are_fused_into_the_template(template: str) -> None:
    def gated(x: torch.Tensor, w: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(F.linear(x, w)) * up

    def residual(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w) + r

    for function in (gated, residual):
        torch.compiler.reset()
        inputs = [tensor(0, 64, K), tensor(1, N, K), tensor(2, 64, N)]
        code, usage = compile_and_check(function, inputs, entry(mm_problem(64), template=template, **LARGE))
        assert_pinned(code, usage, LARGE)
        assert not re.findall(r"^def triton_(poi|red|per)_", code, re.MULTILINE)


@pytest.mark.parametrize("op", ["bmm", "baddbmm"])
def test_batches(op: str) -> None:
    batch, m, n, k = 8, 64, 512, 1024
    shapes = [(batch, m, k), (batch, k, n)] if op == "bmm" else [(batch, m, n), (batch, m, k), (batch, k, n)]
    problem = Problem(op=op, inputs=tuple(spec(*shape) for shape in shapes), device="cuda")
    inputs = [tensor(i, *shape) for i, shape in enumerate(shapes)]
    code, usage = compile_and_check(getattr(torch, op), inputs, entry(problem, template="bmm", **LARGE))
    assert_pinned(code, usage, LARGE)


def test_weights_side_by_side() -> None:
    sizes = (4096, 1024, 1024)
    inputs = (spec(16, K), *(weight(K, n) for n in sizes))
    problem = Problem(op="merged_mm", inputs=inputs, device="cuda", constants=(1, 2, 3))
    layers = torch.nn.ModuleList(torch.nn.Linear(K, n, bias=False) for n in sizes).to("cuda", torch.bfloat16)
    backend = autokernel.backend(bundle_of(entry(problem, template="mm", merge="concat", **SMALL)))
    compiled = torch.compile(lambda x: [layer(x) for layer in layers], backend=backend, fullgraph=True)
    x = tensor(0, 16, K)
    outputs, (code, *_) = torch._inductor.utils.run_and_get_code(compiled, x)
    for layer, out in zip(layers, outputs, strict=True):
        check(linear, [x, layer.weight], out)
    assert_pinned(code, list(backend.usage().values()), SMALL)
    assert counters["inductor"]["select_algorithm_autotune"] == 0


def test_other_shapes_and_layouts_get_what_inductor_takes_by_default() -> None:
    tuned = entry(mm_problem(16), template="mm", **SMALL)
    code, usage = compile_and_check(linear, [tensor(0, 17, K), tensor(1, N, K)], tuned)
    assert "extern_kernels.mm(" in code
    assert "triton_tem" not in code
    assert [(item.hits, item.reasons) for item in usage] == [(0, [])]
    torch.compiler.reset()
    code, usage = compile_and_check(torch.mm, [tensor(0, 16, K), tensor(1, K, N)], tuned)
    assert "extern_kernels.mm(" in code
    assert "laid out in another way" in usage[0].reasons[0]


def test_from_a_thread_and_as_options() -> None:
    tuned = entry(mm_problem(16), template="mm_persistent_tma", **SMALL)
    inputs, seen = [tensor(0, 16, K), tensor(1, N, K)], []

    def work() -> None:
        with torch.no_grad():
            seen.append(compile_and_check(linear, inputs, tuned))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_pinned(*seen[0], SMALL)
    torch.compiler.reset()
    compiled = torch.compile(linear, options=dict(autokernel.options(bundle_of(tuned))))
    out, (code, *_) = torch._inductor.utils.run_and_get_code(compiled, *inputs)
    check(linear, inputs, out)
    assert "make_tensor_descriptor" in code
    assert counters["inductor"]["select_algorithm_autotune"] == 0
    # stock compilations beside it are left alone
    torch.compiler.reset()
    stock = torch.compile(linear, options={"fx_graph_cache": False})
    _, (code, *_) = torch._inductor.utils.run_and_get_code(stock, *inputs)
    assert "extern_kernels.mm(" in code


def test_tiles_that_do_not_fit_are_build_errors_and_harm_nothing() -> None:
    from autokernel.backends import BuildError, get_backend
    from autokernel.records import Candidate

    huge = {**LARGE, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 256, "num_stages": 5}
    candidate = Candidate(problem=mm_problem(128), backend="inductor", config={"template": "mm", **huge})
    with pytest.raises(BuildError):
        get_backend("inductor").build(candidate, [[tensor(1, N, K).t()]])
    torch.cuda.synchronize()
    assert torch.isfinite(torch.mm(tensor(0, 16, 64), tensor(1, 64, 16))).all()


def test_the_library_is_chosen_for_the_call_alone() -> None:
    bundle = replace(bundle_of(), graph_options={"blas_library": "cublaslt"})
    before = torch.backends.cuda.preferred_blas_library()
    inputs = [tensor(0, 16, K), tensor(1, N, K)]
    check(linear, inputs, torch.compile(linear, backend=autokernel.backend(bundle))(*inputs))
    assert torch.backends.cuda.preferred_blas_library() == before


FRESH = """
import json, sys, torch
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.lookup_table.choices import LookupTableChoices
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V

config.lookup_table.table = json.load(open(sys.argv[1]))
config.max_autotune_gemm = True
config.max_autotune_gemm_backends = "ATEN,TRITON"
config.triton.enable_persistent_tma_matmul = True
V.set_choices_handler(LookupTableChoices())
codes = []
with torch.no_grad():
    for m in (16, 64):
        inputs = torch.randn(m, 4096, device="cuda").bfloat16(), torch.randn(6144, 4096, device="cuda").bfloat16()
        compiled = torch.compile(torch.nn.functional.linear, dynamic=False)
        out, code = run_and_get_code(compiled, *inputs)
        torch.testing.assert_close(out, torch.nn.functional.linear(*inputs), rtol=2e-2, atol=1.0)
        codes += code
        torch.compiler.reset()
print(json.dumps([counters["inductor"]["select_algorithm_autotune"], codes, "autokernel" in sys.modules]))
"""


def test_inductors_own_lookup_table_in_a_fresh_process(tmp_path: Path) -> None:
    entries = entry(mm_problem(16), template="mm", **SMALL), entry(mm_problem(64), template="mm_persistent_tma", **LARGE)
    table = tmp_path / "table.json"
    table.write_text(json.dumps(lookup_table(bundle_of(*entries))))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(table)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    num_benchmarks, (small, large), imported = json.loads(done.stdout.splitlines()[-1])
    assert (num_benchmarks, imported) == (0, False)
    for code, tile in ((small, SMALL), (large, LARGE)):
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"):
            assert f"{name} : tl.constexpr = {tile[name]}\n" in code
    assert "make_tensor_descriptor" in large
