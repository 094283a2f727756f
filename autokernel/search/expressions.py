"""Constraints of search spaces: one Python expression each, parsed against a whitelist and never given to `eval`.

    block_m * block_k * num_stages <= smem_bytes / dtype_bytes
    threads_m == 0 or threads_m * threads_n * threads_k == threads
    template == "cpp_gemm"

Allowed are numbers, strings, true and false, the names that the caller lists, arithmetic, comparisons, `in` a list,
`and` / `or` / `not`, `a if c else b`, and the functions of `FUNCTIONS`.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autokernel.errors import ConfigError

Value = Any  # int, float, str, bool, or a tuple of them on the right of `in`
_Evaluator = Callable[[Mapping[str, Value]], Value]

_MAX_LENGTH = 500
_FAILURES = (KeyError, ArithmeticError, TypeError, ValueError)
_MAX_BITS = 256  # of any intermediate result: enough for every product of sizes, too few to exhaust memory


def ceildiv(a: float, b: float) -> int:
    """a / b, rounded up."""
    return int(-(-a // b))


def is_power_of_two(a: float) -> bool:
    """1, 2, 4, 8, ..."""
    return a >= 1 and int(a) == a and int(a) & (int(a) - 1) == 0


def log2(a: float) -> float:
    """Binary logarithm."""
    return math.log2(a)


FUNCTIONS: Mapping[str, Callable[..., Value]] = {
    "abs": abs, "ceildiv": ceildiv, "is_power_of_two": is_power_of_two, "log2": log2, "max": max, "min": min,
}  # fmt: skip


def _numbers(function: Callable[[Any, Any], Value]) -> Callable[[Any, Any], Value]:
    def checked(a: Value, b: Value) -> Value:
        if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
            raise TypeError(f"arithmetic needs numbers, not {a!r} and {b!r}")
        result = function(a, b)
        if isinstance(result, int) and result.bit_length() > _MAX_BITS:
            raise OverflowError(f"a result has more than {_MAX_BITS} bits")
        return result

    return checked


def _power(a: Any, b: Any) -> Value:
    # judged before it is computed: 9 ** 9 ** 9 would not return
    if abs(a) > 1 and abs(b) * math.log2(abs(a)) > _MAX_BITS:
        raise OverflowError(f"{a} ** {b} has more than {_MAX_BITS} bits")
    return a**b


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Value]] = {
    ast.Add: _numbers(operator.add),
    ast.Sub: _numbers(operator.sub),
    ast.Mult: _numbers(operator.mul),
    ast.Div: _numbers(operator.truediv),
    ast.FloorDiv: _numbers(operator.floordiv),
    ast.Mod: _numbers(operator.mod),
    ast.Pow: _numbers(_power),
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Value]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Value]] = {
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression; `names` are the ones it reads, `where` says where it stands, for messages."""

    text: str
    names: frozenset[str]
    where: str
    _evaluator: _Evaluator
    _tree: ast.expr
    _whole: Expression | None = None  # what this is part of the work of

    def given(self, known: Mapping[str, Value]) -> Expression:
        """The same with what these names decide worked out once: for m = 16, `m <= 16 or a < b` is true at once.

        It has the same values; `names` are the other ones, read or not. What cannot be computed is left for `evaluate` to say,
        unless the rest decides the value.
        """
        compiler = _Compiler(text=self.text, allowed=self.names, where=self.where, names=set(), known=known)
        evaluator = compiler.compile(self._tree)
        return replace(self, names=self.names - set(known), _evaluator=evaluator, _whole=self)

    @property
    def always(self) -> bool:
        """Whether it is true whatever values its names have."""
        return isinstance(self._evaluator, _Constant) and bool(self._evaluator.value)

    def evaluate(self, values: Mapping[str, Value]) -> Value:
        """Its value, with `values` for its names.

        Raises:
            ConfigError: a name has no value, or the values do not fit the operation (division by zero, text times number).
        """
        try:
            return self._evaluator(values)
        except _FAILURES as error:
            if self._whole is not None:
                return self._whole.evaluate(values)  # whose message has all names
            raise self._error(error, values) from None

    def _error(self, error: Exception, values: Mapping[str, Value]) -> ConfigError:
        if isinstance(error, KeyError):
            name = str(error.args[0])
            known = ", ".join(sorted(values))
            return ConfigError(f"{self.where}: `{self.text}`: {name} has no value here; known are {known}")
        given = ", ".join(f"{name}={values[name]!r}" for name in sorted(self.names) if name in values)
        return ConfigError(
            f"{self.where}: `{self.text}` cannot be computed with {given or 'no names'}: {error}; "
            "guard the case, e.g. `block_k == 0 or k % block_k == 0`"
        )


def parse_expression(text: str, *, allowed: Collection[str], where: str) -> Expression:
    """Check an expression against the whitelist.

    Args:
        text: the expression.
        allowed: names that it may read.
        where: file and key path, for messages.

    Raises:
        ConfigError: unknown name, function or syntax; the message lists what is allowed.
    """
    if len(text) > _MAX_LENGTH:
        raise ConfigError(
            f"{where}: `{text[:60]}...` has {len(text)} characters, at most {_MAX_LENGTH} are allowed; split it into several"
        )
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(
            f"{where}: `{text}` is not an expression: {reason}; write it as in Python, e.g. `m % 8 == 0`"
        ) from None
    compiler = _Compiler(text=text, allowed=frozenset(allowed), where=where, names=set())
    try:
        evaluator = compiler.compile(tree.body)
    except RecursionError:
        raise ConfigError(f"{where}: `{text[:60]}...` is nested too deeply; split it into several") from None
    return Expression(text=text.strip(), names=frozenset(compiler.names), where=where, _evaluator=evaluator, _tree=tree.body)


