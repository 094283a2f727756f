"""Loading and launching compiled kernels: real objects and loader; where a GPU would be, `pretended_cuda` takes the launch."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cutedsl.pretended_cuda import PretendedCuda, on_gpu

from autokernel.cutedsl import objects
from autokernel.cutedsl.cache import ObjectCache
from autokernel.cutedsl.call import Device
from autokernel.cutedsl.compiler import cuda_major, unavailable
from autokernel.cutedsl.objects import Kernel, ObjectError, load, why_not_here
from autokernel.cutedsl.spec import KernelSpec

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

CPU = Device(empty=torch._C._dynamo.guards._empty_strided_cpu, stream=lambda device: 77)
M, N, K = 48, 512, 256
COOPERATIVE = {"source": "quack", "tile_m": 128, "tile_n": 128, "cluster_n": 2}
PINGPONG = {**COOPERATIVE, "pingpong": True}
LARGE = {"source": "quack", "tile_m": 256, "tile_n": 128, "cluster_m": 2, "cluster_n": 1}
TENSOROP = {"source": "operators", "family": "tensorop", "tile_m": 128, "tile_n": 128}
OPERATORS = {"source": "operators", "tile_m": 64, "tile_n": 128, "cluster_m": 2}


def spec(config: dict[str, Any], **changes: Any) -> KernelSpec:
    given = {"dtype": "bfloat16", "out_dtype": "bfloat16", "a_major": "k", "b_major": "k", **changes}
    return KernelSpec(config=config, **given)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ObjectCache:
    return ObjectCache(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> PretendedCuda:
    return PretendedCuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine takes every object, on stream 77."""
    monkeypatch.setattr(objects, "why_not_here", lambda info: None)
    monkeypatch.setattr(objects, "_share_cuda_runtime", lambda major: None)
    monkeypatch.setattr(objects, "current_gpu", lambda: CPU)


def launchable(kernel: Kernel) -> Kernel:
    """The kernel, with its tensors on a GPU as far as its object can tell."""
    return Kernel(kernel.info, lambda *arguments: kernel.function(*map(on_gpu, arguments)))


def operands(kernel: KernelSpec, m: int, n: int) -> list[torch.Tensor]:
    sizes = {"bias": (n,), "scale_a": (m,), "scale_b": (n,), "tensor_scale_a": (1,), "tensor_scale_b": (1,)}
    return [
        torch.empty(sizes.get(name, (m, n)), dtype=torch.float32 if "scale" in name else getattr(torch, kernel.out_dtype))
        for name in kernel.operands().values()
    ]


