"""Regions around reductions: whatever is computed row by row with them, where results that others use are written as well."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from autokernel.ops.growth import Found, Growth, Notes, is_work, without_first_views, without_last_views
from autokernel.ops.legality import Broken, Rule, call_of, fits, is_free, is_full, is_pair, refusal, shape_of
from autokernel.ops.matching import op_name
from autokernel.ops.program import REDUCTIONS

if TYPE_CHECKING:
    from torch.fx import Node


class RowRegions:
    """The regions around the reductions of a graph."""

    def __init__(self, growth: Growth) -> None:
        self._growth = growth
        self.nodes, self.order, self.notes = growth.nodes, growth.order, growth.notes
        self.grown: dict[Node, frozenset[Node]] = {}  # reduction -> what is legal with it, were it alone

    def regions(self) -> Iterable[Found]:
        """One for each row of reductions; what became of each reduction is noted."""
        taken: set[Node] = set()
        for node in self.nodes:
            call = call_of(node) if op_name(node).split(".")[-1] in REDUCTIONS else None
            if op_name(node).split(".")[-1] not in REDUCTIONS or not node.all_input_nodes:
                continue
            self.notes[node] = notes = Notes(node)
            source = shape_of(node.all_input_nodes[0])
            if call is None:
                notes.whole = refusal(node, 1, 1) or Broken(Rule.REDUCTION, node.name)
                continue
            if node in taken:
                notes.num_regions += 1
                continue
            columns = source[-1]
            rows = math.prod(source) // max(1, columns)
            inner = self._rows(node, rows, columns)
            if not inner:
                continue
            taken |= {other for other in inner if other in self.notes or op_name(other).split(".")[-1] in REDUCTIONS}
            notes.num_regions += 1
            yield Found(inner, tuple(self._growth.outputs_of(inner)), node)

    def _rows(self, seed: Node, rows: int, columns: int) -> frozenset[Node]:
        """Everything that is computed row by row with a reduction."""
        notes = self.notes[seed]
        wrong = refusal(seed, rows, columns)
        if wrong is not None or columns == 1:
            notes.whole = wrong or Broken(Rule.REDUCTION, seed.name, "rows of one element")
            return frozenset()
        held = frozenset({seed, *(seed.users if is_pair(seed) else ())})
        refused: dict[Node, Broken] = {}
        grown = True
        while grown:
            grown = False
            for node in self._neighbours(held):
                wrong = refusal(node, rows, columns) or _not_whole(node, held, rows, columns)
                if wrong is None:
                    for addition in self._additions(node, held, rows, columns):
                        wrong = self._growth.problem_of(held | addition)
                        if wrong is None:
                            held |= addition
                            grown = True
                            break
                if wrong is not None:
                    refused[node] = wrong
        inner = without_first_views(without_last_views(held, {seed}))
        notes.before = [refused[n] for n in self._growth.inputs_of(inner) if n in refused]
        notes.behind = [refused[user] for n in inner for user in n.users if user in refused and user not in inner]
        notes.whole = self._growth.problem_of(inner)
        if notes.whole is None:
            self.grown[seed] = inner
        if notes.whole is None and sum(is_work(node) for node in inner) < 2:
            notes.whole = next(iter((*notes.behind, *notes.before)), Broken(Rule.USER, seed.name))
        return frozenset() if notes.whole is not None else inner

    def _neighbours(self, held: frozenset[Node]) -> list[Node]:
        """What a region's nodes read, the nearest first, and what uses them, the first first."""
        before = sorted(self._growth.inputs_of(held), key=lambda node: -self.order[node])
        behind = {user for node in held if not is_free(node) for user in node.users if user not in held}
        return [*before, *sorted(behind, key=self.order.__getitem__)]

    def _additions(self, node: Node, held: frozenset[Node], rows: int, columns: int) -> list[frozenset[Node]]:
        """A node with the lines before it that serve it alone; or alone. Pairs come with both of their results."""
        both = node.all_input_nodes[0] if op_name(node) == "getitem" else node
        pair = {both, *both.users} if is_pair(both) else set()
        more = self._growth.small_operands(node, set(held), rows, columns)
        return [frozenset({node, *pair, *more}), frozenset({node, *pair})]


def _not_whole(node: Node, held: frozenset[Node], rows: int, columns: int) -> Broken | None:
    """What keeps a neighbour out: results are whole rows, or an element for each; others serve the region alone."""
    if is_free(node) or is_pair(node):
        return None
    shape = shape_of(node)
    if not is_full(shape, rows, columns):
        if set(node.users) <= held:
            return None
        return Broken(Rule.USER if fits(shape, rows, columns) else Rule.BROADCAST, node.name)
    return None
