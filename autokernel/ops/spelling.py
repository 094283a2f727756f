"""The graph of a plain torch function, and how its nodes and those of a captured graph are read to be compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from autokernel.ops.matching import name_of, op_name
from autokernel.records import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

Spelling = Callable[..., "tuple[torch.Tensor, ...]"]
Pair = tuple[Any, Any]  # what the spelling has, what the graph has: nodes or literals

# The same elements in the same order, whatever their shape and memory are.
_KEEPS = frozenset({
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.squeeze", "aten.unsqueeze", "aten.alias", "aten.clone",
})  # fmt: skip
KEEP, CONVERT = "keep", "convert"
_CONVERSIONS = frozenset({"aten._to_copy", "prims.convert_element_type"})
COMMUTATIVE = frozenset({"aten.add", "aten.mul", "aten.maximum", "aten.minimum"})
HALVES = ("float16", "bfloat16")
_BY_RESULT = frozenset({"dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"})  # seen in the result
_WHOLE_SHAPE = frozenset({"aten.expand"})  # whose sizes are those of the result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traced:
    """The graph of a spelling."""

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    dtypes: tuple[str, ...]  # that its last output may have
    depth: Mapping[Node, int]  # nodes on the longest way to an input


@functools.lru_cache(maxsize=1024)
def trace(spelling: Spelling, specs: tuple[TensorSpec, ...], scalars: tuple[tuple[str, Any], ...]) -> Traced:
    """A spelling's graph for inputs that look like this; nodes carry fake tensors.

    Raises:
        RuntimeError: the function does not take such inputs.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return spelling(*inputs, **dict(scalars))

    # whoever is compiling meanwhile has a fake mode of its own, which must not be mixed with this one
    with torch._guards.tracing(None), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # type: ignore[no-untyped-call]
        fakes = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in specs]
        graph = make_fx(call, tracing_mode="real")(*fakes).graph
    graph.eliminate_dead_code()
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        depth[node] = 1 + max((depth[source] for source in node.all_input_nodes), default=-1)
    (outputs,) = next(node for node in graph.nodes if node.op == "output").args
    last = dtype_of(outputs[-1])
    return Traced(
        inputs=tuple(node for node in graph.nodes if node.op == "placeholder"),
        outputs=tuple(outputs),
        dtypes=HALVES if last in HALVES else (last,),
        depth=depth,
    )


def is_node(value: object) -> TypeGuard[Node]:
    from torch.fx import Node

    return isinstance(value, Node)


def kind_of(node: Node) -> str:
    """The op's name; one for all that only reshape, one for all conversions."""
    return _kind_of(node.target) if node.op == "call_function" else node.op


@functools.lru_cache(maxsize=1024)  # it is asked for most nodes of a graph, many times
def _kind_of(target: Any) -> str:
    name = name_of(target)
    return KEEP if name in _KEEPS else CONVERT if name in _CONVERSIONS else name


def dtype_of(node: Node) -> str:
    return str(getattr(node.meta.get("val"), "dtype", "")).removeprefix("torch.")


def shape_of(node: Any) -> tuple[Any, ...] | None:
    return tuple(node.meta["val"].shape) if hasattr(node.meta.get("val"), "shape") else None


def is_exact(node: Node) -> bool:
    """Whether it is a conversion to float32 from 16 bits, or from itself: arithmetic in float32 needs none."""
    source = dtype_of(node.args[0]) if kind_of(node) == CONVERT else None  # type: ignore[arg-type]
    return dtype_of(node) == "float32" and source in (*HALVES, "float32")


def is_free(node: Node) -> bool:
    """Whether it is the same value in another form: it costs nothing to have it twice."""
    return kind_of(node) == KEEP or is_exact(node)


def arguments_of(node: Node) -> dict[str, Any]:
    """Arguments by name, defaults filled in; positions count from the front, and what the result shows is left out."""
    if kind_of(node) == CONVERT:
        return {"self": node.args[0]}
    parameters = _parameters(node.target)
    if parameters is None:
        return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}
    given = {**dict(parameters), **node.kwargs, **dict(zip((name for name, _ in parameters), node.args, strict=False))}
    shape = next((shape_of(x) for x in node.all_input_nodes[:1]), None) or ()
    named = {name: value for name, value in given.items() if name not in _BY_RESULT}
    if op_name(node) in _WHOLE_SHAPE:
        named = {"self": named["self"]}
    return {name: _from_front(name, value, shape, named) for name, value in named.items()}


@functools.lru_cache(maxsize=1024)  # torch makes new objects of them each time
def _parameters(target: Any) -> tuple[tuple[str, Any], ...] | None:
    """Names and defaults, None for what is no operator."""
    schema = getattr(target, "_schema", None)
    return None if schema is None else tuple((argument.name, argument.default_value) for argument in schema.arguments)


def _from_front(name: str, value: Any, shape: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Dimensions, and the ends of slices, as numbers from 0 on."""
    if name in ("dim", "dims") and shape:
        if isinstance(value, int):
            return value % len(shape)
        return [x % len(shape) for x in value] if isinstance(value, (list, tuple)) else value
    if name in ("start", "end") and "dim" in named and shape and all(isinstance(n, int) for n in shape):
        size = shape[named["dim"] % len(shape)]
        value = (0 if name == "start" else size) if value is None else value
        return min(value if value >= 0 else value + size, size)
    return value


def flat(wanted: Any, value: Any) -> list[Pair] | None:
    """Pairs of the elements of two arguments, None if they are not alike."""
    if isinstance(wanted, (list, tuple)) or isinstance(value, (list, tuple)):
        if not isinstance(wanted, (list, tuple)) or not isinstance(value, (list, tuple)) or len(wanted) != len(value):
            return None
        return list(zip(wanted, value, strict=True))
    return [(wanted, value)]
