"""Runs generated kernels in Triton's interpreter, on the CPU, against their programs. One line for each case that is wrong."""

from __future__ import annotations

import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from autokernel.kernels.launch import AHEAD, KernelPlan
from autokernel.kernels.launch import run as launch
from autokernel.kernels.plans import plan_of
from autokernel.ops.program import run
from autokernel.records import Problem, TensorSpec

WHOLE: dict[str, Any] = {"kernel": "generated_rows", "block_m": 4, "block_k": 0, "num_warps": 4}
TILED = {**WHOLE, "block_m": 2, "block_k": 32}
ROWS: dict[str, Any] = {
    "kernel": "generated_mm", "mode": "rows", "block_m": 16, "block_n": 32, "block_k": 32, "block_s": 64, "num_warps": 4,
    "num_stages": 2,
}  # fmt: skip
SWAP = {**ROWS, "mode": "swap", "split_k": 2}
VECTOR = {**ROWS, "mode": "vector", "block_m": 1, "split_k": 3}
WHOLE_VECTOR = {**VECTOR, "split_k": 1, "block_k": 16}  # K is a multiple of it: weights can be read ahead
tl.extra.cuda.gdc_wait = lambda: None  # the interpreter runs nothing beside anything

RMS = (
    "t0 = convert({x}, float32); t1 = pow(t0, 2); t2 = mean(t1); t3 = add(t2, 1e-06); t4 = rsqrt(t3); t5 = mul(t0, t4); "
    "t6 = convert(t5, {d}); t7 = mul(i0, t6); "
)
ADD_NORM = "o0 = add(i1, i2); " + RMS.replace("{x}", "o0") + "o1 = mul(t7, i3)"
LAYER_NORM = (
    "t0 = convert(i0, float32); t1 = var_mean(t0, 0); t2 = getitem(t1, 0); t3 = getitem(t1, 1); t4 = sub(t0, t3); "
    "t5 = add(t2, 1e-06); t6 = rsqrt(t5); t7 = mul(t4, t6); t8 = mul(t7, i1); t9 = add(t8, i2); o0 = convert(t9, {d})"
)
FAR = "t0 = var_mean(i1, 0); t1 = getitem(t0, 0); t2 = rsqrt(t1); o0 = mul(i0, t2); t3 = getitem(t0, 1); o1 = gt(i1, t3)"
SOFTMAX = "t0 = amax(i0); t1 = sub(i0, t0); t2 = exp(t1); t3 = sum(t2); o0 = div(t2, t3); o1 = gt(i0, t3)"
# as Inductor has it on a GPU, with a reduction of what comes of it
ONLINE = (
    "t0 = prepare_softmax_online(i0); t1 = getitem(t0, 0); t2 = sub(i0, t1); t3 = exp(t2); t4 = getitem(t0, 1); "
    "o0 = div(t3, t4); o1 = gt(i0, t4); t5 = amax(o0); o2 = sub(t1, t5)"
)
GATED = (
    RMS.replace("{x}", "i1") + "t8 = reshape(t7, [{m}, {k}]); t9 = t(i2); t10 = mm(t8, t9); t11 = reshape(t10, [{m}, 1, {n}]); "
    "t12 = convert(t11, float32); t13 = sigmoid(t12); t14 = mul(t12, t13); t15 = convert(t14, {d}); t16 = t(i3); "
    "t17 = mm(t8, t16); t18 = reshape(t17, [{m}, 1, {n}]); o0 = mul(t15, t18)"
)
SHARED = (
    RMS.replace("{x}", "i1") + "t8 = reshape(t7, [{m}, {k}]); t9 = t(i2); t10 = addmm(i3, t8, t9); o0 = tanh(t10); "
    "o1 = mm(t8, i4)"
)
RESIDUAL = (
    "t0 = where(i0, i1, i2); t1 = maximum(t0, i2); t2 = mm(t1, i3); t3 = gelu(t2, none); t4 = erf(t3); t5 = relu(t4); "
    "t6 = mul(t5, 0.5); t7 = add(i4, t6); t8 = abs(t7); t9 = add(t8, 1); t10 = log(t9); t11 = sqrt(t9); t12 = sin(t10); "
    "t13 = reciprocal(t9); t14 = mul(t12, t13); t15 = exp2(t14); t16 = cos(t15); t17 = minimum(t16, t11); o0 = neg(t17)"
)

# numbers that 16 bits do not hold: the same bits as eager's, not only as near
NUMBERS = (
    "t0 = full([], 0.1, {d}); t1 = convert(t0, float32); t2 = convert(i0, float32); o0 = sub(t2, t1); "
    "t3 = full([1], 1e-08, {d}); o1 = div(i0, t3); o2 = lt(i0, 0.1); o3 = ge(i0, 0.1); o4 = mul(i0, 0.1); "
    "t4 = amax(i0); o5 = gt(i0, t4)"
)


def spec(dtype: str, *shape: int, stride: tuple[int, ...] | None = None) -> TensorSpec:
    dense = TensorSpec.contiguous(shape, dtype)
    return dense if stride is None else TensorSpec(shape=shape, dtype=dtype, stride=stride)


