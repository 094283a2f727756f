"""A bundle's Triton templates in Inductor's own form, for those who use `torch._inductor.lookup_table` without autokernel.

    import json, torch
    from torch._inductor import config
    from torch._inductor.lookup_table.choices import LookupTableChoices
    from torch._inductor.virtualized import V

    config.lookup_table.table = json.load(open("table.json"))
    config.max_autotune_gemm = True                         # without it Inductor offers no templates
    config.max_autotune_gemm_backends = "ATEN,TRITON"
    config.triton.enable_persistent_tma_matmul = True       # for entries of that template
    V.set_choices_handler(LookupTableChoices())             # in each thread that compiles

What this form does not cover, and `autokernel.backend` and `autokernel.options` do: GEMMs without an entry are autotuned by
max-autotune; `addmm` keeps ATen as a second choice from torch 2.13 on, so these two are benchmarked; merged GEMMs, our own
kernels and `decompose_k` beyond Inductor's own conditions are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from autokernel.export.bundle import Bundle, Entry
from autokernel.export.matching import is_transposed, parts_of_merged
from autokernel.export.plan import minor
from autokernel.export.templates import DECOMPOSE_K, complete_fields, has_template, template_of
from autokernel.records import Problem, TensorSpec

Table = dict[str, list[dict[str, Any]]]

_DECOMPOSE_K_FROM = 32  # Inductor offers decompose_k where K is this many times M and N
_TMA_DESCRIPTOR_BYTES = 128


def lookup_table(bundle: Bundle) -> Table:
    """Contents of `torch._inductor.config.lookup_table.table`: plain JSON, one key per GEMM, two where a bias is added.

    Entries are complete, since torch 2.11 takes nothing from its own lists for them. They carry the hash of the template's
    source if the installed torch is the one that the bundle was made with; Inductor then drops an entry whose template changed.
    """
    table: Table = {}
    for entry, problem in _covered(bundle):
        fields = {**_template_id(entry, bundle), **_fields(entry, problem, bundle.environment.num_units)}
        for key in lookup_keys(problem, bundle.environment.device_name):
            table.setdefault(key, [fields])
    return table


def _covered(bundle: Bundle) -> Iterator[tuple[Entry, Problem]]:
    for entry in bundle.entries:
        if entry.problem.device != "cuda" or not has_template(entry) or entry.config.get("merge") == "concat":
            continue
        parts = parts_of_merged(entry.problem) if entry.problem.op == "merged_mm" else (entry.problem,)
        for problem in parts:
            if entry.config["template"] != DECOMPOSE_K or _inductor_decomposes(problem):
                yield entry, problem


def _inductor_decomposes(problem: Problem) -> bool:
    (m, k), (_, n) = (spec.shape for spec in _matrices(problem))
    return k >= _DECOMPOSE_K_FROM * max(m, n)


def lookup_keys(problem: Problem, device_name: str) -> tuple[str, ...]:
    """The keys under which Inductor looks a GEMM up on a device; of `addmm`, with the bias expanded and as it is."""
    left, right = _matrices(problem)
    scalars = ""
    added: list[TensorSpec | None] = [None]
    if problem.op in ("addmm", "baddbmm"):
        factors = {"alpha": 1, "beta": 1} | dict(problem.scalars)
        scalars = "+" + "&".join(f"{name}={value}" for name, value in sorted(factors.items()))
        bias = problem.inputs[0]
        shape = (*left.shape[:-1], right.shape[-1])
        padding = len(shape) - len(bias.shape)
        stride = tuple(
            0 if i < padding or bias.shape[i - padding] != size else bias.stride[i - padding] for i, size in enumerate(shape)
        )
        expanded = TensorSpec(shape=shape, dtype=bias.dtype, stride=stride)
        added = [expanded] if expanded == bias else [expanded, bias]
    keys = []
    for spec in added:
        inputs = tuple(_spelled(s) for s in (spec, left, right) if s is not None)
        keys.append(f"{device_name}+{inputs}{scalars}+{problem.op}")
    return tuple(keys)


def _spelled(spec: TensorSpec) -> tuple[torch.dtype, list[int], list[int]]:
    return getattr(torch, spec.dtype), list(spec.shape), list(spec.stride)


def _matrices(problem: Problem) -> tuple[TensorSpec, TensorSpec]:
    first = 1 if problem.op in ("addmm", "baddbmm") else 0
    return problem.inputs[first], problem.inputs[first + 1]


def _template_id(entry: Entry, bundle: Bundle) -> dict[str, str]:
    name = str(entry.config["template"])
    if name == DECOMPOSE_K:
        return {"template_id": name}
    same_torch = minor(torch.__version__) == minor(bundle.environment.torch)
    source_hash = getattr(template_of(name), "src_hash", None) if same_torch else None
    return {"template_id": f"triton::{name}", **({"template_hash": source_hash} if source_hash else {})}


def _fields(entry: Entry, problem: Problem, num_units: int) -> dict[str, Any]:
    """All parameters that the template of an entry takes."""
    if entry.config["template"] == DECOMPOSE_K:
        return {"k_split": int(entry.config["k_split"])}
    left, right = _matrices(problem)
    stock: dict[str, Any] = {
        "USE_FAST_ACCUM": False,
        "ACC_TYPE": "tl.float32" if left.dtype in ("float16", "bfloat16") else f"tl.{left.dtype}",
        "hint_override": None,
    }
    if entry.config["template"] == "mm_persistent_tma":
        stock |= {
            "A_ROW_MAJOR": not is_transposed(left.shape, left.stride),
            "B_ROW_MAJOR": not is_transposed(right.shape, right.stride),
            "NUM_SMS": num_units,
            "TMA_SIZE": _TMA_DESCRIPTOR_BYTES,
            "TMA_EXPERIMENTAL_API": False,
            "tma_store": False,
            "transpose_discontiguous_tensor_descriptors_override": True,
        }
    return complete_fields(entry.config, left.shape[-1], stock)
