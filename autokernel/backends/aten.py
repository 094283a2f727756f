"""Stock kernels: ATen as Inductor calls it (oneDNN or MKL on a CPU, cuBLAS on a GPU), and its packed-weight form.

Config: `prepack` (the weight is reordered once, at compile time, into the library's own layout) and, where GEMMs share an
input, `merge` ("none", or "concat": one GEMM with the weights side by side). For fusions `implementation`: "stock", or the
library's calls that `autokernel.rewrites` spells out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autokernel.backends import Built, Refused
from autokernel.backends.compiled import build, refuse_without_constant_weight
from autokernel.ops import FUSIONS
from autokernel.records import Candidate, ConfigValue, Problem
from autokernel.rewrites import REWRITES, STOCK

GEMM_OPS = ("mm", "addmm", "bmm", "baddbmm", "merged_mm", "scaled_mm", "int_mm")


def stock_config(op: str) -> Mapping[str, ConfigValue]:
    """The config of this backend that is stock code."""
    if op not in GEMM_OPS:
        return {"implementation": STOCK}
    return {"prepack": False, "merge": "none"} if op == "merged_mm" else {"prepack": False}


def is_stock(config: Mapping[str, ConfigValue]) -> bool:
    """Whether a config of this backend is what eager PyTorch and `torch.compile` without a bundle would run."""
    return not config.get("prepack") and config.get("merge", "none") == "none" and config.get("implementation", STOCK) == STOCK


def refuse_unknown_implementation(candidate: Candidate) -> None:
    """Raises Refused if the config names an implementation that the op does not have."""
    name = candidate.config.get("implementation", STOCK)
    known = (STOCK, *REWRITES.get(candidate.problem.op, {}))
    if name not in known:
        raise Refused(f"{candidate.problem.op} has no implementation {name!r}; there are {', '.join(known)}")


class AtenBackend:
    """Always available, always in the candidate set."""

    name = "aten"

    def unavailable(self, device: str) -> str | None:
        if device == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device: install the NVIDIA driver, or a CUDA build of torch"
        return None

    def supports(self, problem: Problem) -> str | None:
        known = problem.op in GEMM_OPS or problem.op in FUSIONS
        return None if known else f"no ATen kernel is known for {problem.op}"

    def build(self, candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        stock = is_stock(candidate.config)
        refuse_unknown_implementation(candidate)
        if candidate.config.get("prepack"):
            if candidate.problem.device != "cpu":
                raise Refused("packed weights are oneDNN's and MKL's, for a CPU; this problem is on cuda")
            refuse_without_constant_weight(candidate)
        return build(candidate, constants, stock=stock)

    def export(self, candidate: Candidate) -> Mapping[str, ConfigValue]:
        return dict(candidate.config)
