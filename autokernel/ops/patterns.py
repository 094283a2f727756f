"""Finding plain torch functions in captured graphs: a fusion's reference is the pattern that it is found by.

A spelling is traced over fake tensors, and its graph is looked for in the captured one, from its last result backwards. What
does not change values is skipped on both sides (reshapes, copies, and conversions that are exact), operands of commutative
ops come in either order, literals that stand for a scalar of the spelling are read from the graph.

That happens twice. The first search compares ops alone: one trace for each width of dtypes serves every size, and it says
which nodes would be the inputs. The second one has a trace of the very inputs, and compares shapes, dtypes and literals too.

Spellings are written in the ops that Inductor's decompositions leave (`x / (exp(-x) + 1)`, and not `silu`): whatever torch
calls the same thing then needs no table of its own here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autokernel.ops.base import Region
from autokernel.ops.matching import computed_before, op_name, settled, source_of, spec_of, tensor_spec
from autokernel.ops.spelling import (
    COMMUTATIVE,
    CONVERT,
    HALVES,
    KEEP,
    Pair,
    Spelling,
    Traced,
    arguments_of,
    dtype_of,
    flat,
    is_exact,
    is_free,
    is_node,
    kind_of,
    shape_of,
    trace,
)
from autokernel.records import ConfigValue, Problem, TensorSpec

_MAX_READINGS = 8  # ways to see a spelling at one place that are tried
WHOLE_MARKS = 997  # from here on whole numbers stand for scalars; what `Pattern.inputs` gives has room for as many

if TYPE_CHECKING:
    from torch.fx import Graph, Node

Order = Mapping["Node", int]  # positions of a graph's nodes
Writes = Sequence[tuple[int, "Node"]]  # where memory is written, and what lies behind all views of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What a fusion looks like.

    Args:
        op: its name.
        spellings: functions of the inputs (and, by keyword, of the scalars) that return the outputs. All compute the same; the
            first one is the reference. Every output but the last is a value on the way to the last one, or another result of
            the same call.
        inputs: for a dtype, what the inputs may look like; any sizes will do, for only the ops are looked at.
        scalars: names of the numbers that the graph holds as literals.
        whole: those of them that are integers.
        fixed: scalars whose values tell this pattern from others of the op; its functions get them by keyword as well.
    """

    op: str
    spellings: tuple[Spelling, ...]
    inputs: Callable[[str], tuple[TensorSpec, ...]]
    scalars: tuple[str, ...] = ()
    whole: frozenset[str] = frozenset()
    fixed: tuple[tuple[str, ConfigValue], ...] = ()

    def match(self, graph: Graph, device: str) -> list[Region]:
        """Its regions, in the graph's order and without overlap; of two, the one in 16 bits, which has the conversions."""
        order = {node: position for position, node in enumerate(graph.nodes)}
        writes = writes_in(order)
        by_kind: dict[str, list[Node]] = {}
        for node in order:
            if node.op == "call_function":
                by_kind.setdefault(kind_of(node), []).append(node)
        found: dict[int, Region] = {}
        taken: set[Node] = set()
        for spelling in self.spellings:
            for traced in self._first_traces(spelling):
                for anchor in by_kind.get(kind_of(traced.outputs[-1]), []):
                    if anchor in taken or dtype_of(anchor) not in traced.dtypes:
                        continue
                    region = self._region(spelling, traced, anchor, order, writes, device)
                    if region is not None and not region.inner & taken:
                        found[order[anchor]] = region
                        taken |= region.inner
        return [found[position] for position in sorted(found)]

    def _marks(self) -> dict[float, str]:
        """The literals that stand for scalars in the first traces."""
        return {_mark(i, name in self.whole): name for i, name in enumerate(self.scalars)}

    def _first_traces(self, spelling: Spelling) -> list[Traced]:
        marks = tuple((name, mark) for mark, name in self._marks().items())
        return [trace(spelling, self.inputs(dtype), (*self.fixed, *marks)) for dtype in ("bfloat16", "float32")]

    def _region(
        self,
        spelling: Spelling,
        traced: Traced,
        anchor: Node,
        order: Order,
        writes: Writes,
        device: str,
    ) -> Region | None:
        """The region that ends at this node, None if there is none or the rules forbid it."""
        readings = _Search(exact=False, marks=self._marks()).readings(traced, anchor)
        for _, reading in zip(range(_MAX_READINGS), readings, strict=False):
            nodes = [reading.nodes[placeholder] for placeholder in traced.inputs if placeholder in reading.nodes]
            specs = [spec for spec in map(tensor_spec, nodes) if spec is not None]
            if len(specs) != len(traced.inputs) or len(reading.scalars) != len(self.scalars):
                continue
            scalars = (*self.fixed, *((name, reading.scalars[name]) for name in self.scalars))
            known = tuple(settled(spec) for spec in specs)
            try:
                whole = trace(spelling, known, scalars)
            except (RuntimeError, ValueError, IndexError):  # sizes that the function does not take
                continue
            fixed = dict(zip(whole.inputs, nodes, strict=True))
            sure = next(_Search(exact=True, fixed=fixed).readings(whole, anchor), None)
            if sure is None:
                continue
            outputs = tuple(sure.nodes[node] for node in whole.outputs)
            inner = _inner(sure, outputs, fixed)
            if inner is None or written_between(nodes, inner, outputs, order, writes):
                continue
            problem = Problem(op=self.op, inputs=known, device=device, scalars=scalars)
            return Region(problem=problem, inputs=tuple(nodes), outputs=outputs, inner=inner, name_of=anchor)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One way to see a spelling in a graph: its nodes, what was skipped on the way, and its scalars."""

    nodes: Mapping[Node, Node] = field(default_factory=dict)
    skipped: frozenset[Node] = frozenset()
    scalars: Mapping[str, float] = field(default_factory=dict)

    def binding(self, wanted: Node, node: Node) -> _Reading:
        return _Reading(nodes={**self.nodes, wanted: node}, skipped=self.skipped, scalars=self.scalars)

    def skipping(self, node: Node) -> _Reading:
        return _Reading(nodes=self.nodes, skipped=self.skipped | {node}, scalars=self.scalars)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """Looks for a traced spelling at a node. `marks` are the literals that stand for scalars."""

    exact: bool
    marks: Mapping[float, str] = field(default_factory=dict)
    fixed: Mapping[Node, Node] = field(default_factory=dict)  # inputs that are known

    def readings(self, traced: Traced, anchor: Node) -> Iterator[_Reading]:
        """Every way to see the spelling's last output in this node, its other outputs included."""
        for reading in self._solve([(traced.outputs[-1], anchor)], _Reading(), traced.depth):
            whole = self._with_siblings(traced, reading)
            if all(output in whole.nodes for output in traced.outputs):
                yield whole

    def _with_siblings(self, traced: Traced, reading: _Reading) -> _Reading:
        """With those outputs that are other results of a call that is known by now."""
        for output in traced.outputs:
            call = output.args[0] if op_name(output) == "getitem" and output not in reading.nodes else None
            if not is_node(call) or call not in reading.nodes:
                continue
            for node in reading.nodes[call].users:
                same = op_name(node) == "getitem" and node.args[1] == output.args[1]
                if same and (not self.exact or _same_result(output, node)):
                    reading = reading.binding(output, node)
                    break
        return reading

    def _solve(self, pairs: list[Pair], reading: _Reading, depth: Mapping[Node, int]) -> Iterator[_Reading]:
        if not pairs:
            yield reading
            return
        # what has most behind it first: inputs take any node, so they come last
        at = max(range(len(pairs)), key=lambda i: depth.get(pairs[i][0], 0))
        rest = [*pairs[:at], *pairs[at + 1 :]]
        for more, after in self._steps(*pairs[at], reading):
            yield from self._solve([*rest, *more], after, depth)

    def _steps(self, wanted: Any, node: Any, reading: _Reading) -> Iterator[tuple[list[Pair], _Reading]]:
        """Ways to go on from one pair: the pairs that follow from it, and what is known then."""
        if not (is_node(wanted) and is_node(node)):
            after = None if is_node(wanted) or is_node(node) else self._literal(wanted, node, reading)
            if after is not None:
                yield [], after
            return
        if wanted in reading.nodes:
            if reading.nodes[wanted] is node:
                yield [], reading
                return
        elif wanted.op == "placeholder":
            if _fits(wanted, node) and self.fixed.get(wanted, node) is node:
                yield [], reading.binding(wanted, node)
                return
        elif kind_of(wanted) == KEEP:
            yield from self._kept(wanted, node, reading)
        elif kind_of(wanted) == CONVERT and is_exact(wanted):
            if kind_of(node) == CONVERT and is_exact(node):
                yield [(wanted.args[0], node.args[0])], reading.skipping(node)
            else:
                yield [(wanted.args[0], node)], reading
        elif kind_of(wanted) == kind_of(node) and (not self.exact or _same_result(wanted, node)):
            for pairs in self._operands(wanted, node):
                yield pairs, reading.binding(wanted, node)
        if is_exact(node) or (kind_of(node) == KEEP != kind_of(wanted) and shape_of(node) == shape_of(node.args[0])):
            yield [(wanted, node.args[0])], reading.skipping(node)

    def _kept(self, wanted: Node, node: Node, reading: _Reading) -> Iterator[tuple[list[Pair], _Reading]]:
        """A reshape of the spelling is one or several of the graph's; or none, where it changes nothing."""
        source = wanted
        while kind_of(source) == KEEP:
            source = source.args[0]  # type: ignore[assignment]
        if self.exact and shape_of(wanted) != shape_of(node):
            return
        unchanged = after = reading.binding(wanted, node)
        behind = node
        while kind_of(behind) == KEEP:
            after, behind = after.skipping(behind), behind.args[0]  # type: ignore[assignment]
            yield [(source, behind)], after
        if not self.exact or shape_of(source) == shape_of(wanted):
            yield [(source, node)], unchanged

    def _operands(self, wanted: Node, node: Node) -> Iterator[list[Pair]]:
        """Pairs of two calls' arguments, in each order that makes no difference."""
        ours, theirs = arguments_of(wanted), arguments_of(node)
        if ours.keys() != theirs.keys():
            return
        pairs: list[Pair] = []
        for name, value in ours.items():
            found = flat(value, theirs[name])
            if found is None:
                return
            pairs += found
        yield pairs
        if op_name(wanted) in COMMUTATIVE:
            (a, first), (b, second), *more = pairs
            if more in ([], [(1, 1)]):  # of a sum the factor
                yield [(a, second), (b, first), *more]

    def _literal(self, wanted: Any, value: Any, reading: _Reading) -> _Reading | None:
        if isinstance(wanted, (int, float)) and wanted in self.marks and isinstance(value, (int, type(wanted))):
            name = self.marks[wanted]
            if reading.scalars.get(name, value) != value:
                return None
            found = {**reading.scalars, name: type(wanted)(value)}
            return _Reading(nodes=reading.nodes, skipped=reading.skipped, scalars=found)
        if not self.exact and isinstance(wanted, int) and isinstance(value, int):
            return reading  # a size or a position: the second search looks at it
        return reading if wanted == value else None


