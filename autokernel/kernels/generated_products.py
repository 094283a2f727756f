"""Triton source for programs with matrix products: tiles, the loop over K with the prologue in it, and the epilogue."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autokernel.kernels.generated_config import ProductsConfig
from autokernel.kernels.generated_ops import rounded
from autokernel.kernels.generated_source import Columns, Scope, Writer, indented, kernel_source, products_of
from autokernel.kernels.launch import AHEAD
from autokernel.ops.program import Line, Program
from autokernel.ops.row_scale import RowScale, row_scale
from autokernel.records import TensorSpec

_COLUMNS = "n = n_at[None, :]"
_STATISTICS_BYTES = 98304  # of shared memory, for rows that are read ahead; the loop over K has it afterwards


@dataclass(frozen=True, slots=True)
class ProductsSource:
    """A kernel for products: its text, its tiles, and the fp32 elements that programs with parts of K leave for each other.

    `weights` are the inputs that it can read before it waits for the kernel in front of it, with AHEAD; none, if it cannot.
    """

    name: str
    source: str
    num_tiles: int
    part_elements: int
    weights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Products that are tiles of one program: they end in common outputs. Of batches, all are as large."""

    products: tuple[Line, ...]
    outputs: tuple[str, ...]
    columns: int
    batch: int


