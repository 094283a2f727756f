"""Inductor's own GEMM templates. On a CPU: the C++ template over packed weights.

Config: `template` ("cpp_gemm"); `threads_m/n/k` (factors of the thread count along each axis), `block_m/n/k` (cache blocks, in
register blocks), `k_slices`, where 0 leaves the choice to Inductor; `merge` ("none", "concat", "grouped") where GEMMs share
an input. Inductor has these as process-wide options; `export/pins.py` sets them kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autokernel.backends import Built, Refused
from autokernel.backends.compiled import build, refuse_without_constant_weight
from autokernel.export.matching import weights_of_merged
from autokernel.records import Candidate, ConfigValue, Problem

_CPP_DTYPES = ("float32", "bfloat16", "float16")


class InductorBackend:
    """Templates as `torch.compile` would use them, with configs that its own list does not have."""

    name = "inductor"

    def unavailable(self, device: str) -> str | None:
        if device == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device: install the NVIDIA driver, or a CUDA build of torch"
        if device == "cpu" and not bool(torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
            return "this build of torch has no oneDNN, which packs the weights: install an x86-64 or aarch64 wheel of torch"
        return None

    def supports(self, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return "Triton templates on GPUs are not searched by this version"
        if problem.op == "bmm":
            return None if problem.inputs[0].dtype in _CPP_DTYPES else "the C++ template takes floating-point inputs"
        if problem.op not in ("mm", "addmm", "merged_mm"):
            return f"Inductor has no C++ template for {problem.op}"
        if not problem.constants:
            return "the C++ template needs a constant weight"
        if problem.inputs[0].dtype not in _CPP_DTYPES:
            return f"the C++ template takes {', '.join(_CPP_DTYPES)}, not {problem.inputs[0].dtype}"
        return None

    def build(self, candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        config, problem = candidate.config, candidate.problem
        if problem.op != "bmm":
            refuse_without_constant_weight(candidate)
        factors = [int(config.get(f"threads_{axis}", 0)) for axis in "mnk"]
        threads = torch.get_num_threads()
        if any(factors) and factors[0] * factors[1] * factors[2] != threads:
            raise Refused(f"thread factors {factors} must multiply to the {threads} threads of this run")
        if config.get("merge") == "grouped" and len({spec.shape[1] for spec in weights_of_merged(problem)}) != 1:
            raise Refused("the grouped template needs GEMMs of equal N")
        return build(candidate, constants, stock=False)

    def export(self, candidate: Candidate) -> Mapping[str, ConfigValue]:
        return dict(candidate.config)
