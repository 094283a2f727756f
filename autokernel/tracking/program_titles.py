"""What a generated fusion does, in a few words derived from its program: `rms_norm → 2 products → silu · mul`. Pure.

What stands before an arrow to the products makes their left matrix, what stands behind follows them; operands that are
added are spelled with a plus: `product + residual`. Casts, views and the inner lines of norms and activations say nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autokernel.ops.activations import activation_named, spell_call, spell_number
from autokernel.ops.program import BINARY, COMPARISONS, GEMMS, REDUCTIONS, Argument, Line, Program, is_operand, program_of
from autokernel.records import Problem

_VIEWS = ("convert", "reshape", "t", "getitem", "clone")  # the same numbers as their first operand
_SILENT = (*_VIEWS, *COMPARISONS, "full", "isnan", "logical_not")
_MAX_WORDS = 5  # of one side of the products
_MAX_EXPRESSION = 300  # characters; the longest activation has about 100
_BOTH = "max, sum of exp"
_REDUCED = {"sum": "sum", "mean": "mean", "amax": "max", "var_mean": "variance", "prepare_softmax_online": _BOTH}
_SOFTMAXES = (("max", "sub", "exp", "sum", "div"), (_BOTH, "sub", "exp", "div"))


@dataclass(frozen=True, slots=True)
class ProgramTitle:
    """`words` say what is done, `shape` is M×N×K of the products, or rows×columns.

    N is in brackets, if there are several, and a batch is in front.
    """

    words: str
    shape: str


def program_title(problem: Problem) -> ProgramTitle:
    """Of a problem that carries a program.

    Raises:
        ValueError: it carries none that can be read.
    """
    reading = _Reading(program_of(problem), {f"i{at}": spec.shape for at, spec in enumerate(problem.inputs)})
    return ProgramTitle(reading.words(), reading.shape())


@dataclass(slots=True)
class _Reading:
    """A program with what is known of its values; `shapes` begins with those of the inputs."""

    program: Program
    shapes: dict[str, tuple[int, ...]]
    views: dict[str, str] = field(default_factory=dict)  # value -> what it is a view or cast of
    above: dict[str, frozenset[str]] = field(default_factory=dict)  # value -> all that it depends on, itself included

    def __post_init__(self) -> None:
        for name in self.shapes:
            self.views[name], self.above[name] = name, frozenset((name,))
        for line in self.program.lines:
            self.shapes[line.name] = _shape(line, self.shapes)
            self.views[line.name] = self.views[line.operands[0]] if line.op in _VIEWS else line.name
            self.above[line.name] = frozenset((line.name,)).union(*(self.above[name] for name in line.operands))

    @property
    def products(self) -> list[Line]:
        return [line for line in self.program.lines if line.op in GEMMS]

    def shape(self) -> str:
        """See `ProgramTitle`."""
        products = self.products
        if not products:
            widest = max((self.shapes[line.operands[0]] for line in self._reductions()), key=math.prod, default=())
            return f"{math.prod(widest[:-1])}×{widest[-1]}" if widest else ""
        columns = "+".join(str(self.shapes[line.name][-1]) for line in products)
        *batch, m, k = self.shapes[products[0].operands[-2]]
        rows = "".join(f"{size}·" for size in batch) + str(m)
        return f"{rows}×({columns})×{k}" if len(products) > 1 else f"{rows}×{columns}×{k}"

    def words(self) -> str:
        """See `ProgramTitle`."""
        said = self._said()
        products = {line.name for line in self.products}
        outputs = len(self.program.outputs)
        if not products:
            several = f" ({outputs} results)" if outputs > 1 else ""
            return (_joined(said.values()) or "copy") + several
        before = frozenset().union(*(self.above[name] for name in products)) - products
        behind = {name for name, above in self.above.items() if above & products} - products
        text = "product" if len(products) == 1 else f"{len(products)} products"
        if prologue := _joined(word for name, word in said.items() if name in before and name not in behind):
            text = f"{prologue} → {text}"
        biases = [
            self._operand_word("add", line.operands[0], said) for line in self.products if line.op in ("addmm", "baddbmm")
        ]
        words = [*dict.fromkeys(biases), *(word for name, word in said.items() if name in behind)]
        text = _with_epilogue(text, words)
        return f"{text} ({outputs} results)" if outputs not in (1, len(products)) else text

    def _said(self) -> dict[str, str]:
        """Value -> word, in the program's order; lines that say nothing are left out."""
        activations, inner = self._activations()
        norms = self._norms()
        normalised: set[str] = set()
        said: dict[str, str] = {}
        for line in self.program.lines:
            operands = [self.views[name] for name in line.operands]
            if line.name in activations:
                said[line.name] = activations[line.name]
            elif line.name in norms:
                said[line.name] = norms[line.name]
            elif line.name in inner or line.op in _SILENT or line.op in GEMMS or self._only_reduced(line.name):
                continue
            elif line.op in REDUCTIONS:
                said[line.name] = _REDUCED[line.op]
            elif self._of_norm(line, norms, normalised):
                normalised.add(line.name)
            elif len(operands) == 2 or line.op == "where":
                said[line.name] = self._binary_word(line, said)
            elif line.op not in BINARY and line.op != "pow":  # what a number is added to stays what it is
                said[line.name] = line.op
        return self._without_sides(said)

    def _binary_word(self, line: Line, said: Mapping[str, str]) -> str:
        products = {product.name for product in self.products}
        behind = [bool(self.above[name] & products) for name in line.operands]
        if line.op == "where" or all(behind) or not any(behind):
            vectors = not any(behind) and any(self._is_vector(name) for name in line.operands)
            return "bias" if vectors and line.op == "add" else line.op
        return self._operand_word(line.op, line.operands[behind.index(False)], said)

    def _operand_word(self, op: str, operand: str, said: Mapping[str, str]) -> str:
        """What a product meets that does not come from a product."""
        side = _joined(said[name] for name in said if name in self.above[operand])
        if side:
            return f"{op} by {side}"
        if op != "add":
            return op
        return "bias" if self._is_vector(operand) else "residual"

    def _without_sides(self, said: dict[str, str]) -> dict[str, str]:
        """Without words of what only prepares an operand: the word that takes it has them."""
        products = {line.name for line in self.products}
        if not products:
            return said
        before = frozenset().union(*(self.above[name] for name in products))
        return {name: word for name, word in said.items() if name in before or self.above[name] & products}

    def _is_vector(self, name: str) -> bool:
        """Whether it is an input with one number for each column, or that and a number, as `1 + weight`."""
        source = self.views[name]
        line = next((made for made in self.program.lines if made.name == source), None)
        if line is not None and line.op in ("add", "mul") and len(line.operands) == 1:
            return self._is_vector(line.operands[0])
        return source.startswith("i") and len(self.shapes[source]) == 1

    def _reductions(self) -> list[Line]:
        return [line for line in self.program.lines if line.op in REDUCTIONS]

    def _users(self, name: str) -> list[Line]:
        """Lines that read a value, or a view of it."""
        found = (line for line in self.program.lines if line.op not in _VIEWS)
        return [line for line in found if any(self.views[operand] == name for operand in line.operands)]

    def _only_reduced(self, name: str) -> bool:
        """Whether a value is made for a sum alone, as the squares of a norm are."""
        users = self._users(name)
        return bool(users) and not name.startswith("o") and all(line.op in REDUCTIONS for line in users)

    def _norms(self) -> dict[str, str]:
        """Value -> norm, of the reductions whose results scale the rows that they are of."""
        found = {}
        for line in self._reductions():
            of = self.views[line.operands[0]]
            square = next((made for made in self.program.lines if made.name == of), None)
            squared = square is not None and (
                (square.op == "pow" and square.arguments[1] == 2) or (square.op == "mul" and len(set(square.operands)) == 1)
            )
            name = {"var_mean": "layer_norm", "mean": "rms_norm"}.get(line.op) if line.op != "mean" or squared else None
            if name is not None and any(self._scales(other, {line.name}) for other in self.program.lines):
                found[line.name] = name
        return found

    def _scales(self, line: Line, statistics: Iterable[str]) -> bool:
        """Whether a line has a whole row on one side, and on the other a number made of its statistics."""
        if line.op not in ("mul", "div", "sub") or len(line.operands) != 2:
            return False
        last = [self.shapes[name][-1:] for name in line.operands]
        narrow = [name for name, size in zip(line.operands, last, strict=True) if size == (1,)]
        return len(narrow) == 1 and bool(self.above[narrow[0]].intersection(statistics))

    def _of_norm(self, line: Line, norms: Mapping[str, str], normalised: set[str]) -> bool:
        """Whether a line is part of a norm: its statistics, the scaling by them, its weight and bias."""
        if not any(self.above[line.name] & {norm} for norm in norms):
            return False
        if self.shapes[line.name][-1:] == (1,) or self._scales(line, norms):
            return True
        follows = any(self.views[name] in normalised for name in line.operands)
        return follows and line.op in ("add", "mul") and any(self._is_vector(name) for name in line.operands)

    def _activations(self) -> tuple[dict[str, str], set[str]]:
        """Value -> activation function, and the lines inside of them; the largest first."""
        found: dict[str, str] = {}
        inner: set[str] = set()
        values = [name for name, view in self.views.items() if name == view]
        expressions = {name: self._expressions(name) for name in values}
        for line in reversed(self.program.lines):
            for start in values:
                name = activation_named(expressions[start].get(line.name, ""))
                between = {v for v in self.above[line.name] if v in expressions[start]} - {start, line.name}
                if name is None or line.name in inner or line.op in _VIEWS or not self._is_closed(between, line.name, start):
                    continue
                found[line.name] = name
                inner |= between
                break
        return found, inner

    def _is_closed(self, between: set[str], last: str, start: str) -> bool:
        """Whether nobody else reads, or gets, what is between a value and a function of it."""
        own = {name for name in between if self.views[name] != start}
        return not any(name.startswith("o") for name in own) and all(
            user.name in between or user.name == last for name in own for user in self._users(self.views[name])
        )

    def _expressions(self, start: str) -> dict[str, str]:
        """Values that depend on one alone, as expressions of it, which is `x`."""
        known = {start: "x"}
        for line in self.program.lines:
            if line.operands and all(name in known for name in line.operands):
                text = known[line.operands[0]] if line.op in _VIEWS else _spelled(line, known)
                if len(text) <= _MAX_EXPRESSION:
                    known[line.name] = text
        return known


