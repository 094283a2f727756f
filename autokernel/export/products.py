"""Products by a weight in the graph that Dynamo hands to a backend: which there are, and which parameters they read.

A weight may be a view or a conversion of a parameter (`w.T`, `w.to(dtype)`): what follows from a constant is folded with it.
With torch's own freezing (`prepare_freezing`), parameters are attributes of the graph. Here they count as inputs behind all
others: `take_in` makes them such, so that each call can look at them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autokernel.export.matching import Gemm
from autokernel.export.pins import dtype_name

aten = torch.ops.aten

_PRODUCTS: dict[Any, tuple[str, ...]] = {  # by function, or name of a method: its arguments, `x` and `w` the factors
    **dict.fromkeys((torch._C._nn.linear, torch.nn.functional.linear, aten.linear.default), ("x", "weight", "bias")),
    **dict.fromkeys((torch.matmul, torch.linalg.matmul, operator.matmul, aten.matmul.default), ("x", "other")),
    **dict.fromkeys(("matmul", "__matmul__", torch.Tensor.matmul), ("x", "other")),
    "__rmatmul__": ("other", "x"),
    **dict.fromkeys((torch.mm, "mm", torch.Tensor.mm, aten.mm.default), ("x", "mat2")),
    **dict.fromkeys((torch.inner, "inner", torch.Tensor.inner, aten.inner.default), ("x", "transposed")),
    **dict.fromkeys((torch.addmm, "addmm", torch.Tensor.addmm, aten.addmm.default), ("bias", "x", "mat2")),
}
_KEYWORDS = {  # how callers name these arguments; `input` is the first one of all
    "linear": {"input": "x"},
    "addmm": {"input": "bias", "self": "bias", "mat1": "x"},
    "": {"input": "x", "self": "x", "tensor2": "other"},
}
_BY_ROWS = ("weight", "transposed")  # weights that have a row for each column of the result
# What gives the numbers of one tensor in another shape, order or dtype. Nothing that writes, and nothing random.
_SAME_NUMBERS = frozenset(
    {
        *("t", "T", "mT", "H", "mH", "adjoint", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"),
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "detach", "alias", "data", "_get_data_attr"),
        *("narrow", "select", "getitem", "chunk", "split", "unbind"),
        *("contiguous", "clone", "to", "type", "float", "half", "bfloat16", "double"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product by a weight: of what, and the positions of the parameters that its weight and its bias are made of.

    `num_bytes` is what weight and bias take as the product reads them.
    """

    x: torch.fx.Node
    constants: tuple[int, ...]
    dtype: str
    m: int
    n: int
    k: int
    bias: bool
    num_bytes: int

    @property
    def gemm(self) -> Gemm:
        """As entries are found by."""
        return Gemm(self.dtype, 1, self.m, (self.n,), self.k, self.bias)


def names_of(products: Iterable[Product]) -> tuple[str, ...]:
    """Products as "dtype MxNxK", each once, sorted: what tells the graph of one scenario from another's."""
    return tuple(sorted({f"{p.dtype} {p.m}x{p.n}x{p.k}" for p in products}))


def held_parameters(gm: torch.fx.GraphModule) -> tuple[str, ...]:
    """Attributes of the graph that are parameters, in the order of their first use: where torch's own freezing left them."""
    names = dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr"))
    return tuple(name for name in names if isinstance(getattr(gm, name, None), torch.nn.Parameter))


def graph_products(gm: torch.fx.GraphModule, values: Sequence[Any]) -> list[Product]:
    """The graph's products by a weight, in the order in which they are computed.

    Args:
        gm: the graph.
        values: its inputs, and behind them its `held_parameters`.
    """
    parameters = _parameters(gm, values)
    products = (_product(node, parameters) for node in gm.graph.nodes)
    return [product for product in products if product is not None]


def _parameters(gm: torch.fx.GraphModule, values: Sequence[Any]) -> dict[torch.fx.Node, int]:
    """Positions of the parameters that can be constants, by the nodes that stand for them."""
    inputs = gm.graph.find_nodes(op="placeholder")
    nodes = {node: i for i, node in enumerate(inputs)}
    held = {name: len(inputs) + i for i, name in enumerate(held_parameters(gm))}
    nodes |= {node: held[node.target] for node in gm.graph.find_nodes(op="get_attr") if node.target in held}
    return {node: i for node, i in nodes.items() if can_be_constant(values[i])}


