"""As `interpreted_generated.py`, for products whose epilogue reduces rows of the result, and for batches of products."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from interpreted_generated import ROWS, TILED, WHOLE, reading_ahead, spec, tensor

from autokernel.kernels.launch import run as launch
from autokernel.kernels.plans import plan_of
from autokernel.ops.program import run
from autokernel.records import Problem, TensorSpec

INF, NAN = float("inf"), float("nan")
NORM = (
    "t10 = convert(o0, float32); t11 = pow(t10, 2); t12 = mean(t11); t13 = add(t12, 1e-06); t14 = rsqrt(t13); "
    "t15 = mul(t10, t14); "
)
# a residual, the sum and its norm, both written
SUM_AND_NORM = (
    "t0 = t(i1); t1 = mm(i0, t0); t2 = reshape(t1, [{m}, 1, {n}]); o0 = add(i2, t2); " + NORM
    + "t16 = convert(t15, {d}); o1 = mul(i3, t16)"
)  # fmt: skip
# bias, activation, residual and layer norm; a number of each row is written as well
LAYER_NORM = (
    "t0 = relu(i0); t1 = t(i1); t2 = addmm(i2, t0, t1); t3 = gelu(t2, none); t4 = add(i3, t3); t5 = convert(t4, float32); "
    "t6 = var_mean(t5, 0); t7 = getitem(t6, 0); t10 = getitem(t6, 1); t8 = sub(t5, t10); t9 = add(t7, 1e-06); "
    "o0 = rsqrt(t9); t11 = mul(t8, o0); t12 = mul(t11, i4); t13 = add(t12, i5); o1 = convert(t13, {d})"
)
# scores with a mask
SOFTMAX = (
    "t0 = mm(i0, i1); t1 = mul(t0, 0.5); t2 = where(i2, t1, i3); t3 = convert(t2, float32); t4 = amax(t3); t5 = sub(t3, t4); "
    "t6 = exp(t5); t7 = sum(t6); t8 = div(t6, t7); o0 = convert(t8, {d})"
)
# the same as Inductor has it on a GPU, in one pass
ONLINE = (
    "t0 = mm(i0, i1); t1 = mul(t0, 0.5); t2 = where(i2, t1, i3); t3 = convert(t2, float32); t4 = prepare_softmax_online(t3); "
    "t5 = getitem(t4, 0); t6 = sub(t3, t5); t7 = exp(t6); o1 = getitem(t4, 1); t8 = div(t7, o1); o0 = convert(t8, {d})"
)
# of rows alone, in the dtype of the input: both numbers and the logarithm of a softmax, of which one is computed with again
ONLINE_ROWS = (
    "t0 = prepare_softmax_online(i0); o0 = getitem(t0, 0); t1 = sub(i0, o0); o1 = getitem(t0, 1); t2 = log(o1); "
    "o2 = sub(t1, t2); t3 = mean(o2); o3 = sub(o2, t3)"
)
# a norm, two products, SwiGLU, and two norms of what comes of it, the second one of the first
GATED = (
    "t0 = convert(i0, float32); t1 = pow(t0, 2); t2 = mean(t1); t3 = add(t2, 1e-06); t4 = rsqrt(t3); t5 = mul(t0, t4); "
    "t6 = convert(t5, {d}); t7 = t(i1); t8 = mm(t6, t7); t9 = silu(t8); t20 = mm(t6, i2); o0 = mul(t9, t20); " + NORM
    + "t16 = convert(t15, {d}); o1 = add(i3, t16); t17 = abs(o1); t18 = amax(t17); o2 = gt(o1, t18); t19 = mean(o1); "
    "o3 = sub(o1, t19)"
)  # fmt: skip
# one number for each row is made a row
NARROW = "t0 = full([64], 2.0, {d}); t1 = mul(i0, t0); t2 = sum(t1); o0 = mul(i1, t2)"
# of a batch of 2 x 3: scores with a scale, a mask of each of the two, and softmax, both written
SCORES = (
    "t0 = reshape(i0, [6, {m}, {k}]); t1 = bmm(t0, i1); t2 = reshape(t1, [2, 3, {m}, {n}]); t3 = mul(t2, 0.125); "
    "o0 = add(t3, i2); t4 = amax(o0); t5 = sub(o0, t4); t6 = exp(t5); t7 = sum(t6); o1 = div(t6, t7)"
)
# softmax of scores, times values that all of the batch share
VALUES = (
    "t0 = convert(i0, float32); t1 = amax(t0); t2 = sub(t0, t1); t3 = exp(t2); t4 = sum(t3); t5 = div(t3, t4); "
    "t6 = convert(t5, {d}); t7 = reshape(t6, [6, {m}, {k}]); o0 = bmm(t7, i1)"
)
ONLINE_SCORES = SCORES.partition("t4 =")[0] + (
    "t4 = prepare_softmax_online(o0); t5 = getitem(t4, 0); t6 = sub(o0, t5); t7 = exp(t6); t8 = getitem(t4, 1); "
    "o1 = div(t7, t8)"
)
ONLINE_VALUES = (
    "t0 = convert(i0, float32); t1 = prepare_softmax_online(t0); t2 = getitem(t1, 0); t3 = sub(t0, t2); t4 = exp(t3); "
    "t5 = getitem(t1, 1); t8 = div(t4, t5); t6 = convert(t8, {d}); t7 = reshape(t6, [6, {m}, {k}]); o0 = bmm(t7, i1)"
)
# a bias of each of the batch, and of each row, and a product that shares the left matrix
BIASES = (
    "t0 = sin(i0); t1 = baddbmm(i1, t0, i2); t2 = silu(t1); t3 = baddbmm(i3, t0, i4); t4 = mul(t2, t3); o0 = mul(t4, i5); "
    "o1 = gt(t4, 0.0)"
)
# a norm whose scale can be taken out
SCALED = (
    "t0 = pow(i0, 2); t1 = mean(t0); t2 = add(t1, 1e-06); t3 = rsqrt(t2); t4 = mul(i0, t3); t5 = bmm(t4, i1); "
    "o0 = add(t5, i2)"
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A program, its inputs, and the configs that it is run with. Numbers that are no numbers come where `odd` says."""

    text: str
    specs: list[TensorSpec]
    configs: list[dict[str, Any]]


