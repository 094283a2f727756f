"""Runs the kernel for a norm and linear layers in Triton's interpreter, on the CPU in fp16 and fp32.

One line for each case that is wrong.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from autokernel.kernels.launch import run
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec

Config = dict[str, ConfigValue]
SWAP: Config = {
    "kernel": "rms_norm_linear", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "one_pass": True, "split_k": 1,
    "num_warps": 4, "num_stages": 2,
}  # fmt: skip
ROWS: Config = {**SWAP, "mode": "rows", "BLOCK_M": 32, "BLOCK_K": 32}
TWICE: Config = {"one_pass": False, "block_s": 32}
VECTOR: Config = {**SWAP, "mode": "vector", "BLOCK_M": 1, "BLOCK_N": 8, "BLOCK_K": 32}


@dataclass(frozen=True)
class Case:
    """Sizes; which products have a bias; and whether weights are contiguous along columns, as linear layers' are not."""

    config: Config
    dtype: str
    rows: tuple[int, ...]
    k: int
    columns: tuple[int, ...]
    bias: str = "000"
    late: bool = False
    offset: bool = False
    by_columns: bool = False
    eps: float = 1e-5


CASES = (
    Case(SWAP, "float32", (2, 3), 40, (36,)),
    Case({**ROWS, "precision": "tf32x3"}, "float32", (37,), 70, (48, 33, 17), "101", late=True),
    Case({**ROWS, "split_k": 3}, "float32", (2, 3, 5), 96, (64, 32)),
    Case({**SWAP, **TWICE, "split_k": 2}, "float32", (5,), 50, (36, 20, 20), "010"),
    Case({**VECTOR, "split_k": 2}, "float32", (1, 1), 70, (20, 12)),
    Case(SWAP, "float16", (2, 3), 40, (36, 36), "11", by_columns=True),
    Case({**SWAP, **TWICE}, "float16", (2, 9), 33, (50,), "1", late=True),
    Case({**ROWS, "split_k": 2}, "float16", (128,), 64, (40, 24, 24)),
    Case({**ROWS, **TWICE, "BLOCK_M": 16}, "float16", (17,), 48, (16,)),
    Case(VECTOR, "float16", (1,), 64, (24, 9, 8), "011"),
    Case(SWAP, "float16", (3,), 64, (32, 64, 32), "100", by_columns=False),
    Case({**VECTOR, **TWICE}, "float16", (1, 1), 100, (24,), "1"),
    Case(SWAP, "float32", (5,), 70, (48, 33, 17), "101", late=True, offset=True),
    Case({**SWAP, **TWICE, "split_k": 2}, "float16", (2, 3), 50, (36,), late=True, offset=True),
    Case(VECTOR, "float16", (1,), 100, (24, 12), late=True, offset=True),
)  # fmt: skip
# What x * g is rounded to does not hold the first row of these, or its squares do not fit; the second one is zeros.
EXTREMES = (("float16", 6e4), ("float16", 3e-6), ("float32", 1e30), ("float32", 1e-30), ("float32", 1e38))


def tensors(case: Case) -> list[torch.Tensor]:
    """Inputs: x with its dimensions in another order, where it has several, and a weight with holes."""
    kind, order = getattr(torch, case.dtype), tuple(reversed(range(len(case.rows))))
    x = torch.randn(*reversed(case.rows), 2 * case.k).to(kind)[..., : case.k].permute(*order, len(case.rows))
    gain = (torch.rand(2 * case.k) * 3).to(kind)[::2]
    weights = [(torch.randn(case.k, n) / case.k**0.5).to(kind) for n in case.columns]
    weights = weights if case.by_columns else [w.t().contiguous().t() for w in weights]
    biases = [torch.randn(2 * n).to(kind)[::2] for n, there in zip(case.columns, case.bias, strict=False) if there == "1"]
    return [x, gain, *weights, *biases]


