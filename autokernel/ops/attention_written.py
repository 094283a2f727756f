"""Attention written out as two batched products with a softmax between.

It is what `scaled_dot_product_attention` becomes in a graph where the library takes none of its kernels, and Inductor makes no
library call of it: 16-bit operands are widened, and half of the scale is on each side of the first product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autokernel.ops.matching import is_reshape, op_name
from autokernel.ops.spelling import is_node

if TYPE_CHECKING:
    from torch.fx import Node

_SWAPPED = [0, 1, 3, 2]  # the last two of four dimensions
_WIDE = "torch.float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenAttention:
    """Operands of `[B, H, rows, columns]`, and all nodes from them to the result of `[B, H, Q, E]`."""

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


def written_attention(product: Node) -> WrittenAttention | None:
    """The attention whose second product this is; None if it is none, or computes in less than fp32."""
    if op_name(product) != "aten.bmm" or str(product.meta["val"].dtype) != _WIDE:
        return None
    left, right = product.all_input_nodes if len(product.all_input_nodes) == 2 else (None, None)
    out = _only_user(product, is_reshape)
    if left is None or right is None or out is None or out.meta["val"].dim() != 4:
        return None
    weights, values = _factor(left, softmax=True), _factor(right)
    found = _softmax(weights.source) if weights is not None else None
    if weights is None or values is None or found is None or weights.scale != 1 or values.scale != 1:
        return None
    scores, between = found
    mask: Node | None = None
    added: tuple[Node, ...] = ()
    if op_name(scores) == "aten.add" and len(scores.all_input_nodes) == 2 and not scores.kwargs:
        added, (scores, mask) = (scores,), scores.all_input_nodes
        if not mask.meta["val"].dtype.is_floating_point:  # booleans that are added say nothing of what is seen
            return None
    first = scores.all_input_nodes[0] if is_reshape(scores) else scores
    if op_name(first) != "aten.bmm" or len(first.all_input_nodes) != 2:
        return None
    queries, keys = _factor(first.all_input_nodes[0]), _factor(first.all_input_nodes[1], swapped=True)
    if queries is None or keys is None:
        return None
    narrow = queries.source.meta["val"].dtype
    if str(narrow) != _WIDE:
        narrowed = _only_user(out, lambda user: _converts_to(user, narrow))
        if narrowed is None:
            return None
        last: tuple[Node, ...] = (product, out, narrowed)
    else:
        last = (product, out)
    return WrittenAttention(
        query=queries.source,
        key=keys.source,
        value=values.source,
        mask=mask,
        scale=queries.scale * keys.scale,
        out=last[-1],
        nodes=(*queries.passed, *keys.passed, first, scores, *added, *between, *weights.passed, *values.passed, *last),
    )


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
        elif not (_is_view_of_heads(node, before) or _is_copy(node, before) or (_widens(node, before) and not softmax)):
            return found
        passed.append(node)
        node = before


def _softmax(weights: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """What a softmax along the last dimension is of, and its nodes; a row of nothing but -inf is zero."""
    if op_name(weights) != "aten.where" or len(weights.args) != 3:
        return None
    some, zeros, divided = weights.args
    if not is_node(some) or not is_node(divided) or not _is_zero(zeros) or op_name(divided) != "aten.div":
        return None
    chain = _below(divided, "aten.exp", "aten.sub")
    if chain is None:
        return None
    exp, shifted = chain
    scores, highest = shifted.args
    total = divided.args[1]
    if not (is_node(scores) and is_node(highest) and is_node(total)):
        return None
    passed = _of_online(scores, highest, total) or _of_two_reductions(scores, highest, total, exp)
    guard = _sees_nothing(some, scores)
    if passed is None or guard is None:
        return None
    fill = (zeros,) if is_node(zeros) else ()
    return scores, (*passed, shifted, exp, divided, *guard, *fill, weights)


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


def _widens(node: Node, before: Node) -> bool:
    narrow = str(before.meta["val"].dtype) in ("torch.bfloat16", "torch.float16")
    return narrow and _converts_to(node, node.meta["val"].dtype) and str(node.meta["val"].dtype) == _WIDE


def _converts_to(node: Node, dtype: object) -> bool:
    return op_name(node) in ("prims.convert_element_type", "aten._to_copy") and node.meta["val"].dtype == dtype


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _is_zero(value: object) -> bool:
    if not is_node(value):
        return _number(value) == 0
    filled = {"aten.full": 1, "aten.scalar_tensor": 0}.get(op_name(value))
    return filled is not None and _number(value.args[filled]) == 0
