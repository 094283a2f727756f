"""What nvMatmulHeuristics' model of CUTLASS 3 proposes for CuTe DSL kernels: tiles, clusters, parts of K, in both orientations.

It knows no two sources: each is asked about with its own tiles, and everything else of an answer (clusters of four, a depth
of the tile, parts of K) is moved to what the source has.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from autokernel.cutedsl.config import (
    BLACKWELL_GROUPS,
    BLACKWELL_PROBLEMS,
    COLUMNS,
    COOPERATIVE_TILES,
    OPERATORS,
    OPERATORS_TILES,
    PERSISTENT,
    PINGPONG_TILES,
    QUACK,
    ROWS,
)
from autokernel.records import ConfigValue
from autokernel.search.nvmatmul_library import Query, ask, gpu_for
from autokernel.search.space import BoundSpace, Config

MAX_SEEDS = 8  # of each source

_TARGET = "CUTLASS3"
_NO_SPLIT = {"SPLIT_K_KIND": 0}
_MAX_CLUSTER, _MAX_SWIZZLE = 2, 8
_TILES = {OPERATORS: OPERATORS_TILES, QUACK: (*COOPERATIVE_TILES, *PINGPONG_TILES)}
# of one block on sm_100; a pair of blocks that computes together (clusters of two along M) has a tile of twice the rows
BLACKWELL_TILES = tuple((m, n) for m in (64, 128) for n in (16, 32, 64, 128, 160, 192, 224, 256))
_BLACKWELL = "sm_100"
# what the library is asked of each kind of problem, and tiles of one block that its operators have. It knows nothing of scales
# of blocks: mxfp8 is asked as plain e4m3, nvfp4 as plain fp4; nor of groups: as a batch of products with as many rows each
_BLACKWELL_ASKED = {
    "dense": ("TST", BLACKWELL_TILES),
    "mxfp8": ("QQTST", tuple((m, n) for m in (64, 128) for n in (64, 128, 192))),
    "nvfp4": ("OOTST", tuple((m, n) for m in (64, 128) for n in (64, 128, 192))),
    "grouped": ("TST", ((64, 128), (128, 128), (128, 256))),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CuteRow:
    """One proposal, in the terms of `cutedsl.config`. `runtime_s` is an estimate: it ranks answers about one product.

    Clusters and swizzle are the library's own, and may be larger than a source has them.
    """

    tile_m: int
    tile_n: int
    cluster_m: int
    cluster_n: int
    split_k: int
    swizzle: int
    raster: str
    swap: bool
    runtime_s: float


def ask_cute(query: Query, tiles: Collection[tuple[int, int]], *, split: bool = True) -> list[CuteRow]:
    """Proposals for a product and its transpose, distinct, fastest estimate first.

    Args:
        query: the product as the caller sees it.
        tiles: M x N that there are kernels for.
        split: whether K may be split.

    Raises:
        ImportError, OSError: the library is not installed.
        RuntimeError: it refused the question.
    """
    known, properties = frozenset(tiles), {} if split else _NO_SPLIT
    rows: dict[CuteRow, CuteRow] = {}
    for swap, question in ((False, query), (True, query.transposed)):
        answers = ask(question, _TARGET, properties=properties, accepts=lambda m, n, _k: (m, n) in known)
        for kernel, runtime_s in ((answer.kernel, answer.runtime_s) for answer in answers):
            row = CuteRow(
                tile_m=kernel.cta_tile_m,
                tile_n=kernel.cta_tile_n,
                cluster_m=max(1, kernel.cluster_m),
                cluster_n=max(1, kernel.cluster_n),
                split_k=max(1, kernel.split_k),
                swizzle=max(1, kernel.swizzle_factor),
                raster=COLUMNS if kernel.cta_order else ROWS,
                swap=swap,
                runtime_s=runtime_s,
            )
            same = replace(row, runtime_s=0.0)  # answers differ in the depth of tiles, too
            if same not in rows or rows[same].runtime_s > runtime_s:
                rows[same] = row
    return sorted(rows.values(), key=lambda row: row.runtime_s)


def blackwell_rows(m: int, n: int, k: int, dtype_letters: str, device_name: str = "NVIDIA B200") -> list[CuteRow]:
    """What is proposed for a product of a row-major [m, k] and an nn.Linear's weight on a Blackwell card.

    Kernels for it can be compiled without one (arch "sm_100a"); none of these was ever run by us.

    Args:
        m: rows.
        n: columns.
        k: depth.
        dtype_letters: of `nvmatmul_library.PRECISIONS`.
        device_name: the card's own name.

    Raises:
        ImportError, OSError: the library is not installed.
        RuntimeError: it refused the question.
    """
    gpu = gpu_for(device_name, _BLACKWELL)
    assert gpu is not None
    return ask_cute(Query(m=m, n=n, k=k, precision=dtype_letters, gpu=gpu), BLACKWELL_TILES)


def blackwell_seeds(problem: str, shape: tuple[int, int, int], limit: int = MAX_SEEDS) -> list[tuple[int, int, int, int]]:
    """What is proposed for one of `BLACKWELL_PROBLEMS` on a B200, for `cutedsl.blackwell.named`: distinct, the best first.

    Args:
        problem: its kind.
        shape: M, N, K; with groups M is that of all together.
        limit: most proposals.

    Returns:
        Tile of one block, M and N, and blocks of a cluster, M and N.

    Raises:
        ImportError, OSError: the library is not installed.
        RuntimeError: it refused the question.
        ValueError: no such kind of problem, or rows that groups cannot share evenly.
    """
    if problem not in _BLACKWELL_ASKED:
        raise ValueError(f"problems for SM100 are {', '.join(BLACKWELL_PROBLEMS)}, not {problem}")
    letters, tiles = _BLACKWELL_ASKED[problem]
    groups = BLACKWELL_GROUPS if problem == "grouped" else 1
    m, n, k = shape
    if m % groups:
        raise ValueError(f"{groups} groups share {m} rows evenly: give a multiple of {groups}")
    gpu = gpu_for("NVIDIA B200", _BLACKWELL)
    assert gpu is not None
    query = Query(m=m // groups, n=n, k=k, batch=groups, precision=letters, gpu=gpu)
    rows = [row for row in ask_cute(query, tiles, split=False) if not row.swap]  # operands lie as they lie
    found = dict.fromkeys((row.tile_m, row.tile_n, row.cluster_m, row.cluster_n) for row in rows)
    return list(found)[:limit]


def cute_configs(query: Query, space: BoundSpace) -> list[Config]:
    """Proposals as legal configs of a space of CuTe DSL kernels: up to `MAX_SEEDS` of each source, the sources by turns.

    Raises:
        ImportError, OSError: the library is not installed.
        RuntimeError: it refused the question.
    """
    domains = {domain.name: domain for domain in space.domains}
    if not {"source", "tile_m", "tile_n"} <= set(domains) or space.empty:
        return []
    by_source: list[list[Config]] = []
    for source in (str(choice) for choice in domains["source"].choices if choice in _TILES):
        splits = source == QUACK and "split_k" in domains
        rows = ask_cute(query, _TILES[source], split=splits)
        by_source.append(_legal(source, rows, space)[:MAX_SEEDS])
    turns = max(map(len, by_source), default=0)
    return [configs[turn] for turn in range(turns) for configs in by_source if turn < len(configs)]


def _legal(source: str, rows: Sequence[CuteRow], space: BoundSpace) -> list[Config]:
    """Rows as configs of the space, each once: those that keep tile and orientation there; others only if none does."""
    names = {domain.name for domain in space.domains}
    kept: list[Config] = []
    moved: list[Config] = []
    for row in rows:
        for wanted in _wanted(source, row):
            legal = space.nearest({name: value for name, value in wanted.items() if name in names})
            if legal is None or legal["source"] != source:
                continue
            same = all(legal.get(name, wanted[name]) == wanted[name] for name in ("tile_m", "tile_n", "swap", "pingpong"))
            (kept if same else moved).append(legal)
    found: list[Config] = []
    for config in kept or moved:
        if config not in found:
            found.append(config)
    return found


def _wanted(source: str, row: CuteRow) -> list[dict[str, ConfigValue]]:
    """A row in the terms of a source; of quack both kinds of kernel, where it has the tile in both."""
    config: dict[str, ConfigValue] = {
        "source": source,
        "tile_m": row.tile_m,
        "tile_n": row.tile_n,
        "cluster_m": min(row.cluster_m, _MAX_CLUSTER),
        "cluster_n": min(row.cluster_n, _MAX_CLUSTER),
        "swap": row.swap,
        "split_k": row.split_k,
        "ordered": True,
        "separate": False,
        "fuse": True,  # where something follows
        "fast_accum": True,  # where the model allows it
    }
    if source == OPERATORS:
        ordered: dict[str, ConfigValue] = {"swizzle": min(row.swizzle, _MAX_SWIZZLE), "raster": row.raster}
        return [{**config, "family": PERSISTENT, "pingpong": False, **ordered}]
    tile = (row.tile_m, row.tile_n)
    kinds = [kind for kind, tiles in ((True, PINGPONG_TILES), (False, COOPERATIVE_TILES)) if tile in tiles]
    return [{**config, "pingpong": kind, "swizzle": _MAX_SWIZZLE, "raster": ROWS} for kind in kinds]
