"""The pointwise ops behind a GEMM that a backend may fuse into it: what they compute, and how a graph spells them.

A step is a name: a function of the value, or one of it and a number, a matrix, or an element for each row or column.
`activations.py` finds those that a graph spells in several nodes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autokernel.ops.activations import activation_of, dtype_of, keeps, size_of
from autokernel.ops.matching import is_reshape, op_name, spec_of, tensor_spec
from autokernel.records import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

UNARY_EPILOGUES: tuple[str, ...] = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
FUNCTION_EPILOGUES: tuple[str, ...] = ("neg", "abs", "exp", "sqrt", "rsqrt", "reciprocal", "square", "cube")
MATRIX_EPILOGUES: tuple[str, ...] = ("add", "mul", "sub", "rsub", "div", "rdiv", "maximum", "minimum")  # "r": operand first
PER_ROW, PER_COLUMN = "_per_row", "_per_column"  # behind such a name: one element of the operand for each row, [M, 1], or [N]
BINARY_EPILOGUES: tuple[str, ...] = tuple(f"{name}{kind}" for kind in ("", PER_ROW, PER_COLUMN) for name in MATRIX_EPILOGUES)
GATED_EPILOGUES: tuple[str, ...] = tuple(f"gated_{name}" for name in UNARY_EPILOGUES)  # of two products: f(first) * second

_SCALAR = re.compile(r"(add|mul|div_by|clamp_min|clamp_max)\((.+)\)")  # "mul(0.125)": with a number in place of an operand
_POWERS = {2: "square", 3: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """What follows a GEMM: the names in order, the binary ones' operands, the node of the final result, and why it ends."""

    names: tuple[str, ...]
    operands: tuple[Node, ...]
    operand_specs: tuple[TensorSpec, ...]
    last: Node
    end: str  # why it is no longer