def _mark(position: int, whole: bool) -> float:
    """A literal that no graph holds by chance."""
    return WHOLE_MARKS + position if whole else math.pi * 1e-5 * (1 + position)


def _fits(wanted: Node, node: Node) -> bool:
    """Whether a node can be this input, as far as its dtype says."""
    ours, theirs = dtype_of(wanted), dtype_of(node)
    return ours == theirs or (ours in HALVES and theirs in HALVES)


def _same_result(wanted: Node, node: Node) -> bool:
    ours, theirs = (spec_of(x.meta.get("val")) for x in (wanted, node))
    if ours is None or theirs is None:
        return ours is theirs  # several results: `getitem` has them
    return (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def _inner(reading: _Reading, outputs: tuple[Node, ...], fixed: Mapping[Node, Node]) -> frozenset[Node] | None:
    """What of the graph serves the outputs alone; None if somebody else needs a value that the fusion does not give.

    What is only skipped costs nothing and may stay for others.
    """
    inputs = set(fixed.values())
    inner = ({*reading.nodes.values()} | reading.skipped) - inputs
    shared: set[Node] = set()
    while True:
        more = {n for n in inner - shared - {*outputs} if is_free(n) and not {*n.users} <= inner - shared}
        if not more:
            break
        shared |= more
    inner -= shared
    needed = inner - {*outputs}
    return frozenset(inner) if all({*node.users} <= inner for node in needed) else None


def writes_in(order: Order) -> list[tuple[int, Node]]:
    """Where memory is written, and what lies behind all views of it."""
    found = []
    for node, position in order.items():
        for written in _written_by(node):
            found.append((position, source_of(written)))
    return found


def _written_by(node: Node) -> list[Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    values = [given.get(name) for name in names]
    return [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value]) if is_node(x)]


def written_between(
    inputs: Sequence[Node],
    inner: frozenset[Node],
    outputs: Sequence[Node],
    order: Order,
    writes: Writes,
) -> bool:
    """Whether an input's memory changes between the region's first read and its last one.

    The fusion reads everything at one place, behind its last input and not behind its last output.
    """
    first, last = min(order[node] for node in inner), max(order[node] for node in outputs)
    sources = {source_of(node) for node in inputs}
    return any(first < position < last and written in sources for position, written in writes)


def can_be_one(inputs: Sequence[Node], outputs: tuple[Node, ...], inner: frozenset[Node], order: Order, writes: Writes) -> bool:
    """Whether one call can stand for several results: all inputs are there before anything is computed from any of them.

    And stay as they are meanwhile.
    """
    last = max(inputs, key=order.__getitem__)
    early = computed_before(last, outputs, inner, order)
    if (inner | {*early}) & {*inputs} or written_between(inputs, inner, outputs, order, writes):
        return False
    return not early or not any(order[early[0]] <= position <= order[last] for position, _ in writes)
