"""CuTe DSL kernels for Hopper, compiled ahead of time: nvidia-cutlass-operators', quack-kernels', and our own.

Config: the parameters that `cutedsl/config.py` explains; `merge` ("concat", or "none") where GEMMs share an input. Kernels are
compiled here, into the machine's cache of objects, so that a compiler's failure is the build's; `export/cutedsl.py` then finds
them there and puts them in the place of the GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from autokernel.backends import BuildError, Built, Refused
from autokernel.backends.compiled import build, expanded, refuse_without_constant_weight
from autokernel.cutedsl.config import ALIGNMENT_BYTES, DTYPES, TENSOROP, TENSOROP_BATCH, CuteConfig, multiplies
from autokernel.cutedsl.spec import KernelSpec
from autokernel.errors import CompileError
from autokernel.export.bundle import Entry
from autokernel.export.cute_specs import arch_of, expected_epilogue, has_aligned_rows, matrices, out_dtype_of, specs_of
from autokernel.export.cutedsl import compiled_object
from autokernel.export.matching import weights_of_merged
from autokernel.ops.epilogue import BINARY_EPILOGUES, PER_ROW, operand_kind
from autokernel.ops.linear_rms_norm import LinearRmsNorm, as_matrix
from autokernel.ops.scaled_mm import ScaledMm
from autokernel.records import DTYPE_BYTES, Candidate, ConfigValue, Problem, TensorSpec

_OPS = ("mm", "addmm", "bmm", "merged_mm", "scaled_mm", "int_mm", LinearRmsNorm.name)
_FACTORS = ("alpha", "beta")
_CAPABILITY = (9, 0)  # what the kernels of the space are for


class CuteDslBackend:
    """Persistent GEMM kernels with TMA and warpgroup instructions, with what follows the GEMM fused into them."""

    name = "cutedsl"

    def unavailable(self, device: str) -> str | None:
        if device != "cuda":
            return "the CuTe DSL kernels are for NVIDIA GPUs: tune with `device: cuda`"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device: install the NVIDIA driver, or a CUDA build of torch"
        if (found := torch.cuda.get_device_capability()) != _CAPABILITY:
            return (
                f"the CuTe DSL kernels are for Hopper (compute capability 9.0), this GPU has {found[0]}.{found[1]}: "
                "leave cutedsl out of `backends`"
            )
        from autokernel.cutedsl import compiler

        return compiler.unavailable()

    def supports(self, problem: Problem) -> str | None:
        if problem.op not in _OPS:
            return f"there is no CuTe DSL kernel for {problem.op}"
        if problem.device != "cuda":
            return f"the CuTe DSL kernels are for NVIDIA GPUs, not for {problem.device}"
        if scaled := [f"{name} is {value}" for name, value in problem.scalars if name in _FACTORS]:
            return f"the CuTe DSL kernels do not scale: {', '.join(scaled)}"
        factors = list(_factors(problem))
        dtypes = {spec.dtype for _, spec in factors}
        mixed = len(dtypes) > 1 and problem.op != ScaledMm.name
        if mixed or not multiplies(min(dtypes), max(dtypes)):
            return (
                f"the CuTe DSL kernels multiply two matrices of one of {', '.join(DTYPES)}, or of both kinds of 8-bit floating "
                f"point, not {' and '.join(sorted(dtypes))}"
            )
        return next((f"the {name} {wrong}" for name, spec in factors if (wrong := _layout_problem(name, spec))), None)

    def build(self, candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        _refuse_illegal(candidate)
        _refuse_misplaced(constants)
        for spec in kernels_of(candidate):
            try:
                compiled_object(spec)
            except CompileError as error:
                raise BuildError(str(error)) from error
        return build(candidate, constants, stock=False)

    def export(self, candidate: Candidate) -> Mapping[str, ConfigValue]:
        return dict(candidate.config)


def kernels_of(candidate: Candidate) -> list[KernelSpec]:
    """The kernels that a candidate may need on this process's GPU, each once.

    Raises:
        Refused: there is none for this problem with this config.
    """
    from autokernel.cutedsl.compiler import refusal

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = arch_of((device.major, device.minor))
    specs: list[KernelSpec] = []
    for entry in _entries(candidate):
        try:
            wanted = specs_of(entry, arch=arch, num_units=device.multi_processor_count)
        except ValueError as error:
            raise Refused(str(error)) from error
        specs += [spec for spec in wanted if spec not in specs]
    if (wrong := next(filter(None, map(refusal, specs)), None)) is not None:
        raise Refused(wrong)
    return specs


def _entries(candidate: Candidate) -> tuple[Entry, ...]:
    return expanded(Entry(problem=candidate.problem, backend=candidate.backend, config=dict(candidate.config)))


def _factors(problem: Problem) -> Iterator[tuple[str, TensorSpec]]:
    """The matrices that are multiplied, by name."""
    if problem.op == "merged_mm":
        yield "left matrix", problem.inputs[0]
        yield from (("right matrix", weight) for weight in weights_of_merged(problem))
    else:
        yield from zip(("left matrix", "right matrix"), matrices(problem), strict=True)


def _layout_problem(name: str, spec: TensorSpec) -> str | None:
    """The rule about its layout that a factor breaks, None if the kernels read it."""
    *batch, rows, columns = spec.stride
    row_major = columns == 1
    if not row_major and rows != 1:
        return f"has strides {spec.stride}: its rows or its columns must be contiguous"
    along_k = row_major == (name == "left matrix")
    if DTYPE_BYTES[spec.dtype] == 1 and not along_k:
        return f"has strides {spec.stride}: matrices of {spec.dtype} must be contiguous along K"
    # strides of dimensions of one element say nothing
    steps = [step for step, size in zip((*batch, rows, columns), spec.shape, strict=True) if size > 1 and step != 1]
    contiguous = spec.shape[-1] if row_major else spec.shape[-2]
    if any(size * DTYPE_BYTES[spec.dtype] % ALIGNMENT_BYTES for size in (contiguous, *steps)):
        return (
            f"has {contiguous} contiguous {spec.dtype} and strides {spec.stride}: "
            f"all must be multiples of {ALIGNMENT_BYTES} bytes, which TMA reads"
        )
    return None


def _refuse_illegal(candidate: Candidate) -> None:
    """Raises Refused if no kernel has this config, or not for this problem."""
    problem = candidate.problem
    if wrong := CuteDslBackend().supports(problem):
        raise Refused(wrong)
    try:
        config = CuteConfig.from_entry(candidate.config)
    except ValueError as error:
        raise Refused(str(error)) from error
    if config.fast_accum and not dict(problem.scalars).get("use_fast_accum", False):
        raise Refused("fast_accum keeps sums in fewer bits than the model asks for (use_fast_accum is off): leave it off")
    if config.family == TENSOROP and problem.op == "bmm" and problem.inputs[0].shape[0] > TENSOROP_BATCH:
        raise Refused(f"{TENSOROP} computes up to {TENSOROP_BATCH} products at once, not {problem.inputs[0].shape[0]}")
    if candidate.config.get("merge") == "concat":
        refuse_without_constant_weight(candidate)
    for part in (entry.problem for entry in _entries(candidate)):
        n, out_dtype = matrices(part)[1].shape[-1], out_dtype_of(part)
        if n * DTYPE_BYTES[out_dtype] % ALIGNMENT_BYTES:
            raise Refused(f"the result has rows of {n} {out_dtype}: TMA writes multiples of {ALIGNMENT_BYTES} bytes")
        if config.fuse:
            _refuse_unfusible(part)
        elif part.op == LinearRmsNorm.name:
            _refuse_unreadable(part, "the kernel reads", "take stock code")


def _refuse_unfusible(problem: Problem) -> None:
    """Raises Refused if what follows a product cannot be computed in its kernel."""
    if not expected_epilogue(problem):
        raise Refused("fuse computes in the kernel what follows the product, and nothing follows this one: leave fuse off")
    if DTYPE_BYTES[out_dtype_of(problem)] == 1:
        raise Refused(f"fuse is for wider results: what follows one of {out_dtype_of(problem)} stays behind; leave fuse off")
    _refuse_unreadable(problem, "fuse reads", "leave fuse off")


def _refuse_unreadable(problem: Problem, reads: str, cure: str) -> None:
    """Raises Refused if a kernel cannot read what else it computes with. The sentence begins and ends with these words."""
    x, w = matrices(problem)
    m, n = x.shape[-2], w.shape[-1]
    operands = _operands(problem)
    kinds = [operand_kind(name) for name in problem.epilogue if name in BINARY_EPILOGUES]
    for kind, spec in zip([*[""] * (len(operands) - len(kinds)), *kinds], operands, strict=True):
        if kind == PER_ROW:
            if m > 1 and spec.stride[0] != 1:
                raise Refused(f"{reads} numbers of rows, [{m}, 1], that follow each other in memory, not {spec}: {cure}")
            continue
        vector = spec.shape == (n,)
        if not (vector or spec.shape[-2:] == (m, n)) or spec.stride[-1] != 1:
            raise Refused(f"{reads} vectors [{n}] and matrices [{m}, {n}] row by row, not {spec}: {cure}")
        if not has_aligned_rows(spec):
            raise Refused(f"{reads} rows that begin at multiples of {ALIGNMENT_BYTES} bytes, none twice, not {spec}: {cure}")


def _operands(problem: Problem) -> tuple[TensorSpec, ...]:
    """What is read by the steps that follow a product."""
    if problem.op == "merged_mm":
        return ()  # of the products themselves
    if problem.op == "addmm":
        return (problem.inputs[0], *problem.inputs[3:])
    if problem.op == LinearRmsNorm.name:
        return tuple(map(as_matrix, problem.inputs[3:]))
    return problem.inputs[4 if problem.op == "scaled_mm" else 2 :]


def _refuse_misplaced(constants: list[list[torch.Tensor]]) -> None:
    """Raises Refused if a constant begins where TMA cannot read it."""
    for tensor in (tensor for copy in constants for tensor in copy):
        offset = tensor.data_ptr() % ALIGNMENT_BYTES
        if offset:
            raise Refused(
                f"a constant of {tuple(tensor.shape)} begins {offset} bytes behind a multiple of {ALIGNMENT_BYTES}: "
                "TMA reads from such multiples; clone it"
            )