def apply_epilogue(names: Sequence[str], value: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The epilogue in plain torch.

    Args:
        names: of `UNARY_EPILOGUES`, `FUNCTION_EPILOGUES` and `BINARY_EPILOGUES`, or with a number (`scalar_step`), in order.
        value: the GEMM's result.
        operands: one per binary name, in order, each of the shape of `value`, or [M, 1], or [N], as its name says.

    Raises:
        ValueError: an unknown name, or the number of operands does not fit the names.
    """
    functions = _functions()
    known = (*UNARY_EPILOGUES, *FUNCTION_EPILOGUES, *BINARY_EPILOGUES)
    unknown = [name for name in names if name not in known and scalar_step(name) is None]
    num_binary = sum(name in BINARY_EPILOGUES for name in names)
    if unknown or num_binary != len(operands):
        raise ValueError(
            f"epilogue {tuple(names)} with {len(operands)} operands: names must be of {', '.join(known)}, "
            f"and each of {', '.join(MATRIX_EPILOGUES)}, {PER_ROW} and {PER_COLUMN} too, takes one operand"
        )
    rest = iter(operands)
    for name in names:
        if (step := scalar_step(name)) is not None:
            value = functions[step[0]](value, step[1])
        else:
            value = functions[name](value, next(rest)) if name in BINARY_EPILOGUES else functions[name](value)
    return value


def scalar_step(name: str) -> tuple[str, float] | None:
    """("mul", 0.125) of the name "mul(0.125)", likewise "add", "div_by", "clamp_min", "clamp_max"; None for any other."""
    parsed = _SCALAR.fullmatch(name)
    try:
        number = float(parsed[2]) if parsed is not None else math.nan
    except ValueError:
        return None
    if parsed is None or not math.isfinite(number) or (parsed[1] == "div_by" and number == 0):
        return None
    return parsed[1], number


def operand_kind(name: str) -> str:
    """What a step of `BINARY_EPILOGUES` reads: `PER_ROW`, `PER_COLUMN`, or "" for a matrix like the result."""
    return next((kind for kind in (PER_ROW, PER_COLUMN) if name.endswith(kind)), "")


def apply_gated(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """One of `GATED_EPILOGUES` in plain torch."""
    return _functions()[name.removeprefix("gated_")](gate) * up


def _functions() -> Mapping[str, Callable[..., torch.Tensor]]:
    import torch
    from torch.nn import functional

    binary: dict[str, Callable[..., torch.Tensor]] = {
        "add": torch.add,
        "mul": torch.mul,
        "sub": torch.sub,
        "rsub": lambda x, operand: operand - x,
        "div": torch.div,
        "rdiv": lambda x, operand: operand / x,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
    }
    return {
        "relu": torch.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "neg": torch.neg,
        "abs": torch.abs,
        "exp": torch.exp,
        "sqrt": torch.sqrt,
        "rsqrt": torch.rsqrt,
        "reciprocal": torch.reciprocal,
        "square": lambda x: torch.pow(x, 2),
        "cube": lambda x: torch.pow(x, 3),
        "div_by": torch.div,
        "clamp_min": torch.clamp_min,
        "clamp_max": torch.clamp_max,
        **{f"{name}{kind}": function for kind in ("", PER_ROW, PER_COLUMN) for name, function in binary.items()},
    }


def find_epilogue(gemm: Node, order: Mapping[Node, int]) -> Epilogue:
    """The longest chain of fusible ops behind a GEMM, each the only user of the one before.

    A binary op joins the chain only if its other operand is computed before the GEMM: `silu(gate) * up` thus belongs to
    one of the two, the later, and never to both.

    Args:
        gemm: the node whose result is followed.
        order: position of every node in the graph.
    """
    names: list[str] = []
    operands: list[Node] = []
    specs: list[TensorSpec] = []
    value = _past_reshapes(gemm)
    while True:
        if (alone := _alone(value) or _in_fp32(value)) is not None:
            more, value = alone
            names += more
        elif (binary := _binary(value, gemm, order)) is not None:
            name, value, operand, spec = binary
            names.append(name)
            operands.append(operand)
            specs.append(spec)
        else:
            end = _why(value, gemm, order)
            return Epilogue(names=tuple(names), operands=tuple(operands), operand_specs=tuple(specs), last=value, end=end)
        value = _past_reshapes(value)


def _why(value: Node, gemm: Node, order: Mapping[Node, int]) -> str:
    """Why nothing that follows a value is a step."""
    user = _only_user(value)
    if user is None:
        return f"{value.name} is read by {len(value.users)} nodes"
    name, short = op_name(user), op_name(user).removeprefix("aten.")
    if user.op == "output":
        return "it is a result of the graph"
    if short not in (*MATRIX_EPILOGUES, *FUNCTION_EPILOGUES, "pow", "clamp_min", "clamp_max"):
        return f"{name} is no step of an epilogue"
    if user.kwargs:
        return f"{user.name} says {', '.join(user.kwargs)}, which no step has"
    if dtype_of(user) != dtype_of(gemm) or size_of(user) != size_of(gemm):
        return f"{user.name} changes dtype or size"
    others = [node for node in user.all_input_nodes if node is not value]
    if any(order[node] > order[gemm] for node in others):
        return f"{user.name} reads {', '.join(node.name for node in others)}, which is computed behind the product"
    if others:
        return (
            f"{user.name} reads {others[0].name}, neither a matrix like the result nor one element for each row or column of it"
        )
    return f"{user.name} is {name} with numbers that no step has"


def find_gated(gate: Node, up: Node) -> tuple[str, Node] | None:
    """(name, result) if all that uses two products is `f(gate) * up` with an activation function f.

    Args:
        gate: the node of the first product.
        up: of the second.
    """
    found = activation_of(_past_reshapes(gate))
    if found is None:
        return None
    (name, value), other = (found[0], _past_reshapes(found[1])), _past_reshapes(up)
    users = set(value.users)
    if users != set(other.users) or len(users) != 1:
        return None
    (product,) = users
    if op_name(product) != "aten.mul" or set(product.all_input_nodes) != {value, other} or dtype_of(product) != dtype_of(gate):
        return None
    return (f"gated_{name}", product) if size_of(value) == size_of(other) == size_of(product) else None


def _past_reshapes(node: Node) -> Node:
    while len(node.users) == 1 and is_reshape(user := next(iter(node.users))):
        node = user
    return node


def _alone(value: Node) -> tuple[list[str], Node] | None:
    """(names, result) of steps that read nothing else."""
    found = activation_of(value) or _function(value)
    return ([found[0]], found[1]) if found is not None else _scalar(value)


def _in_fp32(value: Node) -> tuple[list[str], Node] | None:
    """(names, result) of such steps between a conversion to fp32 and the one back: none of them is rounded in the graph."""
    node = _only_user(value)
    if node is None or op_name(node) != "prims.convert_element_type" or not keeps(node, value):
        return None
    names: list[str] = []
    while (step := _function(node) or _scalar(node)) is not None:
        names += [step[0]] if isinstance(step[0], str) else step[0]
        node = step[1]
    back = _only_user(node)
    if back is None or op_name(back) != "prims.convert_element_type" or dtype_of(back) != dtype_of(value) or not names:
        return None
    return (names, back) if size_of(back) == size_of(value) else None


def _only_user(value: Node) -> Node | None:
    return next(iter(value.users)) if len(value.users) == 1 else None


def _function(value: Node) -> tuple[str, Node] | None:
    """(name, result) if the only user is one of `FUNCTION_EPILOGUES` of the value alone."""
    user = _only_user(value)
    if user is None or user.kwargs or dtype_of(user) != dtype_of(value) or size_of(user) != size_of(value):
        return None
    name = op_name(user).removeprefix("aten.")
    if op_name(user) == "aten.pow" and user.args[0] is value and isinstance(user.args[1], (int, float)):
        name = _POWERS.get(user.args[1], "")
    elif op_name(user) == "aten.mul" and tuple(user.args) == (value, value):
        name = "square"
    elif op_name(user) != f"aten.{name}" or len(user.args) != 1:
        return None
    return (name, user) if name in FUNCTION_EPILOGUES else None


def _binary(value: Node, gemm: Node, order: Mapping[Node, int]) -> tuple[str, Node, Node, TensorSpec] | None:
    """(name, result, operand, the operand's spec as its name says) if the only user combines the value with another."""
    user = _only_user(value)
    if user is None:
        return None
    name = op_name(user).removeprefix("aten.")
    # kwargs: an `alpha`, or how a quotient is rounded; one input node: a scalar operand, or the value with itself.
    if op_name(user) != f"aten.{name}" or name not in MATRIX_EPILOGUES or user.kwargs or len(user.all_input_nodes) != 2:
        return None
    operand = next(node for node in user.all_input_nodes if node is not value)
    if order[operand] > order[gemm] or dtype_of(user) != dtype_of(gemm) or size_of(user) != size_of(gemm):
        return None
    if name in ("sub", "div") and user.args[0] is operand:
        name = f"r{name}"
    if (spec := _as_shape_of(operand, gemm)) is not None:
        return name, user, operand, spec
    kind = _vector_kind(operand, user, gemm)
    spec = _as_vector(operand, kind) if kind else None
    return None if spec is None else (f"{name}{kind}", user, operand, spec)


def _vector_kind(operand: Node, user: Node, gemm: Node) -> str:
    """`PER_ROW` or `PER_COLUMN` if the operand has one element for each of those of the GEMM's result; else ""."""
    shape, result = operand.meta["val"].shape, gemm.meta["val"]
    whole, sizes = user.meta["val"].shape, result.shape
    # where rows were split, or columns, an operand's last dimension counts something else
    if operand.meta["val"].dtype != result.dtype or whole[-1] != sizes[-1] or not shape:
        return ""
    if shape[-1] == sizes[-1] == operand.meta["val"].numel() and shape[-1] > 1:
        return PER_COLUMN
    rows = tuple(shape[:-1]) == tuple(whole[:-1])[len(whole) - len(shape) :] and operand.meta["val"].numel() == sizes[-2]
    return PER_ROW if shape[-1] == 1 and rows and len(sizes) == 2 else ""


def _as_vector(operand: Node, kind: str) -> TensorSpec | None:
    """The spec of an operand as [M, 1] or [N]; None where its strides have no such view."""
    import torch

    spec = tensor_spec(operand)
    if spec is None:
        return None
    shape = (spec.num_elements, 1) if kind == PER_ROW else (spec.num_elements,)
    try:
        view = torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device="meta").view(shape)
    except RuntimeError:
        return None
    return spec_of(view)


def _scalar(value: Node) -> tuple[list[str], Node] | None:
    """(names, result) if the only user combines the value with a number."""
    user = _only_user(value)
    if user is None:
        return None
    name = op_name(user).removeprefix("aten.")
    numbers = [argument for argument in user.args if type(argument) in (int, float)]
    if op_name(user) != f"aten.{name}" or user.kwargs or len(user.args) != 2 or len(numbers) != 1:
        return None
    number = float(numbers[0])  # type: ignore[arg-type]
    if dtype_of(user) != dtype_of(value) or not math.isfinite(number):
        return None
    first = user.args[0] is value
    steps = {
        "add": [f"add({number!r})"],
        "mul": [f"mul({number!r})"],
        "sub": [f"add({-number!r})"] if first else ["neg", f"add({number!r})"],
        "div": [f"div_by({number!r})"] if first and number != 0 else [],
        "clamp_min": [f"clamp_min({number!r})"],
        "clamp_max": [f"clamp_max({number!r})"],
    }.get(name, [])
    return (steps, user) if steps else None


def _as_shape_of(operand: Node, gemm: Node) -> TensorSpec | None:
    """The operand as a view of the shape of the GEMM's result; None if it is no such view, or of another dtype."""
    import torch

    spec, result = tensor_spec(operand), gemm.meta["val"]
    if spec is None or spec.num_elements != result.numel() or getattr(torch, spec.dtype) != result.dtype:
        return None
    try:
        view = torch.empty_strided(spec.shape, spec.stride, dtype=result.dtype, device="meta").view(result.shape)
    except RuntimeError:  # strides that no view of that shape has
        return None
    return spec_of(view)
