"""Short spellings of problems, configs, times and speed-ups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from autokernel.records import Candidate, Problem, Speedup, Status
from autokernel.tracking.summary import problem_title

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_FIRST_KEYS = ("template", "merge")  # of a config: what kind of kernel it is
_FIRST_MATRIX = {"mm": 0, "bmm": 0, "linear": 0, "merged_mm": 0, "addmm": 1, "baddbmm": 1}


def short_problem(problem: Problem) -> str:
    """`mm 1×1280×384 bf16 +silu` with M×N×K; `bmm 8·1×64×512` with a batch in front; merged GEMMs as `1×(384+128)×384`."""
    at = _FIRST_MATRIX.get(problem.op)
    if at is None or len(problem.inputs) < at + 2:
        return problem_title(problem)
    left, *rights = problem.inputs[at:]
    rights = rights if problem.op == "merged_mm" else rights[:1]
    if len(left.shape) < 2 or any(len(r.shape) < 2 or r.shape[-2] != left.shape[-1] for r in rights):
        return problem_title(problem)
    batch = "".join(f"{size}·" for size in left.shape[:-2])
    columns = "+".join(str(r.shape[-1]) for r in rights)
    columns = f"({columns})" if len(rights) > 1 else columns
    dtypes = "/".join(dict.fromkeys(_DTYPES.get(spec.dtype, spec.dtype) for spec in (left, *rights)))
    epilogue = "".join(f" +{name}" for name in problem.epilogue)
    return f"{problem.op} {batch}{left.shape[-2]}×{columns}×{left.shape[-1]} {dtypes}{epilogue}"


def short_config(candidate: Candidate) -> str:
    """The backend and its config, without what says nothing (`prepack=False`, `merge=none`, empty)."""
    ordered = sorted(candidate.config.items(), key=lambda item: (item[0] not in _FIRST_KEYS, item[0]))
    said = {k: v for k, v in ordered if v not in (False, "", "none")}
    words = [key if value is True else f"{key}={value}" for key, value in said.items()]
    return " ".join([candidate.backend, *words])


def microseconds(value: float) -> str:
    """Four significant digits at most, without exponents: `7.42`, `128.3`, `18,250`."""
    for limit, digits in ((10, 2), (1000, 1)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def ratio(speedup: Speedup) -> str:
    """`1.52× [1.48, 1.56]`."""
    return f"{speedup.ratio:.2f}× {interval(speedup)}"


def interval(speedup: Speedup) -> str:
    return f"[{speedup.low:.2f}, {speedup.high:.2f}]"


def percent(value: float) -> str:
    """A fraction as `12.3 %`."""
    return f"{value * 100:.1f} %"


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def failures(statuses: Mapping[Status, int] | Counter[Status]) -> str:
    """`3 INVALID, 1 WRONG`; empty if nothing failed."""
    return ", ".join(f"{statuses[s]} {s}" for s in Status if s is not Status.OK and statuses.get(s))


def one_line(text: str, width: int = 300) -> str:
    """The first line of a text that has something on it, cut to a width."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    more = len(text.strip()) > len(first)
    return f"{first[: width - 2]} …" if len(first) > width or more else first
