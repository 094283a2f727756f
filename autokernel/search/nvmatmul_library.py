"""NVIDIA's nvMatmulHeuristics, which models GEMM kernels analytically and needs no GPU itself: one question, its answers.

The library (0.1.0.27) is used within limits that were found by running it:

- precision is a string of letters that it does not check: only letters known to be right are passed;
- without an explicit GPU it silently models an old one;
- its Python wrapper shares state between calls and keeps one callback per interface: every question makes its own
  interface with one backend and one callback, and never calls `estimateRuntime`, `estimateSiliconMetric` or
  `nvMatmulHeuristicsDestroy`, which fail or crash;
- a callback that is strict about more than tiles prunes what the answers grow from: everything else is mapped afterwards;
- answers come unsorted and differ in what not every kernel has.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autokernel.records import Problem, TensorSpec

_ROWS = 64  # asked of the library; most differ only in warp tiles

# input dtype -> letters of A and B, accumulation, output; with a letter for each operand: A, B, C, accumulation, D
PRECISIONS: Mapping[str, str] = {
    "bfloat16": "TST",
    "float16": "HSH",
    "float32": "SFS",
    "int8": "BII",
    "float8_e4m3fn": "QQTST",
    "float8_e5m2": "RRTST",
}
# words of a card's own name -> the library's, the first whose words are all there
CARDS: tuple[tuple[str, str], ...] = (
    ("GB300", "GB300_NVL"), ("B300", "GB300_NVL"), ("GB200", "GB200_NVL"), ("B200", "B200"), ("GH200", "H200_SXM"),
    ("H200", "H200_SXM"), ("H100 PCIE", "H100_PCIE"), ("H100 NVL", "H100_NVL"), ("H100", "H100_SXM"), ("H20", "H20_SXM"),
    ("A100 PCIE", "A100_PCIE_80GB"), ("A100", "A100_SXM_80GB"), ("A30", "A30_PCIE"), ("A10", "A10_PCIE"),
    ("A40", "A40_PCIE"), ("A6000", "RTX_A6000"), ("L4", "L4"), ("L20", "L20"), ("L40", "L40"), ("L40S", "L40S"),
    ("6000 ADA", "RTX_6000_ADA"), ("PRO 6000", "RTX_PRO_6000"), ("RTX 3090", "RTX_3090"), ("RTX 4090", "RTX_4090"),
    ("RTX 5080", "RTX_5080"), ("RTX 5090", "RTX_5090"),
)  # fmt: skip
# for cards that it does not know by name
ARCHITECTURES: Mapping[str, str] = {
    "sm_80": "A100_SXM_80GB", "sm_86": "A40_PCIE", "sm_89": "L40S", "sm_90": "H200_SXM", "sm_100": "B200",
}  # fmt: skip
# positions of A and B among an op's inputs
OPERANDS: Mapping[str, tuple[int, int]] = {
    "mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "merged_mm": (0, 1), "scaled_mm": (0, 1), "int_mm": (0, 1),
    "linear_rms_norm": (0, 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What the library is asked: sizes in elements, letters, its name of a GPU, majorness of A, B and the result."""

    m: int
    n: int
    k: int
    batch: int = 1
    precision: str
    gpu: str
    a_row_major: bool = True
    b_row_major: bool = False
    out_row_major: bool = True

    @property
    def layout(self) -> str:
        """The library's name for it: T is row-major, N column-major; behind them the result's."""
        a, b = ("T" if row_major else "N" for row_major in (self.a_row_major, self.b_row_major))
        return f"{a}{b}_{'ROW' if self.out_row_major else 'COL'}_MAJOR"

    @property
    def transposed(self) -> Query:
        """The same product with the weight's columns as its rows: B^T A^T."""
        return Query(
            m=self.n,
            n=self.m,
            k=self.k,
            batch=self.batch,
            precision=self.precision,
            gpu=self.gpu,
            a_row_major=not self.b_row_major,
            b_row_major=not self.a_row_major,
            out_row_major=not self.out_row_major,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """One kernel that the library proposes: its own record of it, and an estimate that ranks within one question."""

    kernel: Any
    runtime_s: float


def query_for(problem: Problem, names: Mapping[str, int | str]) -> Query | str:
    """The question for a problem, or why it cannot be asked."""
    if problem.op not in OPERANDS:
        return f"{problem.op} is not a GEMM it knows"
    a, b = (problem.inputs[position] for position in OPERANDS[problem.op])
    if a.dtype != b.dtype or a.dtype not in PRECISIONS:
        return f"no letters for {a.dtype} x {b.dtype}"
    gpu = gpu_for(str(names.get("device_name", "")), str(names["isa"]))
    if gpu is None:
        return f"no model of a GPU with {names['isa']}; it has {', '.join(ARCHITECTURES)}"
    return Query(
        m=int(names["m"]),
        n=int(names["n"]),
        k=int(names["k"]),
        batch=int(names.get("batch", 1)),
        precision=PRECISIONS[a.dtype],
        gpu=gpu,
        a_row_major=_row_major(a),
        b_row_major=_row_major(b),
    )


def gpu_for(device_name: str, isa: str) -> str | None:
    """The library's model of a card: by its own name ("NVIDIA H100 80GB HBM3"), failing that of one with its architecture."""
    words = set(re.split(r"[\s-]+", device_name.upper()))
    named = next((gpu for wanted, gpu in CARDS if set(wanted.split()) <= words), None)
    return named or ARCHITECTURES.get(isa.removesuffix("a"))


def ask(
    query: Query, target_name: str, *, properties: Mapping[str, int], accepts: Callable[[int, int, int], bool]
) -> list[Answer]:
    """The library's proposals, in its own order.

    Args:
        query: the product.
        target_name: kind of kernel: "CUTLASS3", "TRITON", "GENERIC".
        properties: of these kernels, by the library's names.
        accepts: whether there is a kernel with a tile of M x N x K.

    Raises:
        ImportError, OSError: the library is not installed.
        RuntimeError: it refused the question.
    """
    import nvMatmulHeuristics as library  # noqa: N813

    target = library.NvMatmulHeuristicsTarget[target_name]
    interface = library.NvMatmulHeuristicsInterfaceEx(
        backend=target,
        flags=library.NvMatmulHeuristicsFlags.PERF_MODEL_BASED_AUTO_TUNING,
        gpu=library.NvMatmulHeuristicsNvidiaGpu[query.gpu],
        load_discovery_implicitly=True,
    )
    backend = interface.createBackend(target)
    try:
        for name, value in properties.items():
            number = ctypes.c_int(value)
            interface.setBackendValueProperty(
                backend, library.NvMatmulHeuristicsBackendProperty[name], ctypes.byref(number), ctypes.sizeof(number)
            )
        interface.setBackendCallbackProperty(
            backend,
            library.NvMatmulHeuristicsBackendPropertyCallbackKind.KERNEL_ADDITIONAL_VALIDITY_CHECK,
            lambda kernel, _problem: int(accepts(*(kernel.contents.cta[i] for i in range(3)))),
        )
        layout = library.NvMatmulHeuristicsMatmulLayout[query.layout]
        problem = interface.makeNvMatmulHeuristicsProblem(query.m, query.n, query.k, layout, query.batch)
        found = interface.getEx(problem, _ROWS, backend, precision=query.precision)
        answers = [Answer(answer["kernel"], float(answer["runtime"])) for answer in found]
    finally:
        interface.destroyBackend(backend)
    # an estimate of nothing means that the library did not understand the question
    return [answer for answer in answers if answer.runtime_s > 0 and math.isfinite(answer.runtime_s)]


def _row_major(spec: TensorSpec) -> bool:
    return len(spec.stride) < 2 or spec.stride[-1] == 1 or spec.shape[-1] == 1
