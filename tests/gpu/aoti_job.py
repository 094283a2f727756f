"""Compiles one package; run as a program, so that a crash of a library costs one test. `aoti_job.py CASE FOLDER`.

Writes `model.pt2` and the inputs it is to be tried on; prints one line of JSON: hits and reasons by entry.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gpu.llama_like import DOWN, DOWN_BIASED, DOWN_TILE, GATE, bundle_of, make_input, make_model, template_bundle
from torch._dynamo.utils import counters

import autokernel
from autokernel.export.aoti import linking_options
from autokernel.export.bundle import Bundle, Entry

SKINNY = {
    "kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "split_k": 2,
    "num_warps": 4, "num_stages": 3,
}  # fmt: skip


def bundle_for(case: str) -> Bundle:
    """The bundle of a case by name."""
    if case == "template":
        return bundle_of(Entry(problem=DOWN, backend="inductor", config=DOWN_TILE))
    if case == "merged":
        return template_bundle()
    if case == "own":
        return bundle_of(*(Entry(problem=problem, backend="triton", config=SKINNY) for problem in (GATE, DOWN_BIASED)))
    raise ValueError(f"no such case: {case}")


def main(case: str, folder: Path) -> None:
    """Compile it; case "stock" is without a bundle."""
    model, inputs = make_model(bias=case == "own"), [make_input(seed) for seed in range(2)]
    path = folder / "model.pt2"
    with torch.no_grad():
        program = torch.export.export(model, (inputs[0],))
        if case == "stock":
            with linking_options() as configs:
                torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
            usage = {}
        else:
            made = autokernel.aoti_compile_and_package(program, bundle_for(case), package_path=path)
            usage = {key: [item.hits, list(item.reasons)] for key, item in made.usage.items()}
    torch.save([x.cpu() for x in inputs], folder / "inputs.pt")
    sys.stdout.write(json.dumps({"usage": usage, "benchmarks": counters["inductor"]["select_algorithm_autotune"]}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
