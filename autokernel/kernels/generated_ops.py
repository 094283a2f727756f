"""What the lines of a program are in Triton: source text, one expression each.

Values are tiles of two dimensions, either of which may be 1. Floats are computed in fp32 and rounded where a line's dtype is
narrower, as eager PyTorch rounds them; truth values are computed as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Functions that generated kernels call; a kernel's file has those that it needs.
HELPERS: Mapping[str, str] = {
    "_tanh": '''@triton.jit
def _tanh(x):
    """Odd series near 0, where the quotient would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.div_rn(1.0 - e, 1.0 + e)
    far = tl.where(x < 0, -far, far)
    s = x * x
    near = x * (1.0 + s * (-0.33333333333 + s * (0.13333333333 - s * 0.05396825397)))
    return tl.where(tl.abs(x) < 0.1, near, far)
''',
    "_sigmoid": """@triton.jit
def _sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))
""",
    "_relu": """@triton.jit
def _relu(x):
    return tl.where(x < 0, tl.zeros(x.shape, tl.float32), x)
""",
    "_larger": '''@triton.jit
def _larger(a, b):
    """The larger one; NaN where there is one."""
    return tl.where((a > b) | (a != a), a, b)
''',
    "_exponentials": '''@triton.jit
def _exponentials(total, largest, x):
    """The sum of exp(v - largest) over the v before x as that with x: of the two exponentials one is of 0."""
    far = x - largest
    e = tl.exp(-tl.abs(far))
    return tl.where(x == -float("inf"), total, tl.where(far > 0, total * e + 1.0, total + e))
''',
    "_smaller": '''@triton.jit
def _smaller(a, b):
    """The smaller one; NaN where there is one."""
    return tl.where((a < b) | (a != a), a, b)
''',
}
_GELU = "(0.5 * {0}) * (1.0 + tl.erf({0} * 0.7071067811865476))"
_GELU_TANH = "(0.5 * {0}) * (1.0 + _tanh(0.7978845608028654 * ({0} + 0.044715 * {0} * {0} * {0})))"

_EXPRESSIONS: Mapping[str, str] = {
    "neg": "-{0}", "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})", "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "tl.rsqrt({0})", "reciprocal": "tl.div_rn(tl.full({0}.shape, 1.0, tl.float32), {0})", "tanh": "_tanh({0})",
    "sigmoid": "_sigmoid({0})", "erf": "tl.erf({0})", "relu": "_relu({0})", "silu": "{0} * _sigmoid({0})",
    "abs": "tl.abs({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})", "isnan": "{0} != {0}", "logical_not": "{0} == 0",
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "tl.div_rn({0}, {1})",
    "maximum": "_larger({0}, {1})", "minimum": "_smaller({0}, {1})",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "where": "tl.where({0}, {1}, {2})", "convert": "{0}", "reshape": "{0}", "clone": "{0}",
}  # fmt: skip
_POWERS: Mapping[float, str] = {
    2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "tl.sqrt_rn({0})", -0.5: "tl.rsqrt({0})",
    -1: "tl.div_rn(tl.full({0}.shape, 1.0, tl.float32), {0})",
}  # fmt: skip
_NO_ROUNDING = ("reshape", "clone")  # of what is rounded already


@dataclass(frozen=True, slots=True)
class Reduction:
    """A reduction over a row: what it starts with, how a tile joins the running one, and how the running one is finished."""

    start: str
    join: Callable[[str, str], str]
    finish: Callable[[str], str]


def sum_of_row() -> Reduction:
    """Sums, in fp32: lanes first, then across."""
    return Reduction("0.0", lambda running, tile: f"{running} + {tile}", lambda running: f"tl.sum({running}, 1)[:, None]")


def largest_of_row() -> Reduction:
    """The largest; NaN if the row holds one."""
    return Reduction(
        '-float("inf")',
        lambda running, tile: f"_larger({running}, {tile})",
        lambda running: f"tl.reduce({running}, 1, _larger)[:, None]",
    )


def expression(op: str, operands: list[str], extra: object = None) -> str:
    """The Triton expression of an elementwise line.

    Args:
        op: of the program.
        operands: names of tiles.
        extra: the exponent of `pow`, or how `gelu` is approximated.

    Raises:
        ValueError: there is no code for it.
    """
    if op == "pow" and isinstance(extra, (int, float)):
        text = _POWERS.get(extra)
    elif op == "gelu":
        text = _GELU_TANH if extra == "tanh" else _GELU
    else:
        text = _EXPRESSIONS.get(op)
    if text is None:
        raise ValueError(f"generated kernels have no code for {op}{'' if extra is None else f' with {extra}'}")
    return text.format(*operands)


def rounded(text: str, op: str, dtype: str) -> str:
    """A value as its dtype holds it: 16-bit floats are rounded, and computed with in fp32."""
    if op in _NO_ROUNDING or dtype not in ("bfloat16", "float16"):
        return text
    return f"({text}).to(tl.{dtype}).to(tl.float32)"


def number(value: float, dtype: str) -> str:
    """A number as a tile of one element, as its dtype holds it."""
    if dtype == "bool":
        return f"tl.full([1, 1], {int(value)}, tl.int1)"
    value = float(value)
    text = repr(value) if math.isfinite(value) else f'float("{value}")'
    return rounded(f"tl.full([1, 1], {text}, tl.float32)", "full", dtype)


def helpers_of(source: str) -> str:
    """The functions that a kernel's text calls, in an order in which they can be defined."""
    used = [name for name in HELPERS if f"{name}(" in source or f", {name})" in source]
    return "\n\n".join(HELPERS[name] for name in used)
