"""Triton kernels of our own, on a GPU: `skinny_mm` for GEMMs of up to 128 rows, and those of fusions.

Config: `kernel` and its parameters. For GEMMs "skinny_mm", which `kernels/config.py` explains; `merge` ("concat", or "none")
where GEMMs share an input; `m_min` and `m_max` where it was measured for a range of rows. `export/substitution.py` puts the
kernel in the place of the GEMM. For fusions, what `kernels/plans.py` has for the op; `export/regions.py` puts it in place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

from autokernel.backends import Built, Refused
from autokernel.backends.compiled import build, refuse_without_constant_weight
from autokernel.export.matching import gemm_of, weights_of_merged
from autokernel.kernels.config import DTYPES, KERNEL, MAX_M, SkinnyConfig
from autokernel.kernels.plans import PLANNERS, plan_of
from autokernel.records import Candidate, ConfigValue, Problem, TensorSpec

_OPS = ("mm", "addmm", "merged_mm")
_TMA_CAPABILITY = (9, 0)


class TritonBackend:
    """Our kernels, in graphs that Inductor compiles."""

    name = "triton"

    def unavailable(self, device: str) -> str | None:
        if device != "cuda":
            return "the Triton kernels are for NVIDIA GPUs: tune with `device: cuda`"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device: install the NVIDIA driver, or a CUDA build of torch"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: install the version that this torch asks for"
        return None

    def supports(self, problem: Problem) -> str | None:
        if problem.op not in _OPS and problem.op not in PLANNERS:
            return f"there is no Triton kernel of ours for {problem.op}"
        if problem.device != "cuda":
            return f"the Triton kernels are for NVIDIA GPUs, not for {problem.device}"
        if problem.op in PLANNERS:
            return None  # its planner knows the rules, which depend on the config
        gemm = gemm_of(problem)
        assert gemm is not None
        if gemm.dtype not in DTYPES:
            return f"the Triton kernels take {' and '.join(DTYPES)}, not {gemm.dtype}"
        if gemm.m > MAX_M:
            return f"the Triton kernels are for at most {MAX_M} rows, not {gemm.m}"
        if any(spec.stride != (1, gemm.k) for spec in _weights(problem)):
            return "the Triton kernels take weights as nn.Linear keeps them, [N, K] row by row"
        return None

    def build(self, candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        problem, gemm = candidate.problem, gemm_of(candidate.problem)
        wrong = self.supports(problem)
        if not wrong and problem.op in PLANNERS:
            _refuse_illegal_plan(candidate)
            return build(candidate, constants, stock=False)
        if wrong or gemm is None:
            raise Refused(wrong or f"{problem.op} is no GEMM")
        if candidate.config.get("kernel") != KERNEL:
            raise Refused(f"kernel {candidate.config.get('kernel')} is not known; there is {KERNEL}")
        merged = candidate.config.get("merge") == "concat"
        if merged:
            refuse_without_constant_weight(candidate)
        try:
            config = SkinnyConfig.from_entry(candidate.config)
        except ValueError as error:
            raise Refused(str(error)) from error
        for n in (sum(gemm.ns),) if merged else gemm.ns:
            wrong = config.problem(gemm.m, n, gemm.k)
            if wrong:
                raise Refused(wrong)
        if config.tma and torch.cuda.get_device_capability() < _TMA_CAPABILITY:
            raise Refused("tensor descriptors need a GPU of compute capability 9.0; set tma to false")
        return build(candidate, constants, stock=False)

    def export(self, candidate: Candidate) -> Mapping[str, ConfigValue]:
        return dict(candidate.config)


def _refuse_illegal_plan(candidate: Candidate) -> None:
    """Raises Refused if the kernel of a fusion does not take the config, or not for this problem."""
    try:
        plan_of(candidate.problem, candidate.config)
    except ValueError as error:
        raise Refused(str(error)) from error


def _weights(problem: Problem) -> tuple[TensorSpec, ...]:
    return weights_of_merged(problem) if problem.op == "merged_mm" else (problem.inputs[1 if problem.op == "mm" else 2],)
