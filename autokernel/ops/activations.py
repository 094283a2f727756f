"""Activation functions as a graph spells them.

Inductor decomposes them and, for 16-bit dtypes, computes them in fp32 between two conversions. What follows a value is
therefore rendered as an expression of it, conversions and reshapes left out, and looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.ops.matching import is_reshape, op_name

if TYPE_CHECKING:
    from torch.fx import Node

_LARGEST_ACTIVATION = 14  # nodes; gelu_tanh has eleven and two conversions
_POINTWISE = frozenset(
    f"aten.{name}" for name in ("add", "div", "erf", "exp", "gelu", "mul", "neg", "relu", "sigmoid", "silu", "tanh")
)


def activation_of(value: Node) -> tuple[str, Node] | None:
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
        same = dtype_of(node) == dtype_of(value) and size_of(node) == size_of(value)
        if closed and same and expression in _ACTIVATIONS:
            return _ACTIVATIONS[expression], node
    return None


def _render(node: Node, expressions: Mapping[Node, str]) -> str | None:
    if any(source not in expressions for source in node.all_input_nodes):
        return None
    name = op_name(node)
    if is_reshape(node) or (name == "prims.convert_element_type" and keeps(node, next(iter(expressions)))):
        return expressions[node.all_input_nodes[0]]
    if name not in _POINTWISE:
        return None
    import torch.fx

    arguments = [expressions[a] if isinstance(a, torch.fx.Node) else spell_number(a) for a in node.args]
    arguments += [f"{key}={value}" for key, value in node.kwargs.items() if value != "none"]
    return spell_call(name.removeprefix("aten."), *arguments)


def keeps(conversion: Node, value: Node) -> bool:
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


def dtype_of(node: Node) -> object:
    return getattr(node.meta.get("val"), "dtype", None)


def size_of(node: Node) -> int:
    """Elements: more than an operand has where shapes broadcast, which reshapes that are passed over can make them do."""
    return int(node.meta["val"].numel())
