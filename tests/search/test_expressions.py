"""Constraints of search spaces: what they may say, and that nothing else gets through."""

from __future__ import annotations

import time
from typing import Any

import pytest

from autokernel.errors import ConfigError
from autokernel.search.expressions import parse_expression

pytestmark = pytest.mark.clock

NAMES = {"m": 64, "k": 96, "block_k": 32, "threads": 4, "a": 2, "b": 2, "template": "cpp_gemm", "pad": False, "zero": 0}


def evaluate(text: str) -> Any:
    return parse_expression(text, allowed=NAMES, where="space.yaml: constraints[0]").evaluate(NAMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("m * block_k <= 4096 / 2", True),
        ("a * b * 1 == threads", True),
        ("k % block_k == 0 or pad", True),
        ("m % 5 == 0 or pad", False),
        ("zero == 0 or k % zero == 0", True),  # the second half must not be computed
        ('template == "cpp_gemm"', True),
        ("template != 'cpp_gemm' and m > 1", False),
        ("m in [16, 32, 64]", True),
        ("template not in ('a', 'b')", True),
        ("1 < m <= 64 < 100", True),
        ("not pad", True),
        ("pad == false", True),
        ("-m + abs(-m)", 0),
        ("max(m, k) - min(m, k)", 32),
        ("ceildiv(m, 60)", 2),
        ("is_power_of_two(m) and not is_power_of_two(k)", True),
        ("log2(m)", 6),
        ("m // 60 if m > 60 else 0", 1),
        ("2 ** 10", 1024),
    ],
)
def test_values(text: str, expected: Any) -> None:
    assert evaluate(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "().__class__.__bases__",
        "m.bit_length()",
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "eval('1')",
        "[x for x in (1, 2)]",
        "(lambda: 1)()",
        "max(*[1, 2])",
        "max(m, key=abs)",
        "f'{m}'",
        "m[0]",
        "(m := 3)",
        "m << 60",
        "m in range(9)",
        "b'x' == 1",
        "None",
        "{1: 2}",
        "m if True else __builtins__",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"space.yaml: constraints\[0\]") as caught:
        parse_expression(text, allowed=NAMES, where="space.yaml: constraints[0]")
    assert "Allowed names" in str(caught.value) or "must be a list" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "9 ** 9 ** 9",
        "2 ** 2 ** 2 ** 2 ** 2 ** 2",
        "10 ** m ** m",
        "'x' * 10",
        "m + template",
        "m / zero",
        "m < template",
        "log2(zero)",
    ],
)
def test_values_that_do_not_fit_are_errors_at_once(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="cannot be computed") as caught:
        evaluate(text)
    assert time.perf_counter() - start < 1
    assert text in str(caught.value)


def test_unknown_name_says_what_was_meant() -> None:
    with pytest.raises(ConfigError, match="did you mean `block_k`") as caught:
        evaluate("blok_k > 1")
    assert "threads" in str(caught.value)
    assert "ceildiv" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"), [("m <", "not an expression"), ("", "not an expression"), ("m + " * 200 + "1", "at most 500")]
)
def test_syntax(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        evaluate(text)


def test_deep_nesting_is_refused_rather_than_crashing() -> None:
    with pytest.raises(ConfigError):
        evaluate("(" * 249 + "1" + ")" * 249)
    with pytest.raises(ConfigError):
        evaluate("not " * 120 + "m" + " + " * 3)


def test_names_are_those_that_are_read() -> None:
    expression = parse_expression("m > 1 and max(k, 2) > 0", allowed=NAMES, where="x")
    assert expression.names == {"m", "k"}
    with pytest.raises(ConfigError, match="k has no value"):
        expression.evaluate({"m": 2})
