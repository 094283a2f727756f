"""The pointwise ops behind a GEMM that a backend may fuse into it: what they compute, and how a graph spells them.

Inductor decomposes activations and, for 16-bit dtypes, computes them in fp32 between two conversions. The finder
therefore renders what follows a value as an expression of it, conversions and reshapes left out, and looks that up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autokernel.ops.matching import is_reshape, op_name, spec_of, tensor_spec
from autokernel.records import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

UNARY_EPILOGUES: tuple[str, ...] = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
BINARY_EPILOGUES: tuple[str, ...] = ("add", "mul")
GATED_EPILOGUES: tuple[str, ...] = tuple(f"gated_{name}" for name in UNARY_EPILOGUES)  # of two products: f(first) * second

_SCALAR = re.compile(r"(add|mul)\((.+)\)")  # "mul(0.125)": with a number in place of an operand
_LARGEST_ACTIVATION = 14  # nodes; gelu_tanh has eleven and two conversions
_POINTWISE = frozenset(
    f"aten.{name}" for name in ("add", "div", "erf", "exp", "gelu", "mul", "neg", "relu", "sigmoid", "silu", "tanh")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """What follows a GEMM: the names in order, the operands of the binary ones, and the node of the final result."""

    names: tuple[str, ...]
    operands: tuple[Node, ...]
    operand_specs: tuple[TensorSpec, ...]
    last: Node


def apply_epilogue(names: Sequence[str], value: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The epilogue in plain torch.

    Args:
        names: of `UNARY_EPILOGUES` and `BINARY_EPILOGUES`, or the latter with a number (`scalar_step`), in order.
        value: the GEMM's result.
        operands: one per binary name, in order, each of the shape of `value`.

    Raises:
        ValueError: an unknown name, or the number of operands does not fit the names.
    """
    functions = _functions()
    unknown = [name for name in names if name not in functions and scalar_step(name) is None]
    num_binary = sum(name in BINARY_EPILOGUES for name in names)
    if unknown or num_binary != len(operands):
        raise ValueError(
            f"epilogue {tuple(names)} with {len(operands)} operands: names must be of {', '.join(functions)}, "
            f"and each of {', '.join(BINARY_EPILOGUES)} takes one operand"
        )
    rest = iter(operands)
    for name in names:
        if (step := scalar_step(name)) is not None:
            value = functions[step[0]](value, step[1])
        else:
            value = functions[name](value, next(rest)) if name in BINARY_EPILOGUES else functions[name](value)
    return value


def scalar_step(name: str) -> tuple[str, float] | None:
    """("mul", 0.125) of the name "mul(0.125)", likewise with "add"; None for any other."""
    parsed = _SCALAR.fullmatch(name)
    try:
        number = float(parsed[2]) if parsed is not None else math.nan
    except ValueError:
        return None
    return None if parsed is None or not math.isfinite(number) else (parsed[1], number)


