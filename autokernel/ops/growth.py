"""How regions of generated kernels grow in a graph: what a set of nodes reads and leaves, and whether one call may be it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autokernel.ops.legality import Broken, Rule, call_of, is_free, refusal, shape_of
from autokernel.ops.matching import op_name, source_of, tensor_spec
from autokernel.ops.program import REDUCTIONS

if TYPE_CHECKING:
    from torch.fx import Graph, Node

MAX_LINES, MAX_INPUTS, MAX_OUTPUTS = 64, 16, 4
_LAYOUT = (
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.full",
    "aten.permute",
    "aten.expand",
)


@dataclass(frozen=True, slots=True)
class Found:
    """The nodes of a region."""

    inner: frozenset[Node]
    outputs: tuple[Node, ...]
    name_of: Node


@dataclass(slots=True)
class Notes:
    """What became of one product or reduction: regions, and the rules that ended them."""

    node: Node
    num_regions: int = 0
    before: list[Broken] = field(default_factory=list)  # what ended the prologue
    behind: list[Broken] = field(default_factory=list)  # what ended the epilogue
    whole: Broken | None = None  # why there is no region


class Growth:
    """A graph in which regions grow, and what became of its products and reductions."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: tuple[Node, ...] = tuple(graph.nodes)
        self.order: Mapping[Node, int] = {node: position for position, node in enumerate(self.nodes)}
        self.notes: dict[Node, Notes] = {}
        self._writes = [(self.order[node], sources) for node in self.nodes if (sources := _written(node))]

    def inputs_of(self, inner: Iterable[Node]) -> list[Node]:
        """What a set of nodes reads from outside."""
        held = set(inner)
        return list(dict.fromkeys(operand for node in held for operand in node.all_input_nodes if operand not in held))

    def outputs_of(self, inner: Iterable[Node]) -> list[Node]:
        """The nodes of a set that others use, in the graph's order; constants can be had by anybody."""
        held = set(inner)
        used = [node for node in held if not is_free(node) and any(user not in held for user in node.users)]
        return sorted((node for node in used if not _is_weight_view(node, held)), key=self.order.__getitem__)

    def problem_of(self, inner: frozenset[Node]) -> Broken | None:
        """The rule that nodes break as a region, None if one call may stand for them.

        The call takes the place of the first output. What it reads must be there by then and must not be written to from
        the first of its nodes to the last.
        """
        outputs, inputs = self.outputs_of(inner), self.inputs_of(inner)
        if not outputs:
            return Broken(Rule.RESULT, next(iter(inner)).name, "nobody uses it")
        if len(inner) > MAX_LINES or len(inputs) > MAX_INPUTS or len(outputs) > MAX_OUTPUTS:
            return Broken(Rule.SIZE, outputs[0].name, f"{len(inner)} lines, {len(inputs)} inputs, {len(outputs)} outputs")
        first = self.order[outputs[0]]
        for node in inputs:
            if self.order[node] > first:
                return Broken(Rule.LATE, node.name, f"behind {outputs[0].name}")
        begin, end = min(map(self.order.__getitem__, inner)), max(map(self.order.__getitem__, inner))
        memory = {source_of(node) for node in inputs}
        for position, written in self._writes:
            if begin < position < end and written & memory:
                return Broken(Rule.MUTATION, self.nodes[position].name)
        return None

    def small_operands(self, node: Node, held: set[Node], rows: int, columns: int) -> set[Node]:
        """Lines before a node that serve it alone: a gate's tanh, a scale plus one."""
        found: set[Node] = set()
        pending = [operand for operand in node.all_input_nodes if operand not in held]
        while pending:
            operand = pending.pop()
            alone = is_free(operand) or all(user in held or user in found or user is node for user in operand.users)
            if operand in found or not alone or refusal(operand, rows, columns) is not None:
                continue
            call = call_of(operand)
            if call is None or call.op in (*REDUCTIONS, "getitem", "reshape", "clone"):
                continue
            found.add(operand)
            pending += [before for before in operand.all_input_nodes if before not in held]
        return found


def left_of(node: Node) -> Node:
    return node.args[-2]  # type: ignore[return-value]


def shared_left(node: Node) -> tuple[Node, tuple[int, ...]]:
    """What products have in common that share their left matrix: where it comes from, and how it is cut into a batch."""
    return behind_reshapes(left_of(node)), shape_of(left_of(node))[:-2]


def weight_view(product: Node) -> Node | None:
    """The transposition of a product's right matrix: the kernel reads the weight as it is kept."""
    right = product.args[-1]
    transposed = op_name(right) == "aten.permute" and list(right.args[1]) == [1, 0]  # type: ignore[arg-type, union-attr]
    return right if transposed else None  # type: ignore[return-value]


def _is_weight_view(node: Node, held: set[Node]) -> bool:
    return op_name(node) == "aten.permute" and any(user in held and user.args[-1] is node for user in node.users)


def is_row_reshape(node: Node) -> bool:
    call = call_of(node)
    if call is None or call.op != "reshape" or tensor_spec(node) is None:
        return False
    source, shape = shape_of(node.all_input_nodes[0]), shape_of(node)
    return source[-1:] == shape[-1:]


def behind_reshapes(node: Node) -> Node:
    while is_row_reshape(node) or op_name(node) == "aten.clone":
        node = node.all_input_nodes[0]
    return node


def without_last_views(inner: frozenset[Node], keep: set[Node]) -> frozenset[Node]:
    """Without the reshapes that nothing in the region reads."""
    held = set(inner)
    while last := {n for n in held - keep if op_name(n) in _LAYOUT and not set(n.users) & held}:
        held -= last
    return frozenset(held)


def without_first_views(inner: frozenset[Node]) -> frozenset[Node]:
    """Without the reshapes of what comes from outside."""
    held = set(inner)
    while first := {n for n in held if op_name(n) in _LAYOUT and not is_free(n) and not set(n.all_input_nodes) & held}:
        held -= first
    return frozenset(held)


def is_work(node: Node) -> bool:
    return op_name(node) not in _LAYOUT and op_name(node) not in ("getitem", "aten.clone")


def computes(nodes: Iterable[Node]) -> bool:
    return any(is_work(node) for node in nodes)


def _written(node: Node) -> frozenset[Node]:
    """Whose memory a node writes to; of what is no ATen op, all that it is given."""
    if node.op != "call_function" or op_name(node) == "getitem":
        return frozenset()
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return frozenset(source_of(operand) for operand in node.all_input_nodes)
    if not schema.is_mutable:
        return frozenset()
    import torch.fx

    found: set[Node] = set()
    for position, argument in enumerate(schema.arguments):
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            torch.fx.map_arg(given, lambda value: found.add(source_of(value)))  # type: ignore[arg-type]
    return frozenset(found)
