"""Attention of one decoding step over a static cache, with the heads of Llama-3.1-8B: every way to compute it, on one GPU.

    python benchmarks/attention_device.py --out benchmarks/results/attention-nvidia-h200-DATE.json

Times are the project's own (`evaluate.timing`): CUDA graphs of compiled candidates, caches cold. Each result is held against
the error budget before it is timed. What does not fit into --seconds is listed as skipped; the most telling come first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autokernel.backends import BuildError, Refused, get_backend
from autokernel.backends.compiled import release
from autokernel.environment import current_environment
from autokernel.evaluate.budget import errors_of, expected_outputs
from autokernel.evaluate.caches import cache_bytes
from autokernel.evaluate.probes import derived_seed, is_cold, make_variables, num_copies_for
from autokernel.evaluate.roofline import Ceilings, measure_ceilings, roofline_us
from autokernel.evaluate.timing import measure
from autokernel.ops import get_op
from autokernel.records import Candidate, ConfigValue, Problem, TensorSpec
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SMEM_BYTES = 232_448  # of a Hopper
Choice = tuple[str, dict[str, ConfigValue]]


def decoding(batch: int, context: int, *, mask: bool = True) -> Problem:
    """One position of q for each sequence; a static cache has a mask of booleans."""
    q = TensorSpec(
        shape=(batch, HEADS, 1, HEAD_DIM), dtype="bfloat16", stride=(HEADS * HEAD_DIM, HEAD_DIM, HEADS * HEAD_DIM, 1)
    )  # fmt: skip
    cache = TensorSpec.contiguous((batch, KV_HEADS, context, HEAD_DIM), "bfloat16")
    masks = (TensorSpec.contiguous((batch, 1, 1, context), "bool"),) if mask else ()
    return Problem(op="attention", inputs=(q, cache, cache, *masks), device="cuda", scalars=(("scale", HEAD_DIM**-0.5),))


def ours(problem: Problem, **changes: ConfigValue) -> Choice:
    """The default of our kernel's space, or the legal config next to it."""
    here = current_environment("cuda")
    device = DeviceFacts(
        device="cuda", isa=here.isa, num_units=here.num_units, smem_bytes=SMEM_BYTES, l2_bytes=cache_bytes("cuda")
    )
    space = load_space("attention")["triton"].bind(names_for(get_op("attention").dims(problem), device))
    config = space.nearest(changes)
    assert config is not None, "the space has a config for every decoding step"
    return "triton", config


def choices(problem: Problem) -> Iterator[Choice]:
    """The most telling first."""
    splits = int(ours(problem)[1]["num_splits"])
    yield "aten", {"implementation": "stock"}
    yield ours(problem)
    yield "aten", {"implementation": "grouped"}
    yield ours(problem, num_splits=2 * splits)
    yield ours(problem, BLOCK_S=128, num_warps=8, num_stages=3)
    yield "aten", {"implementation": "cudnn"}
    yield ours(problem, BLOCK_S=32, num_stages=6)
    yield ours(problem, BLOCK_S=32, num_warps=2, num_stages=5, num_splits=2 * splits)
    yield ours(problem, skip=True)
    yield "inductor", {"implementation": "matmul"}
    yield "inductor", {"implementation": "reduction"}


def result_of(candidate: Candidate, ceilings: Ceilings, seed: int) -> dict[str, Any]:
    """Time and fraction of the roofline of one candidate, or why there is none."""
    problem, op = candidate.problem, get_op(candidate.problem.op)
    copies = num_copies_for(problem)
    try:
        built = get_backend(candidate.backend).build(candidate, [[] for _ in range(copies)])
    except (Refused, BuildError) as error:
        return {"failed": str(error)}
    inputs = [make_variables(problem, derived_seed(seed, copy)) for copy in range(copies)]
    flat = [x for copy in inputs for x in copy]
    try:
        outputs = built.run(*flat)
        (expected,) = expected_outputs(op, problem, inputs[0])
        errors = errors_of(outputs[0], expected)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"failed": str(error).splitlines()[0][:300]}
    right = errors.max <= expected.limit_max and errors.norm <= expected.limit_norm and not errors.misplaced
    del outputs, expected
    cold = is_cold(problem, copies, cache_bytes("cuda"))
    timing = measure(built, flat, device="cuda", cold=cold)
    least_us = roofline_us(op.flops(problem), op.num_bytes(problem), problem.inputs[0].dtype, ceilings)
    return {
        "median_us": timing.median_us,
        "spread_us": timing.spread_us,
        "regime": timing.regime,
        "roofline_us": least_us,
        "fraction": least_us / timing.median_us,
        "right": right,
        "hits": built.hits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1, 16, 128])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=55.0)
    given = parser.parse_args()
    start = time.monotonic()
    ceilings = measure_ceilings("cuda", dtypes=("bfloat16",), budget_s=1.0)
    problems = [decoding(batch, given.context) for batch in given.batches]
    rounds = [list(choices(problem)) for problem in problems]
    work = [
        (problem, choice) for step in zip(*rounds, strict=True) for problem, choice in zip(problems, step, strict=True)
    ]  # fmt: skip
    work += [(decoding(batch, given.context, mask=False), ("aten", {"implementation": "flash"})) for batch in given.batches]
    rows: list[dict[str, Any]] = []
    for problem, (backend, config) in work:
        row: dict[str, Any] = {"problem": problem.key, "backend": backend, "config": dict(config)}
        row |= {"batch": problem.inputs[0].shape[0], "mask": len(problem.inputs) > 3}
        if time.monotonic() - start > given.seconds:
            row["skipped"] = "no time left"
        else:
            row |= result_of(Candidate(problem=problem, backend=backend, config=config), ceilings, seed=0)
            release()
        rows.append(row)
        us = f"{row['median_us']:9.1f} us {row['fraction']:5.2f}" if "median_us" in row else row.get("failed", "skipped")
        print(f"batch {row['batch']:4d}  {us}  {backend} {config}", flush=True)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": current_environment("cuda").to_json(),
        "ceilings": ceilings.to_json(),
        "protocol": "CUDA graph replays, cold L2, as long as a screen: median of samples; roofline by the measured read speed",
        "rows": rows,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
