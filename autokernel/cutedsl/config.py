"""Parameters of a CuTe DSL GEMM, under the names of search_spaces/, and the rules between them. Imports neither source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

OPERATORS, QUACK, CLUSTER = "operators", "quack", "cluster"
SOURCES = (OPERATORS, QUACK, CLUSTER)
PERSISTENT, TENSOROP = "persistent", "tensorop"
FAMILIES = (PERSISTENT, TENSOROP)  # of operators
ROWS, COLUMNS = "rows", "columns"
SWIZZLES = (1, 2, 4, 8)
DEFAULT_SWIZZLE = 8
AT_CALLS: Mapping[str, tuple[str, ...]] = {QUACK: ("swizzle",)}  # source -> see `CuteConfig.at_calls`
ALIGNMENT_BYTES = 16  # of what is contiguous: TMA reads and writes nothing narrower
DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")  # either may be multiplied by the other

# tiles (M, N) of quack's two kinds of kernel on SM90: one tile by two warpgroups, or one by each in turns
COOPERATIVE_TILES = (
    *((64, n) for n in (16, 32, 48, 64, 96, 112, 128, 224)),
    *((128, n) for n in (16, 32, 48, 64, 96, 112, 128, 192, 224, 256)),
    (192, 256),
    *((256, n) for n in (128, 160, 192, 208)),
)
PINGPONG_TILES = (
    *((64, n) for n in (16, 32, 48, 64, 96, 112, 128, 224, 256)),
    *((128, n) for n in (32, 48, 64, 96, 112, 128, 160, 192, 208)),
    (192, 128),
)
# of `cluster_gemm`: rows of weights for each warpgroup, rows of the other matrix, and what a multiprocessor can hold
CLUSTER_ROWS = 64
CLUSTER_TILES = tuple((m, n) for m in (64, 128, 192, 256) for n in (16, 32, 48, 64, 96, 128))
CLUSTER_BLOCK_K = 64
CLUSTER_BLOCKS = 8
TILES_K = (0, 64, 128, 256, 512)
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024  # of a multiprocessor of sm_90, and by CUDA for each block
BARRIERS_BYTES = 1024
BLACKWELL_PROBLEMS = ("dense", "mxfp8", "nvfp4", "grouped")  # what SM100's operators are listed for, by `blackwell.py`
BLACKWELL_OTHERS = ("batched", "float16", "float8", "int8", "mixed", "fused")  # and what nvMatmulHeuristics is not asked for
BLACKWELL_GROUPS = 4  # products of one grouped problem, which share its rows
OPERATORS_TILES = ((64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256))
TENSOROP_TILES = ((128, 128),)  # operators names three smaller ones, whose machine code is that of this one
TENSOROP_BATCH = 65535  # products at most: each has blocks of its own, along the third axis of the grid


@dataclass(frozen=True, slots=True, kw_only=True)
class CuteConfig:
    """One kernel of one source.

    Args:
        source: "operators" (nvidia-cutlass-operators' kernels), "quack" (quack-kernels' GEMM) or "cluster" (our own).
        family: which of operators' kernels: "persistent", made for the architecture, or "tensorop", with Ampere's instructions
            for 16 bits. The latter has several blocks on a multiprocessor, for products that wait for memory.
        tile_m: rows of a tile of the product as the kernel sees it (columns of the caller's with `swap`).
        tile_n: its columns.
        cluster_m: thread blocks of a cluster along M, which share loads of B.
        cluster_n: along N, which share loads of A.
        pingpong: two warpgroups with a tile each, of which one computes while the other stores; else both share one. quack.
        swap: computes the transpose, weights as rows: for few rows.
        split_k: parts of K, summed in fp32: by the last one to finish (quack), or by all blocks of a cluster, each some rows.
        ordered: parts are summed in their order, so that results repeat to the bit; else in that of their arrival.
        separate: the kernel leaves the parts, fp32, to the graph, which sums them in one kernel with what follows. quack.
        swizzle: most tiles that run side by side before the next row of them, so that they find each other's operands in L2.
        raster: which neighbours follow each other, "rows" or "columns" of tiles. operators; quack decides it by the shape.
        fuse: compute the problem's epilogue in the kernel; else it stays behind it. quack.
        fast_accum: sums of products in 8-bit floating point stay in the matrix units, which keep fewer bits of them than fp32
            has; else those of each block of K are added up in fp32, in as many registers again. quack.
        resident: blocks of a multiprocessor at once, among which it divides its shared memory. cluster.
        tile_k: elements of K in a stage: more are longer stretches of each row that are asked for at once. 0: 128 bytes of
            them. quack and cluster.
    """

    source: str
    family: str = PERSISTENT
    tile_m: int
    tile_n: int
    cluster_m: int = 1
    cluster_n: int = 1
    pingpong: bool = False
    swap: bool = False
    split_k: int = 1
    ordered: bool = True
    separate: bool = False
    swizzle: int = DEFAULT_SWIZZLE
    raster: str = ROWS
    fuse: bool = False
    fast_accum: bool = False
    resident: int = 1
    tile_k: int = 0

    def problem(self) -> str | None:
        """The rule that the parameters break, None if a kernel has them."""
        tile, cluster = (self.tile_m, self.tile_n), (self.cluster_m, self.cluster_n)
        if self.source == OPERATORS:
            if (wrong := self._operators_problem()) is not None:
                return wrong
        elif self.source == QUACK:
            tiles = PINGPONG_TILES if self.pingpong else COOPERATIVE_TILES
            if tile not in tiles:
                kind = "pingpong" if self.pingpong else "cooperative"
                return f"quack has {kind} tiles {_listed(tiles)}, not {tile[0]}x{tile[1]}"
            if self.raster != ROWS:
                return "quack orders tiles by the shape of the problem: leave raster at rows"
        elif self.source == CLUSTER:
            if (wrong := self._cluster_problem()) is not None:
                return wrong
        else:
            return f"source must be one of {', '.join(SOURCES)}, not {self.source!r}"
        if self.family != PERSISTENT and self.source != OPERATORS:
            return f"families are operators': leave family at {PERSISTENT} with {self.source}"
        if any(size not in (1, 2) for size in cluster):
            return f"clusters have 1 or 2 blocks along an axis, not {cluster[0]}x{cluster[1]}"
        if self.split_k < 1 or self.swizzle not in SWIZZLES or self.raster not in (ROWS, COLUMNS):
            given = f"split_k={self.split_k}, swizzle={self.swizzle}, raster={self.raster}"
            return f"split_k is 1 or more, swizzle 1, 2, 4 or 8, raster rows or columns, not {given}"
        if self.resident != 1 and self.source != CLUSTER:
            return f"{self.source} decides itself how many blocks a multiprocessor has: leave resident at 1"
        if self.tile_k not in TILES_K:
            return f"tile_k is one of {', '.join(map(str, TILES_K))}, not {self.tile_k}"
        if self.split_k == 1 and not self.ordered:
            return "ordered says how parts of K are summed: leave it on with split_k=1"
        if self.separate and (self.split_k == 1 or not self.ordered or self.fuse):
            return "separate leaves parts of K to what follows, which sums them in order: with split_k above 1, without fuse"
        return None

    def _operators_problem(self) -> str | None:
        """The rule of nvidia-cutlass-operators' kernels that is broken."""
        tile = (self.tile_m, self.tile_n)
        if self.family not in FAMILIES:
            return f"operators has the families {' and '.join(FAMILIES)}, not {self.family}"
        known, name = (TENSOROP_TILES, TENSOROP) if self.family == TENSOROP else (OPERATORS_TILES, OPERATORS)
        if tile not in known:
            return f"{name} has tiles {_listed(known)}, not {tile[0]}x{tile[1]}"
        if self.pingpong or self.split_k != 1 or self.fuse or self.fast_accum or self.tile_k:
            return "operators has neither pingpong nor split_k nor fuse nor fast_accum nor tile_k on SM90: leave them off"
        ordered = (self.cluster_m, self.cluster_n, self.swizzle, self.raster) != (1, 1, DEFAULT_SWIZZLE, ROWS)
        if self.family == TENSOROP and ordered:
            return f"{TENSOROP} has no clusters, and orders its tiles itself: leave swizzle and raster out, clusters at 1"
        return None

    def _cluster_problem(self) -> str | None:
        """The rule of our own kernel that is broken."""
        if (self.tile_m, self.tile_n) not in CLUSTER_TILES:
            return f"cluster has tiles {_listed(CLUSTER_TILES)}, not {self.tile_m}x{self.tile_n}"
        flags = self.pingpong or self.separate or self.fuse or self.fast_accum or not self.ordered
        if not self.swap or flags or self.cluster_n != 1 or self.swizzle != DEFAULT_SWIZZLE or self.raster != ROWS:
            return "cluster takes swap (always), cluster_m, split_k, resident and tile_k: leave the other parameters off"
        blocks, warps = self.cluster_m * self.split_k, self.tile_m // 16
        if self.split_k not in (1, 2, 4, 8) or blocks > CLUSTER_BLOCKS or warps % self.split_k:
            return (
                f"a cluster has up to {CLUSTER_BLOCKS} blocks, and each adds up as many of a tile's 16 rows as the others: "
                f"not split_k={self.split_k}, cluster_m={self.cluster_m} with tile_m={self.tile_m}"
            )
        if self.resident < 1 or self.cluster_stages < 2:
            tile = f"{self.tile_m}x{self.tile_n}"
            return f"{tile} needs more shared memory than resident={self.resident} leaves: choose a smaller one of them"
        return None

    @property
    def cluster_stages(self) -> int:
        """Blocks of K, of both matrices, that our own kernel has room for."""
        room = SHARED_BYTES // self.resident - RESERVED_BYTES - BARRIERS_BYTES
        row, sums = 2 * (self.tile_k or CLUSTER_BLOCK_K), 4 * self.tile_m * self.tile_n
        return (room - sums) // ((self.tile_m + self.tile_n) * row)

    @property
    def deterministic(self) -> bool:
        """Whether two runs agree to the bit."""
        return self.split_k == 1 or self.ordered

    @property
    def at_calls(self) -> tuple[str, ...]:
        """Parameters that the kernel takes at each call: one object serves all their values."""
        return AT_CALLS.get(self.source, ())

    @property
    def swizzle_of_calls(self) -> int:
        """The swizzle that calls name; the default where the object has its own."""
        return self.swizzle if "swizzle" in self.at_calls else DEFAULT_SWIZZLE

    @classmethod
    def from_entry(cls, config: Mapping[str, object]) -> CuteConfig:
        """From a candidate's config, whose names are those of search_spaces/.

        Raises:
            ValueError: a parameter is missing, not one of ours, or breaks a rule.
        """
        given = {name: value for name, value in config.items() if name not in _OF_ENTRIES}
        if given.pop(_HINTS, False):
            raise ValueError(f"kernels that tell L2 what to keep ({_HINTS}) gained nothing in models and are gone: tune again")
        names = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(given) - names), sorted({"source", "tile_m", "tile_n"} - set(given))
        if unknown or missing:
            raise ValueError(
                f"a CuTe DSL kernel takes {', '.join(sorted(names))}; "
                f"unknown: {', '.join(unknown) or 'none'}, missing: {', '.join(missing) or 'none'}"
            )
        values: dict[str, Any] = {
            name: str(value) if name in _WORDS else bool(value) if name in _FLAGS else int(str(value))
            for name, value in given.items()
        }
        made = cls(**values)
        if wrong := made.problem():
            raise ValueError(wrong)
        return made


_WORDS = ("source", "family", "raster")
_FLAGS = ("pingpong", "swap", "ordered", "separate", "fuse", "fast_accum")
_HINTS = "stream"  # in entries of earlier versions: false says nothing
_OF_ENTRIES = ("merge",)  # what a config says beside the kernel's parameters


def multiplies(left: str, right: str) -> bool:
    """Whether there are kernels for factors of these dtypes."""
    return left in DTYPES and (left == right or {left, right} <= set(FLOAT8))


def _listed(tiles: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{m}x{n}" for m, n in tiles)
