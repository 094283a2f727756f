"""What quack is given to compute, with torch's activations in place of the GPU's: steps, their order, their operands.

The GPU's own activations exist on a GPU only: tests/gpu has them.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from autokernel.cutedsl.spec import KernelSpec
from autokernel.ops.epilogue import FUNCTION_EPILOGUES, MATRIX_EPILOGUES, UNARY_EPILOGUES

CONFIG = {"source": "quack", "tile_m": 128, "tile_n": 128}
EPILOGUES = [
    (),
    ("bias",),
    ("silu", "mul"),
    ("mul", "silu"),
    ("bias", "gelu", "add", "mul"),
    ("gelu_tanh",),
    ("scale_a", "scale_b", "bias", "relu"),
    ("mul(0.125)", "silu", "add(-1.5)"),
    ("mul(0.25)", "silu", "add(-1.5)"),
    ("gated_silu",),
    ("gated_gelu_tanh",),
    ("tensor_scale_a", "tensor_scale_b", "tanh", "sigmoid", "add"),
    ("add",),
    ("add", "squares"),
    ("squares",),
    ("sub", "rsub"),
    ("rsub", "sub"),
    ("rsub_per_row", "neg", "square"),
    ("sub_per_row", "neg", "square"),
    ("sigmoid", "cube", "mul_per_column", "sub_per_row"),
    ("abs", "sqrt", "rdiv"),
    ("clamp_min(-1.0)", "clamp_max(2.0)", "exp", "div_by(3.0)"),
    ("clamp_min(-1.0)", "clamp_max(2.5)", "exp", "div_by(3.0)"),
    ("exp", "rsqrt", "maximum_per_row", "minimum_per_column", "reciprocal"),
    ("bias", "div", "add_per_row", "div_per_column", "silu", "maximum", "minimum"),
]


@pytest.fixture(scope="module")
def answer(child: Any) -> dict[str, Any]:
    specs = [
        KernelSpec(config=CONFIG, dtype="bfloat16", out_dtype="bfloat16", a_major="k", b_major="k", epilogue=names)
        for names in EPILOGUES
    ]
    done = child("epilogues", given=[spec.to_json() for spec in specs])
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("position", range(len(EPILOGUES)), ids=["_".join(names) or "none" for names in EPILOGUES])
def test_the_function_is_what_its_names_say(answer: dict[str, Any], position: int) -> None:
    assert answer["errors"][position] < 1e-12


def test_all_activations_are_there(answer: dict[str, Any]) -> None:
    assert answer["activations"] == sorted(UNARY_EPILOGUES)


def test_all_steps_are_there(answer: dict[str, Any]) -> None:
    numbers = ("div_by", "clamp_min", "clamp_max")
    assert answer["functions"] == sorted((*FUNCTION_EPILOGUES, *MATRIX_EPILOGUES, *numbers))


def test_no_two_epilogues_are_taken_for_one(answer: dict[str, Any]) -> None:
    """Neither by their sources nor by their names, by which quack knows functions of packages in the interpreter's folders."""
    assert len(set(answer["digests"])) == len(EPILOGUES)
    assert len(set(answer["by_name"])) == len(EPILOGUES)
    assert len(set(answer["by_source"])) == len(EPILOGUES), "of packages elsewhere it looks into all functions"


@pytest.mark.slow
def test_steps_compute_what_torch_does(child: Any) -> None:
    """Compiled for this processor, NaN and Inf included; a GPU's own instructions are for tests/gpu."""
    done = child("functions")
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert sorted(wrong) == sorted((*FUNCTION_EPILOGUES, *MATRIX_EPILOGUES, "div_by", "clamp_min", "clamp_max"))
    assert {name: said for name, said in wrong.items() if said} == {}