def whole_rows(d: str) -> Iterator[Case]:
    """Ragged and full sizes of rows, columns and K, in both modes, with parts of K and without."""
    yield Case(NARROW.format(d=d), [spec(d, 7, 1), spec(d, 7, 64)], [WHOLE, TILED])
    for columns in (100, 64):
        for config in (WHOLE, {**TILED, "block_m": 4}):
            yield Case(ONLINE_ROWS, [spec(d, 5, columns)], [config])
            masked = "t9 = where(i1, i0, i2); " + ONLINE_ROWS.replace("i0", "t9")
            yield Case(masked, [spec(d, 5, columns), spec("bool", 5, columns), spec(d)], [config])
    for m, n, k in ((17, 40, 72), (3, 64, 64), (1, 48, 96), (33, 100, 40)):
        rows = {**ROWS, "block_n": max(16, 1 << (n - 1).bit_length()), "block_m": 32 if m == 33 else 16}
        swap = {**rows, "mode": "swap"}
        configs = [rows, {**swap, "split_k": 2}] if m != 3 else [swap, {**rows, "block_k": 16}]
        sizes = {"m": m, "n": n, "d": d}
        x, weight, vector = spec(d, m, k), spec(d, n, k), spec(d, n)
        wide = spec(d, k, n, stride=(n + 9, 1))
        yield Case(SUM_AND_NORM.format(**sizes), [x, weight, spec(d, m, 1, n), vector], configs)
        yield Case(LAYER_NORM.format(**sizes), [x, weight, vector, spec(d, m, n, stride=(1, m)), vector, vector], configs)
        yield Case(SOFTMAX.format(**sizes), [x, wide, spec("bool", m, n), spec(d)], configs)
        yield Case(ONLINE.format(**sizes), [x, wide, spec("bool", m, n), spec(d)], configs)
        yield Case(GATED.format(**sizes), [x, weight, wide, spec(d, 1, n)], configs)


def batches(d: str) -> Iterator[Case]:
    """Batches of 6, in all modes, of heads that lie one behind the other in a row, and of transposed matrices."""
    for m, n, k in ((17, 40, 24), (5, 64, 48), (1, 40, 64)):
        rows = {**ROWS, "block_k": 16, "split_k": 1 + (m == 5)}
        vector = {**rows, "mode": "vector", "block_m": 1, "split_k": 1}
        few = [vector, {**vector, "split_k": 3}, {**rows, "mode": "swap"}] if m == 1 else [{**rows, "mode": "swap"}, rows]
        sizes = {"m": m, "n": n, "k": k, "d": d}
        heads = spec(d, 2, 3, m, k, stride=(m * 3 * k, k, 3 * k, 1))
        keys = spec(d, 6, k, n, stride=(n * k, 1, k))
        padded, shared = spec(d, 6, k, n, stride=(k * (n + 9) + 5, n + 9, 1)), spec(d, 6, k, n, stride=(0, n, 1))
        whole = [{**config, "block_n": 64, "block_m": 16} for config in few if config["mode"] != "vector"]
        yield Case(SCORES.format(**sizes), [heads, keys, spec(d, 2, 1, m, n)], whole)
        yield Case(VALUES.format(**sizes), [spec(d, 2, 3, m, k), shared], few)
        if m == 5:
            yield Case(ONLINE_SCORES.format(**sizes), [heads, keys, spec(d, 2, 1, m, n)], whole)
            yield Case(ONLINE_VALUES.format(**sizes), [spec(d, 2, 3, m, k), shared], few)
        biases = [spec(d, 6, m, k), spec(d, 6, 1, n), keys, spec(d, 1, m, n), padded, spec(d, 6, 1, 1)]
        yield Case(BIASES.format(**sizes), biases, few)
        yield Case(SCALED.format(**sizes), [spec(d, 6, m, k), padded, spec(d, m, n, stride=(1, m))], few)


