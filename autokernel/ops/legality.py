"""Which nodes of a graph a generated kernel may hold, and the rule that keeps the others out.

A kernel works on `rows` x `columns`: all dimensions but the last are rows, however many there are and however they lie in
memory. A value has an element for each of these, or one for each row, or fewer that broadcast to them.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.ops.matching import op_name, tensor_spec
from autokernel.ops.program import ARITY, BINARY, COMPARISONS, PAIRS, REDUCTIONS, UNARY, Argument

if TYPE_CHECKING:
    from torch.fx import Node

DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16", "bool")
MATRIX_DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")
MAX_ROW_BYTES = 4096  # of a block that holds whole rows of products: two steps of 16 along K fill half of the shared memory
_RESHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.squeeze", "aten.unsqueeze")
_POWERS = (2, 3, 0.5, -0.5, -1)  # 2.0 is 2
_OF_TRUTHS = (*COMPARISONS, "isnan", "logical_not", "where", "convert", "full", "reshape", "clone")
_OVERLOADS = ("default", "Tensor", "Scalar", "Tensor_Scalar", "self", "dim", "dim_IntList", "correction")


class Rule(enum.StrEnum):
    """Why a region ends."""

    INPUT = "an input of the graph"
    RESULT = "a result of the graph"
    NO_CODE = "an op without code"
    DTYPE = "a dtype without code"
    SHAPE = "a value without static sizes"
    VIEW = "a view that is not row-wise"
    BROADCAST = "a broadcast that is not along rows or columns"
    REDUCTION = "a reduction that is not over whole rows"
    BEHIND_PRODUCT = "a reduction of rows that no program holds whole"
    PRODUCT = "a matrix product"
    USER = "a user outside"
    MUTATION = "a mutation between"
    LATE = "an operand that is computed later"
    SIZE = "more lines, inputs or outputs than a kernel has"


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule and the node that breaks it."""

    rule: Rule
    node: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.rule}: {self.node}{f' ({self.detail})' if self.detail else ''}"


@dataclass(frozen=True, slots=True)
class Call:
    """A node as a line of a program: `arguments` has nodes in the place of operands."""

    op: str
    arguments: tuple[Node | Argument, ...]


def call_of(node: Node) -> Call | None:
    """The node as a line; None if there is no code for it."""
    name = op_name(node)
    if node.op != "call_function" or not (name == "getitem" or name.startswith(("aten.", "prims."))):
        return None
    if getattr(node.target, "_overloadname", "default") not in _OVERLOADS:
        return None
    short = name.split(".")[-1]
    special = _SPECIAL.get(name)
    if special is not None:
        return special(node)  # type: ignore[no-any-return]
    if short not in (*UNARY, *BINARY) or node.kwargs or len(node.args) != ARITY[short]:
        return None
    return Call(short, tuple(node.args)) if all(_is_plain(a) for a in node.args) else None  # type: ignore[arg-type]


def refusal(node: Node, rows: int, columns: int) -> Broken | None:
    """The rule that keeps a node out of a kernel of so many rows and columns, None if it may be in it."""
    if node.op in ("placeholder", "get_attr"):
        return Broken(Rule.INPUT, node.name)
    if node.op == "output":
        return Broken(Rule.RESULT, node.name)
    if op_name(node) in ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"):
        return Broken(Rule.PRODUCT, node.name)
    call = call_of(node)
    if call is None:
        return _why_no_call(node)
    specs = [tensor_spec(user) for user in node.users] if call.op in PAIRS else [tensor_spec(node)]
    if not specs or any(spec is None for spec in specs):
        value = node.meta.get("val")
        dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
        return Broken(Rule.DTYPE, node.name, dtype) if dtype.startswith(("complex", "uint")) else Broken(Rule.SHAPE, node.name)
    for spec in specs:
        assert spec is not None
        if spec.dtype not in DTYPES:
            return Broken(Rule.DTYPE, node.name, spec.dtype)
        if not fits(spec.shape, rows, columns):
            return Broken(Rule.VIEW if call.op == "reshape" else Rule.BROADCAST, node.name, f"{list(spec.shape)}")
        if spec.dtype == "bool" and call.op not in _OF_TRUTHS:
            return Broken(Rule.NO_CODE, node.name, f"{call.op} of truth values")
    return _wrong_operands(node, call, rows, columns)


def fits(shape: tuple[int, ...], rows: int, columns: int) -> bool:
    """Whether a value of this shape broadcasts to the rows and columns."""
    if not shape:
        return True
    return shape[-1] in (1, columns) and rows % max(1, math.prod(shape[:-1])) == 0


def row_bytes(columns: int, products: int, dtype_bytes: int) -> int:
    """What each step along K reads for a block that holds whole rows of so many products, filled up to a power of two."""
    return products * dtype_bytes * max(16, 1 << (columns - 1).bit_length())


def is_full(shape: tuple[int, ...], rows: int, columns: int) -> bool:
    """Whether it has an element for each row: for each column as well, or one."""
    return bool(shape) and shape[-1] in (1, columns) and math.prod(shape[:-1]) == rows


def is_free(node: Node) -> bool:
    """Whether it costs nothing to have the node in several kernels: a constant, or a weight seen the other way round."""
    return op_name(node) == "aten.full"


def is_pair(node: Any) -> bool:
    """Whether the node has two results, which others take apart."""
    return op_name(node) in ("aten.var_mean", "prims.prepare_softmax_online")