def _spelled(line: Line, known: Mapping[str, str]) -> str:
    arguments = [known[a] if isinstance(a, str) and is_operand(a) else spell_number(a) for a in line.arguments]
    if line.op == "gelu":
        arguments = [arguments[0], *(["approximate=tanh"] if arguments[1] == "tanh" else [])]
    return spell_call(line.op, *arguments)


def _shape(line: Line, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Of what a line makes."""
    given = [shapes[name] for name in line.operands]
    sizes: list[Argument] = [a for a in line.arguments if isinstance(a, tuple)]
    if sizes:  # reshape, full
        return tuple(sizes[0])  # type: ignore[arg-type]
    if line.op == "t":
        return given[0][::-1]
    if line.op in GEMMS:
        return (*given[-2][:-1], given[-1][-1])
    if line.op in REDUCTIONS:
        return (*given[0][:-1], 1)
    backwards = itertools.zip_longest(*(shape[::-1] for shape in given), fillvalue=1)
    return tuple(max(dimension) for dimension in backwards)[::-1]


def _joined(words: Iterable[str]) -> str:
    """`add · rms_norm`; the middle of a long chain is left out."""
    runs = [(word, len(list(run))) for word, run in itertools.groupby(_with_softmax(list(words)))]
    said = [word if count == 1 else f"{count} {word}" for word, count in runs]
    if len(said) > _MAX_WORDS:
        said = [*said[: _MAX_WORDS - 2], "…", said[-1]]
    return " · ".join(said)


def _with_softmax(words: Sequence[str]) -> list[str]:
    found = list(words)
    for at in range(len(found)):
        for softmax in _SOFTMAXES:
            if tuple(found[at : at + len(softmax)]) == softmax:
                return [*found[:at], "softmax", *_with_softmax(found[at + len(softmax) :])]
    return found


def _with_epilogue(text: str, words: Sequence[str]) -> str:
    """`product + bias → relu + residual`."""
    chain: list[str] = []
    for word in (*words, ""):
        if word in ("bias", "residual", ""):
            text = f"{text} → {_joined(chain)}" if chain else text
            text = f"{text} + {word}" if word else text
            chain = []
        else:
            chain.append(word)
    return text