def products_source(
    program: Program, results: Mapping[str, TensorSpec], rows: int, depth: int, config: ProductsConfig
) -> ProductsSource:
    """The kernel of a program."""
    groups = groups_of(program, results)
    tiles_m = -(-rows // config.block_m)
    size = config.block_m * config.block_n
    names = [*program.inputs, *program.outputs, *(("parts", "counters") if config.split_k > 1 else ())]
    ahead = config.mode == "vector" and config.split_k == 1 and depth % config.block_k == 0
    parameters = [*names, f"{AHEAD}: tl.constexpr"] if ahead else names
    arguments = [*names, AHEAD] if ahead else names
    parts, body = [], ["program = tl.program_id(0)"]
    weights: list[str] = []
    before = part_before = 0
    for number, group in enumerate(groups):
        tiles = group.batch * tiles_m * -(-group.columns // config.block_n)
        section = _Section(program, results, rows, depth, config, group, tiles_m, ahead)
        lines = section.lines(before, part_before)
        parts.append(f"@triton.jit\ndef _part{number}(program, {', '.join(parameters)}):\n{indented(lines)}")
        call = f"_part{number}(program - {before * config.split_k}, {', '.join(arguments)})"
        weights += section.weights() if ahead else ()
        if len(groups) == 1:
            body.append(call)
        elif number == len(groups) - 1:
            body += ["else:", f"    {call}"]
        else:
            body += [f"{'el' if number else ''}if program < {(before + tiles) * config.split_k}:", f"    {call}"]
        before += tiles
        part_before += tiles * len(group.products) * config.split_k * size
    name, source = kernel_source(indented(body), parameters, "\n\n".join(parts))
    return ProductsSource(name, source, before, part_before, tuple(dict.fromkeys(weights)))


def groups_of(program: Program, results: Mapping[str, TensorSpec]) -> list[Group]:
    """The products by the outputs that they end in."""
    products = products_of(program)
    behind = {
        output: {line.name for line in program.behind(output)} & {line.name for line in products} for output in program.outputs
    }
    sets: list[set[str]] = []
    for needed in behind.values():
        joined = [other for other in sets if other & needed]
        sets = [other for other in sets if not other & needed] + [set().union(needed, *joined)]
    found = []
    for members in sets:
        lines = tuple(line for line in products if line.name in members)
        outputs = tuple(output for output in program.outputs if behind[output] & members)
        if not lines:
            raise ValueError(f"every output of generated_mm comes from a product; {', '.join(outputs)} does not")
        *batch, _, columns = results[lines[0].name].shape
        found.append(Group(lines, outputs, columns, math.prod(batch)))
    return found


def _reads_input(line: str) -> bool:
    """Whether a line of the epilogue needs nothing that comes before it, so that it can be on its way during the products."""
    return line.startswith("v_i") and " = tl.load(i" in line


class _Section:
    """The code of one group's tiles."""

    def __init__(
        self,
        program: Program,
        results: Mapping[str, TensorSpec],
        rows: int,
        depth: int,
        config: ProductsConfig,
        group: Group,
        tiles_m: int,
        ahead: bool,
    ) -> None:
        self.writer = Writer(program, results, group.batch * rows, config.block_m, group.batch)
        self.results, self.config, self.group, self.tiles_m = results, config, group, tiles_m
        self.rows, self.depth, self.ahead = rows, depth, ahead
        self.left = str(group.products[0].arguments[-2])
        # one row is read once: the products begin at once, and are multiplied by its scale when they are there
        self.scale = row_scale(program, results) if config.mode == "vector" and config.split_k == 1 else None
        self.statistics = self.writer.statistics({self.scale.number}) if self.scale is not None else []
        if self.scale is not None:
            self.writer.leave_out(self.scale)
        self.dtype = results[self.left].dtype
        self.k = Columns("k", depth, config.block_k)
        self.n = Columns("n", group.columns, config.block_n)

    def lines(self, tiles_before: int, parts_before: int) -> list[str]:
        """The body of the function that computes a tile."""
        config, at = self.config, "tile"
        lines = [f"tile = program // {config.split_k}" if config.split_k > 1 else "tile = program"]
        row = f"tl.minimum(m, {self.rows - 1})" if self.rows % config.block_m else "m"
        if self.group.batch > 1:
            tiles = self.tiles_m * -(-self.group.columns // config.block_n)
            lines += [f"batch = tile // {tiles}", f"at = tile % {tiles}"]
            at, row = "at", f"batch * {self.rows} + {row}"
        lines += [
            f"m = ({at} % {self.tiles_m}) * {config.block_m} + tl.arange(0, {config.block_m})[:, None]",
            f"row = {row}",
            f"n_at = ({at} // {self.tiles_m}) * {config.block_n} + tl.arange(0, {config.block_n})",
            # columns that are not there are read from the last one, and never stored
            f"n_read = tl.minimum(n_at, {self.group.columns - 1})" if self.n.ragged else "n_read = n_at",
        ]
        if self.ahead:
            lines += self._weights_ahead()
        if self.scale is None:
            smem_bytes = _STATISTICS_BYTES if self.rows > 1 else 0
            self.writer.walk({self.left}, Columns("k", self.depth, self.config.block_s), lines, smem_bytes)
        product: list[str] = []
        self._product(product)
        if config.split_k > 1:
            return [*lines, *product, *self._joined(tiles_before, parts_before)]
        epilogue = self._epilogue()
        early = [line for line in epilogue if _reads_input(line)] if config.mode == "vector" else []
        return [*lines, _COLUMNS, *early, *product, *(line for line in epilogue if line not in early)]

    def weights(self) -> list[str]:
        """The right matrices, as inputs of the program."""
        return [self._source(str(line.arguments[-1])) for line in self.group.products]

    def _weights_ahead(self) -> list[str]:
        """The first tiles of the right matrices, and the wait for the kernel in front: everything else comes behind it."""
        block = self.config.block_k
        lines = [f"a_k_at = tl.arange(0, {block})", "a_k = a_k_at[None, :]"]
        lines += [f"a_w{number} = {self._weight(line, 'a_k')}" for number, line in enumerate(self.group.products)]
        return [f"if {AHEAD}:", *(f"    {line}" for line in (*lines, "tl.extra.cuda.gdc_wait()"))]

    def _product_ahead(self) -> list[str]:
        """The first step of the loop over K, with weights that are there already."""
        scope = Scope(Columns("a_k", self.depth, self.config.block_k), prefix="a_")
        left = self.writer.tile(self.left, (), scope)
        for statistic in self.statistics:
            self.writer.join(statistic, scope)
        lines = [*scope.lines, f"a_x = {self._left(left)}"]
        for number, line in enumerate(self.group.products):
            lines += self._step(number, line, "a_")
        return [f"if {AHEAD}:", *(f"    {line}" for line in lines)]

    def _left(self, tile: str) -> str:
        """The left matrix's tile, rounded to the products' dtype; in mode vector it stays in fp32."""
        if self.scale is not None:
            return self._whole(tile)
        return f"{self._whole(tile)}.to(tl.{self.dtype}){'.to(tl.float32)' if self.config.mode == 'vector' else ''}"

    def _whole(self, tile: str) -> str:
        return f"tl.broadcast_to({tile}, [{self.config.block_m}, {self.config.block_k}])"

    def _product(self, lines: list[str]) -> None:
        """Loop over K: `acc0`, `acc1`, ... are the products' tiles, [block_m, block_n]."""
        config, scope = self.config, Scope(self.k)
        for number, line in enumerate(self.group.products):
            lines.append(f"acc{number} = tl.zeros({self._accumulator(line)}, tl.float32)")
        for statistic in self.statistics:
            self.writer.begin(statistic, self.k, lines)
        first, end = "0", str(self.depth)
        if self.ahead:
            lines += self._product_ahead()
            first = f"{AHEAD} * {config.block_k}"
        if config.split_k > 1:
            share = -(-self.depth // (config.block_k * config.split_k)) * config.block_k
            lines.append(f"first = (program % {config.split_k}) * {share}")
            first, end = "first", f"tl.minimum(first + {share}, {self.depth})"
        left = self._inside(self.writer.tile(self.left, (), scope))
        for statistic in self.statistics:
            self.writer.join(statistic, scope)
        scope.lines.append(f"x = {self._left(left)}")
        self._loop(scope, first, end, lines)
        for number, line in enumerate(self.group.products):
            if config.mode == "vector":
                lines.append(f"acc{number} = {self._added_up(f'acc{number}', line)}")
            elif config.mode == "swap":
                lines.append(f"acc{number} = tl.trans(acc{number})")
        if self.scale is not None:
            lines += self._scaled(self.scale)

    def _inside(self, tile: str) -> str:
        """The tile with zeros where K has ended."""
        return f"tl.where({self.k.inside}, {tile}, 0.0)" if self.k.ragged else tile

    def _loop(self, scope: Scope, first: str, end: str, lines: list[str], into: str = "acc") -> None:
        """Multiply the left matrix's tiles, which the scope's lines compute, and add them up."""
        for number, line in enumerate(self.group.products):
            weight = f"{scope.prefix}w{number} = {self._weight(line, 'k')}"
            scope.lines += [weight, *self._step(number, line, scope.prefix, into)]
        # where no product tells Triton to read ahead
        stages = f", num_stages={self.config.num_stages}" if self.config.mode == "vector" else ""
        lines.append(f"for start in tl.range({first}, {end}, {self.config.block_k}{stages}):")
        lines.append(f"    k_at = start + tl.arange(0, {self.config.block_k})")
        lines.append("    k = k_at[None, :]")
        lines += [f"    {text}" for text in scope.lines]

    def _added_up(self, tile: str, line: Line) -> str:
        """In mode vector: the products from what the threads have of them."""
        return f"tl.sum({tile}, {1 if self._along_k(line) else 0})[None, :]"

    def _scaled(self, scale: RowScale) -> list[str]:
        """The products times what was left out.

        Where that is 0 or infinite, as for numbers whose squares are too large, each element by itself decides what comes of
        it: such a row is multiplied once more, as the program says.
        """
        scope = Scope(self.n)
        for statistic in self.statistics:
            self.writer.finish(statistic, scope.lines)
        by = self.writer.tile(scale.number, (), scope)
        lines, products = scope.lines, list(enumerate(self.group.products))
        lines += [f"acc{number} = acc{number} * {by}" for number, _ in products]
        lines.append(f'if tl.max((({by} == 0) | (tl.abs({by}) == float("inf"))).to(tl.int32)) > 0:')
        plain = Writer(self.writer.program, self.results, self.writer.rows, self.config.block_m, self.writer.batch)
        plain.fixed[scale.number] = by
        again = Scope(self.k, prefix="z_")
        tile = self._inside(plain.tile(self.left, (), again))
        again.lines.append(f"z_x = {self._whole(tile)}.to(tl.{self.dtype}).to(tl.float32)")
        inner = [f"z_acc{number} = tl.zeros({self._accumulator(line)}, tl.float32)" for number, line in products]
        self._loop(again, "0", str(self.depth), inner, "z_acc")
        inner += [f"acc{number} = {self._added_up(f'z_acc{number}', line)}" for number, line in products]
        return [*lines, *(f"    {text}" for text in inner)]

    def _accumulator(self, line: Line) -> str:
        config = self.config
        if config.mode == "rows":
            return f"[{config.block_m}, {config.block_n}]"
        if config.mode == "swap":
            return f"[{config.block_n}, {config.block_m}]"
        sizes = (config.block_n, config.block_k) if self._along_k(line) else (config.block_k, config.block_n)
        return f"[{sizes[0]}, {sizes[1]}]"

    def _along_k(self, line: Line) -> bool:
        """Whether the right matrix is contiguous along K: its tile is read as [block_n, block_k] then."""
        step_k, step_n = self.results[str(line.arguments[-1])].stride[-2:]
        return step_k <= step_n

    def _weight(self, line: Line, columns: str) -> str:
        """The load of a tile of a right matrix, at these numbers of K: [1, block_k], and without the first dimension `_at`."""
        right = str(line.arguments[-1])
        *step_batch, step_k, step_n = self.results[right].stride
        source = self._source(right)
        along = self._along_k(line)
        n, k = ("n_read[:, None]", columns) if along else ("n_read[None, :]", f"{columns}_at[:, None]")
        where = " + ".join(text if step == 1 else f"{text} * {step}" for text, step in ((n, step_n), (k, step_k)))
        where += f" + batch * {step_batch[0]}" if self.group.batch > 1 and step_batch[0] else ""
        guard = f", mask={k} < {self.depth}, other=0.0" if self.k.ragged else ""
        return f'tl.load({source} + {where}{guard}, eviction_policy="evict_first")'

    def _step(self, number: int, line: Line, prefix: str, into: str = "acc") -> list[str]:
        """The product of a right matrix's tile with the left one's; `prefix` is that of their variables."""
        along = self._along_k(line)
        if self.config.mode == "vector":
            x = f"{prefix}x" if along else f"tl.trans({prefix}x)"
            return [f"{into}{number} += {prefix}w{number}.to(tl.float32) * {x}"]
        w = f"w{number}" if along == (self.config.mode == "swap") else f"tl.trans(w{number})"
        pair = f"{w}, tl.trans(x)" if self.config.mode == "swap" else f"x, {w}"
        if self.dtype == "float32":
            # Each block of K is added up by itself, as the library's kernels do, for one long chain of additions is less exact
            # than those. Triton would turn this into the long chain again, but for the last argument, which says nothing else.
            precision = f'input_precision="{self.config.precision}"'
            return [f"acc{number} += tl.dot({pair}, {precision}, max_num_imprecise_acc=1)"]
        return [f"acc{number} = tl.dot({pair}, acc{number})"]

    def _source(self, right: str) -> str:
        """The input that a right matrix is, or is the transposition of."""
        if right.startswith("i"):
            return right
        line = self.writer.program.line(right)
        source = str(line.arguments[0])
        if line.op != "t" or not source.startswith("i"):
            raise ValueError(f"a right matrix is an input or its transposition; {line} is not")
        return source

    def _epilogue(self) -> list[str]:
        """From the accumulators to the stored outputs."""
        scope = Scope(self.n)
        for number, line in enumerate(self.group.products):
            text = f"acc{number}"
            if line.op in ("addmm", "baddbmm"):
                frame = self.results[line.name].shape[:-1]
                text = f"{text} + {self.writer.tile(str(line.arguments[0]), frame, scope)}"
            scope.lines.append(f"p{number} = {rounded(text, line.op, self.results[line.name].dtype)}")
            self.writer.fixed[line.name] = f"p{number}"
        if self.writer.program.row_epilogue:
            self.writer.at_once(set(self.group.outputs), scope)
        for output in self.group.outputs:
            self.writer.store(output, scope)
        return scope.lines

    def _joined(self, tiles_before: int, parts_before: int) -> list[str]:
        """Parts of K: each program leaves its own and counts itself; the last one adds them in order and goes on."""
        config, count = self.config, len(self.group.products)
        size = config.block_m * config.block_n
        share = count * size
        place = f"tl.arange(0, {config.block_m})[:, None] * {config.block_n} + tl.arange(0, {config.block_n})[None, :]"
        lines = [f"place = {place}", f"mine = parts + {parts_before} + program * {share}"]
        lines += [f"tl.store(mine + {number * size} + place, acc{number})" for number in range(count)]
        # the barrier orders the stores of all threads before the count, which the others acquire
        lines += [
            "tl.debug_barrier()",
            f'done = tl.atomic_add(counters + {tiles_before} + tile, 1, sem="acq_rel") + 1',
            f"if done == {config.split_k}:",
        ]
        inner = []
        for number in range(count):
            inner.append(f"acc{number} = tl.zeros([{config.block_m}, {config.block_n}], tl.float32)")
        inner += [f"for other in range({config.split_k}):"]
        theirs = f"parts + {parts_before} + (tile * {config.split_k} + other) * {share}"
        inner += [
            f'    acc{number} += tl.load({theirs} + {number * size} + place, cache_modifier=".cg")' for number in range(count)
        ]
        inner += [f"tl.store(counters + {tiles_before} + tile, 0)", _COLUMNS, *self._epilogue()]
        return [*lines, *(f"    {line}" for line in inner)]
