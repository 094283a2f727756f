"""Kernels of all sources, compiled for a Hopper without one, down to the call that only a GPU could answer.

Kinds of kernels that test_objects.py compiles and launches are not compiled here once more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autokernel.cutedsl import compiler
from autokernel.cutedsl.spec import KernelSpec, ObjectInfo
from autokernel.errors import CompileError

OPERATORS = {"source": "operators", "tile_m": 128, "tile_n": 128, "cluster_m": 1, "cluster_n": 2}
TENSOROP = {"source": "operators", "family": "tensorop", "tile_m": 128, "tile_n": 128}
COOPERATIVE = {"source": "quack", "tile_m": 256, "tile_n": 128, "cluster_m": 2, "cluster_n": 1}
PINGPONG = {"source": "quack", "tile_m": 128, "tile_n": 192, "cluster_m": 1, "cluster_n": 2, "pingpong": True}
FP8 = {"dtype": "float8_e4m3fn", "out_dtype": "bfloat16"}
SIZES = (16, 64, 128)  # M, N, K at the call: others than at compilation
WRONG_SIZES = (16, 12, 128)  # 12 columns are no multiple of 16 bytes


def spec(config: dict[str, Any], **changed: Any) -> KernelSpec:
    given = {"dtype": "bfloat16", "out_dtype": "bfloat16", "a_major": "k", "b_major": "k", **changed}
    return KernelSpec(config=config, **given)


CLUSTER = {"source": "cluster", "tile_m": 128, "tile_n": 16, "cluster_m": 2, "split_k": 2, "swap": True}
PARTS = {**COOPERATIVE, "split_k": 4, "separate": True}
SPECS = {
    "operators": spec(OPERATORS),
    "tensorop, any majors, batched": spec(TENSOROP, a_major="m", b_major="n", batched=True),
    "tensorop, swapped, fp16 in fp32": spec({**TENSOROP, "swap": True}, dtype="float16", out_dtype="float32"),
    "fused": spec({**PINGPONG, "fuse": True}, epilogue=("bias", "silu", "add")),
    "operators, any majors, batched": spec(OPERATORS, a_major="m", b_major="n", batched=True),
    "operators, fp8 from Hopper's other format": spec(OPERATORS, dtype="float8_e5m2", out_dtype="float16"),
    "quack, fp16 in fp32": spec(COOPERATIVE, dtype="float16", out_dtype="float32", b_major="n"),
    "parts of K as they come, swapped, fused": spec(
        {**PINGPONG, "split_k": 3, "ordered": False, "swap": True}, epilogue=("bias", "gelu", "add")
    ),
    "all activations": spec(COOPERATIVE, epilogue=("gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "silu")),
    "fp8, scaled as a whole, swapped": spec(
        {**PINGPONG, "swap": True}, **FP8, epilogue=("tensor_scale_a", "tensor_scale_b", "silu")
    ),
    "fp8, sums in fp32": spec(COOPERATIVE, **FP8, epilogue=("scale_a", "scale_b")),
    "fp8, sums in the matrix units": spec({**COOPERATIVE, "fast_accum": True}, **FP8, epilogue=("scale_a", "scale_b")),
    "fp8 of both kinds, swapped": spec(
        {**PINGPONG, "swap": True}, dtype="float8_e5m2", b_dtype="float8_e4m3fn", epilogue=("scale_a", "scale_b", "bias")
    ),
    "parts of fp8 of both kinds, swapped": spec(
        {**PARTS, "swap": True}, dtype="float8_e4m3fn", b_dtype="float8_e5m2", out_dtype="float32"
    ),
    "functions": spec(PINGPONG, epilogue=("abs", "exp", "neg", "sqrt", "rsqrt", "reciprocal", "square", "cube")),
    "numbers": spec(COOPERATIVE, epilogue=("clamp_min(-1.0)", "clamp_max(6.0)", "div_by(3.0)", "add(1.0)", "mul(2.0)")),
    "operands of every kind": spec(
        {**PINGPONG, "swap": True}, epilogue=("bias", "mul_per_row", "sub_per_column", "rsub", "div", "maximum", "minimum")
    ),
    "rows and columns, parts of K, swapped": spec(
        {**COOPERATIVE, "split_k": 2, "swap": True},
        epilogue=("div_per_row", "rdiv_per_column", "rdiv", "silu", "maximum_per_row"),
    ),
    "columns of a batch": spec(COOPERATIVE, batched=True, dtype="float16", out_dtype="float16", epilogue=("mul_per_column",)),
    "gated, fp8, batched": spec(COOPERATIVE, **FP8, batched=True, epilogue=("gated_gelu_tanh",)),
    "columns for a row of multiprocessors": spec({**COOPERATIVE, "tile_m": 64, "tile_n": 48, "fuse": True}, epilogue=("add",)),
    "a few rows, swapped": spec({**COOPERATIVE, "tile_m": 64, "tile_n": 16, "swap": True, "split_k": 4}),
    "longer stages": spec({**COOPERATIVE, "tile_m": 64, "tile_n": 16, "swap": True, "tile_k": 256}),
    "our own, x shared by pairs": spec(CLUSTER),
    "our own, longer stages": spec({**CLUSTER, "tile_k": 128}),
    "our own, fp16, lone blocks": spec({**CLUSTER, "cluster_m": 1, "split_k": 1}, dtype="float16", out_dtype="float32"),
    "batched, fused": spec(COOPERATIVE, batched=True, a_major="m", b_major="n", epilogue=("bias", "add")),
}


@dataclass(frozen=True)
class Compiled:
    info: ObjectInfo
    path: Path
    reached: str  # what a call said before it ended
    refused: str  # what one of wrong sizes said


Kernels = dict[str, Compiled]


@pytest.fixture(scope="module")
def kernels(compile_all: Any, child: Any) -> Kernels:
    found = compile_all(list(SPECS.values()))
    assert not [answer for answer in found if isinstance(answer, str)]
    called = child("bind", given=[[str(path), sizes] for sizes in (SIZES, WRONG_SIZES) for _, path in found])
    said = [json.loads(line) for line in called.stdout.splitlines()]
    calls = zip(SPECS, found, said[: len(SPECS)], said[len(SPECS) :], strict=True)
    return {name: Compiled(*kernel, reached, refused) for name, kernel, reached, refused in calls}


@pytest.mark.slow
def test_what_a_source_is_told_aside_is_not_lost_in_its_memory(compile_all: Any) -> None:
    """quack remembers kernels under keys that lack it: one process compiles both, and gets two kernels."""
    infos = [info for info, _ in compile_all([spec({**COOPERATIVE, "fast_accum": fast}, **FP8) for fast in (False, True)])]
    assert infos[0].sha256 != infos[1].sha256


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_kernel_takes_its_arguments(kernels: Kernels, name: str) -> None:
    """Our call fits the kernel's own checks of every argument: what is missing behind them is the CUDA runtime."""
    kernel = kernels[name]
    assert kernel.info.key == kernel.info.spec.key(compiler.versions())
    assert kernel.info.num_bytes == kernel.path.stat().st_size < 400_000
    assert kernel.info.compile_s > 0
    assert "undefined symbol: cuda" in kernel.reached


