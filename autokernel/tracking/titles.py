"""Short spellings of problems and configs, the same in tables, report and MLflow. Pure."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable

from autokernel.ops.attention import Attention, mask_position, sizes_of
from autokernel.records import Candidate, Problem
from autokernel.tracking.program_titles import program_title

_DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2",
}  # fmt: skip
_FIRST_KEYS = ("template", "kernel", "source", "implementation", "merge")  # of a config: what kind of kernel it is
_AS_ONE = (  # parameters that are one word
    ("tile", ("BLOCK_M", "BLOCK_N", "BLOCK_K")),
    ("tile", ("tile_m", "tile_n")),
    ("cluster", ("cluster_m", "cluster_n")),
)
_FIRST_MATRIX = {
    "mm": 0, "bmm": 0, "linear": 0, "merged_mm": 0, "addmm": 1, "baddbmm": 1, "scaled_mm": 0, "int_mm": 0,
    "rms_norm_linear": 0, "rms_norm_qkv": 0,
}  # fmt: skip
_NORMED = ("rms_norm_linear", "rms_norm_qkv")  # whose rows are counted through all dimensions but the last
_WITH_VECTORS = ("merged_mm", *_NORMED)  # among their matrices, or behind them: a norm's weight, biases


def problem_title(problem: Problem) -> str:
    """`mm 1×1280×384 bf16 +silu` with M×N×K; `bmm 8·1×64×512` with a batch in front; merged GEMMs as `1×(384+128)×384`.

    Attention is `attention 8·32/8 1×2048×128 bf16 +mask`: sequences, heads (of q / of keys where fewer), q×keys×dim. What
    carries a program says what it does: `generated rms_norm → 2 products → silu · mul 1×(64+64)×96 bf16`. Any other op has
    the shapes of its inputs, without those that only broadcast to the first; `problem.key` says everything.
    """
    if problem.op == Attention.name:
        return _attention_title(problem)
    if "program" in dict(problem.scalars):
        with contextlib.suppress(ValueError):  # of another version
            title = program_title(problem)
            of = dict.fromkeys(_DTYPES.get(spec.dtype, spec.dtype) for spec in problem.inputs if len(spec.shape) > 1)
            return " ".join(filter(None, (problem.op, title.words, title.shape, "/".join(of))))
    epilogue = "".join(f" +{name}" for name in problem.epilogue)
    shape, specs = _gemm_shape(problem), problem.inputs
    if shape:
        at = _FIRST_MATRIX[problem.op]
        specs = tuple(s for s in specs[at:] if len(s.shape) > 1) if problem.op in _WITH_VECTORS else specs[at : at + 2]
    else:
        first = specs[0].shape if specs else ()
        told = [spec.shape for at, spec in enumerate(specs) if at == 0 or not _broadcasts(spec.shape, first)]
        shape = " · ".join("×".join(map(str, shape)) for shape in told)
    dtypes = "/".join(dict.fromkeys(_DTYPES.get(spec.dtype, spec.dtype) for spec in specs))
    return f"{problem.op} {shape} {dtypes}{epilogue}"


def with_titles(text: str, problems: Iterable[Problem]) -> str:
    """A sentence with titles in place of the keys of these problems: a program makes a key long."""
    for problem in sorted(problems, key=lambda problem: -len(problem.key)):  # one key may begin another
        if problem.key in text:
            text = text.replace(problem.key, problem_title(problem))
    return text


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(size in (1, other) for size, other in zip(shape[::-1], to[::-1], strict=False))


def _attention_title(problem: Problem) -> str:
    sizes = sizes_of(problem)
    heads = f"{sizes.heads}" if sizes.kv_heads == sizes.heads else f"{sizes.heads}/{sizes.kv_heads}"
    dim = f"{sizes.head_dim}" if sizes.v_dim == sizes.head_dim else f"{sizes.head_dim}/{sizes.v_dim}"
    seen = " +mask" if mask_position(problem) is not None else " +causal" if dict(problem.scalars).get("causal") else ""
    dtype = problem.inputs[0].dtype
    style = dict(problem.scalars).get("written")
    written = f" by products ({style})" if style else ""
    return f"attention {sizes.batch}·{heads} {sizes.q_len}×{sizes.kv_len}×{dim} {_DTYPES.get(dtype, dtype)}{seen}{written}"


def _gemm_shape(problem: Problem) -> str:
    """M×N×K, or nothing if it is no GEMM."""
    at = _FIRST_MATRIX.get(problem.op)
    if at is None or len(problem.inputs) < at + 2:
        return ""
    left, *rights = problem.inputs[at:]
    rights = [r for r in rights if len(r.shape) > 1] if problem.op in _WITH_VECTORS else rights[:1]
    if len(left.shape) < 2 or any(len(r.shape) < 2 or r.shape[-2] != left.shape[-1] for r in rights):
        return ""
    *batches, rows, depth = left.shape
    if problem.op in _NORMED:
        batches, rows = [], math.prod(left.shape[:-1])
    batch = "".join(f"{size}·" for size in batches)
    columns = "+".join(str(r.shape[-1]) for r in rights)
    columns = f"({columns})" if len(rights) > 1 else columns
    return f"{batch}{rows}×{columns}×{depth}"


def config_title(candidate: Candidate) -> str:
    """The backend and its config, a tile as one word, without what says nothing (`prepack=False`, `merge=none`, empty)."""
    config = dict(candidate.config)
    for word, parts in _AS_ONE:
        if all(name in config for name in parts):
            config[word] = "×".join(str(config.pop(name)) for name in parts)
    order = (*_FIRST_KEYS, "tile")
    said = {k: v for k, v in config.items() if v not in (False, "", "none")}
    names = sorted(said, key=lambda name: (order.index(name) if name in order else len(order), name))
    words = [name if said[name] is True else f"{name}={said[name]}" for name in names]
    return " ".join([candidate.backend, *words])