def drawn_as(spec: TensorSpec) -> torch.Tensor:
    """Numbers; a matrix that a batch shares is one, and a number is -inf."""
    if not spec.shape:
        return torch.tensor(-INF, dtype=getattr(torch, spec.dtype))
    if spec.stride[0] == 0:
        return tensor(TensorSpec(shape=spec.shape[1:], dtype=spec.dtype, stride=spec.stride[1:])).expand(spec.shape)
    return tensor(spec)


def odd_inputs(inputs: list[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """The inputs with an element of each that is infinite or no number, or with all of a row."""
    for position, value in enumerate(inputs):
        if not value.is_floating_point() or not value.dim():
            continue
        for number in (INF, NAN):
            changed = copied(value)
            changed[(*(0 for _ in value.shape[1:]), -1)] = number  # the last column is read for those that are not there
            yield f"{number} in input {position}", [changed if i == position else x for i, x in enumerate(inputs)]
        changed = copied(value)
        changed[-1:] = -INF
        yield f"-inf in the last of input {position}", [changed if i == position else x for i, x in enumerate(inputs)]


def copied(value: torch.Tensor) -> torch.Tensor:
    """In memory of its own, in the same strides; what all of a batch share is one."""
    if value.stride()[0] == 0 and value.dim() > 1:
        return copied(value[0]).expand(value.shape)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)


def differs(problem: Problem, config: dict[str, Any], inputs: list[torch.Tensor]) -> str | None:
    """What is wrong with the kernel's results: other places of what is not finite, or more than twice the program's error.

    And one rounding of the largest number: two products are multiplied, whose sums are in another order.
    """
    eager = run(problem, *inputs)
    exact = run(problem, *[x.double() if x.dtype.is_floating_point else x for x in inputs])
    plan = plan_of(problem, config)
    results = launch(plan, *inputs)
    if (ahead := reading_ahead(plan)) is not None:
        pairs = zip(results, launch(ahead, *inputs), strict=True)
        if not all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs):
            return "other bits where weights are read ahead"
    for number, (own, reference, out) in enumerate(zip(eager, exact, results, strict=True)):
        if (out.shape, out.dtype, out.stride()) != (own.shape, own.dtype, own.stride()):
            return f"o{number}: {out.dtype}{list(out.shape)}{out.stride()} for {own.dtype}{list(own.shape)}{own.stride()}"
        if out.dtype is torch.bool:
            if (out != own).float().mean() > 0.01:
                return f"o{number}: other truth values"
            continue
        for name, places in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
            if not torch.equal(places(out), places(own)):
                return f"o{number}: {int(places(out).sum())} {name}, eager has {int(places(own).sum())}"
        there = own.isfinite() & reference.isfinite()
        if not there.any():
            continue
        error, limit = ((x.double() - reference)[there].abs().max().item() for x in (out, own))
        if not error <= 2 * limit + torch.finfo(own.dtype).eps * reference[there].abs().max().item():
            return f"o{number}: error {error:.3g}, eager's is {limit:.3g}"
    return None


def check(case: Case) -> None:
    """One line for each config and each kind of numbers that are computed wrong."""
    problem = Problem(op="generated", inputs=tuple(case.specs), device="cpu", scalars=(("program", case.text),))
    torch.manual_seed(0)
    drawn = [drawn_as(spec) for spec in case.specs]
    for config in case.configs:
        few = drawn[0].dtype is torch.float16 and drawn[0].shape[-2] <= 5
        odd = odd_inputs(drawn) if few and config is case.configs[0] else ()
        for name, inputs in (("as drawn", drawn), *odd):
            if wrong := differs(problem, config, inputs):
                print(config, problem.key, f"{name}:", wrong)


if __name__ == "__main__":
    for d in ("float16", "float32"):
        for case in {"whole_rows": whole_rows, "batches": batches}[sys.argv[1]](d):
            check(case)
    print("done")
