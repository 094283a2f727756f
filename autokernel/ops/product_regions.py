"""Regions around matrix products: a prologue, products that share their left matrix, and epilogues.

The prologue is what makes the left matrix and serves nothing else. An epilogue is what follows one product, or all of them,
up to the last value that alone is used by others; one that reduces rows is in `whole_rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from autokernel.ops.growth import (
    MAX_LINES,
    Found,
    Growth,
    Notes,
    behind_reshapes,
    computes,
    is_row_reshape,
    left_of,
    shared_left,
    weight_view,
    without_last_views,
)
from autokernel.ops.legality import (
    MATRIX_DTYPES,
    MAX_ROW_BYTES,
    Broken,
    Rule,
    call_of,
    extent_of,
    fits,
    is_free,
    is_full,
    refusal,
    row_bytes,
    shape_of,
)
from autokernel.ops.matching import op_name, source_of, tensor_spec
from autokernel.ops.program import REDUCTIONS
from autokernel.records import DTYPE_BYTES

if TYPE_CHECKING:
    from torch.fx import Node

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")
_NUM_REASONS = 3  # of what ended an epilogue: the nearest


class ProductRegions:
    """The regions around the products of a graph."""

    def __init__(self, growth: Growth) -> None:
        self._growth = growth
        self.nodes, self.order, self.notes = growth.nodes, growth.order, growth.notes

    def regions(self) -> Iterable[Found]:
        """Those that hold more before their parts; what became of each product is noted."""
        groups: dict[tuple[Node, tuple[int, ...]], list[Node]] = {}
        for node in self.nodes:
            if op_name(node) not in PRODUCTS:
                continue
            self.notes[node] = Notes(node)
            self.notes[node].whole = why_not_product(node)
            if self.notes[node].whole is None:
                groups.setdefault(shared_left(node), []).append(node)
        for products in groups.values():
            yield from self._around(products)

    def _around(self, products: list[Node]) -> Iterable[Found]:
        """Regions of products that share their left matrix."""
        bare = frozenset(products) | {right for node in products if (right := weight_view(node)) is not None}
        prologue, ends = self.prologue(products)
        for node in products:
            self.notes[node].before = ends
        parts = [self._epilogue([node]) for node in products]
        joint = self._epilogue(products) if len(products) > 1 else frozenset()
        whole = joint or frozenset().union(*parts)
        wanted: list[frozenset[Node]] = []
        if computes(prologue):
            wanted += [bare | prologue | whole, bare | prologue]
        if joint:
            wanted.append(bare | joint | self.shared_views(products))
        for node, part in zip(products, parts, strict=True):
            if computes(part):
                alone = frozenset({node}) | ({right} if (right := weight_view(node)) is not None else frozenset())
                wanted.append(alone | part | self.shared_views([node]))
        if not joint and not any(map(computes, parts)) and _lacks_kernels(products[0]):
            wanted.append(bare | self.shared_views(products))
        any_legal = False
        for inner in dict.fromkeys(wanted):
            wrong = self._growth.problem_of(inner)
            for node in products:
                if node in inner and wrong is None:
                    self.notes[node].num_regions += 1
                elif node in inner and not any_legal:
                    self.notes[node].whole = wrong
            if wrong is None:
                any_legal = True
                yield Found(inner, tuple(self._growth.outputs_of(inner)), next(node for node in products if node in inner))
        for node in products:
            if self.notes[node].num_regions:
                self.notes[node].whole = None

    def shared_views(self, products: list[Node]) -> frozenset[Node]:
        """The reshapes between the value that products share and themselves, where nothing else uses them."""
        found: set[Node] = set()
        for node in products:
            view = left_of(node)
            while (is_row_reshape(view) or op_name(view) == "aten.clone") and set(view.users) <= {*products, *found}:
                found.add(view)
                view = view.all_input_nodes[0]
        return frozenset(found)

    def prologue(self, products: list[Node]) -> tuple[frozenset[Node], list[Broken]]:
        """What makes the left matrix and serves nothing else, and what ended it."""
        rows, columns = extent_of(left_of(products[0]))
        held: set[Node] = set()
        ends: dict[Node, Broken] = {}
        pending = [left_of(node) for node in products]
        while pending:
            node = pending.pop()
            if node in held:
                continue
            wrong = refusal(node, rows, columns)
            outside = [user for user in node.users if user not in held and user not in products and not is_free(node)]
            if wrong is None and outside:
                wrong = Broken(Rule.USER, node.name, f"{outside[0].name} uses it as well")
            if wrong is not None:
                ends[node] = wrong
                continue
            ends.pop(node, None)
            held.add(node)
            # a value may have been refused for a user that has been taken in since
            pending += [*node.all_input_nodes, *(other for other in ends if ends[other].rule is Rule.USER)]
        return frozenset(held), [wrong for node, wrong in ends.items() if set(node.users) & (held | set(products))]

    def _epilogue(self, products: list[Node]) -> frozenset[Node]:
        """The lines behind products up to the last value that alone is used by others; empty if there are none."""
        rows, columns = extent_of(products[0])
        if any(shape_of(node) != shape_of(products[0]) for node in products):
            return frozenset()
        held: set[Node] = set(products)
        cuts: list[tuple[Node, frozenset[Node]]] = []
        ends: dict[Node, Broken] = {}
        first = max(map(self.order.__getitem__, products))
        follow = {user for node in products for user in node.users}
        for node in self.nodes[min(map(self.order.__getitem__, products)) :]:
            if node not in follow or node in held:
                continue
            wrong = self._refused_behind(node, held, products)
            if wrong is not None:
                ends[node] = wrong
                continue
            held |= {node, *self._growth.small_operands(node, held, rows, columns)}
            follow |= set(node.users)
            open_nodes = [other for other in self._growth.outputs_of(held) if other in follow or other in products]
            if self.order[node] > first and open_nodes == [node]:
                cuts.append((node, frozenset(held)))
            if len(held) > MAX_LINES:
                break
        while cuts and _widens(cuts[-1][0]):  # whoever reads it can widen it, and it is written in fewer bytes
            cuts.pop()
        inner = without_last_views(cuts[-1][1] if cuts else frozenset(), set(products))
        if len(products) == 1:
            self.notes[products[0]].behind = self._reasons(inner or frozenset(products), held, ends)
        return inner - frozenset(products) if computes(inner - frozenset(products)) else frozenset()

    def _reasons(self, inner: frozenset[Node], held: set[Node], ends: Mapping[Node, Broken]) -> list[Broken]:
        """Why a region ends where it does: the rules that the nearest nodes broke, or else a value that several use."""
        pending = [user for node in inner for user in node.users if user not in inner]
        seen: set[Node] = set()
        while pending:
            user = pending.pop()
            if user not in seen:
                seen.add(user)
                pending += user.users if user in held and user not in ends else ()
        first = sorted((node for node in seen if node in ends), key=self.order.__getitem__)
        return [ends[node] for node in first[:_NUM_REASONS]] or [Broken(Rule.USER, node.name) for node in seen]

    def _refused_behind(self, node: Node, held: set[Node], products: list[Node]) -> Broken | None:
        rows, columns = extent_of(products[0])
        wrong = refusal(node, rows, columns)
        if wrong is not None:
            return wrong
        call = call_of(node)
        assert call is not None
        if call.op in REDUCTIONS or call.op == "getitem":
            return Broken(Rule.BEHIND_PRODUCT, node.name, why_no_whole_rows(products))
        if shape_of(node)[-1:] != (columns,) or not is_full(shape_of(node), rows, columns):
            return Broken(Rule.BROADCAST, node.name, f"{list(shape_of(node))}")
        for operand in node.all_input_nodes:
            spec = tensor_spec(operand)
            if operand not in held and (spec is None or not fits(spec.shape, rows, columns)):
                return Broken(Rule.BROADCAST, node.name, f"reads {operand.name}")
        return None


def _lacks_kernels(product: Node) -> bool:
    """Whether nothing but the library serves the product itself: Inductor's templates are too inexact in fp32."""
    spec = tensor_spec(product)
    return spec is not None and spec.dtype == "float32"


