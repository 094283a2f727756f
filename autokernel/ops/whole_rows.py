"""Regions around products whose epilogue reduces rows: `x @ W + residual` with the norm of its rows, or their softmax.

Each is a region of rows (`row_regions.py`) with the products that it reads, with what makes their left matrix and without. A
program holds whole rows of the result, so these are limited. What others use, the sum beside its norm, is written as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from autokernel.ops.growth import Found, Growth, behind_reshapes, computes, is_row_reshape, shared_left, weight_view
from autokernel.ops.legality import Broken, Rule, extent_of, is_free
from autokernel.ops.matching import op_name
from autokernel.ops.product_regions import PRODUCTS, ProductRegions, why_no_whole_rows, why_not_product
from autokernel.ops.program import REDUCTIONS
from autokernel.ops.row_regions import RowRegions

if TYPE_CHECKING:
    from torch.fx import Node


class WholeRowRegions:
    """The regions of products and of the reductions behind them; both kinds of regions have been looked for before."""

    def __init__(self, growth: Growth, products: ProductRegions, rows: RowRegions) -> None:
        self._growth, self._products, self._rows = growth, products, rows
        self.order, self.notes = growth.order, growth.notes

    def regions(self) -> Iterable[Found]:
        """Two for each region of rows at most: of several products that it reads, those that come last are taken in."""
        for seed, tail in self._rows.grown.items():
            found: list[Found] = []
            for products in self._products_before(seed, tail):
                if found:
                    self._explain(products, seed, f"they are with {found[0].name_of.name}")
                    continue
                found, why = self._joined(products, tail)
                self._explain(products, seed, why)
            yield from found
        for node, notes in self.notes.items():
            if op_name(node) in PRODUCTS and notes.num_regions:
                notes.whole = None

    def _products_before(self, seed: Node, tail: frozenset[Node]) -> list[list[Node]]:
        """The products that a region of rows reads, by their left matrix, the last ones first."""
        groups: dict[tuple[Node, tuple[int, ...]], list[Node]] = {}
        for node in sorted(self._growth.inputs_of(tail), key=self.order.__getitem__):
            product = node
            while is_row_reshape(product):
                product = product.all_input_nodes[0]
            if op_name(product) not in PRODUCTS or why_not_product(product) is not None:
                continue
            if extent_of(product) == extent_of(seed.args[0]):
                groups.setdefault(shared_left(product), []).append(product)
        found = [list(dict.fromkeys(products)) for products in groups.values()]
        return sorted(found, key=lambda products: -self.order[products[-1]])

    def _joined(self, products: list[Node], tail: frozenset[Node]) -> tuple[list[Found], str]:
        """The regions of these products and the rows behind them, the largest first; or why there is none."""
        if why := why_no_whole_rows(products):
            return [], why
        bare = frozenset(products) | {right for node in products if (right := weight_view(node)) is not None}
        behind = self._behind(products, tail)
        if not any(_reduces(node) for node in behind & self._following(products, behind)):
            return [], "others need what it reduces"
        prologue, _ = self._products.prologue(products)
        wanted = [bare | behind | self._products.shared_views(products)]
        if computes(prologue):
            wanted.insert(0, bare | prologue | behind)
        found, why = [], ""
        for inner in wanted:
            if (wrong := self._growth.problem_of(inner)) is not None:
                why = str(wrong)
            else:
                found.append(Found(inner, tuple(self._growth.outputs_of(inner)), products[0]))
                for node in (*products, *(other for other in behind if _reduces(other) and other in self.notes)):
                    self.notes[node].num_regions += 1
        return found, "" if found else why

    def _behind(self, products: list[Node], tail: frozenset[Node]) -> frozenset[Node]:
        """What a program of the products can compute of rows: what follows these, and what serves that alone."""
        held = set(tail)
        for view in self._growth.inputs_of(tail):
            between = view
            while is_row_reshape(between) and behind_reshapes(view) in products:
                held.add(between)
                between = between.all_input_nodes[0]
        following = self._following(products, held)
        grown = True
        while grown:
            away = {
                node
                for node in held - following
                if not is_free(node)
                and (not set(node.users) <= held or (op_name(node) == "getitem" and node.all_input_nodes[0] not in held))
            }
            held -= away
            grown = bool(away)
        return frozenset(held)

    def _following(self, products: list[Node], held: Iterable[Node]) -> set[Node]:
        """Those that depend on the products."""
        found: set[Node] = set()
        for node in sorted(held, key=self.order.__getitem__):
            if any(operand in found or operand in products for operand in node.all_input_nodes):
                found.add(node)
        return found

    def _explain(self, products: list[Node], seed: Node, why: str) -> None:
        """What ends the epilogue now: what ended the rows; or else why these are not with the product, if that ended it."""
        for product in products:
            notes = self.notes[product]
            others = [broken for broken in notes.behind if broken.rule is not Rule.BEHIND_PRODUCT]
            if not why:
                notes.behind = others + [broken for broken in self.notes[seed].behind if broken not in others]
            elif len(others) < len(notes.behind):
                notes.behind = [*others, Broken(Rule.BEHIND_PRODUCT, seed.name, why)]


def _reduces(node: Node) -> bool:
    return op_name(node).split(".")[-1] in REDUCTIONS
