"""Seeds from NVIDIA's nvMatmulHeuristics: for kernels with Triton's tiles, and by `nvmatmul_cute` for CuTe DSL kernels.

Its TRITON target does not know Hopper's large tiles, and its GENERIC target none below 64 rows: each is asked where it is
right, both in between. Answers that differ in what Triton does not have are one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autokernel.records import Candidate, ConfigValue
from autokernel.search.nvmatmul_cute import cute_configs
from autokernel.search.nvmatmul_library import Answer, Query, ask, query_for
from autokernel.search.space import BoundSpace

if TYPE_CHECKING:
    from autokernel.search.seeds import Seed, SeedContext

logger = logging.getLogger(__name__)

MAX_SEEDS = 8
_SMALL_M, _LARGE_M = 32, 64  # up to the first: TRITON target; from the second: GENERIC; between: both
_MAX_STAGES = 5
_VARIED = 2  # how many of the best rows are varied
_TMA_TEMPLATE = "mm_persistent_tma"
# Triton has no clusters and no slices within a block. Split-K is forbidden only where enough is left without it.
_GENERIC = {"SPLIT_K_KIND": 0, "SUPPORTS_CLUSTER_CONFIG": 0, "HAS_SLICE_K": 0, "CTA_SWIZZLER_BUILTIN_KIND": 3}


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
    """Up to `MAX_SEEDS` configs per backend with tiles (per source of one that has several), best first.

    None for a CPU or without the library.
    """
    from autokernel.search.seeds import Seed

    if context.problem.device != "cuda":
        return []
    query = query_for(context.problem, dict(context.names))
    if isinstance(query, str):
        logger.info("nvMatmulHeuristics has no seeds for %s: %s", context.problem, query)
        return []
    seeds: list[Seed] = []
    try:
        for backend, space in context.spaces.items():
            for config in _configs(query, space.bind(context.names)):
                candidate = Candidate(problem=context.problem, backend=backend, config=config)
                seeds.append(Seed(candidate=candidate, origin="nvmatmul"))
    except (ImportError, OSError) as error:
        logger.info(
            "nvMatmulHeuristics is not installed (%s), so it proposes no seeds: pip install nvidia-matmul-heuristics", error
        )
    except RuntimeError as error:
        logger.warning("nvMatmulHeuristics failed and proposes no seeds for %s: %s", context.problem, error)
    return seeds


def _configs(query: Query, space: BoundSpace) -> list[dict[str, ConfigValue]]:
    """Seeds of one backend; none for one without tiles."""
    names = {domain.name for domain in space.domains}
    if "tile_m" in names:
        return cute_configs(query, space)
    return triton_configs(ask_library(query), space) if "BLOCK_M" in names else []


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
    properties = _GENERIC if target_name == "GENERIC" else {}
    answers = ask(query, target_name, properties=properties, accepts=lambda *tile: all(map(_is_power_of_two, tile)))
    return [_row(answer) for answer in answers]


def _row(answer: Answer) -> Row:
    kernel = answer.kernel
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
        runtime_s=answer.runtime_s,
    )


def _is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0
