"""Runs row_norm in Triton's interpreter, on the CPU in fp16 and fp32, against fp64. One line for each case that is wrong."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from autokernel.kernels.launch import run
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import Problem, TensorSpec

ONE = {"kernel": "row_norm", "rows": 1, "repeat": 1, "num_warps": 1}
MANY = {"kernel": "row_norm", "rows": 4, "repeat": 3, "num_warps": 1}
EPS = (("eps", 1e-5),)
FROM_ZERO = (("offset", 1.0), ("rounded", "late"), *EPS)
# op, config, dtype, x's [shape] as stored, order of its dimensions, shapes of the inputs behind the weight or before it
CASES = (
    ("rms_norm", ONE, "float32", (5, 40), (0, 1), ()),
    ("rms_norm", MANY, "float16", (13, 33), (0, 1), ()),
    ("rms_norm", MANY, "float32", (3, 7, 40), (1, 0, 2), ()),
    ("rms_norm", ONE, "float16", (2, 3, 4, 32), (0, 2, 1, 3), ()),
    ("add_rms_norm", MANY, "float16", (13, 64), (0, 1), ((13, 64),)),
    ("add_rms_norm", ONE, "float32", (2, 3, 40), (1, 0, 2), ((3, 2, 40),)),
    ("adaln_rms_norm", MANY, "float32", (2, 9, 40), (0, 1, 2), ((2, 1, 40),)),
    ("adaln_rms_norm", ONE, "float16", (3, 5, 32), (0, 1, 2), ((32,),)),
    ("gated_rms_norm", MANY, "float16", (2, 9, 40), (0, 1, 2), ((2, 1, 40), (2, 9, 40))),
    ("gated_rms_norm", ONE, "float32", (2, 9, 40), (0, 1, 2), ((1, 9, 1), (2, 9, 40))),
)
# the same with other scalars
OFFSET_CASES = (
    ("rms_norm", MANY, "float16", (13, 33), (0, 1), ()),
    ("rms_norm", ONE, "float32", (2, 3, 4, 32), (0, 2, 1, 3), ()),
    ("add_rms_norm", MANY, "float32", (13, 64), (0, 1), ((13, 64),)),
    ("adaln_rms_norm", ONE, "float16", (3, 5, 32), (0, 1, 2), ((32,),)),
    ("gated_rms_norm", MANY, "float32", (2, 9, 40), (0, 1, 2), ((2, 1, 40), (2, 9, 40))),
)


def tensors(op: str, dtype: str, stored: tuple[int, ...], order: tuple[int, ...], others: tuple[tuple[int, ...], ...]) -> list[
    torch.Tensor
]:  # fmt: skip
    """Inputs with rows of zeros and of large numbers; the others are halves of something wider."""
    kind = getattr(torch, dtype)
    x = torch.randn(stored)
    x.view(-1, stored[-1])[0] = 0
    x.view(-1, stored[-1])[-1] *= 100
    wide = [torch.randn(*shape[:-1], 2 * shape[-1]).to(kind)[..., : shape[-1]] for shape in others]
    weight = torch.randn(stored[-1]).to(kind)
    found = [x.to(kind).permute(order)]
    return [*found, *wide, weight] if op == "add_rms_norm" else [*found, weight, *wide]


def wrong(op: str, config: dict[str, object], scalars: tuple[tuple[str, object], ...], *case: object) -> str | None:
    """What is wrong with one case, None if nothing is."""
    inputs = tensors(op, *case)  # type: ignore[arg-type]
    specs = tuple(
        TensorSpec(shape=tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."), stride=x.stride()) for x in inputs
    )
    problem = Problem(op=op, inputs=specs, device="cuda", scalars=scalars)  # type: ignore[arg-type]
    plan = plan_of(problem, config)  # type: ignore[arg-type]
    eager = get_op(op).reference(problem, *inputs)
    exact = get_op(op).reference(problem, *(x.double() for x in inputs))
    outputs = run(plan, *inputs)
    for out, own, want in zip(outputs, eager, exact, strict=True):
        if (out.shape, out.dtype, out.stride()) != (own.shape, own.dtype, own.stride()):
            return f"{out.dtype}{list(out.shape)}@{out.stride()} instead of {own.dtype}{list(own.shape)}@{own.stride()}"
        limit = 2 * float((own.double() - want).abs().max()) + torch.finfo(own.dtype).eps * float(want.abs().max())
        error = float((out.double() - want).abs().max())
        if not error <= limit:
            return f"error {error}, limit {limit}"
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    for cases, scalars in ((CASES, EPS), (OFFSET_CASES, FROM_ZERO)):
        for op, config, *case in cases:
            problem = wrong(op, config, scalars, *case)  # type: ignore[arg-type]
            if problem:
                print(op, config, scalars, case, problem)
    print("done")
