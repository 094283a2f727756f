"""Stock kernels: ATen as Inductor calls it (oneDNN or MKL on a CPU, cuBLAS on a GPU), and its packed-weight form.

Config: `prepack` (the weight is reordered once, at compile time, into the library's own layout) and, where GEMMs share an
input, `merge` ("none", or "concat": one GEMM with the weights side by side).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autokernel.backends import Built, Refused
from autokernel.backends.compiled import build, refuse_without_constant_weight
from autokernel.records import Candidate, ConfigValue, Problem

GEMM_OPS = ("mm", "addmm", "bmm", "baddbmm", "merged_mm", "scaled_mm", "int_mm")


class AtenBackend:
    """Always available, always in the candidate set."""

    name = "aten"

    def unavailable(self, device: str) -> str | None:
        if device == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device: install the NVIDIA driver, or a CUDA build of torch"
        return None

    def supports(self, problem: Problem) -> str | None:
        return None if problem.op in GEMM_OPS else f"no ATen kernel is known for {problem.op}"

    def build(self, candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        stock = not candidate.config.get("prepack") and candidate.config.get("merge", "none") == "none"
        if candidate.config.get("prepack"):
            if candidate.problem.device != "cpu":
                raise Refused("packed weights are oneDNN's and MKL's, for a CPU; this problem is on cuda")
            refuse_without_constant_weight(candidate)
        return build(candidate, constants, stock=stock)

    def export(self, candidate: Candidate) -> Mapping[str, ConfigValue]:
        return dict(candidate.config)
