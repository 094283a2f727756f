"""Inductor's own GEMM templates, with configs that its own list does not have.

On a CPU the C++ template over packed weights. Config: `template` ("cpp_gemm", "cpp_bmm"); `threads_m/n/k` (factors of the
thread count along each axis), `block_m/n/k` (cache blocks, in register blocks), `k_slices`, where 0 leaves the choice to
Inductor. Inductor has these as process-wide options; `export/pins.py` sets them kernel by kernel.

On a GPU its Triton templates. Config: `template` ("mm", "mm_persistent_tma", "bmm") with `BLOCK_M/N/K`, `num_stages`,
`num_warps` and `GROUP_M`; or `template` "decompose_k" with `k_split`. `export/templates.py` builds exactly these. A product of
one row may have `template` "reduction" (`export/one_row.py`): a sum along K, which is what max-autotune makes of it.

Where GEMMs share an input, `merge` says how: "none", "concat", and on a CPU "grouped".

`mode` "max-autotune" is a stock choice, for comparison (`max_autotune.py`).

Fusions have `implementation`: what of `autokernel.rewrites` Inductor compiles into kernels of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autokernel.backends import Built, Refused
from autokernel.backends.aten import refuse_unknown_implementation
from autokernel.backends.compiled import build, refuse_without_constant_weight
from autokernel.backends.max_autotune import TEMPLATES, is_max_autotune, options
from autokernel.export.matching import is_transposed, weights_of_merged
from autokernel.export.one_row import DTYPES, REDUCTION
from autokernel.export.templates import DECOMPOSE_K, TILE, template_of
from autokernel.records import DTYPE_BYTES, Candidate, ConfigValue, Problem, TensorSpec
from autokernel.rewrites import REWRITES

_DTYPES = ("float32", "bfloat16", "float16")
_TMA_BYTES = 16  # rows that TMA reads are multiples of this


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
        if problem.op in REWRITES:
            return None
        if problem.device == "cuda":
            return _supports_cuda(problem)
        if problem.op == "bmm":
            return None if problem.inputs[0].dtype in _DTYPES else "the C++ template takes floating-point inputs"
        if problem.op not in ("mm", "addmm", "merged_mm"):
            return f"Inductor has no C++ template for {problem.op}"
        if not problem.constants:
            return "the C++ template needs a constant weight"
        if problem.inputs[0].dtype not in _DTYPES:
            return f"the C++ template takes {', '.join(_DTYPES)}, not {problem.inputs[0].dtype}"
        return None

    def build(self, candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        config, problem = candidate.config, candidate.problem
        if is_max_autotune(candidate):
            return build(candidate, constants, stock=True, options=options())
        if problem.op in REWRITES:
            refuse_unknown_implementation(candidate)
            return build(candidate, constants, stock=False)
        if problem.device == "cuda":
            _refuse_illegal_on_cuda(candidate)
            return build(candidate, constants, stock=False)
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
        if is_max_autotune(candidate):
            raise ValueError(f"{candidate.label} is stock code, which no entry can stand for")
        return dict(candidate.config)


def _supports_cuda(problem: Problem) -> str | None:
    if problem.op not in TEMPLATES:
        return f"Inductor has no Triton template for {problem.op}"
    if problem.inputs[0].dtype not in _DTYPES:
        return f"the Triton templates take {', '.join(_DTYPES)}, not {problem.inputs[0].dtype}"
    return None


def _refuse_illegal_on_cuda(candidate: Candidate) -> None:
    """Raises Refused if Inductor's templates cannot have this config, or not for this problem."""
    config, problem = candidate.config, candidate.problem
    template = str(config.get("template"))
    allowed = TEMPLATES[problem.op]
    if template not in allowed:
        raise Refused(f"template {template} is not one of {', '.join(allowed)}, which are for {problem.op}")
    if template == REDUCTION:
        _refuse_reduction(problem)
        return
    if template_of(template) is None:
        raise Refused(f"torch {torch.__version__} has no template {template}")
    needed = ("k_split",) if template == DECOMPOSE_K else TILE
    missing = [name for name in needed if name not in config]
    if missing:
        raise Refused(f"template {template} needs {', '.join(needed)}; {', '.join(missing)} is missing")
    if config.get("merge") == "concat":
        refuse_without_constant_weight(candidate)
    left, right = _matrices(problem)
    k = left.shape[-1]
    if template == DECOMPOSE_K and k % int(config["k_split"]):
        raise Refused(f"k_split must divide K: {config['k_split']} does not divide {k}")
    if template == "mm_persistent_tma":
        for name, spec in (("left", left), ("right", right)):
            row = spec.shape[-2] if is_transposed(spec.shape, spec.stride) else spec.shape[-1]
            if row * DTYPE_BYTES[spec.dtype] % _TMA_BYTES:
                raise Refused(
                    f"TMA reads rows of multiples of {_TMA_BYTES} bytes; the {name} matrix has rows of {row} {spec.dtype}"
                )


def _refuse_reduction(problem: Problem) -> None:
    """Raises Refused if the product does not become a reduction."""
    left, right = _matrices(problem)
    if left.shape[0] != 1:
        raise Refused(f"template {REDUCTION} is for products of one row; this one has {left.shape[0]}")
    if problem.inputs[0].dtype not in DTYPES or right.stride[0] != 1:
        raise Refused(f"template {REDUCTION} sums along a K that is contiguous, of {', '.join(DTYPES)}; right is {right}")


def _matrices(problem: Problem) -> tuple[TensorSpec, TensorSpec]:
    first = 1 if problem.op in ("addmm", "baddbmm") else 0
    return problem.inputs[first], problem.inputs[first + 1]
