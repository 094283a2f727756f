"""Which kernels of CuTe DSL an entry needs: what is multiplied, what is computed with it, and in which layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from autokernel.cutedsl.config import ALIGNMENT_BYTES, DTYPES, CuteConfig, multiplies
from autokernel.cutedsl.spec import BIAS, SCALE_A, SCALE_B, SQUARES, TENSOR_SCALE_A, TENSOR_SCALE_B, KernelSpec
from autokernel.export.bundle import Entry
from autokernel.export.matching import is_transposed, weights_of_merged
from autokernel.export.pins import dtype_name
from autokernel.ops.int_mm import OUT_DTYPE
from autokernel.ops.linear_rms_norm import LinearRmsNorm, as_matrix
from autokernel.ops.scaled_mm import ROW_WISE, TENSOR_WISE, has_bias, scaling_of
from autokernel.records import DTYPE_BYTES, ConfigValue, Problem, TensorSpec

ADD = "add"
SCALES = {TENSOR_WISE: (TENSOR_SCALE_A, TENSOR_SCALE_B), ROW_WISE: (SCALE_A, SCALE_B)}
_KERNEL_PARAMETERS = tuple(field.name for field in fields(CuteConfig) if field.name != "fuse")  # of the object itself


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture that kernels are compiled for: with the features of exactly this one, from Hopper on."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def specs_of(entry: Entry, *, arch: str, num_units: int) -> tuple[KernelSpec, ...]:
    """All kernels that an entry may need: with its problem's epilogue if it fuses that, and plain, for sites with another.

    Raises:
        ValueError: the config is none of a CuTe DSL kernel's, or the problem none that it solves.
    """
    x, w = matrices(entry.problem)
    inside, behind = inner_epilogue(entry.problem), expected_epilogue(entry.problem)
    fuses = bool(behind) and CuteConfig.from_entry(entry.config).fuse
    facts: dict[str, Any] = {"out_dtype": out_dtype_of(entry.problem), "arch": arch, "num_units": num_units}
    epilogues = ((*inside, *behind), inside) if fuses else (inside,)
    return tuple(spec_for(entry.config, x, w, epilogue=epilogue, **facts) for epilogue in epilogues)


def matrices(problem: Problem) -> tuple[TensorSpec, TensorSpec]:
    """The two factors; weights that share an input count as one, side by side."""
    if problem.op == "merged_mm":
        weights = weights_of_merged(problem)
        k, n = weights[0].shape[0], sum(spec.shape[1] for spec in weights)
        transposed = is_transposed(weights[0].shape, weights[0].stride)
        return problem.inputs[0], TensorSpec(shape=(k, n), dtype=weights[0].dtype, stride=(1, k) if transposed else (n, 1))
    if problem.op == LinearRmsNorm.name:
        return as_matrix(problem.inputs[0]), problem.inputs[1]
    first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "scaled_mm": 0, "int_mm": 0}.get(problem.op)
    if first is None:
        raise ValueError(f"there is no CuTe DSL kernel for {problem.op}")
    return problem.inputs[first], problem.inputs[first + 1]


def inner_epilogue(problem: Problem) -> tuple[str, ...]:
    """What belongs to the product itself and is computed before the sums are rounded: scales, and what a norm needs."""
    if problem.op == LinearRmsNorm.name:
        return (ADD, SQUARES) if dict(problem.scalars)["residual"] else (SQUARES,)
    return SCALES[str(scaling_of(*problem.inputs[:4]))] if problem.op == "scaled_mm" else ()


def expected_epilogue(problem: Problem) -> tuple[str, ...]:
    """What follows the product in a problem, what is added by the op itself included."""
    if problem.op in ("addmm", "baddbmm"):
        return (BIAS if len(problem.inputs[0].shape) == 1 else ADD, *problem.epilogue)
    if problem.op == "scaled_mm" and has_bias(problem):
        return (BIAS, *problem.epilogue)
    return problem.epilogue


def out_dtype_of(problem: Problem) -> str:
    """Of a problem's result."""
    if problem.op == "int_mm":
        return OUT_DTYPE
    return str(dict(problem.scalars).get("out_dtype", problem.inputs[0].dtype))


def spec_for(
    config: Mapping[str, ConfigValue],
    x: TensorSpec,
    w: TensorSpec,
    *,
    out_dtype: str,
    epilogue: tuple[str, ...] = (),
    arch: str,
    num_units: int,
) -> KernelSpec:
    """The kernel for two matrices of this layout.

    Raises:
        ValueError: the config or the layout is not one that a kernel has; the message says which rule.
    """
    parameters = CuteConfig.from_entry(config)
    if not multiplies(x.dtype, w.dtype):
        raise ValueError(
            f"CuTe DSL kernels multiply two matrices of one dtype of {', '.join(DTYPES)}, or of two of 8-bit floating point, "
            f"not {x.dtype} and {w.dtype}"
        )
    for name, spec in (("left", x), ("right", w)):
        if wrong := layout_problem(spec):
            raise ValueError(f"the {name} matrix {wrong}")
    if w.shape[-1] * DTYPE_BYTES[out_dtype] % ALIGNMENT_BYTES:
        raise ValueError(f"the result's rows are {w.shape[-1]} {out_dtype}, no multiple of {ALIGNMENT_BYTES} bytes")
    return KernelSpec(
        config={name: config[name] for name in _KERNEL_PARAMETERS if name in config and name not in parameters.at_calls},
        dtype=x.dtype,
        b_dtype=w.dtype if w.dtype != x.dtype else "",
        out_dtype="float32" if parameters.separate else out_dtype,
        a_major="k" if x.stride[-1] == 1 else "m",
        b_major="n" if w.stride[-1] == 1 else "k",
        batched=len(x.shape) == 3,
        epilogue=epilogue,
        arch=arch,
        num_units=num_units,
    )


def layout_problem(spec: TensorSpec) -> str | None:
    """The rule about layouts that a matrix breaks, None if TMA can read it."""
    *_, rows, columns = spec.stride
    if columns != 1 and rows != 1:
        return f"has strides {spec.stride}: neither its rows nor its columns are contiguous"
    step = rows if columns == 1 else columns
    batch = spec.stride[0] if len(spec.shape) == 3 and spec.shape[0] > 1 else 0
    if step * DTYPE_BYTES[spec.dtype] % ALIGNMENT_BYTES or batch * DTYPE_BYTES[spec.dtype] % ALIGNMENT_BYTES:
        return f"has strides {spec.stride} of {spec.dtype}: they must be multiples of {ALIGNMENT_BYTES} bytes"
    return None


def has_aligned_rows(spec: TensorSpec) -> bool:
    """Whether a kernel can read what it adds or multiplies with: contiguous rows, each at a place of its own, and aligned."""
    *rows, columns = spec.stride
    return columns == 1 and all(step and step * DTYPE_BYTES[spec.dtype] % ALIGNMENT_BYTES == 0 for step in rows)


def spec_of_value(value: torch.Tensor) -> TensorSpec:
    """Shape, dtype and strides of a (fake) tensor whose start is aligned.

    Raises:
        ValueError: its first element does not lie where TMA could read it.
    """
    if value.storage_offset() * value.element_size() % ALIGNMENT_BYTES:
        raise ValueError(
            f"a matrix begins {value.storage_offset()} elements into its memory, no multiple of {ALIGNMENT_BYTES} bytes"
        )
    return TensorSpec(shape=tuple(value.shape), dtype=dtype_name(value.dtype), stride=tuple(value.stride()))
