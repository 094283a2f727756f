"""Reading a post-grad ATen graph: specs, constants, and neighbours behind the views between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from autokernel.records import DTYPE_BYTES, TensorSpec

if TYPE_CHECKING:
    from torch.fx import Node

# Ops that only look at their first argument's memory in another way (a reshape of what can be viewed).
_VIEWS = frozenset({
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.permute", "aten.t", "aten.transpose", "aten.expand",
    "aten.squeeze", "aten.unsqueeze", "aten.alias", "aten.detach", "aten.as_strided", "aten.slice", "aten.select",
})  # fmt: skip
# Those of them that keep the order of the elements, whatever the strides.
_RESHAPES = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view", "aten.squeeze", "aten.unsqueeze", "aten.alias"})


def op_name(node: Node) -> str:
    """`aten.mm` for a call of any overload of it; for other nodes what they are: `input`, `output`, a function's name."""
    if node.op == "placeholder":
        return "input"
    if node.op != "call_function":
        return node.op
    return name_of(node.target)


def name_of(target: object) -> str:
    """As `op_name`, of what a node calls."""
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(target, "__name__", str(target))


def is_reshape(node: Node) -> bool:
    """Whether the node is its argument in another shape, element order kept."""
    return op_name(node) in _RESHAPES


def source_of(node: Node) -> Node:
    """The node behind all views."""
    while op_name(node) in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def is_constant(node: Node, constants: frozenset[str]) -> bool:
    """Whether the node is a constant placeholder, or a view of one."""
    source = source_of(node)
    return source.op == "placeholder" and source.name in constants


def tensor_spec(node: Node) -> TensorSpec | None:
    """What the graph says of the node's value; None where it is no dense tensor of static shape and a known dtype."""
    return spec_of(node.meta.get("val"))


def spec_of(value: object) -> TensorSpec | None:
    """As `tensor_spec`, of a (fake) tensor."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    shape, stride, dtype = tuple(value.shape), tuple(value.stride()), str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES or not all(isinstance(n, int) for n in (*shape, *stride)):
        return None
    return TensorSpec(shape=shape, dtype=dtype, stride=stride)


def settled(spec: TensorSpec) -> TensorSpec:
    """The same with strides that say something: those of dimensions of one element differ without meaning."""
    if 1 not in spec.shape:
        return spec
    stride = list(spec.stride)
    for i in reversed(range(len(stride))):
        if spec.shape[i] == 1:
            stride[i] = 1 if i == len(stride) - 1 else stride[i + 1] * spec.shape[i + 1]
    return TensorSpec(shape=spec.shape, dtype=spec.dtype, stride=tuple(stride))


def identity(node: Node) -> tuple[object, ...]:
    """Equal for two nodes that are the same elements of the same memory: separate views of one value are."""
    value = node.meta["val"]
    return source_of(node), tuple(value.shape), tuple(value.stride()), value.storage_offset(), value.dtype


def computed_before(last: Node, nodes: Iterable[Node], inner: frozenset[Node], order: Mapping[Node, int]) -> list[Node]:
    """What is computed from these nodes up to another one, itself included, in order; the set that they belong to left out."""
    found: set[Node] = set()
    left = list(nodes)
    while left:
        users = [user for user in left.pop().users if user not in inner and order[user] <= order[last]]
        left += [user for user in users if user not in found]
        found.update(users)
    return sorted(found, key=order.__getitem__)


def site_name(node: Node) -> str:
    """The path of the module that the node comes from, if the graph knows it, else the node's name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return node.name
    # The root is called L['self'] or the like, whatever dynamo knew it by.
    _, dot, path = str(stack[-1][0]).partition(".")
    return f"{path} ({node.name})" if dot else node.name


def producers_of(nodes: list[Node], constants: frozenset[str]) -> tuple[str, ...]:
    """Names of what computes these values, views skipped and constants left out."""
    return tuple(_producer(node) for node in nodes if not is_constant(node, constants))


def _producer(node: Node) -> str:
    """What really computes a value: an op with several results is read through `getitem`."""
    source = source_of(node)
    return _producer(source.all_input_nodes[0]) if op_name(source) == "getitem" else op_name(source)


def consumers_of(node: Node) -> tuple[str, ...]:
    """Names of what uses this value, views skipped, each once, in order."""
    names: dict[str, None] = {}
    for user in node.users:
        for name in consumers_of(user) if op_name(user) in _VIEWS else (op_name(user),):
            names[name] = None
    return tuple(names)