def problem_of(case: Case, inputs: list[torch.Tensor]) -> Problem:
    specs = tuple(TensorSpec(shape=tuple(t.shape), dtype=case.dtype, stride=t.stride()) for t in inputs)
    parts = len(case.columns)
    said: ConfigValue = case.bias[:parts] if parts > 1 else case.bias[0] == "1"
    told = (*((("offset", 1.0),) if case.offset else ()), *((("rounded", "late"),) if case.late else ()))
    scalars = (("bias", said), *told, ("eps", case.eps))
    op = "rms_norm_qkv" if parts > 1 else "rms_norm_linear"
    return Problem(op=op, inputs=specs, device="cuda", scalars=scalars)


def wrong(case: Case, inputs: list[torch.Tensor]) -> str | None:
    """What is wrong with one case, None if nothing is."""
    problem = problem_of(case, inputs)
    op = get_op(problem.op)
    own, want = op.reference(problem, *inputs), op.reference(problem, *(t.double() for t in inputs))
    found = run(plan_of(problem, case.config), *inputs)
    for out, mine, exact in zip(found, own, want, strict=True):
        if (out.shape, out.dtype, out.stride()) != (mine.shape, mine.dtype, mine.stride()):
            return f"{out.dtype}{list(out.shape)}@{out.stride()} instead of {mine.dtype}{list(mine.shape)}@{mine.stride()}"
        if not torch.equal(out.isnan(), mine.isnan()) or not torch.equal(out.isposinf(), mine.isposinf()):
            return "NaN or infinity elsewhere than in eager"
        for there, right, own_row in zip(out, exact, mine, strict=True):  # by rows: they may differ in size
            at = own_row.isfinite()
            limit = 2 * (own_row.double() - right)[at].norm() + torch.finfo(out.dtype).eps * right[at].norm()
            error = (there.double() - right)[at].norm()
            if not error <= limit:
                return f"error {error}, limit {limit}"
    return None


def others_change(case: Case) -> bool:
    """Whether a row that is multiplied once more changes any bit of the others."""
    inputs = tensors(case)
    inputs[0] = inputs[0].contiguous()
    plan, large = plan_of(problem_of(case, inputs), case.config), inputs[0].clone()
    large.view(-1, case.k)[0] = 6e4
    before, behind = (run(plan, x, *inputs[1:]) for x in (inputs[0], large))
    return any(not torch.equal(a[1:], b[1:]) or torch.equal(a[0], b[0]) for a, b in zip(before, behind, strict=True))


def spoiled(case: Case, size: float) -> list[torch.Tensor]:
    """The first row all of one size, the second one zeros, which have nothing to do with the others."""
    inputs = tensors(case)
    rows = inputs[0].reshape(-1, case.k)
    rows[0] = rows[0].sign() * size
    if len(rows) > 1:
        rows[1] = 0
    return [rows.reshape(inputs[0].shape), *inputs[1:]]


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of infinity times zero
    torch.manual_seed(0)
    for case in CASES:
        if found := wrong(case, tensors(case)):
            print(case, found)
    for dtype, size in EXTREMES:
        for case in (Case(SWAP, dtype, (2, 3), 40, (36,)), Case({**ROWS, "split_k": 2}, dtype, (5,), 64, (20, 16), "01"),
                     Case(VECTOR, dtype, (1,), 64, (20, 16)), Case({**SWAP, **TWICE}, dtype, (3,), 40, (17,))):  # fmt: skip
            if found := wrong(case, spoiled(case, size)):
                print(case, size, found)
    # with no eps the scale of such a row is infinite, in eager as well
    for config, rows in ((SWAP, (3,)), (VECTOR, (1,))):
        case = Case(config, "float32", rows, 40, (17,), eps=0.0)
        if found := wrong(case, spoiled(case, 1e-30)):
            print(case, "without eps:", found)
    if others_change(Case(SWAP, "float16", (5,), 64, (33,))):
        print("a row changes with others")
    for spoil in (float("nan"), float("inf"), -float("inf"), 0.0):
        for eps in (1e-5, 0.0):
            case = replace(CASES[5], eps=eps)
            if found := wrong(case, spoiled(case, spoil)):
                print(spoil, eps, found)
    print("done")
