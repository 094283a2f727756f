"""A region's program: what its nodes compute, line by line, as text that is read, run and compiled to a kernel.

    t0 = convert(i0, float32); t1 = pow(t0, 2); t2 = mean(t1); ...; t9 = mm(t8, i3); o0 = mul(t9, i4)

A line is one ATen call of the graph in the graph's own dtype, implicit promotion included. Operands are inputs (`i0`),
earlier lines (`t0`) and outputs (`o0`, which later lines may read as well), numbers, dtypes and shapes. Names follow the
order in which values are needed, so that equal regions have equal text. Reductions are over the last dimension and keep it;
`prepare_softmax_online`, which is Inductor's own, makes a row's largest number and the sum of exp(x - largest).
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch

Argument = str | int | float | bool | tuple[int, ...]  # a string is an operand or a dtype

_OPERAND = re.compile(r"[ito]\d+")
_NUMBERS = {"inf": float("inf"), "nan": float("nan")}

UNARY: tuple[str, ...] = (
    "neg", "exp", "exp2", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "erf", "relu", "silu", "abs", "sin", "cos",
    "isnan", "logical_not",
)  # fmt: skip
COMPARISONS: tuple[str, ...] = ("eq", "ne", "lt", "le", "gt", "ge")
BINARY: tuple[str, ...] = ("add", "sub", "mul", "div", "maximum", "minimum", *COMPARISONS)
PAIRS: tuple[str, ...] = ("var_mean", "prepare_softmax_online")  # two results, each had by `getitem`
REDUCTIONS: tuple[str, ...] = ("sum", "mean", "amax", *PAIRS)
GEMMS: tuple[str, ...] = ("mm", "addmm", "bmm", "baddbmm")
VIEWS: tuple[str, ...] = ("reshape", "t", "getitem")
# name -> numbers of arguments
ARITY: Mapping[str, int] = {
    **dict.fromkeys((*UNARY, "clone", "t", "sum", "mean", "amax", "prepare_softmax_online"), 1),
    **dict.fromkeys((*BINARY, "pow", "gelu", "convert", "var_mean", "mm", "bmm", "reshape", "getitem"), 2),
    **dict.fromkeys(("where", "addmm", "baddbmm", "full"), 3),
}


@dataclass(frozen=True, slots=True)
class Line:
    """`name = op(arguments)`."""

    name: str
    op: str
    arguments: tuple[Argument, ...]

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the values that it reads, as often as it does."""
        return tuple(argument for argument in self.arguments if isinstance(argument, str) and is_operand(argument))

    def __str__(self) -> str:
        return f"{self.name} = {self.op}({', '.join(map(_spelled, self.arguments))})"


@dataclass(frozen=True, slots=True)
class Program:
    """Lines in an order in which they can be run."""

    lines: tuple[Line, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.lines))

    @property
    def inputs(self) -> tuple[str, ...]:
        """`i0`, `i1`, ..."""
        found = {name for line in self.lines for name in line.operands if name.startswith("i")}
        return tuple(sorted(found, key=lambda name: int(name[1:])))

    @property
    def outputs(self) -> tuple[str, ...]:
        """`o0`, `o1`, ..."""
        found = (line.name for line in self.lines if line.name.startswith("o"))
        return tuple(sorted(found, key=lambda name: int(name[1:])))

    def line(self, name: str) -> Line:
        """The line that makes a value."""
        return next(line for line in self.lines if line.name == name)

    @property
    def row_epilogue(self) -> tuple[Line, ...]:
        """Reductions that no product waits for, in a program with products: they are of rows of the result."""
        products = [line for line in self.lines if line.op in GEMMS]
        before = {line.name for product in products for line in self.behind(product.name)}
        return tuple(line for line in self.lines if products and line.op in REDUCTIONS and line.name not in before)

    def behind(self, name: str) -> tuple[Line, ...]:
        """All lines that a value depends on, its own included, in order."""
        needed = {name}
        for line in reversed(self.lines):
            if line.name in needed:
                needed |= set(line.operands)
        return tuple(line for line in self.lines if line.name in needed)

    @classmethod
    def parse(cls, text: str) -> Program:
        """The inverse of `str`.

        Raises:
            ValueError: the text is no program.
        """
        try:
            tree = ast.parse(text.replace("; ", "\n"))
        except SyntaxError as error:
            raise ValueError(f"a program has lines `name = op(arguments)` separated by `; `, not {text!r}: {error}") from None
        program = cls(tuple(_line(statement) for statement in tree.body))
        known = set(program.inputs)
        for line in program.lines:
            missing = [name for name in line.operands if name not in known]
            if missing or line.name in known:
                raise ValueError(f"a line reads what lines before it made, and makes one new value; this one does not: {line}")
            known.add(line.name)
        if not program.outputs or len(program.inputs) != len(set(program.inputs)):
            raise ValueError(f"a program has an output, o0; this one has none: {text!r}")
        return program


def is_operand(argument: object) -> bool:
    """Whether an argument of a line is the name of a value."""
    return isinstance(argument, str) and _OPERAND.fullmatch(argument) is not None


def program_of(problem: Problem) -> Program:
    """The program that a problem carries."""
    return Program.parse(str(dict(problem.scalars)["program"]))