def cases(d: str) -> list[tuple[str, list[TensorSpec], list[dict[str, Any]]]]:
    permuted = spec(d, 5, 3, 100, stride=(100, 600, 1))
    vector, row = spec(d, 100), spec(d, 5, 1, 100)
    found = [
        (ADD_NORM, [vector, permuted, spec(d, 5, 3, 100), row], [WHOLE, TILED]),
        (LAYER_NORM, [permuted, vector, vector], [WHOLE, TILED]),
        (SOFTMAX, [spec(d, 7, 48)], [WHOLE, TILED]),
        (ONLINE, [spec(d, 7, 300)], [WHOLE, TILED]),
    ]
    for m, n, k, configs in ((1, 40, 96, [VECTOR, WHOLE_VECTOR]), (3, 70, 72, [SWAP]), (17, 32, 64, [ROWS])):
        sizes = {"m": m, "n": n, "k": k, "d": "{d}"}
        x = [spec(d, k), spec(d, m, 1, k)]
        weights = [spec(d, n, k), spec(d, n, k)]
        found.append((GATED.format(**sizes), [*x, *weights], configs))
        several = [*x, weights[0], spec(d, n), spec(d, k, n + 9)]
        found.append((SHARED.format(**sizes), several, configs))
        masks = [spec("bool", 1, k), spec(d, m, k, stride=(1, m)), spec(d, m, 1), spec(d, k, n), spec(d, m, n)]
        found.append((RESIDUAL, masks, configs))
    return [*found, (FAR, [vector, permuted], [WHOLE, TILED])]


def tensor(spec: TensorSpec) -> torch.Tensor:
    x = torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype))
    drawn = torch.randn(spec.shape)
    weight = len(spec.shape) == 2 and spec.shape[0] > 20
    return x.copy_(drawn > 0 if spec.dtype == "bool" else drawn * spec.shape[-1] ** -0.5 if weight else drawn)


def reading_ahead(plan: KernelPlan) -> KernelPlan | None:
    """The plan with its weights read ahead, None if it cannot."""
    (one,) = plan.launches
    return replace(plan, launches=(replace(one, arguments={**one.arguments, AHEAD: 1}),)) if one.weights else None


def wrong_with(problem: Problem, config: dict[str, Any], size: float = 1.0, mean: float = 0.0) -> str | None:
    """What is wrong with the kernel's results, None if nothing is: no more than the program's own error, twice.

    The second input, a norm's rows, is that many times as large as usual, and the first, its gain, 8 times: what they give
    together is more than fp16 holds, if nothing is made of the norm before. A size that is no number is one element's.
    The mean is what is added to it.
    """
    torch.manual_seed(0)
    inputs = [tensor(spec) for spec in problem.inputs]
    inputs[0][..., :1] = 0
    if not math.isfinite(size):
        inputs[1][..., 5] = size
    elif size != 1:
        inputs[0] *= 8
        inputs[1] *= size
    if mean:
        inputs[1] += mean
    eager = run(problem, *inputs)
    exact = run(problem, *[x.double() if x.dtype.is_floating_point else x for x in inputs])
    plan = plan_of(problem, config)
    results = launch(plan, *inputs)
    if ahead := reading_ahead(plan):
        others = launch(ahead, *inputs)
        if not all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(results, others, strict=True)):
            return "other bits where weights are read ahead"
    elif config is WHOLE_VECTOR:
        return "weights are not read ahead"
    for own, reference, out in zip(eager, exact, results, strict=True):
        if (out.shape, out.dtype, out.stride()) != (own.shape, own.dtype, own.stride()):
            return f"{out.dtype}{list(out.shape)}{out.stride()} for {own.dtype}{list(own.shape)}{own.stride()}"
        if out.dtype is torch.bool:
            if (out != own).float().mean() > 0.01:
                return "other truth values"
            continue
        if not torch.equal(out.isnan(), own.isnan()):
            return f"{int(out.isnan().sum())} NaN, eager has {int(own.isnan().sum())}"
        exact_there = reference.nan_to_num(0.0)
        error, limit = ((x.nan_to_num(0.0).double() - exact_there).abs().max().item() for x in (out, own))
        if not error <= 2 * limit + torch.finfo(own.dtype).eps / 2 * exact_there.abs().max().item():
            return f"error {error:.3g}, eager's is {limit:.3g}"
    return None


def other_numbers(d: str, config: dict[str, Any]) -> str | None:
    """Which results of `NUMBERS` have other bits than eager's, None if none has."""
    problem = Problem(op="generated", inputs=(spec(d, 6, 64),), device="cpu", scalars=(("program", NUMBERS.replace("{d}", d)),))
    x = tensor(problem.inputs[0])
    x[:, ::3] = 0.1
    outputs = zip(run(problem, x), launch(plan_of(problem, config), x), strict=True)
    wrong = [f"o{i}" for i, (own, out) in enumerate(outputs) if not torch.equal(own, out)]
    return f"{', '.join(wrong)} of {problem.key} in other bits" if wrong else None


if __name__ == "__main__":
    for d in ("float16", "float32"):
        for config in (WHOLE, TILED):
            if wrong := other_numbers(d, config):
                print(config, wrong)
        for template, specs, configs in cases(d)[: None if d == "float16" else 5]:
            text = template.replace("{d}", d)
            for config in configs:
                problem = Problem(op="generated", inputs=tuple(specs), device="cpu", scalars=(("program", text),))
                normed = "i1, float32" in text and config in (VECTOR, WHOLE_VECTOR)
                # a norm makes them small again; in fp32 its squares are infinite, and what it gives is 0
                for size in (1.0, *((0.0, 1e-4, 1e4 if d == "float16" else 1e38, math.inf, math.nan) if normed else ())):
                    # a mean that fp16 rounds to another number, by as much as the rows vary: not the centre of a variance
                    wrong = wrong_with(problem, config, size, 1000.2 if template is FAR else 0.0)
                    if wrong:
                        print(config, problem.key, f"times {size}:", wrong)
    print("done")