@dataclass(frozen=True, slots=True)
class _Constant:
    """An evaluator that reads nothing."""

    value: Value

    def __call__(self, _values: Mapping[str, Value]) -> Value:
        return self.value


@dataclass(slots=True)
class _Compiler:
    """Turns whitelisted nodes into closures, and those without names into constants; anything else is refused.

    A space is walked config by config, some hundred thousand of them in a run: hence the special cases.
    """

    text: str
    allowed: frozenset[str]
    where: str
    names: set[str]
    known: Mapping[str, Value] = field(default_factory=dict)  # names with the values that they always have

    def compile(self, node: ast.expr) -> _Evaluator:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return _Constant(value)
            case ast.Name(id=name):
                return self._name(name)
            case ast.BoolOp(op=op, values=values):
                return _all_or_any([self.compile(value) for value in values], decisive=isinstance(op, ast.Or))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                unary, inner = _UNARY[type(op)], self.compile(operand)
                return _folded([inner], lambda env: unary(inner(env)))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _pair(_BINARY[type(op)], self.compile(left), self.compile(right))
            case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in _COMPARE for op in ops):
                return self._comparison(left, ops, comparators)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                condition, yes, no = self.compile(test), self.compile(body), self.compile(orelse)
                if isinstance(condition, _Constant):
                    return yes if condition.value else no
                return lambda env: yes(env) if condition(env) else no(env)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                function, compiled = FUNCTIONS[name], [self.compile(a) for a in arguments]
                return _folded(compiled, lambda env: function(*[a(env) for a in compiled]))
            case ast.Call(func=ast.Name(id=name)):
                raise self._refused(f"{name}(...) is not one of the functions {', '.join(FUNCTIONS)}")
            case _:
                raise self._refused(f"`{ast.unparse(node)}` ({type(node).__name__}) is not allowed")

    def _name(self, name: str) -> _Evaluator:
        constant = {"true": True, "false": False}.get(name)  # YAML's spelling
        if constant is not None:
            return _Constant(constant)
        if name not in self.allowed:
            near = difflib.get_close_matches(name, self.allowed, n=1)
            cure = f"did you mean `{near[0]}`? " if near else ""
            raise self._refused(f"the name `{name}` is unknown; {cure}Text goes in quotes")
        self.names.add(name)
        return _Constant(self.known[name]) if name in self.known else operator.itemgetter(name)

    def _comparison(self, left: ast.expr, ops: list[ast.cmpop], comparators: list[ast.expr]) -> _Evaluator:
        functions = [_COMPARE[type(op)] for op in ops]
        operands = [self.compile(left)]
        for op, node in zip(ops, comparators, strict=True):
            if isinstance(op, (ast.In, ast.NotIn)):
                if not isinstance(node, (ast.Tuple, ast.List)):
                    raise self._refused(f"the right side of `in` must be a list such as [1, 2, 4], not `{ast.unparse(node)}`")
                items = [self.compile(item) for item in node.elts]
                operands.append(_folded(items, lambda env, items=items: tuple(item(env) for item in items)))  # type: ignore[misc]
            else:
                operands.append(self.compile(node))
        if len(functions) == 1:
            return _pair(functions[0], operands[0], operands[1])

        def chain(env: Mapping[str, Value]) -> Value:
            values = [operand(env) for operand in operands]
            return all(f(a, b) for f, a, b in zip(functions, values[:-1], values[1:], strict=True))

        return _folded(operands, chain)

    def _refused(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{self.where}: `{self.text}`: {reason}. Allowed names: {', '.join(sorted(self.allowed)) or 'none'}; "
            f"functions: {', '.join(FUNCTIONS)}; besides numbers, quoted text, + - * / // % **, comparisons, `in [..]`, "
            "and, or, not, if-else"
        )


def _folded(parts: Sequence[_Evaluator], whole: _Evaluator) -> _Evaluator:
    """A constant if all parts are, unless it cannot be computed."""
    if not all(isinstance(part, _Constant) for part in parts):
        return whole
    try:
        return _Constant(whole({}))
    except _FAILURES:
        return whole


def _pair(function: Callable[[Any, Any], Value], first: _Evaluator, second: _Evaluator) -> _Evaluator:
    """An operation on two values."""
    if isinstance(second, _Constant) and not isinstance(first, _Constant):
        right = second.value
        return lambda env: function(first(env), right)
    if isinstance(first, _Constant) and not isinstance(second, _Constant):
        left = first.value
        return lambda env: function(left, second(env))
    return _folded([first, second], lambda env: function(first(env), second(env)))


def _all_or_any(parts: Sequence[_Evaluator], *, decisive: bool) -> _Evaluator:
    """`and` (decided by what is false) or `or` (by what is true); constants that decide nothing are left out."""
    constants = [part.value for part in parts if isinstance(part, _Constant)]
    if any(bool(value) is decisive for value in constants):
        return _Constant(decisive)
    rest = [part for part in parts if not isinstance(part, _Constant)]
    if not rest:
        return _Constant(not decisive)
    if len(rest) == 1:
        (only,) = rest
        return lambda env: bool(only(env))
    if len(rest) == 2:
        one, two = rest
        if decisive:
            return lambda env: bool(one(env) or two(env))
        return lambda env: bool(one(env) and two(env))
    if decisive:
        return lambda env: any(part(env) for part in rest)
    return lambda env: all(part(env) for part in rest)
