"""What the kernel for norms is launched with: its parameters, what follows from them for a problem, and the launch. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from autokernel.kernels.launch import AHEAD, KernelPlan, Launch, Operand
from autokernel.kernels.parameters import is_power_of_two, power_of_two
from autokernel.records import ConfigValue, Problem, TensorSpec

DTYPES = ("bfloat16", "float16", "float32")
MAX_COLS = 32768
_DIMS = 4
_MIN_PER_THREAD, _MAX_PER_THREAD = 1, 128  # elements of a block for each of a program's threads


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNormConfig:
    """Parameters of `row_norm`.

    Attributes:
        rows: of a block; a power of two.
        repeat: blocks that a program takes one after another.
        num_warps: of Triton.
    """

    rows: int
    repeat: int
    num_warps: int

    @classmethod
    def from_entry(cls, config: Mapping[str, ConfigValue]) -> RowNormConfig:
        """From a candidate's config without its `kernel`.

        Raises:
            ValueError: a parameter is missing or unknown.
        """
        names = [field.name for field in fields(cls)]
        if set(config) != set(names):
            raise ValueError(f"row_norm takes {', '.join(names)}; the config has {', '.join(sorted(config)) or 'nothing'}")
        return cls(**{name: int(value) for name, value in config.items()})

    def problem(self, num_rows: int, num_cols: int) -> str | None:
        """The rule that the parameters break for a problem, None if they are legal."""
        for name in ("rows", "num_warps"):
            value = getattr(self, name)
            if not is_power_of_two(value):
                return f"{name} is a power of two; it is {value}"
        if num_cols > MAX_COLS:
            return f"row_norm keeps whole rows in registers, of at most {MAX_COLS} columns; there are {num_cols}"
        blocks = -(-num_rows // self.rows)
        if self.repeat < 1 or (self.repeat > 1 and self.repeat > blocks):
            return f"repeat is 1 to the number of blocks of rows, {blocks}; it is {self.repeat}"
        each = self.rows * power_of_two(num_cols) / (32 * self.num_warps)
        if not _MIN_PER_THREAD <= each <= _MAX_PER_THREAD:
            return (
                f"a thread has {_MIN_PER_THREAD} to {_MAX_PER_THREAD} elements of a block; {self.rows} rows of {num_cols} "
                f"columns with {self.num_warps} warps are {each:g}"
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """Where a fusion has its operands among its inputs; which of the kernel's steps it needs."""

    weight: int
    residual: int = 0
    factor: int = 0
    sums: bool = False
    scales: bool = False
    gates: bool = False


_FORMS: Mapping[str, _Form] = {
    "rms_norm": _Form(weight=1),
    "add_rms_norm": _Form(weight=2, residual=1, sums=True),
    "adaln_rms_norm": _Form(weight=1, factor=2, scales=True),
    "gated_rms_norm": _Form(weight=1, factor=2, residual=3, gates=True),
}


def plan_row_norm(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """One launch of `row_norm_kernel`.

    Args:
        problem: a norm with what is around it.
        config: the fields of `RowNormConfig`.

    Raises:
        ValueError: the kernel does not take the problem or the config; says the rule.
    """
    from autokernel.kernels.row_norm import row_norm_kernel
    from autokernel.ops import get_op
    from autokernel.ops.fusion import PatternFusion

    parameters, form, scalars = RowNormConfig.from_entry(config), _FORMS[problem.op], dict(problem.scalars)
    x = problem.inputs[0]
    rows, cols = x.num_elements // x.shape[-1], x.shape[-1]
    wrong = _problem(problem, form) or parameters.problem(rows, cols)
    if wrong:
        raise ValueError(wrong)
    op = get_op(problem.op)
    assert isinstance(op, PatternFusion)
    outputs = op.outputs(problem)
    total = outputs[0] if form.sums else outputs[-1]
    named = {"X": x, "R": problem.inputs[form.residual], "F": problem.inputs[form.factor], "Y": outputs[-1], "T": total}
    strides = {
        f"{name}{i}": stride for name, spec in named.items() for i, stride in enumerate(broadcast_strides(spec, x.shape))
    }
    sizes = (1,) * (_DIMS - len(x.shape)) + x.shape
    return KernelPlan(
        outputs=outputs,
        scratch=(),
        launches=(
            Launch(
                kernel=row_norm_kernel,
                grid=(-(-rows // (parameters.rows * parameters.repeat)), 1, 1),
                arguments={
                    "x": Operand("in", 0),
                    "weight": Operand("in", form.weight),
                    "residual": Operand("in", form.residual),
                    "factor": Operand("in", form.factor),
                    "y": Operand("out", len(outputs) - 1),
                    "total": Operand("out", 0),
                    "ROWS": rows,
                    "COLS": cols,
                    "SIZE_1": sizes[1],
                    "SIZE_2": sizes[2],
                    "EPS": float(scalars["eps"]),
                    "OFFSET": float(scalars.get("offset", 0.0)),
                    **strides,
                    "W": problem.inputs[form.weight].stride[0],
                    "SUM": form.sums,
                    "SCALE": form.scales,
                    "GATE": form.gates,
                    "BLOCK_ROWS": parameters.rows,
                    "REPEAT": parameters.repeat,
                    "BLOCK_COLS": power_of_two(cols),
                    AHEAD: 0,
                },
                num_warps=parameters.num_warps,
                num_stages=1,
                weights=("weight",),
            ),
        ),
    )


def broadcast_strides(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor in four dimensions, when it is expanded to a shape."""
    missing = (0,) * (len(shape) - len(spec.shape))
    own = (*missing, *(0 if n == 1 else s for n, s in zip(spec.shape, spec.stride, strict=True)))
    return (0,) * (_DIMS - len(shape)) + own


def _problem(problem: Problem, form: _Form) -> str | None:
    """The rule that the inputs break."""
    x, weight = problem.inputs[0], problem.inputs[form.weight]
    if not 2 <= len(x.shape) <= _DIMS or math.prod(x.shape) == 0:
        return f"row_norm takes 2 to {_DIMS} dimensions, none of them empty; x has {list(x.shape)}"
    if weight.shape != x.shape[-1:]:
        return f"the weight has one number a column, {x.shape[-1]}; its shape is {list(weight.shape)}"
    if (form.sums or form.gates) and problem.inputs[form.residual].shape != x.shape:
        return f"the residual has the shape of x, {list(x.shape)}; its own is {list(problem.inputs[form.residual].shape)}"
    factor = problem.inputs[form.factor].shape
    sizes = zip(reversed(factor), reversed(x.shape), strict=False)
    if len(factor) > len(x.shape) or any(ours not in (1, n) for ours, n in sizes):
        return f"the factor broadcasts to x, {list(x.shape)}; its shape is {list(factor)}"
    others = sorted({spec.dtype for spec in problem.inputs} - set(DTYPES))
    return f"row_norm takes {', '.join(DTYPES)}, not {', '.join(others)}" if others else None
