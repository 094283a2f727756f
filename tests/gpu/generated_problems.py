"""Regions of Llama, ViT and Chronos-2 as problems of the op `generated`, spelled as they are found in a graph.

For the tests of this folder.
"""

from __future__ import annotations

from autokernel.records import Problem, TensorSpec

D, KV, F = 4096, 1024, 14336
S, H = 768, 3072  # of ViT-Base and Chronos-2
NORM = (
    "t0 = convert(i1, float32); t1 = pow(t0, 2); t2 = mean(t1); t3 = add(t2, 1e-05); t4 = rsqrt(t3); t5 = mul(t0, t4); "
    "t6 = convert(t5, bfloat16); t7 = mul(i0, t6); t8 = reshape(t7, [{m}, 4096]); "
)
PROGRAMS: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "rows": (
        "o0 = add(i0, i1); t0 = convert(o0, float32); t1 = pow(t0, 2); t2 = mean(t1); t3 = add(t2, 1e-05); t4 = rsqrt(t3); "
        "t5 = mul(t0, t4); t6 = convert(t5, bfloat16); o1 = mul(i2, t6)",
        [(0, 1, D), (0, 1, D), (D,)],
    ),
    "norm_qkv": (
        NORM + "t9 = t(i2); o0 = mm(t8, t9); t10 = t(i3); o1 = mm(t8, t10); t11 = t(i4); o2 = mm(t8, t11)",
        [(D,), (0, 1, D), (KV, D), (KV, D), (D, D)],
    ),
    "norm_gate_up": (
        NORM + "t9 = t(i2); t10 = mm(t8, t9); t11 = reshape(t10, [{m}, 1, 14336]); t12 = convert(t11, float32); "
        "t13 = neg(t12); t14 = exp(t13); t15 = add(t14, 1); t16 = div(t12, t15); t17 = convert(t16, bfloat16); "
        "t18 = t(i3); t19 = mm(t8, t18); t20 = reshape(t19, [{m}, 1, 14336]); o0 = mul(t17, t20)",
        [(D,), (0, 1, D), (F, D), (F, D)],
    ),
    "o_proj_residual": (
        "t0 = reshape(i1, [{m}, 4096]); t1 = t(i2); t2 = mm(t0, t1); t3 = reshape(t2, [{m}, 1, 4096]); o0 = add(i0, t3)",
        [(0, 1, D), (0, 1, D), (D, D)],
    ),
    # rows of the result are reduced: the sum and its norm are results
    "projection_sum_layer_norm": (
        "t0 = reshape(i2, [{m}, 768]); t1 = t(i3); t2 = addmm(i1, t0, t1); t3 = reshape(t2, [{m}, 1, 768]); o0 = add(i0, t3); "
        "t4 = convert(o0, float32); t5 = var_mean(t4, 0); t6 = getitem(t5, 1); t7 = sub(t4, t6); t8 = getitem(t5, 0); "
        "t9 = add(t8, 1e-05); t10 = rsqrt(t9); t11 = mul(t7, t10); t12 = mul(t11, i4); t13 = add(t12, i5); "
        "o1 = convert(t13, bfloat16)",
        [(0, 1, S), (S,), (0, 1, S), (S, S), (S,), (S,)],
    ),
    "relu_down_sum_norm": (
        "t0 = relu(i1); t1 = reshape(t0, [{m}, 3072]); t2 = t(i2); t3 = mm(t1, t2); t4 = reshape(t3, [{m}, 1, 768]); "
        "o0 = add(i0, t4); t5 = pow(o0, 2); t6 = mean(t5); t7 = add(t6, 1e-06); t8 = rsqrt(t7); t9 = mul(o0, t8); "
        "o1 = mul(i3, t9)",
        [(0, 1, S), (0, 1, H), (S, H), (S,)],
    ),
    # batches: 12 heads of a ViT-Base whose attention is spelled out
    "scores_mask": (
        "t0 = bmm(i0, i1); t1 = mul(t0, 0.125); o0 = add(t1, i2)",
        [(12, 0, 64), (12, 64, 197), (12, 1, 197)],
    ),
    # their softmax, whose maximum and sum Inductor finds in one pass on a GPU
    "scores_softmax": (
        "t0 = bmm(i0, i1); t1 = mul(t0, 0.125); t2 = add(t1, i2); t3 = convert(t2, float32); t4 = prepare_softmax_online(t3); "
        "t5 = getitem(t4, 0); t6 = sub(t3, t5); t7 = exp(t6); t8 = getitem(t4, 1); t9 = div(t7, t8); "
        "o0 = convert(t9, bfloat16)",
        [(12, 0, 64), (12, 64, 197), (12, 1, 197)],
    ),
    "softmax_values": (
        "t0 = convert(i0, float32); t1 = prepare_softmax_online(t0); t2 = getitem(t1, 0); t3 = sub(t0, t2); t4 = exp(t3); "
        "t5 = getitem(t1, 1); t6 = div(t4, t5); t7 = convert(t6, bfloat16); o0 = bmm(t7, i1)",
        [(12, 0, 197), (12, 197, 64)],
    ),
}
WHOLE_ROWS = frozenset({"projection_sum_layer_norm", "relu_down_sum_norm", "scores_softmax"})  # tried with many rows alone
FP32 = frozenset({"relu_down_sum_norm"})  # the others are bf16


def problem(name: str, m: int) -> Problem:
    """One of them for this many rows; weights are constants."""
    text, shapes = PROGRAMS[name]
    dtype = "float32" if name in FP32 else "bfloat16"
    specs = tuple(TensorSpec.contiguous(tuple(n or m for n in shape), dtype) for shape in shapes)
    constants = tuple(i for i, shape in enumerate(shapes) if 0 not in shape)
    scalars = (("program", text.format(m=m)),)
    return Problem(op="generated", inputs=specs, device="cuda", constants=constants, scalars=scalars)
