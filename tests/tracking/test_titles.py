"""Short spellings of problems."""

from __future__ import annotations

from dataclasses import replace

import pytest
import synthetic_events as synthetic

from autokernel.records import Problem, TensorSpec
from autokernel.tracking.titles import problem_title, with_titles


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mask", "causal", "title"),
    [
        (32, 8, True, False, "attention 4·32/8 1×2048×128 bf16 +mask"),
        (6, 6, False, True, "attention 4·6 1×2048×128 bf16 +causal"),
        (6, 6, False, False, "attention 4·6 1×2048×128 bf16"),
    ],
)
def test_attention_says_sequences_heads_and_sizes(heads: int, kv_heads: int, mask: bool, causal: bool, title: str) -> None:
    q, kv = ((4, heads, 1, 128), (4, kv_heads, 2048, 128))
    specs = [TensorSpec.contiguous(shape, "bfloat16") for shape in (q, kv, kv)]
    specs += [TensorSpec.contiguous((4, 1, 1, 2048), "bool")] if mask else []
    scalars: tuple[tuple[str, float | bool], ...] = (("scale", 0.1),)
    problem = Problem(
        op="attention", inputs=tuple(specs), device="cpu", scalars=(("causal", True), *scalars) if causal else scalars
    )  # fmt: skip
    assert problem_title(problem) == title


_NORM = (
    "t0 = convert(i0, float32); t1 = pow(t0, 2); t2 = mean(t1); t3 = add(t2, 1e-05); t4 = rsqrt(t3); t5 = mul(t0, t4); "
    "t6 = convert(t5, bfloat16); t7 = mul(i1, t6)"
)
_ROWS, _WEIGHT, _VECTOR = (2, 8, 64), (96, 64), (64,)


@pytest.mark.parametrize(
    ("shapes", "program", "title"),
    [
        (
            [_ROWS, _VECTOR, _WEIGHT, (32, 64)],
            f"{_NORM}; t8 = reshape(t7, [16, 64]); t9 = t(i2); o0 = mm(t8, t9); t10 = t(i3); o1 = mm(t8, t10)",
            "rms_norm → 2 products 16×(96+32)×64",
        ),
        ([_ROWS, _VECTOR], _NORM.replace("t7", "o0"), "rms_norm 16×64"),
        (
            [_ROWS, _VECTOR],
            f"{_NORM.partition('; t6')[0]}; t6 = convert(i1, float32); t7 = add(t6, 1); t8 = mul(t5, t7); "
            "o0 = convert(t8, bfloat16)",
            "rms_norm 16×64",
        ),
        (
            [_ROWS, _VECTOR, _ROWS],
            "o0 = add(i0, i2); t0 = mul(o0, o0); t1 = mean(t0); t2 = add(t1, 1e-05); t3 = rsqrt(t2); t4 = mul(o0, t3); "
            "o1 = mul(i1, t4)",
            "add · rms_norm (2 results) 16×64",
        ),
        ([(16, 64), _WEIGHT, (16, 96)], "t0 = t(i1); t1 = mm(i0, t0); o0 = add(i2, t1)", "product + residual 16×96×64"),
        (
            [(16, 64), _WEIGHT, (96,), (16, 96)],
            "t0 = t(i1); t1 = addmm(i2, i0, t0); t2 = relu(t1); o0 = add(t2, i3)",
            "product + bias → relu + residual 16×96×64",
        ),
        (
            [(2, 4, 16, 64), (8, 64, 96), (2, 1, 16, 96)],
            "t0 = reshape(i0, [8, 16, 64]); t1 = bmm(t0, i1); t2 = reshape(t1, [2, 4, 16, 96]); t3 = mul(t2, 0.125); "
            "t4 = add(t3, i2); t5 = amax(t4); t6 = sub(t4, t5); t7 = exp(t6); t8 = sum(t7); o0 = div(t7, t8)",
            "product + residual → softmax 8·16×96×64",
        ),
        (  # rows are reduced behind the product
            [(16, 64), _WEIGHT, (16, 96)],
            "t0 = t(i1); t1 = mm(i0, t0); o0 = add(i2, t1); t2 = pow(o0, 2); t3 = mean(t2); t4 = add(t3, 1e-05); "
            "t5 = rsqrt(t4); o1 = mul(o0, t5)",
            "product + residual → rms_norm (2 results) 16×96×64",
        ),
        (  # silu as Inductor spells it, by one that only the first product passes
            [(16, 64), _WEIGHT, _WEIGHT],
            "t0 = t(i1); t1 = mm(i0, t0); t2 = convert(t1, float32); t3 = neg(t2); t4 = exp(t3); t5 = add(t4, 1); "
            "t6 = div(t2, t5); t7 = convert(t6, bfloat16); t8 = t(i2); t9 = mm(i0, t8); o0 = mul(t7, t9)",
            "2 products → silu · mul 16×(96+96)×64",
        ),
        (  # here another input passes it
            [(16, 64), _WEIGHT, (16, 96)],
            "t0 = sigmoid(i2); t1 = mul(i2, t0); t2 = t(i1); t3 = mm(i0, t2); o0 = mul(t1, t3)",
            "product → mul by silu 16×96×64",
        ),
        (  # somebody else gets a value from inside: no longer one function
            [(16, 64), _WEIGHT],
            "t0 = t(i1); t1 = mm(i0, t0); o0 = sigmoid(t1); o1 = mul(t1, o0)",
            "product → sigmoid · mul (2 results) 16×96×64",
        ),
        (
            [(16, 64), _WEIGHT],
            "t0 = t(i1); t1 = mm(i0, t0); t2 = mul(t1, 0.5); t3 = mul(t1, 0.7071067811865476); t4 = erf(t3); t5 = add(t4, 1); "
            "o0 = mul(t2, t5)",
            "product → gelu 16×96×64",
        ),
        (
            [(16, 64)],
            "t0 = amax(i0); t1 = sub(i0, t0); t2 = exp(t1); t3 = sum(t2); o0 = div(t2, t3)",
            "softmax 16×64",
        ),
        (  # as Inductor has it on a GPU
            [(16, 64)],
            "t0 = prepare_softmax_online(i0); t1 = getitem(t0, 0); t2 = sub(i0, t1); t3 = exp(t2); t4 = getitem(t0, 1); "
            "o0 = div(t3, t4)",
            "softmax 16×64",
        ),
        (
            [(16, 64)],
            "t0 = prepare_softmax_online(i0); t1 = getitem(t0, 1); o0 = log(t1)",
            "max, sum of exp · log 16×64",
        ),
        ([(16, 64)], "t0 = pow(i0, 2); o0 = mean(t0)", "mean 16×64"),
        ([(16, 64)], "t0 = mean(i0); o0 = sub(i0, t0)", "mean · sub 16×64"),
        (
            [(16, 64), _VECTOR, _VECTOR],
            "t0 = var_mean(i0, 0); t1 = getitem(t0, 0); t2 = getitem(t0, 1); t3 = sub(i0, t2); t4 = add(t1, 1e-05); "
            "t5 = rsqrt(t4); t6 = mul(t3, t5); t7 = mul(t6, i1); o0 = add(t7, i2)",
            "layer_norm 16×64",
        ),
    ],
)
def test_generated_fusions_say_what_they_do(shapes: list[tuple[int, ...]], program: str, title: str) -> None:
    assert problem_title(_generated(shapes, program)) == f"generated {title} bf16"


