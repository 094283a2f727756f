"""Seeds from NVIDIA's nvMatmulHeuristics, which models GEMM kernels analytically and needs no GPU itself.

The library (0.1.0.27) is used within limits that were found by running it:

- precision is a string of letters that it does not check: only letters known to be right are passed;
- without an explicit GPU it silently models an old one;
- its Python wrapper shares state between calls and keeps one callback per interface: every query makes its own
  interface with one backend and one callback, and never calls `estimateRuntime`, `estimateSiliconMetric` or
  `nvMatmulHeuristicsDestroy`, which fail or crash;
- rows come unsorted and differ in what Triton does not have: they are sorted by its estimate and made distinct here;
- its TRITON target does not know Hopper's large tiles, and its GENERIC target none below 64 rows: each is asked where
  it is right, both in between.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autokernel.records import Candidate, ConfigValue, Problem, TensorSpec
from autokernel.search.space import BoundSpace

if TYPE_CHECKING:
    from autokernel.search.seeds import Seed, SeedContext

logger = logging.getLogger(__name__)

MAX_SEEDS = 8
_ROWS = 64  # asked of the library; most differ only in warp tiles
_SMALL_M, _LARGE_M = 32, 64  # up to the first: TRITON target; from the second: GENERIC; between: both
_MAX_STAGES = 5
_VARIED = 2  # how many of the best rows are varied
_TMA_TEMPLATE = "mm_persistent_tma"

# input dtype -> letters of A and B, accumulation, output
PRECISIONS = {"bfloat16": "TST", "float16": "HSH", "float32": "SFS", "int8": "BII"}
GPUS = {"sm_80": "A100_SXM_80GB", "sm_86": "A40_PCIE", "sm_89": "L40S", "sm_90": "H200_SXM", "sm_100": "B200"}
# positions of A and B among an op's inputs
OPERANDS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "merged_mm": (0, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What the library is asked: sizes in elements, letters, name of a GPU, majorness of A and B."""

    m: int
    n: int
    k: int
    batch: int
    precision: str
    gpu: str
    a_row_major: bool
    b_row_major: bool

    @property
    def layout(self) -> str:
        """The library's name for it: T is row-major, N column-major; the output is row-major."""
        return f"{'T' if self.a_row_major else 'N'}{'T' if self.b_row_major else 'N'}_ROW_MAJOR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One proposal of the library, in Triton's terms. `runtime_s` ranks within one query and says no more.

    `split_k` is what the estimate assumes; Inductor's templates do not split, so rows that do come last.
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    group_m: int
    split_k: int
    runtime_s: float


def nvmatmul_seeds(context: SeedContext) -> list[Seed]:
    """Up to `MAX_SEEDS` configs per backend with Triton tiles, best first; none for a CPU or without the library."""
    from autokernel.search.seeds import Seed

    if context.problem.device != "cuda":
        return []
    query = query_for(context.problem, dict(context.names))
    if isinstance(query, str):
        logger.info("nvMatmulHeuristics has no seeds for %s: %s", context.problem, query)
        return []
    try:
        rows = ask_library(query)
    except (ImportError, OSError) as error:
        logger.info(
            "nvMatmulHeuristics is not installed (%s), so it proposes no seeds: pip install nvidia-matmul-heuristics", error
        )
        return []
    except RuntimeError as error:
        logger.warning("nvMatmulHeuristics failed and proposes no seeds for %s: %s", context.problem, error)
        return []
    seeds: list[Seed] = []
    for backend, space in context.spaces.items():
        for config in triton_configs(rows, space.bind(context.names)):
            candidate = Candidate(problem=context.problem, backend=backend, config=config)
            seeds.append(Seed(candidate=candidate, origin="nvmatmul"))
    return seeds


def query_for(problem: Problem, names: dict[str, int | str]) -> Query | str:
    """The question for a problem, or why it cannot be asked."""
    if problem.op not in OPERANDS:
        return f"{problem.op} is not a GEMM it knows"
    a, b = (problem.inputs[position] for position in OPERANDS[problem.op])
    if a.dtype != b.dtype or a.dtype not in PRECISIONS:
        return f"no letters for {a.dtype} x {b.dtype}"
    gpu = GPUS.get(str(names["isa"]).removesuffix("a"))
    if gpu is None:
        return f"no model of a GPU with {names['isa']}; it has {', '.join(GPUS)}"
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


def ask_library(query: Query) -> list[Row]:
    """Proposals with distinct tiles, fastest estimate first.

    Raises:
        ImportError, OSError: the library is not installed.
        RuntimeError: it refused the question.
    """
    rows: list[Row] = []
    if query.m < _LARGE_M:
        rows += _ask_target(query, "TRITON")
    if query.m > _SMALL_M:
        rows += _ask_target(query, "GENERIC")
    best: dict[tuple[int, int, int], Row] = {}
    for row in sorted(rows, key=lambda row: (row.split_k > 1, row.runtime_s)):
        best.setdefault((row.block_m, row.block_n, row.block_k), row)
    return list(best.values())


