"""Runs lm_head_argmax in Triton's interpreter, on the CPU in fp16, by exact logits. One line for each case that is wrong."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from collections.abc import Mapping
from dataclasses import replace

import torch

from autokernel.evaluate.budget import errors_of, expected_outputs
from autokernel.kernels.launch import KernelPlan, resolve
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec

Config = Mapping[str, ConfigValue]
SWAP: Config = {"kernel": "lm_head_argmax", "mode": "swap", "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}
ROWS: Config = {**SWAP, "mode": "rows", "join": "launch"}
VECTOR: Config = {**SWAP, "mode": "vector", "block_n": 8}
# config, x as stored, its part that counts, vocabulary, scalars
CASES: tuple[tuple[Config, tuple[int, ...], tuple[slice, ...], int, Config], ...] = (
    (SWAP, (1, 64), (), 70, {"keepdim": False}),
    ({**SWAP, "join": "launch"}, (1, 1, 64), (), 96, {"keepdim": True}),
    ({**SWAP, "block_k": 16}, (3, 1, 48), (), 101, {"keepdim": False}),
    (ROWS, (17, 64), (), 300, {"keepdim": True}),
    ({**ROWS, "join": "last", "block_n": 16}, (17, 64), (), 75, {"keepdim": False}),
    (VECTOR, (1, 1, 64), (), 77, {"keepdim": False}),
    ({**VECTOR, "join": "launch"}, (1, 64), (), 5, {"keepdim": False}),
    (ROWS, (3, 128), (slice(None), slice(64)), 45, {"keepdim": False}),  # rows that are apart
    (SWAP, (3, 5, 64), (), 45, {"keepdim": False, "position": "last"}),
    (VECTOR, (1, 5, 64), (), 45, {"keepdim": True, "position": "last"}),
)
KINDS = ("normal", "zeros", "nan", "negative")


def drawn(kind: str, like: TensorSpec) -> torch.Tensor:
    """Rows in a layout."""
    x = torch.randn(like.shape).half()
    if kind == "zeros":
        x[:] = 0
    if kind == "nan":
        x[-1, ..., 3] = float("nan")
    return torch.empty_strided(like.shape, like.stride, dtype=x.dtype).copy_(-x.abs() if kind == "negative" else x)


def launched(plan: KernelPlan, scratch: list[torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """The plan's result in memory of its own; the scratch is what the launch before has left."""
    (spec,) = plan.outputs
    out = torch.full(spec.shape, -1, dtype=torch.int64)
    for launch in plan.launches:
        launch.kernel[launch.grid](**resolve(launch, {"in": inputs, "out": [out], "scratch": scratch}))
    return out


def wrong(config: Config, stored: tuple[int, ...], part: tuple[slice, ...], vocabulary: int, scalars: Config) -> str | None:
    """What is wrong with a case, None if nothing is."""
    whole = torch.empty(stored)[part] if part else torch.empty(stored)
    x = TensorSpec(shape=tuple(whole.shape), dtype="float16", stride=whole.stride())
    weight = (torch.randn(vocabulary, x.shape[-1]) / x.shape[-1] ** 0.5).half()
    specs = (x, TensorSpec.contiguous(tuple(weight.shape), "float16"))
    problem = Problem(op="lm_head_argmax", inputs=specs, device="cuda", scalars=tuple(scalars.items()))
    op, plan = get_op(problem.op), plan_of(problem, config)
    # parts of many tiles, a few at a time: what a vocabulary of real size needs
    few = [{**launch.arguments, "WIDTH": 4} for launch in plan.launches]
    plan = replace(plan, launches=tuple(replace(launch, arguments=a) for launch, a in zip(plan.launches, few, strict=True)))
    scratch = [torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype)) for buffer in plan.scratch]
    for kind in KINDS:
        head = weight.abs() if kind == "negative" else weight.clone()
        if kind == "nan":
            head.view(torch.int16)[vocabulary // 2, 5] = -512  # a NaN whose sign bit is set: bits below all others
        inputs = (drawn(kind, x), head)
        (expected,) = expected_outputs(op, problem, inputs)
        out = launched(plan, scratch, *inputs)
        if (out.shape, out.stride()) != (expected.shape, expected.stride):
            return f"{list(out.shape)} instead of {expected.shape}"
        errors = errors_of(out, expected)
        if errors.max > expected.limit_max or errors.misplaced:
            return f"{kind}: {errors}, limit {expected.limit_max}"
        if kind in ("zeros", "nan") and not torch.equal(out, op.reference(problem, *inputs)[0]):
            return f"{kind}: of equal logits the first one has it, not {out}"
        if any(buffer.zeroed and scratch[i].any() for i, buffer in enumerate(plan.scratch)):
            return "the counter is not zero"
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in CASES:
        problem = wrong(*case)
        if problem:
            print(case, problem)
    print("done")
