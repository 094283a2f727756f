"""A number by which each row of a matrix is multiplied on its way into products: the scale of an RMS norm.

    (x * s * g) W = s * (x * g) W     with one s for a row of x

A kernel that takes it out needs no statistics of a row before it begins with the products: it finds them on the way. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autokernel.ops.program import GEMMS, REDUCTIONS, Line, Program, is_operand
from autokernel.records import TensorSpec

_ON_THE_WAY = ("sum", "mean", "amax")  # reductions that need nothing but a walk over the row
_FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class RowScale:
    """`line` multiplies `kept` by `number`, one for each row; `path` are the lines from there to the products' left matrix."""

    line: str
    kept: str
    number: str
    path: frozenset[str]


def row_scale(program: Program, results: Mapping[str, TensorSpec]) -> RowScale | None:
    """What the rows of the left matrix of all products are multiplied by, if it can be taken out; None otherwise.

    Between that line and the products there may be conversions, views and factors that no statistic of a row goes into, and
    nothing else may read what is there.
    """
    products = [line for line in program.lines if line.op in GEMMS]
    lefts = {str(line.arguments[-2]) for line in products}
    if len(lefts) != 1:
        return None
    reduced = _reduced(program)
    name, path = lefts.pop(), []
    while name in reduced:
        line = program.line(name)
        path.append(name)
        found = _inner(line, reduced, results)
        if found is None:
            return None
        name, kept = found
        if kept is not None:
            whole = results[kept].shape == results[line.name].shape
            alone = whole and _only_read_by(path, program, products) and _found_on_the_way(name, program)
            return RowScale(line.name, kept, name, frozenset(path)) if alone else None
    return None


def _reduced(program: Program) -> set[str]:
    """Values that statistics of rows go into; products and what follows them are not meant."""
    found: set[str] = set()
    for line in program.lines:
        if line.op in REDUCTIONS or (line.op not in GEMMS and found & set(line.operands)):
            found.add(line.name)
    return found


def _inner(line: Line, reduced: set[str], results: Mapping[str, TensorSpec]) -> tuple[str, str | None] | None:
    """Where to look next; with what is left of the line, if it is the one that multiplies rows. None: nothing can be done."""
    if line.op in ("reshape", "clone") or (line.op == "convert" and results[line.name].dtype in _FLOATS):
        return str(line.arguments[0]), None
    inner = [name for name in line.operands if name in reduced]
    if line.op != "mul" or len(inner) != 1:
        return None
    (other,) = [argument for argument in line.arguments if argument != inner[0]]
    if results[inner[0]].shape[-1:] != (1,):
        return inner[0], None
    return (inner[0], str(other)) if is_operand(other) else None


def _only_read_by(path: list[str], program: Program, products: list[Line]) -> bool:
    """Whether the lines of the path are read by each other and as the products' left matrix alone."""
    inside = set(path)
    for line in program.lines:
        others = [name for argument, name in enumerate(line.operands) if not (line in products and argument == _left_at(line))]
        if line.name not in inside and inside & set(others):
            return False
    return not any(name.startswith("o") for name in path)


def _left_at(product: Line) -> int:
    return len(product.operands) - 2


def _found_on_the_way(number: str, program: Program) -> bool:
    """Whether one walk over the row finds all that the number is made of."""
    behind = program.behind(number)
    reductions = [line for line in behind if line.op in REDUCTIONS]
    first = all(not any(other.op in REDUCTIONS for other in program.behind(str(line.arguments[0]))) for line in reductions)
    return first and all(line.op in _ON_THE_WAY for line in reductions)