@pytest.mark.slow
def test_another_process_finds_them_all_and_imports_no_compiler(kernels: Kernels) -> None:
    """What a second run does: it compiles nothing."""
    (folder,) = {kernel.path.parent for kernel in kernels.values()}
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom autokernel.cutedsl.cache import ObjectCache\n"
        "from autokernel.cutedsl.spec import KernelSpec\n"
        f"cache = ObjectCache(Path({str(folder)!r}))\n"
        "keys = [cache.get_or_compile(KernelSpec.from_json(given))[0].sha256 for given in json.load(sys.stdin)]\n"
        "assert not {'cutlass', 'quack', 'tvm_ffi'} & set(sys.modules)\nprint(json.dumps(keys))"
    )
    given = json.dumps([one.to_json() for one in SPECS.values()])
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [kernels[name].info.sha256 for name in SPECS]


@pytest.mark.slow
def test_a_call_that_does_not_fit_is_refused_by_the_kernel(kernels: Kernels) -> None:
    """So that the test before proves something."""
    said = kernels["fused"].refused
    assert "undefined symbol" not in said
    assert "mD" in said


@pytest.mark.slow
def test_an_object_needs_no_compiler(kernels: Kernels) -> None:
    for kernel in kernels.values():
        done = subprocess.run(["readelf", "-d", str(kernel.path)], capture_output=True, text=True, check=True)
        needed = [line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "(NEEDED)" in line]
        assert set(needed) <= {"libtvm_ffi.so", "libc.so.6", "libstdc++.so.6", "libgcc_s.so.1"}


@pytest.mark.slow
def test_how_sums_are_kept_makes_another_kernel(kernels: Kernels) -> None:
    """Of one process: quack would hand out the first one again, if it did not know them to be two."""
    exact, fast = (kernels[f"fp8, sums in {where}"].info for where in ("fp32", "the matrix units"))
    assert exact.sha256 != fast.sha256
    assert exact.num_bytes > fast.num_bytes, "it adds up twice"