def why_no_whole_rows(products: Sequence[Node]) -> str:
    """Why no program holds whole rows of the results of products; empty if one can."""
    columns, several = shape_of(products[0])[-1], f" of {len(products)} products" if len(products) > 1 else ""
    spec = tensor_spec(products[0])
    if spec is not None and row_bytes(columns, len(products), DTYPE_BYTES[spec.dtype]) <= MAX_ROW_BYTES:
        return ""
    return f"rows of {columns}{several} do not fit into a block"


def why_not_product(node: Node) -> Broken | None:
    """The rule that keeps a matrix product out of a generated kernel."""
    left, right = tensor_spec(left_of(node)), tensor_spec(node.args[-1])  # type: ignore[arg-type]
    result = tensor_spec(node)
    if left is None or right is None or result is None:
        return Broken(Rule.SHAPE, node.name)
    if left.dtype not in MATRIX_DTYPES or not left.dtype == right.dtype == result.dtype:
        return Broken(Rule.DTYPE, node.name, f"{left.dtype} x {right.dtype}")
    if node.kwargs or len(node.args) != (2 if op_name(node) in ("aten.mm", "aten.bmm") else 3):
        return Broken(Rule.NO_CODE, node.name, "a scaled product")
    if 0 in (*left.shape, *right.shape) or left.shape[-1] == 1:
        return Broken(Rule.NO_CODE, node.name, "an outer product")
    if behind_reshapes(left_of(node)) is source_of(node.args[-1]):  # type: ignore[arg-type]
        return Broken(Rule.NO_CODE, node.name, "a matrix times itself")
    bias = tensor_spec(node.args[0]) if len(node.args) == 3 else None  # type: ignore[arg-type]
    if bias is not None and (bias.dtype != left.dtype or not fits(bias.shape, *extent_of(node))):
        return Broken(Rule.BROADCAST, node.name, "what is added to the product")
    return None


def _widens(node: Node) -> bool:
    """Whether it is a conversion to more bytes."""
    if op_name(node) != "prims.convert_element_type":
        return False
    return bool(node.meta["val"].dtype.itemsize > node.all_input_nodes[0].meta["val"].dtype.itemsize)