def apply_gated(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """One of `GATED_EPILOGUES` in plain torch."""
    return _functions()[name.removeprefix("gated_")](gate) * up


def _functions() -> Mapping[str, Callable[..., torch.Tensor]]:
    import torch
    from torch.nn import functional

    return {
        "relu": torch.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "add": torch.add,
        "mul": torch.mul,
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
        if (unary := _activation(value)) is not None:
            name, value = unary
            names.append(name)
        elif (binary := _binary(value, gemm, order)) is not None:
            name, value, operand, spec = binary
            names.append(name)
            operands.append(operand)
            specs.append(spec)
        elif (scaled := _scalar(value)) is not None:
            name, value = scaled
            names.append(name)
        else:
            return Epilogue(names=tuple(names), operands=tuple(operands), operand_specs=tuple(specs), last=value)
        value = _past_reshapes(value)


def find_gated(gate: Node, up: Node) -> tuple[str, Node] | None:
    """(name, result) if all that uses two products is `f(gate) * up` with an activation function f.

    Args:
        gate: the node of the first product.
        up: of the second.
    """
    found = _activation(_past_reshapes(gate))
    if found is None:
        return None
    (name, value), other = (found[0], _past_reshapes(found[1])), _past_reshapes(up)
    users = set(value.users)
    if users != set(other.users) or len(users) != 1:
        return None
    (product,) = users
    if op_name(product) != "aten.mul" or set(product.all_input_nodes) != {value, other} or _dtype(product) != _dtype(gate):
        return None
    return (f"gated_{name}", product) if _size(value) == _size(other) == _size(product) else None


def _size(node: Node) -> int:
    """Elements: more than an operand has where shapes broadcast, which reshapes that are passed over can make them do."""
    return int(node.meta["val"].numel())


def _past_reshapes(node: Node) -> Node:
    while len(node.users) == 1 and is_reshape(user := next(iter(node.users))):
        node = user
    return node


def _binary(value: Node, gemm: Node, order: Mapping[Node, int]) -> tuple[str, Node, Node, TensorSpec] | None:
    """(name, result, operand, the operand's spec in the GEMM's own shape) if the only user is a fusible add or mul."""
    if len(value.users) != 1:
        return None
    user = next(iter(value.users))
    name = op_name(user).removeprefix("aten.")
    # kwargs: an `alpha`; one input node: a scalar operand, or the value with itself.
    if op_name(user) != f"aten.{name}" or name not in BINARY_EPILOGUES or user.kwargs or len(user.all_input_nodes) != 2:
        return None
    operand = next(node for node in user.all_input_nodes if node is not value)
    spec = _as_shape_of(operand, gemm)
    if spec is None or order[operand] > order[gemm] or _dtype(user) != _dtype(gemm) or _size(user) != _size(gemm):
        return None
    return name, user, operand, spec


def _scalar(value: Node) -> tuple[str, Node] | None:
    """(name, result) if the only user adds a number, or multiplies by one."""
    if len(value.users) != 1:
        return None
    user = next(iter(value.users))
    name = op_name(user).removeprefix("aten.")
    numbers = [argument for argument in user.args if type(argument) in (int, float)]
    if name not in BINARY_EPILOGUES or user.kwargs or len(user.args) != 2 or len(numbers) != 1:
        return None
    if _dtype(user) != _dtype(value) or not math.isfinite(numbers[0]):  # type: ignore[arg-type]
        return None
    return f"{name}({float(numbers[0])!r})", user  # type: ignore[arg-type]


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


def _activation(value: Node) -> tuple[str, Node] | None:
    """(name, result) if all that uses the value is one activation function of it."""
    expressions: dict[Node, str] = {value: "x"}
    node = value
    while len(expressions) <= _LARGEST_ACTIVATION:
        pending = {user for seen in expressions for user in seen.users if user not in expressions}
        if not pending:
            return None
        while node not in pending:
            node = node.next
        expression = _render(node, expressions)
        if expression is None:
            return None
        expressions[node] = expression
        closed = all(user in expressions for seen in expressions if seen is not node for user in seen.users)
        same = _dtype(node) == _dtype(value) and _size(node) == _size(value)
        if closed and same and expression in _ACTIVATIONS:
            return _ACTIVATIONS[expression], node
    return None


def _render(node: Node, expressions: Mapping[Node, str]) -> str | None:
    if any(source not in expressions for source in node.all_input_nodes):
        return None
    name = op_name(node)
    if is_reshape(node) or (name == "prims.convert_element_type" and _keeps(node, next(iter(expressions)))):
        return expressions[node.all_input_nodes[0]]
    if name not in _POINTWISE:
        return None
    import torch.fx

    arguments = [expressions[a] if isinstance(a, torch.fx.Node) else spell_number(a) for a in node.args]
    arguments += [f"{key}={value}" for key, value in node.kwargs.items() if value != "none"]
    return spell_call(name.removeprefix("aten."), *arguments)


def _keeps(conversion: Node, value: Node) -> bool:
    """Whether a conversion loses nothing that the value's own dtype has: others (to 8 bits, to integers) are meant."""
    import torch

    to, own = conversion.meta["val"].dtype, value.meta["val"].dtype
    return to == own or (own in (torch.bfloat16, torch.float16, torch.float32) and to in (torch.float32, torch.float64))


def spell_number(value: object) -> str:
    """A number in an expression of an activation; anything else as it is."""
    return f"{float(value):.6g}" if isinstance(value, (int, float)) else str(value)


def spell_call(name: str, *arguments: str) -> str:
    """A call in such an expression, where the order of a sum's or a product's operands says nothing."""
    return f"{name}({','.join(sorted(arguments) if name in ('add', 'mul') else arguments)})"


def activation_named(expression: str) -> str | None:
    """The activation function that an expression of `x` is, spelled by `spell_call` and `spell_number`."""
    return _ACTIVATIONS.get(expression)


def _cube_term() -> str:
    return spell_call("mul", "0.044715", spell_call("mul", spell_call("mul", "x", "x"), "x"))


_ACTIVATIONS: Mapping[str, str] = {
    "relu(x)": "relu",
    "sigmoid(x)": "sigmoid",
    "tanh(x)": "tanh",
    "gelu(x)": "gelu",
    "gelu(x,approximate=tanh)": "gelu_tanh",
    "silu(x)": "silu",
    spell_call("mul", "x", "sigmoid(x)"): "silu",
    spell_call("div", "x", spell_call("add", "1", "exp(neg(x))")): "silu",
    spell_call(
        "mul", spell_call("mul", "x", "0.5"), spell_call("add", "1", f"erf({spell_call('mul', 'x', '0.707107')})")
    ): "gelu",
    spell_call(
        "mul",
        spell_call("mul", "x", "0.5"),
        spell_call("add", "1", f"tanh({spell_call('mul', '0.797885', spell_call('add', 'x', _cube_term()))})"),
    ): "gelu_tanh",
}


def _dtype(node: Node) -> object:
    return getattr(node.meta.get("val"), "dtype", None)
