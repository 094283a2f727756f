"""Runs lm_head_topk in Triton's interpreter, on the CPU in fp16, by exact logits. One line for each case that is wrong."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from collections.abc import Mapping

import torch
from interpreted_lm_head import KINDS, drawn

from autokernel.evaluate.budget import errors_of, expected_outputs
from autokernel.kernels.launch import KernelPlan, resolve
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec

Config = Mapping[str, ConfigValue]
SWAP: Config = {
    "kernel": "lm_head_topk", "mode": "swap", "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2, "width": 32,
}  # fmt: skip
ROWS: Config = {**SWAP, "mode": "rows"}
VECTOR: Config = {**SWAP, "mode": "vector", "block_n": 8}
# config, x as stored, its part that counts, vocabulary, how many, launches, position and cast
CASES: tuple[tuple[Config, tuple[int, ...], tuple[slice, ...], int, int, int, Config], ...] = (
    ({**SWAP, "block_k": 16}, (3, 1, 16), (), 140, 5, 3, {"cast": True}),
    ({**ROWS, "block_n": 16, "width": 128}, (5, 32), (), 75, 50, 2, {"cast": True}),  # tiles of fewer than are wanted
    (VECTOR, (1, 1, 64), (), 77, 16, 4, {"cast": False}),
    ({**VECTOR, "block_n": 64, "width": 64}, (1, 64), (), 5, 5, 2, {"cast": True}),
    (ROWS, (3, 64), (slice(None), slice(32)), 45, 1, 2, {"cast": False}),  # rows that are apart
    (SWAP, (3, 5, 32), (), 45, 8, 2, {"cast": True, "position": "last"}),
)


def launched(plan: KernelPlan, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The plan's results in memory that holds something else."""
    out = [torch.full(spec.shape, -1, dtype=getattr(torch, spec.dtype)) for spec in plan.outputs]
    scratch = [torch.full(buffer.shape, 2**63 - 1, dtype=getattr(torch, buffer.dtype)) for buffer in plan.scratch]
    for launch in plan.launches:
        launch.kernel[launch.grid](**resolve(launch, {"in": inputs, "out": out, "scratch": scratch}))
    return out


def first_of_equals(logits: torch.Tensor, top: int) -> torch.Tensor:
    """Indices of the largest, the earlier of equals first, NaN before all."""
    return torch.sort(logits.nan_to_num(nan=torch.inf), dim=-1, descending=True, stable=True).indices[..., :top]


def wrong(
    kinds: tuple[str, ...],
    config: Config,
    stored: tuple[int, ...],
    part: tuple[slice, ...],
    vocabulary: int,
    top: int,
    num: int,
    scalars: Config,
) -> str | None:
    """What is wrong with a case, None if nothing is."""
    whole = torch.empty(stored)[part] if part else torch.empty(stored)
    x = TensorSpec(shape=tuple(whole.shape), dtype="float16", stride=whole.stride())
    weight = (torch.randn(vocabulary, x.shape[-1]) / x.shape[-1] ** 0.5).half()
    specs = (x, TensorSpec.contiguous(tuple(weight.shape), "float16"))
    problem = Problem(op="lm_head_topk", inputs=specs, device="cuda", scalars=(*scalars.items(), ("top", top)))
    op, plan = get_op(problem.op), plan_of(problem, config)
    if len(plan.launches) != num:
        return f"{len(plan.launches)} launches"
    for kind in kinds:
        head = weight.abs() if kind == "negative" else weight.clone()
        if kind == "nan":
            head.view(torch.int16)[vocabulary // 2, 5] = -512  # a NaN whose sign bit is set: bits below all others
        inputs = (drawn(kind, x), head)
        found = launched(plan, *inputs)
        for out, expected in zip(found, expected_outputs(op, problem, inputs), strict=True):
            if (out.shape, out.stride(), out.dtype) != (expected.shape, expected.stride, expected.dtype):
                return f"{out.dtype}{list(out.shape)} instead of {expected.dtype}{expected.shape}"
            errors = errors_of(out, expected)
            if errors.max > expected.limit_max or errors.norm > expected.limit_norm or errors.misplaced:
                return f"{kind}: {errors}, limits {expected.limit_max}, {expected.limit_norm}"
        (scores,) = op.scores(problem, *(tensor.double() for tensor in inputs))  # type: ignore[attr-defined]
        if kind in ("zeros", "nan") and not torch.equal(found[1][-1:], first_of_equals(scores, top)[-1:]):
            return f"{kind}: of equal logits the first ones are taken, not {found[1]}"
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    for i, case in enumerate(CASES):
        problem = wrong(("normal", KINDS[1 + i % (len(KINDS) - 1)]), *case)
        if problem:
            print(case, problem)
    print("done")