def shape_of(node: Any) -> tuple[int, ...]:
    """Sizes of a node's value."""
    return tuple(node.meta["val"].shape)


def extent_of(node: Any) -> tuple[int, int]:
    """Rows and columns of a node's value."""
    *lead, columns = shape_of(node)
    return math.prod(lead), columns


def _wrong_operands(node: Node, call: Call, rows: int, columns: int) -> Broken | None:
    """What is wrong with what the line reads: dtypes, and whole rows where it needs them."""
    for operand in node.all_input_nodes:
        if call.op == "getitem":
            continue
        spec = tensor_spec(operand)
        if spec is None or spec.dtype not in DTYPES:
            return Broken(Rule.DTYPE, node.name, f"reads {spec.dtype if spec else operand.name}")
    if call.op == "reshape":
        source = shape_of(node.all_input_nodes[0])
        whole = is_full(source, rows, columns) and is_full(shape_of(node), rows, columns)
        if not whole or source[-1] != shape_of(node)[-1]:
            return Broken(Rule.VIEW, node.name, f"{list(source)} as {list(shape_of(node))}")
    if call.op in REDUCTIONS and (
        shape_of(node.args[0])[-1:] != (columns,) or not is_full(shape_of(node.args[0]), rows, columns)
    ):
        return Broken(Rule.REDUCTION, node.name)
    return None


def _why_no_call(node: Node) -> Broken:
    short = op_name(node).split(".")[-1]
    if short in REDUCTIONS:
        return Broken(Rule.REDUCTION, node.name, f"dimensions {node.args[1] if len(node.args) > 1 else 'all'}")
    if short in ("permute", "t", "transpose", "slice", "select", "expand", "as_strided", "split", "split_with_sizes", "unfold"):
        return Broken(Rule.VIEW, node.name, op_name(node))
    return Broken(Rule.NO_CODE, node.name, op_name(node))


def _is_plain(argument: object) -> bool:
    from torch.fx import Node

    return isinstance(argument, (Node, int, float))


def _reshape(node: Node) -> Call | None:
    return Call("reshape", (node.all_input_nodes[0], shape_of(node)))


def _expand(node: Node) -> Call | None:
    """One that changes nothing, as in front of a batch of products."""
    source = node.all_input_nodes[0]
    return Call("reshape", (source, shape_of(node))) if shape_of(source) == shape_of(node) else None


def _convert(node: Node) -> Call | None:
    return Call("convert", (node.args[0], str(node.args[1]).removeprefix("torch.")))  # type: ignore[arg-type]


def _full(node: Node) -> Call | None:
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    return Call("full", (shape_of(node), node.args[1], dtype)) if _is_plain(node.args[1]) else None  # type: ignore[arg-type]


def _pow(node: Node) -> Call | None:
    return Call("pow", tuple(node.args)) if node.args[1] in _POWERS else None  # type: ignore[arg-type]


def _gelu(node: Node) -> Call | None:
    return Call("gelu", (node.args[0], str(node.kwargs.get("approximate", "none"))))  # type: ignore[arg-type]


def _where(node: Node) -> Call | None:
    from torch.fx import Node as FxNode

    whole = len(node.args) == 3 and all(isinstance(argument, FxNode) for argument in node.args)
    return Call("where", tuple(node.args)) if whole else None  # type: ignore[arg-type]


def _clone(node: Node) -> Call | None:
    import torch

    dense = node.kwargs.get("memory_format", torch.contiguous_format) is torch.contiguous_format
    return Call("clone", (node.args[0],)) if dense and node.kwargs else None  # type: ignore[arg-type]


def _reduction(node: Node) -> Call | None:
    """Over the last dimension, which is kept."""
    short = op_name(node).split(".")[-1]
    rank = len(shape_of(node.args[0]))
    dims = node.args[1] if len(node.args) > 1 else []
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    others = set(node.kwargs) - {"keepdim", "correction"}
    if not isinstance(dims, (list, tuple)) or [d % rank for d in dims] != [rank - 1] or kept is not True or others:  # type: ignore[operator]
        return None
    if short != "var_mean":
        return Call(short, (node.args[0],))  # type: ignore[arg-type]
    correction = node.kwargs.get("correction")
    return Call(short, (node.args[0], correction)) if isinstance(correction, (int, float)) else None  # type: ignore[arg-type]


def _prepare_softmax(node: Node) -> Call | None:
    """Over the last dimension; it always keeps it."""
    source, dim = node.args
    last = isinstance(dim, int) and dim in (-1, len(shape_of(source)) - 1)
    return Call("prepare_softmax_online", (source,)) if last else None  # type: ignore[arg-type]


def _getitem(node: Node) -> Call | None:
    return Call("getitem", (node.args[0], node.args[1])) if is_pair(node.args[0]) else None  # type: ignore[arg-type]


_SPECIAL: dict[str, Any] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(("aten.sum", "aten.mean", "aten.amax", "aten.var_mean"), _reduction),
    "prims.prepare_softmax_online": _prepare_softmax,
    "aten.expand": _expand,
    "prims.convert_element_type": _convert,
    "aten.full": _full,
    "aten.pow": _pow,
    "aten.gelu": _gelu,
    "aten.where": _where,
    "aten.clone": _clone,
    "getitem": _getitem,
}
