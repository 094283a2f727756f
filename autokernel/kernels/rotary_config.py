"""What the kernel for rotary embeddings is launched with: its parameters, what follows for a problem, and the launch. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autokernel.kernels.launch import KernelPlan, Launch, Operand, as_real
from autokernel.kernels.parameters import Parameters, is_power_of_two, power_of_two
from autokernel.kernels.row_norm_config import broadcast_strides
from autokernel.ops import get_op
from autokernel.ops.fusion import PatternFusion
from autokernel.ops.rotary_qk import RotaryQk, num_tables, parts_of
from autokernel.records import ConfigValue, Problem, TensorSpec

DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 1024
_DIMS = 4
_MAX_PER_THREAD = 64  # pairs of elements that turn together
_MAX_OFFSET = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig(Parameters):
    """Parameters of `rotary`.

    Attributes:
        block_rows: rows of a program; a power of two.
        num_warps: of Triton.
    """

    block_rows: int
    num_warps: int

    def problem(self, head_dim: int) -> str | None:
        """The rule that the parameters break for rows of a length, None if they are legal."""
        for name in ("block_rows", "num_warps"):
            value = getattr(self, name)
            if not is_power_of_two(value):
                return f"{name} is a power of two; it is {value}"
        pairs = self.block_rows * block_pairs(head_dim) // (32 * self.num_warps)
        if pairs > _MAX_PER_THREAD:
            return (
                f"a thread has at most {_MAX_PER_THREAD} pairs of elements; {self.block_rows} rows of {head_dim} with "
                f"{self.num_warps} warps are {pairs}"
            )
        return None


def block_pairs(head_dim: int) -> int:
    """Pairs of elements that a block has of a row: the next power of two."""
    return power_of_two(head_dim // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """A tensor that is turned: what is read and written, in four dimensions in the result's order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]  # strides of cos and sin; of complex numbers those of their parts
    weight: int  # stride
    output: TensorSpec

    @property
    def num(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def is_wide(self) -> bool:
        """Whether offsets, or numbers of rows, need more than 31 bits."""
        written = broadcast_strides(self.output, self.output.shape)
        strides = (self.stride, written, *self.tables)
        return any(sum(n * s for n, s in zip(self.shape, stride, strict=True)) > _MAX_OFFSET for stride in strides)

    def arguments(self, name: str, output: str, order: Sequence[int]) -> dict[str, int]:
        """What the kernel gets, its rows counted through three dimensions in some order."""
        sizes, written = self.shape, broadcast_strides(self.output, self.output.shape)
        places = [*order, _DIMS - 1]
        return {
            f"{name}_ROWS": self.num,
            f"{name}_SIZE_1": sizes[order[1]],
            f"{name}_SIZE_2": sizes[order[2]],
            f"{name}W": self.weight,
            **{f"{name}{i}": self.stride[dim] for i, dim in enumerate(places)},
            **{f"{output}{i}": written[dim] for i, dim in enumerate(places)},
        }


def plan_rotary(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """One launch of `rotary_kernel`.

    Args:
        problem: a rotary embedding, of one tensor or two, normed before or not.
        config: the fields of `RotaryConfig`.

    Raises:
        ValueError: the kernel does not take the problem or the config; says the rule.
    """
    from autokernel.kernels.rotary import rotary_kernel

    parameters = RotaryConfig.from_entry(config)
    parts = parts_of(problem) if problem.op == RotaryQk.name else (problem,)
    rows = [_rows(part) for part in parts]
    head_dim = problem.inputs[0].shape[-1]
    wrong = parameters.problem(head_dim)
    if wrong:
        raise ValueError(wrong)
    q, k = rows[0], rows[-1]
    pair, scalars, tables = len(rows) == 2, dict(problem.scalars), num_tables(problem)
    each, num_inputs = len(parts[0].inputs) - tables, len(problem.inputs)
    other = each if pair else 0  # where k is among the inputs
    blocks = [-(-part.num // parameters.block_rows) for part in rows]
    # neighbours in memory are in one block
    order = sorted(range(_DIMS - 1), key=lambda dim: -q.stride[dim])
    named = zip("CS", (q.tables[0], q.tables[-1]), strict=True)
    arguments: dict[str, Operand | int | float | bool] = {
        "q": Operand("in", 0),
        "q_weight": Operand("in", each - 1),
        "q_out": Operand("out", 0),
        "k": Operand("in", other),
        "k_weight": Operand("in", other + each - 1),
        "k_out": Operand("out", len(rows) - 1),
        "cos": Operand("in", num_inputs - tables),
        "sin": Operand("in", num_inputs - 1),
        **q.arguments("Q", "QY", order),
        **k.arguments("K", "KY", order),
        **{f"{name}{i}": stride[dim] for name, stride in named for i, dim in enumerate([*order, _DIMS - 1])},
        "HALF": head_dim // 2,
        "EPS": float(scalars.get("eps", 0.0)),
        "OFFSET": float(scalars.get("offset", 0.0)),
        "NORM": "eps" in scalars,
        "NEIGHBOURS": tables == 1,
        "WIDE": any(part.is_wide for part in rows),
        "Q_BLOCKS": blocks[0],
        "BLOCK_ROWS": parameters.block_rows,
        "BLOCK": block_pairs(head_dim),
    }
    if not pair:
        arguments["K_ROWS"] = 0
    launch = Launch(
        kernel=rotary_kernel, grid=(sum(blocks), 1, 1), arguments=arguments, num_warps=parameters.num_warps, num_stages=1
    )  # fmt: skip
    return KernelPlan(outputs=tuple(part.output for part in rows), scratch=(), launches=(launch,))


def _rows(part: Problem) -> _Rows:
    """One tensor of a problem.

    Raises:
        ValueError: the kernel does not take it.
    """
    op = get_op(part.op)
    assert isinstance(op, PatternFusion)
    num = num_tables(part)
    (x, *weights), tables, scalars = part.inputs[:-num], part.inputs[-num:], dict(part.scalars)
    (output,) = op.outputs(part)
    shape, stride = x.shape, x.stride
    if len(shape) == _DIMS and part.op == "norm_rotary" and scalars.get("heads") != "first":
        shape, stride = (tuple(values[i] for i in (0, 2, 1, 3)) for values in (shape, stride))
    wrong = _problem(part, shape, output, weights)
    if wrong:
        raise ValueError(wrong)
    spread = broadcast_strides(TensorSpec(shape=shape, dtype=x.dtype, stride=stride), shape)
    return _Rows(
        shape=(1,) * (_DIMS - len(shape)) + shape,
        stride=spread,
        tables=tuple(_table_strides(table, shape) for table in tables),
        weight=weights[0].stride[0] if weights else 0,
        output=output,
    )


def _table_strides(table: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a table in the dimensions of what it turns."""
    if table.dtype != "complex64":
        return broadcast_strides(table, shape)
    parts = as_real(table)  # [B, T, D / 2, 2], the same for all heads
    batch, length = (0 if n == 1 else s for n, s in zip(parts.shape[:2], parts.stride[:2], strict=True))
    return batch, length, 0, 1


def _problem(part: Problem, shape: tuple[int, ...], output: TensorSpec, weights: Sequence[TensorSpec]) -> str | None:
    """The rule that a tensor, its weight or its tables break."""
    num = num_tables(part)
    if not 2 <= len(shape) <= _DIMS or math.prod(shape) == 0:
        return f"rotary takes 2 to {_DIMS} dimensions, none of them empty; x has {list(shape)}"
    if shape[-1] % 2 or shape[-1] > MAX_HEAD_DIM:
        return f"rotary takes heads of an even number of dimensions up to {MAX_HEAD_DIM}; there are {shape[-1]}"
    if output.shape != shape:
        return f"tables broadcast to what they turn, {list(shape)}, and not beyond it: the result is {list(output.shape)}"
    if any(weight.shape != shape[-1:] for weight in weights):
        return f"the weight has one number a column, {shape[-1]}; its shape is {list(weights[0].shape)}"
    allowed = {*DTYPES, "complex64"}
    others = sorted({spec.dtype for spec in part.inputs} - allowed)
    if others:
        return f"rotary takes {', '.join(DTYPES)}, not {', '.join(others)}"
    if num == 1 and part.inputs[-1].shape[-1] > 1 and part.inputs[-1].stride[-1] != 1:
        return f"complex numbers of a position lie next to each other; their strides are {list(part.inputs[-1].stride)}"
    return None