def can_be_constant(value: object) -> bool:
    """Whether it is a parameter of its own numbers: what changes within a wrapper, as of quantized weights, nobody sees."""
    return isinstance(value, torch.nn.Parameter) and not is_traceable_wrapper_subclass(value)


def _product(node: torch.fx.Node, parameters: dict[torch.fx.Node, int]) -> Product | None:
    given = _arguments(node)
    x, bias, out = given.get("x"), given.get("bias"), _value(node)
    name = next((name for name in ("weight", "transposed", "other", "mat2") if name in given), None)
    if name is None or out is None:
        return None
    weight, left, right = given[name], _value(x), _value(given[name])
    index = _parameter(weight, parameters)
    if index is None or left is None or right is None or right.dim() != 2:
        return None
    (n, k) = right.shape if name in _BY_ROWS else right.shape[::-1]
    if not all(isinstance(size, int) for size in (*left.shape, n, k)) or left.dim() == 0 or left.shape[-1] != k:
        return None
    added = _value(bias)
    in_row = added is not None and added.dim() == 1  # else it is a matrix, which may as well be added behind the product
    bias_index = _parameter(bias, parameters) if in_row else None
    read = right.numel() + (0 if bias_index is None or added is None else added.numel())
    return Product(
        x=_canonical(x),
        constants=(index, *(() if bias_index is None else (bias_index,))),
        dtype=dtype_name(out.dtype),  # autocast multiplies in another one than x has
        m=math.prod(int(s) for s in left.shape[:-1]),
        n=int(n),
        k=int(k),
        bias=in_row,
        num_bytes=read * out.dtype.itemsize,
    )


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    """What a node multiplies, by the names of `_PRODUCTS`; empty if it is no product, or a scaled one."""
    if node.op not in ("call_function", "call_method") or node.target not in _PRODUCTS:
        return {}
    names = _PRODUCTS[node.target]
    kind = "addmm" if names[0] == "bias" else "linear" if "weight" in names else ""
    given = dict(zip(names, node.args, strict=False))
    for keyword, value in node.kwargs.items():
        name = _KEYWORDS[kind].get(keyword, keyword)
        if name == "other" and "transposed" in names:
            name = "transposed"
        if name in names:
            given[name] = value
        elif keyword not in ("alpha", "beta") or value != 1:
            return {}
    return given


def _value(node: object) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _parameter(node: object, parameters: dict[torch.fx.Node, int]) -> int | None:
    """Position of the parameter whose numbers a node has, None if there is none."""
    while isinstance(node, torch.fx.Node) and node not in parameters:
        if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
            return None
        name = node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target)
        if str(name).removesuffix(".default") not in _SAME_NUMBERS:
            return None
        node = node.all_input_nodes[0]
    return parameters[node] if isinstance(node, torch.fx.Node) else None


def _canonical(x: Any) -> torch.fx.Node:
    """The node that stands for x: several identical views of one tensor count as one input."""
    for other in x.all_input_nodes[0].users if len(x.all_input_nodes) == 1 else ():
        if (other.op, other.target, other.args, other.kwargs) == (x.op, x.target, x.args, x.kwargs):
            return other  # type: ignore[no-any-return]
    return x  # type: ignore[no-any-return]


def take_in(gm: torch.fx.GraphModule, names: Sequence[str]) -> torch.fx.GraphModule:
    """A copy of the graph whose attributes of these names are inputs behind all others."""
    if not names:
        return gm
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        mapping[node] = graph.node_copy(node)
    added = {name: graph.placeholder(name) for name in names}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in added:
            mapping[node] = added[node.target]
            mapping[node].meta = dict(node.meta)
        elif node.op != "placeholder":
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    copy = torch.fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy


def may_hold(gm: torch.fx.GraphModule, sizes: Iterable[tuple[str, int]]) -> bool:
    """Whether anything in the graph is a tensor of one of these dtypes and numbers of elements."""
    wanted = set(sizes)
    values = (_value(node) for node in gm.graph.nodes)
    return any(value is not None and (dtype_name(value.dtype), value.numel()) in wanted for value in values)
