"""As `interpreted_generated.py`, for products whose epilogue reduces rows of the result: norms, softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from interpreted_generated import ROWS, TILED, WHOLE, spec, tensor

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
# a norm, two products, SwiGLU, and two norms of what comes of it, the second one of the first
GATED = (
    "t0 = convert(i0, float32); t1 = pow(t0, 2); t2 = mean(t1); t3 = add(t2, 1e-06); t4 = rsqrt(t3); t5 = mul(t0, t4); "
    "t6 = convert(t5, {d}); t7 = t(i1); t8 = mm(t6, t7); t9 = silu(t8); t20 = mm(t6, i2); o0 = mul(t9, t20); " + NORM
    + "t16 = convert(t15, {d}); o1 = add(i3, t16); t17 = abs(o1); t18 = amax(t17); o2 = gt(o1, t18); t19 = mean(o1); "
    "o3 = sub(o1, t19)"
)  # fmt: skip
# one number for each row is made a row
NARROW = "t0 = full([64], 2.0, {d}); t1 = mul(i0, t0); t2 = sum(t1); o0 = mul(i1, t2)"


@dataclass(frozen=True)
class Case:
    """A program, its inputs, and the configs that it is run with. Numbers that are no numbers come where `odd` says."""

    text: str
    specs: list[TensorSpec]
    configs: list[dict[str, Any]]


def whole_rows(d: str) -> Iterator[Case]:
    """Ragged and full sizes of rows, columns and K, in both modes, with parts of K and without."""
    yield Case(NARROW.format(d=d), [spec(d, 7, 1), spec(d, 7, 64)], [WHOLE, TILED])
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
        yield Case(GATED.format(**sizes), [x, weight, wide, spec(d, 1, n)], configs)


def odd_inputs(inputs: list[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """The inputs with an element of each that is infinite or no number, or with all of a row."""
    for position, value in enumerate(inputs):
        if not value.is_floating_point() or not value.dim():
            continue
        for number in (INF, NAN):
            changed = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
            changed[(*(0 for _ in value.shape[1:]), -1)] = number  # the last column is read for those that are not there
            yield f"{number} in input {position}", [changed if i == position else x for i, x in enumerate(inputs)]
        changed = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
        changed[-1:] = -INF
        yield f"-inf in the last of input {position}", [changed if i == position else x for i, x in enumerate(inputs)]


def differs(problem: Problem, config: dict[str, Any], inputs: list[torch.Tensor]) -> str | None:
    """What is wrong with the kernel's results: other places of what is not finite, or more than twice the program's error.

    And one rounding of the largest number: two products are multiplied, whose sums are in another order.
    """
    eager = run(problem, *inputs)
    exact = run(problem, *[x.double() if x.dtype.is_floating_point else x for x in inputs])
    for number, (own, reference, out) in enumerate(zip(eager, exact, launch(plan_of(problem, config), *inputs), strict=True)):
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
    drawn = [tensor(spec) if spec.shape else torch.tensor(-INF, dtype=getattr(torch, spec.dtype)) for spec in case.specs]
    for config in case.configs:
        few = drawn[0].dtype is torch.float16 and len(drawn[0]) <= 17
        odd = odd_inputs(drawn) if few and config is case.configs[0] else ()
        for name, inputs in (("as drawn", drawn), *odd):
            if wrong := differs(problem, config, inputs):
                print(config, problem.key, f"{name}:", wrong)


if __name__ == "__main__":
    for d in ("float16", "float32"):
        for case in whole_rows(d):
            check(case)
    print("done")
