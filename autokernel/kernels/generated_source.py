"""Triton source for a program: the same text for the same problem and config, with all sizes and strides in it.

A program of rows has one Triton program per block of rows, which holds whole rows in registers, or walks over them once for
every reduction that needs another's result and once for the outputs. A program with matrix products has one per tile of a
result: it walks over its rows of the left matrix for the statistics that the prologue needs, then over K, where it makes
every tile of the left matrix in registers, exactly rounded as the graph rounds it; the epilogue is computed on the tile of
the product, and what is stored is the region's result. Where the epilogue reduces rows, the tile has whole ones. Products
that share the left matrix share the launch; those that share an output share the tile as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autokernel.kernels.generated_ops import (
    Reduction,
    expression,
    helpers_of,
    largest_of_row,
    number,
    rounded,
    sum_of_row,
)
from autokernel.ops.program import COMPARISONS, GEMMS, REDUCTIONS, Line, Program
from autokernel.ops.row_scale import RowScale
from autokernel.records import DTYPE_BYTES, TensorSpec, digest_of

_TRUTHS = (*COMPARISONS, "isnan", "logical_not")


@dataclass(frozen=True, slots=True)
class Columns:
    """The second dimension of tiles: its variable, how many there are, and how many a tile has."""

    name: str
    count: int
    block: int

    @property
    def ragged(self) -> bool:
        return self.count % self.block != 0

    @property
    def inside(self) -> str:
        return f"{self.name} < {self.count}"


@dataclass(frozen=True, slots=True)
class Statistic:
    """A number per row. `level` says how many walks over the row come before the one that it is found in.

    "softmax" is two numbers that one walk finds: the largest one, `name.0`, and the sum of exp(x - largest), `name.1`.
    """

    name: str
    source: str
    kind: str  # "sum", "mean", "amax", "var", "softmax"
    level: int
    divisor: float = 1.0
    center: str = ""  # of "var": the statistic that is subtracted first, in fp32


@dataclass(slots=True)
class Scope:
    """Lines of one block of code, and the tiles that are known in it, in variables that begin with `prefix`."""

    columns: Columns
    prefix: str = ""
    known: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


class Writer:
    """Writes tiles of a program's values into scopes, each when it is first needed."""

    def __init__(
        self, program: Program, results: Mapping[str, TensorSpec], rows: int, block_m: int, batch: int = 1
    ) -> None:  # fmt: skip
        self.program = program
        self.results = results
        self.rows = rows  # of all of the batch, numbered by `row`; those of one part of it by `m`
        self.batch = batch
        self.block_m = block_m
        self.fixed: dict[str, str] = {}  # known everywhere: statistics and products
        self._centers: dict[str, str] = {}  # means that are subtracted for a variance: in fp32, whatever the line's dtype is
        self._lines = {line.name: line for line in program.lines}
        self._wide = _wide_values(program, results)
        self._exact: frozenset[str] = frozenset()  # lines that are not rounded

    def leave_out(self, scale: RowScale) -> None:
        """Compute rows without what they are multiplied by. Nothing is rounded then, for they may have any size."""
        self._lines[scale.line] = Line(scale.line, "clone", (scale.kept,))
        self._exact = scale.path

    @property
    def row_block(self) -> int:
        """Rows of a tile that differ."""
        return self.block_m if self.rows > 1 else 1

    def tile(self, name: str, frame: tuple[int, ...], scope: Scope) -> str:
        """The variable that holds a value's tile, written into the scope if it is not known there.

        Args:
            name: of the value.
            frame: the sizes that number the rows where it is used, for a value that has not all of them itself.
            scope: where it is needed.
        """
        if name in self.fixed:
            return self.fixed[name]
        shape = self.results[name].shape
        if math.prod(shape[:-1]) == self.rows and shape:
            frame = shape[:-1]
        key = (name, () if _no_rows(shape) else frame)
        if key not in scope.known:
            text = self._load(name, frame, scope) if name.startswith("i") else self._computed(self._lines[name], frame, scope)
            variable = f"{scope.prefix}v_{name}"
            if variable in scope.known.values():
                variable += f"_{len(scope.known)}"
            scope.lines.append(f"{variable} = {text}")
            scope.known[key] = variable
        return scope.known[key]

    def _computed(self, line: Line, frame: tuple[int, ...], scope: Scope) -> str:
        dtype = self.results[line.name].dtype
        if line.op == "full":
            return number(line.arguments[1], dtype)  # type: ignore[arg-type]
        if line.op == "getitem":
            return self.fixed[f"{line.arguments[0]}.{line.arguments[1]}"]
        operands: list[str] = []
        for argument in line.arguments:
            if isinstance(argument, str) and argument in self.results:
                tile, own = self.tile(argument, frame, scope), self.results[argument].dtype
                wants_float = line.op in COMPARISONS or (dtype != "bool" and not (line.op == "where" and not operands))
                operands.append(f"{tile}.to(tl.float32)" if own == "bool" and wants_float else tile)
            elif not isinstance(argument, (str, tuple)) and line.op != "pow":
                # torch compares with a number as the other operand's dtype holds it, and computes with it as it is
                compared = self.results[line.operands[0]].dtype if line.op in COMPARISONS and line.operands else "float32"
                operands.append(number(argument, "float32" if compared == "bool" else compared))
        if line.op == "convert" and dtype == "bool":
            return f"{operands[0]} != 0"
        if dtype == "bool" and line.op not in (*_TRUTHS, "where", "reshape", "clone"):
            raise ValueError(f"generated kernels have no code for {line.op} of truth values")
        extra = line.arguments[1] if line.op in ("pow", "gelu") else None
        text = expression(line.op, operands, extra)
        return text if line.name in self._exact else rounded(text, line.op, dtype)

    def _load(self, name: str, frame: tuple[int, ...], scope: Scope) -> str:
        spec = self.results[name]
        where = [*row_terms(spec, frame, "row"), *column_terms(spec, scope.columns)]
        guard = ""
        if scope.columns.ragged and column_terms(spec, scope.columns):
            guard = f", mask={scope.columns.inside}, other=0"
        if not where:  # one element
            return f"tl.load({name} + tl.zeros([1, 1], tl.int32)){_as_computed(spec.dtype)}"
        return f"tl.load({name} + {' + '.join(where)}{guard}){_as_computed(spec.dtype)}"

    def store(self, name: str, scope: Scope) -> None:
        """Write an output's tile to memory."""
        spec = self.results[name]
        tile = self.tile(name, spec.shape[:-1], scope)
        rows = row_terms(spec, spec.shape[:-1], "m" if self.batch == 1 else "row") or ["m * 0"]
        columns = column_terms(spec, scope.columns)
        guards = []
        count = self.rows // self.batch
        if count % self.block_m:
            guards.append(f"(m < {count})")
        if scope.columns.ragged and columns:
            guards.append(f"({scope.columns.inside})")
        width = scope.columns.block if columns else 1
        tile = f"tl.broadcast_to({tile}, [{self.block_m}, {width}])"
        value = tile if spec.dtype == "bool" else f"{tile}.to(tl.{spec.dtype})"
        mask = f", mask={' & '.join(guards)}" if guards else ""
        scope.lines.append(f"tl.store({name} + {' + '.join([*rows, *columns])}, {value}{mask})")

    # Statistics

    def statistics(self, names: set[str]) -> list[Statistic]:
        """Those that values need, in the order in which they can be found."""
        needed = {line.name for name in names for line in self.program.behind(name)}
        found: dict[str, list[Statistic]] = {}
        for line in self.program.lines:
            if line.op not in REDUCTIONS or line.name not in needed:
                continue
            source = str(line.arguments[0])
            before = {other.name for other in self.program.behind(source)}
            level = max((s.level + 1 for name, parts in found.items() if name in before for s in parts), default=0)
            columns = self.results[source].shape[-1]
            if line.op == "var_mean":
                mean = Statistic(f"{line.name}.1", source, "mean", level, float(columns))
                left = max(0.0, columns - float(line.arguments[1]))  # type: ignore[arg-type]
                found[line.name] = [mean, Statistic(f"{line.name}.0", source, "var", level + 1, left, mean.name)]
            else:
                kind = "softmax" if line.op == "prepare_softmax_online" else line.op
                found[line.name] = [Statistic(line.name, source, kind, level, float(columns))]
        return sorted((s for parts in found.values() for s in parts), key=lambda s: s.level)

    def walk(self, names: set[str], columns: Columns, lines: list[str], smem_bytes: int = 0) -> None:
        """Find the statistics in loops over the row, those of one level in one loop.

        Args:
            names: of the values that need them.
            columns: of a tile.
            lines: what the loops are added to.
            smem_bytes: shared memory for tiles that are read ahead.
        """
        statistics = self.statistics(names)
        for level in sorted({s.level for s in statistics}):
            found = [s for s in statistics if s.level == level]
            scope = Scope(columns)
            for statistic in found:
                self.begin(statistic, columns, lines)
                self.join(statistic, scope)
            stages = self._stages(scope, smem_bytes)
            ahead = f", num_stages={stages}" if stages > 1 else ""
            lines.append(f"for start in tl.range(0, {columns.count}, {columns.block}{ahead}):")
            lines.append(f"    {columns.name} = start + tl.arange(0, {columns.block})[None, :]")
            lines += [f"    {text}" for text in scope.lines]
            for statistic in found:
                self.finish(statistic, lines)

    def begin(self, statistic: Statistic, columns: Columns, lines: list[str]) -> None:
        """What it is before any tile of the row."""
        start, size = reduction_of(statistic).start, f"[{self.row_block}, {columns.block}]"
        lines.append(f"{_variable(statistic)}_sum = tl.full({size}, {start}, tl.float32)")
        if statistic.kind == "softmax":
            lines.append(f"{_variable(statistic)}_exp = tl.zeros({size}, tl.float32)")

    def join(self, statistic: Statistic, scope: Scope) -> None:
        """With the scope's tile."""
        running = f"{_variable(statistic)}_sum"
        value = self._guarded(statistic, scope)
        if statistic.kind == "softmax":  # of what was the largest one until now
            total = f"{_variable(statistic)}_exp"
            scope.lines.append(f"{total} = _exponentials({total}, {running}, {value})")
        scope.lines.append(f"{running} = {reduction_of(statistic).join(running, value)}")

    def finish(self, statistic: Statistic, lines: list[str]) -> None:
        """Behind the last tile; it is known everywhere then."""
        running = f"{_variable(statistic)}_sum"
        if statistic.kind == "softmax":
            self._finish_softmax(statistic, running, lines, f"{_variable(statistic)}_exp * ")
        else:
            self._finish(statistic, running, lines)

    def _stages(self, scope: Scope, smem_bytes: int) -> int:
        """Tiles of each operand that fit into so much shared memory, 3 at most: loads then hide most of each other's time."""
        operands = [self.results[name] for name, frame in scope.known if name.startswith("i") and frame]
        size = sum(DTYPE_BYTES[spec.dtype] for spec in operands) * self.row_block * scope.columns.block
        return min(3, smem_bytes // size) if size else 0

    def at_once(self, names: set[str], scope: Scope) -> None:
        """Find the statistics of rows that a tile holds whole, without those that are known."""
        for statistic in self.statistics(names):
            if statistic.name in self.fixed or f"{statistic.name}.0" in self.fixed:
                continue
            value = self._guarded(statistic, scope)
            if statistic.kind == "softmax":
                self._finish_softmax(statistic, value, scope.lines)
            else:
                self._finish(statistic, value, scope.lines)

    def _guarded(self, statistic: Statistic, scope: Scope) -> str:
        """The tile that is reduced, with what changes nothing in the columns that are not there."""
        value = self.tile(statistic.source, (), scope)
        if statistic.kind == "var":
            value = f"({value} - {self._centers[statistic.center]})"
            value = f"{value} * {value}"
        if scope.columns.ragged:
            value = f"tl.where({scope.columns.inside}, {value}, {reduction_of(statistic).start})"
        elif statistic.source not in self._wide:
            value = f"{value} + tl.zeros([1, {scope.columns.block}], tl.float32)"
        return f"({value})"

    def _finish(self, statistic: Statistic, running: str, lines: list[str]) -> None:
        variable, line = _variable(statistic), self._lines[statistic.name.partition(".")[0]]
        text = reduction_of(statistic).finish(running)
        if statistic.kind in ("mean", "var"):
            text = f"{text} / {statistic.divisor!r}" if statistic.divisor else f'{text} * float("inf")'
        dtype = self.results[line.name].dtype
        self._centers[statistic.name] = variable
        if line.op == "var_mean" and statistic.kind == "mean" and rounded(text, line.op, dtype) != text:
            center = f"{variable}_fp32"
            lines.append(f"{center} = {text}")
            self._centers[statistic.name] = text = center
        lines.append(f"{variable} = {rounded(text, line.op, dtype)}")
        self.fixed[statistic.name] = variable

    def _finish_softmax(self, statistic: Statistic, largest: str, lines: list[str], times: str = "") -> None:
        """The largest number of a row and the sum of exponentials; NaN where all of a row is -inf, as in eager PyTorch.

        Args:
            statistic: of kind "softmax".
            largest: the tile, or what each lane has seen of the row.
            lines: what is added to.
            times: what stands before the exponential of a lane.
        """
        variable, dtype = _variable(statistic), self.results[statistic.name].dtype
        exponentials = f"{times}tl.exp({largest} - {variable}_0)"
        lines.append(f"{variable}_0 = {largest_of_row().finish(largest)}")  # a number of the row, which needs no rounding
        lines.append(f"{variable}_1 = {rounded(sum_of_row().finish(exponentials), 'sum', dtype)}")
        self.fixed[f"{statistic.name}.0"], self.fixed[f"{statistic.name}.1"] = f"{variable}_0", f"{variable}_1"


def reduction_of(statistic: Statistic) -> Reduction:
    """How the statistic's tiles are joined."""
    return largest_of_row() if statistic.kind in ("amax", "softmax") else sum_of_row()


def row_terms(spec: TensorSpec, frame: tuple[int, ...], row: str) -> list[str]:
    """What a row's number adds to an offset: the leading dimensions are the last of `frame`, or broadcast to them."""
    lead = list(zip(spec.shape[:-1], spec.stride[:-1], strict=True))
    sizes = list(frame)[len(frame) - len(lead) :]
    strides = [stride if size > 1 else 0 for size, stride in lead]
    # neighbours that are one dimension in memory are one here
    merged: list[tuple[int, int, int]] = []  # size, stride, rows behind
    behind = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if merged and stride == merged[-1][1] * merged[-1][0]:
                merged[-1] = (merged[-1][0] * size, merged[-1][1], merged[-1][2])
            else:
                merged.append((size, stride, behind))
        behind *= size
    total = math.prod(frame)
    terms = []
    for size, stride, after in reversed(merged):
        if stride == 0:
            continue
        place = row if after == 1 else f"({row} // {after})"
        place = place if after * size >= total else f"({place} % {size})"
        terms.append(place if stride == 1 else f"{place} * {stride}")
    return terms


def column_terms(spec: TensorSpec, columns: Columns) -> list[str]:
    """What a column's number adds to an offset."""
    if not spec.shape or spec.shape[-1] == 1 or spec.stride[-1] == 0:
        return []
    return [columns.name if spec.stride[-1] == 1 else f"{columns.name} * {spec.stride[-1]}"]


def kernel_source(body: str, names: Sequence[str], parts: str = "") -> tuple[str, str]:
    """(name, source) of a kernel with these parameters, and the functions that it calls."""
    parameters = ", ".join(names)
    helpers = helpers_of(body + parts)
    name = f"generated_{digest_of([helpers, parts, parameters, body], 12)}"
    header = "import triton\nimport triton.language as tl\n"
    pieces = [header, helpers, parts, f"@triton.jit\ndef {name}({parameters}):\n{body}"]
    return name, "\n\n".join(piece.rstrip("\n") for piece in pieces if piece) + "\n"


def indented(lines: list[str], by: int = 1) -> str:
    """Lines as a block of code."""
    return "".join(f"{'    ' * by}{line}\n" for line in lines)


def products_of(program: Program) -> list[Line]:
    """The matrix products, in order."""
    return [line for line in program.lines if line.op in GEMMS]


def _wide_values(program: Program, results: Mapping[str, TensorSpec]) -> frozenset[str]:
    """Those whose tiles have an element for each column, and not one that stands for all of a row."""
    found = {name for name in program.inputs if column_terms(results[name], Columns("c", 0, 1))}
    for line in program.lines:
        if line.op in GEMMS or (line.op not in REDUCTIONS and found.intersection(line.operands)):
            found.add(line.name)
    return frozenset(found)


def _no_rows(shape: tuple[int, ...]) -> bool:
    return math.prod(shape[:-1]) == 1


def _as_computed(dtype: str) -> str:
    return " != 0" if dtype == "bool" else ".to(tl.float32)" if dtype != "float32" else ""


def _variable(statistic: Statistic) -> str:
    return f"s_{statistic.name.replace('.', '_')}"