def test_a_program_of_another_version_has_the_shapes_of_its_inputs() -> None:
    assert problem_title(_generated([(4, 7)], "o0 = fold(i0)")) == "generated 4×7 bf16"


def _generated(shapes: list[tuple[int, ...]], program: str) -> Problem:
    specs = tuple(TensorSpec.contiguous(shape, "bfloat16") for shape in shapes)
    return Problem(op="generated", inputs=specs, device="cuda", scalars=(("program", program),))


@pytest.mark.parametrize(
    ("shapes", "title"),
    [
        (((2, 8, 64), (64,)), "norm 2×8×64 bf16"),
        (((2, 8, 64), (2, 8, 64), (1, 1, 64)), "norm 2×8×64 bf16"),
        (((2, 8, 64), (2, 64, 8)), "norm 2×8×64 · 2×64×8 bf16"),
        (((64,), (8, 64)), "norm 64 · 8×64 bf16"),
    ],
)
def test_shapes_that_broadcast_to_the_first_say_nothing(shapes: tuple[tuple[int, ...], ...], title: str) -> None:
    specs = tuple(TensorSpec.contiguous(shape, "bfloat16") for shape in shapes)
    assert problem_title(Problem(op="norm", inputs=specs, device="cpu")) == title


@pytest.mark.parametrize(
    ("op", "shapes", "title"),
    [
        ("rms_norm_linear", ((2, 8, 64), (64,), (64, 96), (96,)), "rms_norm_linear 16×96×64 bf16"),
        ("rms_norm_qkv", ((16, 64), (64,), (64, 96), (64, 32), (96,)), "rms_norm_qkv 16×(96+32)×64 bf16"),
    ],
)
def test_a_norm_with_products_has_their_sizes(op: str, shapes: tuple[tuple[int, ...], ...], title: str) -> None:
    specs = tuple(TensorSpec.contiguous(shape, "bfloat16") for shape in shapes)
    assert problem_title(Problem(op=op, inputs=specs, device="cuda")) == title


def test_reasons_have_titles_in_place_of_keys() -> None:
    plain = _generated([(16, 64), (96, 64)], "t0 = t(i1); o0 = mm(i0, t0)")
    problems = [synthetic.UP, replace(synthetic.UP, epilogue=("silu",)), plain]
    reason = " and ".join(problem.key for problem in problems)
    said = with_titles(f"its nodes go to {reason}", problems)
    assert said == "its nodes go to mm 512×1280×384 bf16 and mm 512×1280×384 bf16 +silu and generated product 16×96×64 bf16"
