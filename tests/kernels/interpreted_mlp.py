"""Runs the kernels for MLPs in Triton's interpreter, on the CPU in fp16 and fp32. One line for each case that is wrong."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from autokernel.kernels.launch import run
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec

Config = dict[str, ConfigValue]
SMALL: Config = {
    "kernel": "mlp", "BLOCK_M": 16, "BLOCK_H": 16, "BLOCK_K": 16, "BLOCK_N": 16, "swap_in": False, "swap_out": False,
    "num_warps": 4, "num_stages": 2, "sum_block": 64, "sum_parts": 2,
}  # fmt: skip
LARGE: Config = {**SMALL, "BLOCK_M": 64, "BLOCK_H": 32, "BLOCK_K": 64, "BLOCK_N": 64, "sum_parts": 8, "precision": "tf32x3"}


@dataclass(frozen=True)
class Case:
    """Sizes, and whether weights are contiguous along columns, as those of linear layers are not."""

    config: Config
    dtype: str
    activation: str
    bias: str
    residual: bool
    rows: tuple[int, ...]
    k: int
    hidden: int
    n: int
    by_columns: bool = False


# Infinity times what is not there would be NaN.
RAGGED = Case(SMALL, "float32", "relu", "both", True, (5,), 40, 70, 36)
CASES = (
    Case(LARGE, "float32", "relu", "none", True, (1, 37), 64, 96, 48),
    Case(SMALL, "float32", "relu", "none", True, (37,), 40, 70, 36),
    Case({**LARGE, "swap_in": True, "swap_out": True}, "float32", "gelu", "both", True, (2, 3, 5), 72, 40, 80),
    Case({**SMALL, "swap_out": True}, "float16", "silu", "both", True, (5,), 32, 48, 40),
    Case({**SMALL, "swap_in": True}, "float16", "gelu_tanh", "first", False, (2, 9), 33, 50, 17, True),
    Case({**SMALL, "sum_parts": 8}, "float16", "gelu", "second", False, (1,), 16, 16, 16),
)


def tensors(case: Case) -> list[torch.Tensor]:
    """Inputs: x with its dimensions in another order, where it has several; a residual that is half of something wider."""
    kind, order = getattr(torch, case.dtype), tuple(reversed(range(len(case.rows))))
    x = torch.randn(*reversed(case.rows), case.k).to(kind).permute(*order, len(case.rows))
    weights = [(torch.randn(a, b) / a**0.5).to(kind) for a, b in ((case.k, case.hidden), (case.hidden, case.n))]
    w_in, w_out = [w if case.by_columns else w.t().contiguous().t() for w in weights]
    b_in = [torch.randn(2 * case.hidden).to(kind)[::2]] if case.bias in ("first", "both") else []
    b_out = [torch.randn(case.n).to(kind)] if case.bias in ("second", "both") else []
    residual = [torch.randn(*case.rows, 2 * case.n).to(kind)[..., : case.n]] if case.residual else []
    return [x, w_in, *b_in, w_out, *b_out, *residual]


def wrong(case: Case, spoil: float | None = None) -> str | None:
    """What is wrong with one case, None if nothing is; `spoil`: a number for the first row, all others being positive."""
    inputs, op = tensors(case), get_op("mlp")
    if spoil is not None:
        inputs = [tensor.abs() for tensor in inputs]
        inputs[0][(0,) * len(case.rows)][3] = spoil
    specs = tuple(TensorSpec(shape=tuple(t.shape), dtype=case.dtype, stride=t.stride()) for t in inputs)
    scalars = (("activation", case.activation), ("bias", case.bias), ("residual", case.residual))
    problem = Problem(op="mlp", inputs=specs, device="cuda", scalars=scalars)
    (own,), (want,) = op.reference(problem, *inputs), op.reference(problem, *(t.double() for t in inputs))
    (out,) = run(plan_of(problem, case.config), *inputs)
    if (out.shape, out.dtype, out.stride()) != (own.shape, own.dtype, own.stride()):
        return f"{out.dtype}{list(out.shape)}@{out.stride()} instead of {own.dtype}{list(own.shape)}@{own.stride()}"
    if not torch.equal(out.isnan(), own.isnan()) or not torch.equal(out.isposinf(), own.isposinf()):
        return "NaN or infinity elsewhere than in eager"
    there = own.isfinite()
    largest = float(want[there].abs().max())
    limit = 2 * float((own.double() - want)[there].abs().max()) + torch.finfo(own.dtype).eps * largest
    error = float((out.double() - want)[there].abs().max())
    return None if error <= limit else f"error {error}, limit {limit}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of infinity times zero
    torch.manual_seed(0)
    for case in CASES:
        if found := wrong(case):
            print(case, found)
    for spoil in (float("nan"), float("inf"), -float("inf")):
        if found := wrong(RAGGED, spoil):
            print(spoil, found)
    print("done")
