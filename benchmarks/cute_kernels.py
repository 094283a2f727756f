"""CuTe DSL kernels for benchmarks: compiled by the package's own compiler, in processes that have it imported already."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(Path(__file__).resolve().parent), str(ROOT)) if path not in sys.path]

from gemm_kernels import NUM_SMS, Gemm  # noqa: E402

from autokernel.cutedsl.spec import KernelSpec  # noqa: E402
from autokernel.errors import CompileError  # noqa: E402

BACKEND = "cutedsl"


def legal_configs(gemm: Gemm) -> list[dict[str, Any]]:
    """The package's search space, in a random order that is always the same.

    First one config of each compiled kernel, in an order of kernels that all GEMMs share: a part of each needs the same
    compilations, and no worker waits for another that compiles the same.
    """
    from replay import H200

    from autokernel.search.space import names_for
    from autokernel.search.space_file import load_space

    bound = load_space(gemm.op, ROOT / "search_spaces")[BACKEND].bind(names_for(gemm.dims, H200))
    configs = [dict(config) for config in bound.enumerate()]
    random.Random(gemm.name).shuffle(configs)
    kernels: dict[str, list[dict[str, Any]]] = {}
    for config in configs:
        kernels.setdefault(kernel_key(gemm, config), []).append(config)
    turns = itertools.zip_longest(*(kernels[key] for key in sorted(kernels, key=lambda key: random.Random(key).random())))
    return [config for turn in turns for config in turn if config is not None]


def kernel_key(gemm: Gemm, config: Mapping[str, Any]) -> str:
    """Equal for configs that are served by one compiled kernel."""
    return key_of(spec_of(gemm, config))


def key_of(spec: KernelSpec) -> str:
    """Equal for equal kernels."""
    return json.dumps(spec.to_json(), sort_keys=True)


def compile_kernel(spec: KernelSpec) -> Path:
    """The file of a kernel, from the package's cache if it is there.

    Raises:
        CompileError: it is refused, or the compiler fails.
    """
    from autokernel.cutedsl.cache import ObjectCache

    return ObjectCache().get_or_compile(spec)[1]


def compile_all(specs: Iterable[KernelSpec], workers: int) -> set[str]:
    """Compile kernels into the package's cache, each once; returns the keys of those that cannot be, and prints why."""
    failed: set[str] = set()
    with context_with_compilers() as context, ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {key: pool.submit(compile_kernel, spec) for key, spec in {key_of(spec): spec for spec in specs}.items()}
        for key, future in futures.items():
            try:
                future.result()
            except CompileError as error:
                failed.add(key)
                print(f"{key}: {error}", flush=True)
    return failed


def spec_of(gemm: Gemm, config: Mapping[str, Any], *, pdl: bool = False) -> KernelSpec:
    """A config's kernel, as the package has it or launched programmatically.

    Imports Inductor, which takes seconds and workers do without: they are given what it returns.
    """
    from autokernel.export.cute_specs import spec_for
    from autokernel.records import TensorSpec

    lead = (gemm.batch,) if gemm.op == "bmm" else ()
    left = TensorSpec(shape=(*lead, gemm.m, gemm.k), dtype="bfloat16", stride=gemm.stride_a())
    right = TensorSpec(shape=(*lead, gemm.k, gemm.n), dtype="bfloat16", stride=gemm.stride_b())
    spec = spec_for(config, left, right, out_dtype="bfloat16", arch="sm_90a", num_units=NUM_SMS)
    return replace(spec, pdl=pdl)


@contextlib.contextmanager
def context_with_compilers() -> Iterator[ForkServerContext]:
    """Start worker processes inside of it: they have both compilers imported, once for all, and see no GPU."""
    said = {
        "CUTE_DSL_ARCH": "sm_90a",
        "QUACK_ARCH": "90",
        "QUACK_CACHE_ENABLED": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["autokernel.cutedsl.preload"])
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
