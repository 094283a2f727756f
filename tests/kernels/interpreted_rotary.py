"""Runs rotary in Triton's interpreter, on the CPU in fp16 and fp32, against fp64. One line for each case that is wrong."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from autokernel.kernels.launch import run
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.ops.matching import settled
from autokernel.records import Problem, TensorSpec

Scalars = tuple[tuple[str, object], ...]
ONE = {"kernel": "rotary", "block_rows": 1, "num_warps": 1}
MANY = {"kernel": "rotary", "block_rows": 8, "num_warps": 2}
EPS, FIRST = (("eps", 1e-5),), (("heads", "first"), ("eps", 1e-5))
FROM_ZERO = (("offset", 1.0), ("rounded", "late"))
# op, config, dtype, scalars, heads of each, [batch, length, head_dim] and whether x is a part of what lies in memory
CASES = (
    ("rotary", ONE, "float32", (), (3,), (2, 5, 8), False),
    ("rotary", MANY, "float16", (), (3,), (1, 7, 40), True),
    ("norm_rotary", MANY, "float16", EPS, (5,), (2, 3, 64), False),
    ("norm_rotary", ONE, "float32", EPS, (2,), (1, 1, 24), True),
    ("norm_rotary", MANY, "float32", FIRST, (3,), (2, 5, 16), True),
    ("norm_rotary", MANY, "float32", (*EPS, ("rounded", "late")), (3,), (2, 5, 16), True),
    ("norm_rotary", MANY, "float16", (*FROM_ZERO, *FIRST), (3,), (2, 5, 24), True),
    ("rotary_complex", MANY, "float16", (), (3,), (2, 5, 24), True),
    ("rotary_complex", ONE, "float32", (), (1,), (1, 3, 2), False),
    ("norm_rotary_complex", MANY, "float32", EPS, (5,), (1, 9, 40), True),
    ("rotary_qk", MANY, "float32", (), (6, 2), (2, 5, 32), False),
    ("rotary_qk", ONE, "float16", EPS, (4, 1), (2, 3, 16), True),
    ("rotary_qk", MANY, "float32", FIRST, (4, 1), (3, 1, 16), False),
    ("rotary_qk", MANY, "float16", (*EPS, ("complex", True)), (3, 3), (1, 11, 24), False),
    ("rotary_qk", MANY, "float32", (*FROM_ZERO, *FIRST), (4, 2), (2, 5, 32), False),
    ("rotary_qk", MANY, "float32", (*FROM_ZERO, *EPS, ("complex", True)), (3, 3), (1, 11, 24), False),
)


def tensors(
    op: str, dtype: str, scalars: Scalars, heads: tuple[int, ...], sizes: tuple[int, int, int], part: bool
) -> list[torch.Tensor]:
    """Inputs with a head of zeros and one of large numbers; halves of what lies in memory, if they are a part of it."""
    batch, length, dim = sizes
    kind, names = getattr(torch, dtype), dict(scalars)
    by_numbers = "complex" in op or "complex" in names
    found = []
    for num in heads:
        x = torch.randn(batch, length, num, dim * (1 + part))
        x[0, 0, 0], x[-1, -1, -1] = 0, 100 * x[-1, -1, -1]
        x = x.to(kind)[..., :dim]
        behind = by_numbers or ("eps" in names and "heads" not in names)
        found += [x if behind else x.transpose(1, 2)]
        found += [torch.randn(2 * dim).to(kind)[::2]] if "eps" in names else []
    if by_numbers:
        return [*found, torch.randn(batch, length, dim // 2, dtype=torch.complex64)]
    return [*found, torch.randn(batch, 1, length, dim).to(kind), torch.randn(1, 1, length, dim).to(kind)]


def wrong(op: str, config: dict[str, object], dtype: str, scalars: Scalars, *case: object) -> str | None:
    """What is wrong with one case, None if nothing is."""
    inputs = tensors(op, dtype, scalars, *case)  # type: ignore[arg-type]
    known = tuple(pair for pair in scalars if pair[0] != "complex")
    problem = Problem(op=op, inputs=tuple(map(_spec, inputs)), device="cuda", scalars=known)  # type: ignore[arg-type]
    plan = plan_of(problem, config)  # type: ignore[arg-type]
    eager = get_op(op).reference(problem, *inputs)
    exact = get_op(op).reference(problem, *(x.to(torch.complex128) if x.is_complex() else x.double() for x in inputs))
    outputs = run(plan, *inputs)
    for out, own, want in zip(outputs, eager, exact, strict=True):
        if settled(_spec(out)) != settled(_spec(own)):
            return f"{out.dtype}{list(out.shape)}@{out.stride()} instead of {own.dtype}{list(own.shape)}@{own.stride()}"
        limit = 2 * float((own.double() - want).abs().max()) + torch.finfo(own.dtype).eps * float(want.abs().max())
        error = float((out.double() - want).abs().max())
        if not error <= limit:
            return f"error {error}, limit {limit}"
    return None


def _spec(x: torch.Tensor) -> TensorSpec:
    return TensorSpec(shape=tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."), stride=x.stride())


def wide() -> str | None:
    """Offsets of 64 bits, where memory does not end before they are needed."""
    x = torch.randn(2, 3, 2, 8)
    problem = Problem(
        op="rotary_complex",
        inputs=(TensorSpec.contiguous((2, 3, 2, 8), "float32"), TensorSpec.contiguous((2, 3, 4), "complex64")),
        device="cuda",
    )
    turns = torch.randn(2, 3, 4, dtype=torch.complex64)
    plan = plan_of(problem, MANY)  # type: ignore[arg-type]
    (launch,) = plan.launches
    assert launch.arguments["WIDE"] is False
    object.__setattr__(launch, "arguments", {**launch.arguments, "WIDE": True})
    (out,) = run(plan, x, turns)
    (expected,) = get_op("rotary_complex").reference(problem, x, turns)
    return None if torch.allclose(out, expected, atol=1e-5) else "wide offsets"


if __name__ == "__main__":
    torch.manual_seed(0)
    for op, config, *case in CASES:
        problem = wrong(op, config, *case)  # type: ignore[arg-type]
        if problem:
            print(op, config, case, problem)
    found = wide()
    if found:
        print(found)
    print("done")