@pytest.mark.slow
def test_scratch_memory_is_told_to_the_caller(kernels: Kernels) -> None:
    free = kernels["parts of K as they come, swapped, fused"].info.launch
    assert (free.scratch_tile, free.zeroed_workspace, free.transposed) == ((128, 192, 1, 2), True, True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config": {**OPERATORS, "tile_n": 192}}, "operators has tiles"),
        ({"dtype": "float32"}, "CuTe DSL kernels take bfloat16"),
        ({"b_dtype": "float16"}, "not bfloat16 and float16"),
        ({**FP8, "b_dtype": "float8_e5m2"}, "operators multiplies matrices of one dtype"),
        ({"arch": "sm_80"}, "sm_90a and sm_100a, not sm_80"),
        ({**FP8, "b_major": "n"}, "contiguous along K: A is k-major, B n-major"),
        ({"epilogue": ("bias",)}, "operators computes no epilogue"),
        ({"config": COOPERATIVE, "epilogue": ("softmax",)}, "not softmax"),
        ({"config": COOPERATIVE, "dtype": "int8"}, "use operators"),
        ({"config": {**COOPERATIVE, "tile_m": 192, "tile_n": 256}, "b_major": "n"}, "ends its process for tiles of 192x256"),
        ({"config": {**COOPERATIVE, "tile_m": 192, "tile_n": 256, "swap": True}, "a_major": "m"}, "contiguous along K"),
        ({"config": {**COOPERATIVE, "fast_accum": True}}, "8-bit floating point, not for bfloat16"),
        ({"config": {**OPERATORS, "fast_accum": True}, **FP8}, "nor fast_accum"),
        ({"config": COOPERATIVE, "out_dtype": "int32"}, "quack makes bfloat16"),
        ({"config": COOPERATIVE, "epilogue": ("gated_silu",), "b_major": "n"}, "contiguous along K"),
        ({"config": {**COOPERATIVE, "swap": True}, "epilogue": ("gated_silu",)}, "without swap and split_k"),
        ({"config": COOPERATIVE, "epilogue": ("gated_silu", "add")}, "nothing before or behind it"),
        ({"epilogue": ("gated_silu",)}, "quack alone"),
        ({"dtype": "int8", "out_dtype": "bfloat16"}, "operators makes int32"),
        ({"pdl": True}, "operators has no programmatic dependent launch"),
        ({"config": PARTS}, "separate makes float32 parts"),
        ({"config": PARTS, "out_dtype": "float32", "epilogue": ("bias",)}, "without an epilogue"),
        ({"config": PARTS, "out_dtype": "float32", "batched": True}, "of one product"),
        ({"config": PARTS, "out_dtype": "float32", "arch": "sm_100a"}, "on sm_90a"),
        ({"epilogue": ("squares",)}, "by quack alone"),
        ({"config": COOPERATIVE, "epilogue": ("squares", "add")}, "behind all other steps"),
        ({"config": COOPERATIVE, "epilogue": ("gated_silu", "squares")}, "nothing before or behind it"),
        ({"config": {**COOPERATIVE, "split_k": 2}, "epilogue": ("squares",)}, "without split_k"),
        ({"config": COOPERATIVE, "epilogue": ("squares",), "batched": True}, "for one product"),
        ({"config": COOPERATIVE, "epilogue": ("squares",), "arch": "sm_100a"}, "on sm_90a"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_without_compiling(changed: dict[str, Any], words: str) -> None:
    refused = KernelSpec.from_json({**SPECS["operators"].to_json(), **changed})
    assert words in (compiler.refusal(refused) or "")
    if compiler.unavailable() is None:
        with pytest.raises(CompileError, match=r"no such CuTe DSL kernel"):
            compiler.compile_kernel(refused)


def test_specs_here_are_legal() -> None:
    assert {name: compiler.refusal(given) for name, given in SPECS.items()} == dict.fromkeys(SPECS)


def test_operands_are_named_in_their_order() -> None:
    given = spec(COOPERATIVE, epilogue=("scale_a", "bias", "silu", "add", "mul"))
    assert given.operands() == {"operand0": "scale_a", "operand1": "bias", "operand2": "add", "operand3": "mul"}


def test_missing_and_clashing_packages_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        "nvidia-cutlass-dsl": "4.8.1", "nvidia-cutlass-operators": "0.3.0", "quack-kernels": "0.6.5",
        "apache-tvm-ffi": "0.1.15",
    }  # fmt: skip
    monkeypatch.setattr(compiler, "installed_version", installed.get)
    installed["quack-kernels"] = "0.7.0"
    assert "quack-kernels 0.7.0 is too new" in (compiler.unavailable() or "")
    del installed["quack-kernels"]
    said = str(compiler.unavailable())
    assert said.startswith("quack-kernels is not installed: pip install 'nvidia-cutlass-dsl[cu")
    assert "'quack-kernels>=" in said
    assert "'autokernel" not in said, "on PyPI that is another project"
    installed["nvidia-cutlass"] = "4.2.0.0"
    assert "pip uninstall nvidia-cutlass" in (compiler.unavailable() or "")


def test_without_a_linker_there_is_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := compiler.unavailable()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "apt-get install gcc" in (compiler.unavailable() or "")


@pytest.mark.slow
def test_a_process_that_only_compiles_imports_no_more_than_that(kernels: Kernels, child: Any) -> None:
    """And what it makes is the same."""
    name = "fp8, sums in fp32"
    done = child("preload", given=SPECS[name].to_json())
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {"sha256": kernels[name].info.sha256, "imported": []}
