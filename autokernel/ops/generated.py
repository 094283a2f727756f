"""Regions of a graph for which a kernel is generated: what a matrix product or a reduction can be computed with.

A region's problem carries its program (`ops/program.py`), which is its reference at once. Regions overlap: the largest one
around a product, its prologue alone, its epilogue alone and the rows of a norm beside it are problems of their own.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autokernel.ops.base import Region, Site, floating, sites_of
from autokernel.ops.growth import Found, Growth
from autokernel.ops.legality import Broken, Rule, call_of
from autokernel.ops.matching import op_name, settled, tensor_spec
from autokernel.ops.product_regions import PRODUCTS, ProductRegions
from autokernel.ops.program import GEMMS, REDUCTIONS, VIEWS, Argument, Line, Program, program_of, results_of, run
from autokernel.ops.row_regions import RowRegions
from autokernel.ops.row_scale import row_scale
from autokernel.ops.whole_rows import WholeRowRegions
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node


@dataclass(frozen=True, slots=True)
class Explained:
    """What became of a product or a reduction of a graph.

    `before` and `behind` say what ended its regions, `whole` why it has none.
    """

    node: str
    op: str
    num_regions: int
    before: tuple[Broken, ...]
    behind: tuple[Broken, ...]
    whole: Broken | None

    @property
    def is_product(self) -> bool:
        return self.op in PRODUCTS


class Generated:
    """A region with the kernel generated for it.

    Inputs are those of the program, in its order; the scalar `program` is its text. One output per `o0`, `o1`, ...
    """

    name = "generated"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        return run(problem, *inputs)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """`has_gemm`; `batch` of products, `m` rows of each; `n` columns of all products together, `k` their depth (rows alone:
        `n` columns, `k` 0); `num_products`, `num_outputs`; `num_reductions`, with products those in front of them;
        `whole_rows`, whether rows of the result are reduced behind products; `dtype_bytes` of the widest matrix, `out_bytes` of
        the first result; `scaled`, whether the left matrix has a scale for each row that can be taken out (`row_scale`).
        """
        program, results = program_of(problem), results_of(problem)
        products = [line for line in program.lines if line.op in GEMMS]
        behind = len(program.row_epilogue)
        reductions = sum(line.op in REDUCTIONS for line in program.lines) - behind
        batch, m, n, k, widest = _sizes(program, results)
        return {
            "has_gemm": int(bool(products)), "batch": batch, "m": m, "n": n, "k": k,
            "num_products": len(products), "num_reductions": reductions, "num_outputs": len(program.outputs),
            "dtype_bytes": widest, "out_bytes": DTYPE_BYTES[results["o0"].dtype],
            "whole_rows": int(behind > 0), "scaled": int(row_scale(program, results) is not None),
        }  # fmt: skip

    def flops(self, problem: Problem) -> int:
        """Of the products, and one for each element of every other line."""
        program, results = program_of(problem), results_of(problem)
        return sum(_flops(line, results) for line in program.lines)

    def compute_dtype(self, problem: Problem) -> str:
        """See `MixedOp.compute_dtype`: of the products, of several the narrowest; without one, of the widest floating input."""
        return _compute_dtype(problem)

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once, every output written once."""
        results = results_of(problem)
        written = sum(results[name].num_bytes for name in program_of(problem).outputs)
        return written + sum(spec.num_bytes for spec in problem.inputs)

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """See `Op.find`. None on a CPU, for which no kernels are generated."""
        return sites_of(self.match(graph, constants, device), constants) if device == "cuda" else []

    def match(self, graph: Graph, constants: frozenset[str], device: str) -> list[Region]:
        """See `FusionOp.match`; the regions around one product overlap, the largest first."""
        growth = Growth(graph)
        return [_region(found, growth, device) for found in _regions(growth)]


def explain(graph: Graph) -> list[Explained]:
    """What became of every product and reduction of a post-grad graph, in its order."""
    growth = Growth(graph)
    _regions(growth)
    found = []
    for node in growth.nodes:
        if node in growth.notes:
            notes = growth.notes[node]
            whole = notes.whole
            if notes.num_regions == 0 and whole is None:
                whole = next(iter((*notes.behind, *notes.before)), Broken(Rule.RESULT, node.name))
            found.append(
                Explained(node.name, op_name(node), notes.num_regions, tuple(notes.before), tuple(notes.behind), whole)
            )  # fmt: skip
    return found


def count_rules(explained: Sequence[Explained]) -> Counter[str]:
    """How often each rule was why a product or a reduction has no region."""
    return Counter(str(item.whole.rule) for item in explained if item.whole is not None)


def _regions(growth: Growth) -> list[Found]:
    """All regions of a graph, each once: around products first."""
    found: dict[tuple[frozenset[Node], tuple[Node, ...]], Found] = {}
    products, rows = ProductRegions(growth), RowRegions(growth)
    apart = (*products.regions(), *rows.regions())
    for region in (*WholeRowRegions(growth, products, rows).regions(), *apart):
        found.setdefault((region.inner, region.outputs), region)
    return list(found.values())