def run(problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The program in plain torch: the ATen calls of the graph that it was taken from.

    Inputs that are wider than the problem's stay wide: conversions to narrower floats are left out, for the exact result.
    """
    specs = problem.inputs
    raised = [
        x.dtype
        for x, s in zip(inputs, specs, strict=True)
        if x.dtype.is_floating_point and x.dtype.itemsize > DTYPE_BYTES[s.dtype]
    ]
    wide = raised[0] if raised else None
    values: dict[str, Any] = {f"i{position}": value for position, value in enumerate(inputs)}
    names: list[str] = []
    for name, op, arguments in _steps(str(dict(problem.scalars)["program"])):
        given = [values[a] if isinstance(a, str) and a in values else a for a in arguments]
        values[name] = _call(op, given, wide, inputs[0].device)
        if name.startswith("o"):
            names.append(name)
    names.sort(key=lambda name: int(name[1:]))
    return tuple([values[name] for name in names])


def results_of(problem: Problem) -> dict[str, TensorSpec]:
    """What every line makes, by name, without running anything; a pair by its first result."""
    import torch

    values: dict[str, Any] = {
        f"i{position}": torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device="meta")
        for position, spec in enumerate(problem.inputs)
    }
    for line in program_of(problem).lines:
        given = [values[a] if is_operand(a) else a for a in line.arguments]  # type: ignore[index]
        values[line.name] = _call(line.op, given, None, values["i0"].device)
    found = {}
    for name, value in values.items():
        first = value[0] if isinstance(value, tuple) else value
        found[name] = TensorSpec(
            shape=tuple(first.shape), stride=tuple(first.stride()), dtype=str(first.dtype).removeprefix("torch.")
        )  # fmt: skip
    return found


@functools.lru_cache(maxsize=256)
def contracted_input(problem: Problem) -> int | None:
    """The input that becomes the left matrix of the first product: of several the largest whose rows are as long.

    None without a product, and where the matrix is an input's transpose.
    """
    program, results = program_of(problem), results_of(problem)
    product = next((line for line in program.lines if line.op in GEMMS), None)
    if product is None:
        return None
    made = {line.name: line for line in program.lines}
    name = str(product.arguments[-2])
    depth = results[name].shape[-1]
    while name in made:
        as_long = [operand for operand in made[name].operands if results[operand].shape[-1:] == (depth,)]
        if not as_long:
            return None
        name = max(as_long, key=lambda operand: results[operand].num_elements)
    return int(name[1:])


def _steps(text: str) -> tuple[tuple[str, str, tuple[Argument, ...]], ...]:
    """The lines as plain tuples: all that a tracer sees of a program."""
    return tuple((line.name, line.op, line.arguments) for line in Program.parse(text).lines)


# Dynamo runs it instead of tracing a parser.
_steps._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _call(op: str, given: list[Any], wide: torch.dtype | None, device: torch.device) -> Any:
    """One line. `wide`: what comes in is wider than the problem says, and stays so."""
    import torch

    aten = torch.ops.aten
    if op == "convert":
        dtype = getattr(torch, given[1])
        if wide is not None and dtype.is_floating_point and given[0].dtype.is_floating_point:
            return given[0]
        return torch.ops.prims.convert_element_type.default(given[0], dtype)
    if op == "full":
        dtype = getattr(torch, given[2])
        dtype = wide if wide is not None and dtype.is_floating_point else dtype
        return aten.full.default(list(given[0]), given[1], dtype=dtype, device=device)
    if op == "reshape":
        return aten.reshape.default(given[0], list(given[1]))
    if op == "t":
        return aten.permute.default(given[0], [1, 0])
    if op == "getitem":
        return given[0][given[1]]
    if op == "clone":
        return aten.clone.default(given[0], memory_format=torch.contiguous_format)
    if op == "sum":
        return aten.sum.dim_IntList(given[0], [-1], True)
    if op == "mean":
        return aten.mean.dim(given[0], [-1], True)
    if op == "amax":
        return aten.amax.default(given[0], [-1], True)
    if op == "var_mean":
        return aten.var_mean.correction(given[0], [-1], correction=given[1], keepdim=True)
    if op == "prepare_softmax_online":
        from torch._inductor.inductor_prims import prepare_softmax_online

        return prepare_softmax_online(given[0], -1)
    if op == "gelu":
        return aten.gelu.default(given[0], approximate=given[1])
    return _plain(op)(*given)


def _plain(op: str) -> Callable[..., Any]:
    """ATen's function for the lines whose arguments are its own."""
    import torch

    packet = getattr(torch.ops.aten, op)
    return packet  # type: ignore[no-any-return]


def _spelled(argument: Argument) -> str:
    if isinstance(argument, tuple):
        return f"[{', '.join(map(str, argument))}]"
    return argument if isinstance(argument, str) else repr(argument)


def _line(statement: ast.stmt) -> Line:
    if (
        not isinstance(statement, ast.Assign)
        or not isinstance(statement.targets[0], ast.Name)
        or not isinstance(statement.value, ast.Call)
        or not isinstance(statement.value.func, ast.Name)
    ):
        raise ValueError(f"a line of a program is `name = op(arguments)`, not {ast.unparse(statement)!r}")
    name, op = statement.targets[0].id, statement.value.func.id
    arguments = tuple(_argument(node) for node in statement.value.args)
    if ARITY.get(op) != len(arguments) or not re.fullmatch(r"[to]\d+", name):
        known = f"{op} takes {ARITY[op]} arguments" if op in ARITY else f"there are {', '.join(ARITY)}"
        raise ValueError(
            f"a line of a program makes t0, t1, ... or o0, o1, ... by a known op, not {ast.unparse(statement)!r}; {known}"
        )
    return Line(name, op, arguments)


def _argument(node: ast.expr) -> Argument:
    if isinstance(node, ast.Name):
        return _NUMBERS.get(node.id, node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _argument(node.operand)
        if isinstance(value, (int, float)):
            return -value
    if isinstance(node, ast.List):
        return tuple(int(item) for item in map(_argument, node.elts) if not isinstance(item, (str, tuple)))
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        return node.value
    raise ValueError(f"an argument of a program is a value, a number, a dtype or a shape, not {ast.unparse(node)!r}")