def triton_configs(rows: Sequence[Row], space: BoundSpace) -> list[dict[str, ConfigValue]]:
    """Rows as legal configs of a backend with Triton tiles: distinct, best first, the best ones with variations.

    What the estimate is least certain of is varied: the number of warps, and whether Hopper's tensor memory accelerator loads.
    """
    tiles = {"BLOCK_M", "BLOCK_N", "BLOCK_K"}
    default = space.default()
    domains = {domain.name: domain for domain in space.domains}
    if default is None or not tiles <= set(domains):
        return []
    m = int(space.names["m"])
    wanted = [_wanted(row, default, m) for row in rows[:MAX_SEEDS]]
    if m > _SMALL_M and _TMA_TEMPLATE in (domains["template"].choices if "template" in domains else ()):
        wanted[_VARIED:_VARIED] = [{**config, "template": _TMA_TEMPLATE} for config in wanted[:_VARIED]]
    wanted = wanted[: MAX_SEEDS - _VARIED]
    wanted += [_wanted(replace(row, num_warps=4 if row.num_warps == 8 else 8), default, m) for row in rows[:_VARIED]]
    found: list[dict[str, ConfigValue]] = []
    for config in wanted:
        legal = space.nearest({name: value for name, value in config.items() if name in domains})
        # another template would not be this row any more
        if legal is not None and legal.get("template") == config.get("template") and legal not in found:
            found.append(legal)
    return found


def _wanted(row: Row, default: Mapping[str, ConfigValue], m: int) -> dict[str, ConfigValue]:
    config: dict[str, ConfigValue] = {
        **default,
        "BLOCK_M": row.block_m,
        "BLOCK_N": row.block_n,
        "BLOCK_K": row.block_k,
        "num_stages": row.num_stages,
        "num_warps": row.num_warps,
        "GROUP_M": row.group_m if m > row.block_m else default.get("GROUP_M", 1),
    }
    if "split_k" in default and row.split_k > 1:  # a kernel that splits K itself, instead of stream-K
        config |= {"split_k": row.split_k, "waves": 0}
    return config


def _ask_target(query: Query, target_name: str) -> list[Row]:
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
        # Triton has no clusters and no slices within a block. Split-K is forbidden only where enough is left without it.
        properties: dict[str, int] = {}
        if target_name == "GENERIC":
            properties = {"SPLIT_K_KIND": 0, "SUPPORTS_CLUSTER_CONFIG": 0, "HAS_SLICE_K": 0, "CTA_SWIZZLER_BUILTIN_KIND": 3}
        for name, value in properties.items():
            number = ctypes.c_int(value)
            interface.setBackendValueProperty(
                backend, library.NvMatmulHeuristicsBackendProperty[name], ctypes.byref(number), ctypes.sizeof(number)
            )
        interface.setBackendCallbackProperty(
            backend,
            library.NvMatmulHeuristicsBackendPropertyCallbackKind.KERNEL_ADDITIONAL_VALIDITY_CHECK,
            lambda kernel, _problem: int(all(_is_power_of_two(kernel.contents.cta[i]) for i in range(3))),
        )
        layout = library.NvMatmulHeuristicsMatmulLayout[query.layout]
        problem = interface.makeNvMatmulHeuristicsProblem(query.m, query.n, query.k, layout, query.batch)
        answers = interface.getEx(problem, _ROWS, backend, precision=query.precision)
        rows = [_row(answer["kernel"], float(answer["runtime"])) for answer in answers]
    finally:
        interface.destroyBackend(backend)
    # an estimate of nothing means that the library did not understand the question
    return [row for row in rows if row.runtime_s > 0 and math.isfinite(row.runtime_s)]


def _row(kernel: Any, runtime_s: float) -> Row:
    area = kernel.cta_tile_m * kernel.cta_tile_n
    if kernel.instr_tile_m == 64:  # WGMMA: a warpgroup of four warps each, two for the largest tiles
        num_warps = 8 if area >= 128 * 256 else 4
    else:
        tiles = (kernel.cta_tile_m // max(kernel.warp_tile_m, 1)) * (kernel.cta_tile_n // max(kernel.warp_tile_n, 1))
        num_warps = max(1, min(8, tiles))
    return Row(
        block_m=kernel.cta_tile_m,
        block_n=kernel.cta_tile_n,
        block_k=kernel.cta_tile_k,
        num_stages=min(kernel.stages, _MAX_STAGES),
        num_warps=num_warps,
        group_m=max(1, kernel.swizzle_factor),
        split_k=max(1, kernel.split_k),
        runtime_s=runtime_s,
    )


def _is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def _row_major(spec: TensorSpec) -> bool:
    return len(spec.stride) < 2 or spec.stride[-1] == 1 or spec.shape[-1] == 1