def _region(found: Found, growth: Growth, device: str) -> Region:
    outputs = sorted(found.outputs, key=lambda node: (_single(node, found), growth.order[node]))
    program, inputs = written(outputs, found.inner)
    specs = [tensor_spec(node) for node in inputs]
    problem = Problem(
        op=Generated.name,
        inputs=tuple(settled(spec) for spec in specs if spec is not None),
        device=device,
        scalars=(("program", str(program)),),
    )
    return Region(problem=problem, inputs=inputs, outputs=tuple(outputs), inner=found.inner, name_of=found.name_of)


def _single(node: Node, found: Found) -> str:
    """What one output is, whatever the others are: what they are sorted by, for the graph's order is not always the same."""
    program, inputs = written([node], found.inner)
    return f"{program} of {', '.join(str(tensor_spec(node)) for node in inputs)}"


def written(outputs: Sequence[Node], inner: frozenset[Node]) -> tuple[Program, tuple[Node, ...]]:
    """The program that computes outputs from what the inner nodes read, and those inputs in its order."""
    names: dict[Node, str] = {}
    lines: list[Line] = []
    inputs: list[Node] = []
    known: dict[tuple[str, tuple[Argument, ...]], str] = {}
    positions = {node: f"o{position}" for position, node in enumerate(outputs)}

    def visit(node: Node) -> str:
        if node in names:
            return names[node]
        if node not in inner:
            inputs.append(node)
            names[node] = f"i{len(inputs) - 1}"
            return names[node]
        if op_name(node) == "aten.expand" and node not in positions:  # the same value
            names[node] = visit(node.all_input_nodes[0])
            return names[node]
        op, given = _line_of(node)
        arguments = tuple(visit(a) if not isinstance(a, (str, int, float, tuple)) else a for a in given)
        seen = known.get((op, arguments))
        if seen is not None and node not in positions:
            names[node] = seen
            return seen
        name = positions.get(node) or f"t{sum(line.name.startswith('t') for line in lines)}"
        known.setdefault((op, arguments), name)
        lines.append(Line(name, op, arguments))
        names[node] = name
        return name

    for node in outputs:
        visit(node)
    return Program(tuple(lines)), tuple(inputs)


def _line_of(node: Node) -> tuple[str, tuple[Node | Argument, ...]]:
    short = op_name(node).removeprefix("aten.")
    if short in GEMMS:
        return short, tuple(node.args)  # type: ignore[arg-type]
    if short == "permute":
        return "t", (node.args[0],)  # type: ignore[return-value]
    call = call_of(node)
    assert call is not None, f"{node.name} has no code, but is part of a region"
    return call.op, call.arguments


def _sizes(program: Program, results: Mapping[str, TensorSpec]) -> tuple[int, int, int, int, int]:
    """batch, m, n, k and the bytes of an element of the widest matrix."""
    products = [line for line in program.lines if line.op in GEMMS]
    if products:
        left = results[str(products[0].arguments[-2])]
        n = sum(results[line.name].shape[-1] for line in products)
        *batch, m, k = left.shape
        return math.prod(batch), m, n, k, DTYPE_BYTES[left.dtype]
    reduced = next(results[str(line.arguments[0])] for line in program.lines if line.op in REDUCTIONS)
    rows = reduced.num_elements // reduced.shape[-1]
    widest = max(DTYPE_BYTES[results[name].dtype] for name in (*program.inputs, *program.outputs))
    return 1, rows, reduced.shape[-1], 0, widest


def _flops(line: Line, results: Mapping[str, TensorSpec]) -> int:
    if line.op in GEMMS:
        return 2 * results[str(line.arguments[-2])].num_elements * results[line.name].shape[-1]
    return results[line.name].num_elements


@functools.lru_cache(maxsize=256)
def _compute_dtype(problem: Problem) -> str:
    program, results = program_of(problem), results_of(problem)
    made = {line.name: line for line in program.lines}
    products = [
        _widest([_before_widening(str(operand), made, results) for operand in line.arguments[-2:]])
        for line in program.lines
        if line.op in GEMMS
    ]
    if products:
        return min(products, key=lambda spec: DTYPE_BYTES[spec.dtype]).dtype
    return _widest(floating(problem.inputs) or problem.inputs[:1]).dtype


def _before_widening(name: str, made: Mapping[str, Line], results: Mapping[str, TensorSpec]) -> TensorSpec:
    """What a product's operand was before conversions that lose nothing: a kernel may multiply that as well."""
    while name in made and made[name].op in (*VIEWS, "clone", "convert"):
        source = made[name].operands[0]
        if made[name].op == "convert" and DTYPE_BYTES[results[source].dtype] >= DTYPE_BYTES[results[name].dtype]:
            break
        name = source
    return results[name]


def _widest(specs: Sequence[TensorSpec]) -> TensorSpec:
    return max(specs, key=lambda spec: DTYPE_BYTES[spec.dtype])