CASES = {
    "quack": spec(COOPERATIVE),
    "pingpong": spec(PINGPONG, a_major="m", b_major="n"),
    "swapped": spec({**PINGPONG, "swap": True}),
    "parts in order": spec({**LARGE, "split_k": 4}),
    "parts as they come": spec({**PINGPONG, "split_k": 3, "ordered": False}),
    "parts, swapped": spec({**COOPERATIVE, "split_k": 4, "swap": True}),
    "parts for the graph": spec({**COOPERATIVE, "split_k": 4, "separate": True}, out_dtype="float32"),
    "parts for the graph, swapped": spec(
        {**PINGPONG, "split_k": 2, "separate": True, "swap": True}, out_dtype="float32", a_major="m", b_major="n"
    ),
    "batched": spec(COOPERATIVE, batched=True),
    "launched early": spec(PINGPONG, pdl=True),
    "launched early, parts for the graph": spec({**COOPERATIVE, "split_k": 2, "separate": True}, out_dtype="float32", pdl=True),
    "fused": spec(PINGPONG, epilogue=("bias", "silu", "mul", "add")),
    "numbers": spec(PINGPONG, epilogue=("mul(0.125)", "gelu_tanh", "add(1.0)")),
    "fused, swapped": spec({**COOPERATIVE, "swap": True}, epilogue=("bias", "silu", "add")),
    "fused, parts, swapped": spec({**COOPERATIVE, "swap": True, "split_k": 2}, epilogue=("bias", "gelu", "add")),
    "scaled": spec(COOPERATIVE, dtype="float8_e4m3fn", epilogue=("scale_a", "scale_b", "bias")),
    "gated": spec(PINGPONG, epilogue=("gated_silu",)),
    "squares": spec(COOPERATIVE, epilogue=("add", "squares")),
    "squares, swapped": spec({**PINGPONG, "swap": True}, epilogue=("squares",)),
    "our own": spec({"source": "cluster", "tile_m": 128, "tile_n": 16, "cluster_m": 2, "swap": True}),
    "operators": spec(OPERATORS),
    "operators, swapped": spec({**OPERATORS, "swap": True, "swizzle": 4, "raster": "columns"}),
    "tensorop": spec(TENSOROP, batched=True),
    "tensorop, swapped": spec({**TENSOROP, "swap": True}),
    "operators, int8": spec(OPERATORS, dtype="int8", out_dtype="int32"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_kernel_is_launched_as_its_record_says(name: str, cache: ObjectCache, cuda: PretendedCuda) -> None:
    kernel_spec = CASES[name]
    kernel = launchable(load(str(cache.get_or_compile(kernel_spec)[1])))
    config, before = kernel_spec.cute, cuda.launched.count
    for m, n, k in ((M, N, K), (8, 2 * N, 2 * K)):  # one object for all sizes
        dtype, lead = getattr(torch, kernel_spec.dtype), (3,) if kernel_spec.batched else ()
        a = (
            torch.zeros((*lead, m, k), dtype=dtype)
            if kernel_spec.a_major == "k"
            else torch.zeros((*lead, k, m), dtype=dtype).mT
        )
        b = (
            torch.zeros((*lead, k, n), dtype=dtype)
            if kernel_spec.b_major == "n"
            else torch.zeros((*lead, n, k), dtype=dtype).mT
        )
        out = kernel(a, b, operands(kernel_spec, m, n))
        if kernel_spec.squares:
            out, squares = out
            assert (squares.shape, squares.dtype, squares.is_contiguous()) == ((m, n // 128), torch.float32, True)
        parts = (config.split_k,) if config.separate else ()
        assert (out.shape, out.dtype) == ((*parts, *lead, m, kernel_spec.num_columns(n)), getattr(torch, kernel_spec.out_dtype))
        assert out.is_contiguous()
        assert list(cuda.launched.cluster)[:2] == [config.cluster_m, config.cluster_n]
        assert cuda.launched.programmatic == kernel_spec.pdl
        if kernel_spec.cute.source == "operators":
            assert cuda.launched.stream == 77
        # enough blocks for all tiles, or for every multiprocessor: a persistent kernel takes several in turn
        rows, columns = (n, m) if config.swap else (m, n)
        tiles = math.ceil(rows / config.tile_m) * math.ceil(columns / config.tile_n) * (lead or (1,))[0] * config.split_k
        assert math.prod(cuda.launched.grid) >= min(tiles, 66)
    assert cuda.launched.count == before + 2


def test_scratch_memory_is_told_to_the_caller(cache: ObjectCache) -> None:
    ordered = cache.get_or_compile(CASES["parts in order"])[0].launch
    assert (ordered.scratch_tile, ordered.zeroed_workspace, ordered.transposed) == ((256, 128, 2, 1), False, False)


@pytest.mark.usefixtures("here")
def test_an_argument_that_a_kernel_does_not_take_is_named(cache: ObjectCache, cuda: PretendedCuda) -> None:
    kernel = launchable(load(str(cache.get_or_compile(CASES["quack"])[1])))
    a, b = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(N, K, dtype=torch.bfloat16).t()
    before = cuda.launched.count
    with pytest.raises((TypeError, ValueError), match=r"argument #1"):
        kernel(a, b.half())
    with pytest.raises((TypeError, ValueError), match=r"argument #1"):
        kernel(a, torch.zeros(N, 2 * K, dtype=torch.bfloat16).t())
    assert cuda.launched.count == before


@pytest.mark.usefixtures("here")
def test_a_launch_that_fails_is_an_exception(cache: ObjectCache, cuda: PretendedCuda) -> None:
    kernel = launchable(load(str(cache.get_or_compile(CASES["quack"])[1])))
    a, b = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(N, K, dtype=torch.bfloat16).t()
    cuda.fail_next(719)
    with pytest.raises(RuntimeError, match="did not launch: CUDA error 719"):
        kernel(a, b)
    kernel(a, b)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["fused", "operators"])
def test_a_call_itself_costs_the_host_little(name: str, cache: ObjectCache) -> None:
    """Without the loader and the launch below it; of the 15 us that a call may cost on a GPU's host."""
    kernel_spec = CASES[name]
    kernel = Kernel(load(str(cache.get_or_compile(kernel_spec)[1])).info, lambda *arguments: None)
    a, b = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(N, K, dtype=torch.bfloat16).t()
    given, best = operands(kernel_spec, M, N), math.inf
    for _ in range(100):
        start = time.perf_counter()
        for _ in range(20):
            kernel(a, b, given)
        best = min(best, (time.perf_counter() - start) / 20)
    assert best * 1e6 < 4.0


@pytest.mark.usefixtures("here")
def test_what_was_changed_or_is_missing_is_not_loaded(cache: ObjectCache, tmp_path: Path) -> None:
    info, path = cache.get_or_compile(CASES["operators"])
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    with pytest.raises(ObjectError, match="no readable record"):
        load(str(copy))
    copy.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes())
    assert load(str(copy)).info.key == info.key
    other = tmp_path / "other.so"
    other.write_bytes(path.read_bytes() + b"\0")
    other.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes())
    with pytest.raises(ObjectError, match="was changed after it was compiled"):
        load(str(other))


@pytest.mark.parametrize(
    ("machine", "found", "cuda", "capability", "reason"),
    [
        ("aarch64", True, "13.0", (9, 0), "compiled for x86_64 processors, this is aarch64"),
        ("x86_64", False, "13.0", (9, 0), "pip install 'apache-tvm-ffi"),
        ("x86_64", True, None, (9, 0), "torch sees no CUDA device"),
        ("x86_64", True, "11.8", (9, 0), "this torch has 11.8"),
        ("x86_64", True, "{cuda}.1", (10, 0), "compiled for sm_90a, this GPU is sm_100"),
        ("x86_64", True, "{cuda}.1", (9, 0), None),
    ],
)
def test_objects_of_another_machine_are_refused_with_the_cure(
    cache: ObjectCache,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    found: bool,
    cuda: str | None,
    capability: tuple[int, int],
    reason: str | None,
) -> None:
    info, _ = cache.get_or_compile(CASES["operators"])
    monkeypatch.setattr(objects.platform, "machine", lambda: machine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found else None)
    monkeypatch.setattr(torch.version, "cuda", cuda.format(cuda=cuda_major()) if cuda else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    said = why_not_here(info)
    assert said is None if reason is None else reason in str(said)


@pytest.mark.parametrize(("version", "said"), [("0.1.10", "too old"), ("0.2.0", "too new"), ("0.1.12", None), (None, None)])
def test_a_loader_of_another_version_is_refused_with_the_cure(
    cache: ObjectCache, monkeypatch: pytest.MonkeyPatch, version: str | None, said: str | None
) -> None:
    info, _ = cache.get_or_compile(CASES["operators"])
    monkeypatch.setattr(objects, "installed_version", lambda name: version)
    monkeypatch.setattr(torch.version, "cuda", f"{cuda_major()}.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = why_not_here(info)
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert f"apache-tvm-ffi {version}, is {said}: pip install 'apache-tvm-ffi>=" in found


def test_loading_imports_no_compiler(cache: ObjectCache) -> None:
    _, path = cache.get_or_compile(CASES["fused"])
    script = f"""
import sys
from autokernel.cutedsl import objects
from autokernel.cutedsl.call import Device
objects.current_gpu = lambda: Device(empty=None, stream=None)
objects.why_not_here = lambda info: None
objects._share_cuda_runtime = lambda major: None
objects.load({str(path)!r})
print([name for name in ("cutlass", "quack", "triton", "ray", "optuna", "mlflow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
