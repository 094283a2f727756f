"""Attention written out as two batched products with a softmax between.

"math" is what `scaled_dot_product_attention` becomes in a graph where the library takes none of its kernels, and Inductor makes
no library call of it: 16-bit operands are widened, half of the scale is on each side of the first product, and a row of nothing
but -inf is zero. "eager" is how models write it: products in the operands' dtype, a scale and a mask behind the first, and a
softmax in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from autokernel.ops.matching import is_reshape, op_name
from autokernel.ops.spelling import is_node

if TYPE_CHECKING:
    from torch.fx import Node

Style = Literal["math", "eager"]

_SWAPPED = [0, 1, 3, 2]  # the last two of four dimensions
_WIDE = "torch.float32"
_NARROW = ("torch.bfloat16", "torch.float16")
# Inductor's softmax of scaled scores: the scale behind the maximum, unless a row has something infinite or NaN.
_SCALED_SOFTMAX = {
    "aten.where": 1, "aten.logical_not": 2, "aten.any": 1, "aten.mul": 3, "aten.sub": 2, "aten.amax": 2,
    "aten.eq": 1, "aten.abs": 1, "aten.ne": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenAttention:
    """Operands of `[B, H, rows, columns]`, and all nodes from them to the result of `[B, H, Q, E]`."""

    style: Style
    query: Node
    key: Node
    value: Node
    mask: Node | None  # is added to the products
    scale: float
    out: Node
    nodes: tuple[Node, ...]  # without the mask's own


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factor:
    """One side of a product: `source` times `scale`."""

    source: Node
    scale: float
    passed: tuple[Node, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Softmax:
    """Of `scores`, along the last dimension."""

    scores: Node
    guarded: bool  # a row of nothing but -inf is zero
    passed: tuple[Node, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """The first product times `scale`, plus the mask."""

    product: Node
    mask: Node | None
    scale: float
    passed: tuple[Node, ...]


def written_attention(product: Node) -> WrittenAttention | None:
    """The attention whose second product this is; None if it is none of either style."""
    out = _only_user(product, is_reshape) if op_name(product) == "aten.bmm" else None
    if out is None or out.meta["val"].dim() != 4 or len(product.all_input_nodes) != 2:
        return None
    weights, values = _factor(product.all_input_nodes[0], softmax=True), _factor(product.all_input_nodes[1])
    if weights is None or values is None or values.scale != 1:
        return None
    rounded = _rounds(weights.source)
    softmax = _softmax(weights.source.all_input_nodes[0] if rounded else weights.source)
    scores = _scores(softmax.scores) if softmax is not None else None
    if softmax is None or scores is None:
        return None
    queries = _factor(scores.product.all_input_nodes[0])
    keys = _factor(scores.product.all_input_nodes[1], swapped=True)
    if queries is None or keys is None:
        return None
    nodes = (*queries.passed, *keys.passed, *scores.passed, *softmax.passed, weights.source, *weights.passed, *values.passed)
    dtype = queries.source.meta["val"].dtype
    last: tuple[Node, ...] = (product, out)
    style: Style
    if softmax.guarded:
        style = "math"
        if str(product.meta["val"].dtype) != _WIDE or rounded or scores.scale != 1:
            return None
        if str(dtype) != _WIDE:
            narrowed = _only_user(out, lambda user: _converts_to(user, dtype))
            if narrowed is None:
                return None
            last = (product, out, narrowed)
    else:
        style = "eager"
        same = {dtype, keys.source.meta["val"].dtype, values.source.meta["val"].dtype, product.meta["val"].dtype}
        if len(same) != 1 or rounded != (str(dtype) in _NARROW) or str(dtype) not in (_WIDE, *_NARROW):
            return None
    return WrittenAttention(
        style=style,
        query=queries.source,
        key=keys.source,
        value=values.source,
        mask=scores.mask,
        # a square of its root is off by the last digits, and would be another problem each time that it is compiled
        scale=float(f"{queries.scale * keys.scale * scores.scale:.12g}"),
        out=last[-1],
        nodes=(*nodes, *last),
    )


def _scores(node: Node) -> _Scores | None:
    """What a softmax is of, back to the first product."""
    passed = [node]
    if _widens(node):
        node = node.all_input_nodes[0]
        passed.append(node)
    if op_name(node) != "aten.add" or len(node.all_input_nodes) != 2 or node.kwargs:
        return _scaled_product(node, None, passed)
    for scores, mask in (node.all_input_nodes, reversed(node.all_input_nodes)):
        # booleans that are added say nothing of what is seen
        if mask.meta["val"].dtype.is_floating_point and (found := _scaled_product(scores, mask, [*passed, scores])):
            return found
    return None


def _scaled_product(node: Node, mask: Node | None, passed: list[Node]) -> _Scores | None:
    scale = 1.0
    by = _number(node.args[1]) if op_name(node) in ("aten.mul", "aten.div") else None
    if by:
        scale = by if op_name(node) == "aten.mul" else 1 / by
        node = node.all_input_nodes[0]
        passed.append(node)
    first = node.all_input_nodes[0] if is_reshape(node) else node
    if op_name(first) != "aten.bmm" or len(first.all_input_nodes) != 2:
        return None
    return _Scores(product=first, mask=mask, scale=scale, passed=(*passed, first))


def _factor(side: Node, *, swapped: bool = False, softmax: bool = False) -> _Factor | None:
    """What one side of a product is of four dimensions, before it was widened, scaled, copied and seen as three.

    `swapped`: its last two dimensions were. `softmax`: that of the last node which is anything but a view or a copy.
    """
    node, scale, is_swapped = side, 1.0, False
    passed: list[Node] = []
    found: _Factor | None = None
    while True:
        if node.meta["val"].dim() == 4 and is_swapped == swapped:
            found = _Factor(source=node, scale=scale, passed=tuple(passed))
        before = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
        if before is None:
            return found
        if _is_swap(node):
            if is_swapped or not swapped:
                return found
            is_swapped = True
        elif op_name(node) == "aten.mul" and not softmax and (by := _number(node.args[1])) is not None:
            if str(node.meta["val"].dtype) != _WIDE:  # rounded behind it
                return found
            scale *= by
        elif not (_is_view_of_heads(node, before) or _is_copy(node, before) or (_widens(node) and not softmax)):
            return found
        passed.append(node)
        node = before


def _softmax(weights: Node) -> _Softmax | None:
    """A softmax along the last dimension, in fp32."""
    if op_name(weights) == "aten.div":
        return _unguarded(weights)
    if op_name(weights) != "aten.where" or len(weights.args) != 3:
        return None
    some, zeros, divided = weights.args
    if not is_node(some) or not is_node(divided) or not _is_zero(zeros) or op_name(divided) != "aten.div":
        return None
    found = _unguarded(divided)
    guard = _sees_nothing(some, found.scores) if found is not None else None
    if found is None or guard is None:
        return None
    fill = (zeros,) if is_node(zeros) else ()
    return _Softmax(scores=found.scores, guarded=True, passed=(*found.passed, *guard, *fill, weights))


def _unguarded(divided: Node) -> _Softmax | None:
    exp, total = divided.args[:2]
    if not (is_node(exp) and is_node(total)) or op_name(exp) != "aten.exp" or str(divided.meta["val"].dtype) != _WIDE:
        return None
    shifted = exp.all_input_nodes[0]
    scaled: tuple[Node, ...] = ()
    if op_name(shifted) == "aten.where" and is_node(shifted.args[2]):
        choice, shifted = shifted, shifted.args[2]
        between = _scaled_softmax(choice, shifted)
        if between is None:
            return None
        scaled = between
    if op_name(shifted) != "aten.sub":
        return None
    scores, highest = shifted.args[:2]
    if not (is_node(scores) and is_node(highest)):
        return None
    passed = _of_online(scores, highest, total) or _of_two_reductions(scores, highest, total, exp)
    return _Softmax(scores=scores, guarded=False, passed=(*passed, *scaled, shifted, exp, divided)) if passed else None


def _scaled_softmax(choice: Node, shifted: Node) -> tuple[Node, ...] | None:
    """The nodes by which Inductor chooses between two ways to scores times a number; `shifted` is one of them."""
    scores = shifted.args[0]
    scaled = scores.all_input_nodes[0] if is_node(scores) and _widens(scores) else scores
    if not is_node(scaled) or op_name(scaled) != "aten.mul" or _number(scaled.args[1]) is None:
        return None
    source = scaled.all_input_nodes[0]
    found: dict[Node, None] = {}
    waiting = [choice]
    while waiting:
        node = waiting.pop()
        if node in found or node in (source, scores):
            continue
        if node.op != "call_function" or len(found) > sum(_SCALED_SOFTMAX.values()):
            return None
        found[node] = None
        waiting += node.all_input_nodes
    counts: dict[str, int] = {}
    for node in found:
        if not _widens(node):
            counts[op_name(node)] = counts.get(op_name(node), 0) + 1
    if counts != _SCALED_SOFTMAX:
        return None
    factors = sorted(by for node in found if op_name(node) == "aten.mul" and (by := _number(node.args[1])) is not None)
    return tuple(found) if factors == sorted((1.0, float(scaled.args[1]))) else None  # type: ignore[arg-type]


def _of_online(scores: Node, highest: Node, total: Node) -> tuple[Node, ...] | None:
    """The maximum and the sum where Inductor computes both in one pass."""
    both = highest.all_input_nodes[0] if op_name(highest) == "getitem" else None
    if both is None or op_name(both) != "prims.prepare_softmax_online" or op_name(total) != "getitem":
        return None
    same = total.all_input_nodes[0] is both and (highest.args[1], total.args[1]) == (0, 1)
    return (both, highest, total) if same and both.args[0] is scores and _along_last(both, both.args[1]) else None


def _of_two_reductions(scores: Node, highest: Node, total: Node, exp: Node) -> tuple[Node, ...] | None:
    maxima = op_name(highest) == "aten.amax" and highest.args[0] is scores and _keeps_last(highest)
    sums = op_name(total) == "aten.sum" and total.args[0] is exp and _keeps_last(total)
    return (highest, total) if maxima and sums else None


def _sees_nothing(some: Node, scores: Node) -> tuple[Node, ...] | None:
    """The nodes that say which rows of the scores are -inf throughout."""
    chain = _below(some, "aten.any", "aten.logical_not", "aten.eq")
    if op_name(some) != "aten.logical_not" or chain is None or not _keeps_last(chain[0]):
        return None
    equal = chain[-1]
    return (some, *chain) if equal.args[0] is scores and _number(equal.args[1]) == -math.inf else None


def _below(node: Node, *names: str) -> list[Node] | None:
    """The nodes of these operations, one the first operand of the other, the first that of the node."""
    found = []
    for name in names:
        operand = node.args[0] if node.args else None
        if not is_node(operand) or op_name(operand) != name:
            return None
        node = operand
        found.append(node)
    return found


def _only_user(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and wanted(user) else None


def _keeps_last(node: Node) -> bool:
    """Whether a reduction is along the last dimension, which it keeps."""
    dims, keep = (*node.args[1:3], None, None)[:2]
    return bool(keep) and _along_last(node, dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims)


def _along_last(node: Node, dim: object) -> bool:
    source = node.all_input_nodes[0].meta["val"]
    return isinstance(dim, int) and dim % source.dim() == source.dim() - 1


def _is_swap(node: Node) -> bool:
    return op_name(node) == "aten.permute" and list(node.args[1]) == _SWAPPED  # type: ignore[arg-type]


def _is_view_of_heads(node: Node, before: Node) -> bool:
    """Whether batch and heads become one dimension."""
    wide, narrow = tuple(before.meta["val"].shape), tuple(node.meta["val"].shape)
    return is_reshape(node) and len(wide) == 4 and narrow == (wide[0] * wide[1], *wide[2:])


def _is_copy(node: Node, before: Node) -> bool:
    same = tuple(node.meta["val"].shape) == tuple(before.meta["val"].shape)
    return op_name(node) in ("aten.clone", "aten.expand") and same


def _widens(node: Node) -> bool:
    """Whether it is a conversion from 16 bits to fp32."""
    return _converts_to(node, _WIDE) and str(node.all_input_nodes[0].meta["val"].dtype) in _NARROW


def _rounds(node: Node) -> bool:
    """Whether it is a conversion from fp32 to 16 bits."""
    return any(_converts_to(node, dtype) for dtype in _NARROW) and str(node.all_input_nodes[0].meta["val"].dtype) == _WIDE


def _converts_to(node: Node, dtype: object) -> bool:
    return op_name(node) in ("prims.convert_element_type", "aten._to_copy") and str(node.meta["val"].dtype) == str(dtype)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _is_zero(value: object) -> bool:
    if not is_node(value):
        return _number(value) == 0
    filled = {"aten.full": 1, "aten.scalar_tensor": 0}.get(op_name(value))
    return filled is not None and _number(value.args[filled]) == 0
