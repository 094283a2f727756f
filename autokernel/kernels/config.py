"""What a skinny GEMM kernel is launched with: its parameters, and what follows from them for a problem. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Mode = Literal["rows", "swap", "vector"]
MODES: tuple[Mode, ...] = get_args(Mode)

KERNEL = "skinny_mm"
MAX_M = 128
MAX_ELEMENTS = 2**31 - 1  # offsets are 32-bit
DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class SkinnyConfig:
    """Parameters of `skinny_mm`, y[M, N] = x[M, K] @ w[N, K]^T.

    Attributes:
        mode: "rows": rows of x are the rows of the matrix instruction. "swap": rows of w are, so that few rows of x waste
            no rows of a 64-row instruction. "vector": one row of x, no matrix instruction.
        block_m, block_n, block_k: the tile. In mode "vector", block_m is 1.
        split_k: programs that share a tile, each with a part of K; the last one to finish adds the parts in order.
        waves: 0, or stream-K: this many programs per multiprocessor share all tiles evenly, whatever their number.
        tma: read x and w through tensor descriptors.
        tile_first: neighbouring programs work on neighbouring tiles instead of on the parts of one tile.
        num_warps, num_stages: of Triton.
    """

    mode: Mode
    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    waves: int = 0
    tma: bool = False
    tile_first: bool = False
    num_warps: int = 4
    num_stages: int = 3

    def problem(self, m: int, n: int, k: int) -> str | None:
        """The rule that a problem breaks, None if the kernel takes it."""
        if not 1 <= m <= MAX_M:
            return f"skinny_mm is for M of 1 to {MAX_M}; M is {m}"
        if n * k > MAX_ELEMENTS or m * n > MAX_ELEMENTS:
            return f"skinny_mm has 32-bit offsets; N * K is {n * k}, more than {MAX_ELEMENTS}"
        if k % self.block_k:
            return f"block_k must divide K; they are {self.block_k} and {k}"
        if self.mode == "vector" and (m != 1 or self.block_m != 1):
            return f"mode vector is for one row and block_m of 1; M is {m}, block_m {self.block_m}"
        if self.mode == "vector" and self.tma:
            return "mode vector reads without tensor descriptors; set tma to false"
        if self.mode != "vector" and (self.block_m < 16 or self.block_n < 16 or self.block_k < 16):
            return f"tiles of matrix instructions are at least 16; this is {self.block_m}x{self.block_n}x{self.block_k}"
        if self.waves and self.split_k != 1:
            return f"stream-K (waves {self.waves}) takes split_k of 1; it is {self.split_k}"
        if self.split_k > k // self.block_k:
            return f"K has {k // self.block_k} blocks of {self.block_k}; split_k is {self.split_k}"
        return None

    def tiles(self, m: int, n: int) -> int:
        """Tiles of y."""
        return -(-m // self.block_m) * -(-n // self.block_n)

    def programs(self, m: int, n: int, k: int, num_units: int) -> int:
        """Programs of a launch on a device with so many multiprocessors."""
        tiles = self.tiles(m, n)
        return min(self.waves * num_units, tiles * (k // self.block_k)) if self.waves else tiles * self.split_k

    @property
    def reduces(self) -> bool:
        """Whether tiles are shared, so that parts and counters are needed."""
        return self.split_k > 1 or self.waves > 0

    def num_counters(self, m: int, n: int) -> int:
        """int32 counters that must be zero before a launch, and are zero again behind it."""
        return self.tiles(m, n) if self.reduces else 0

    def num_parts(self, m: int, n: int, k: int, num_units: int) -> int:
        """fp32 elements of scratch memory for the parts of shared tiles."""
        programs = self.programs(m, n, k, num_units) * (2 if self.waves else 1)
        return programs * self.block_m * self.block_n if self.reduces else 0

    def reads_ahead(self, k: int) -> bool:
        """Whether the kernel can begin with its weights: each program has one tile, and one block of K of it at least."""
        return self.mode == "vector" and self.waves == 0 and (k // self.block_k) % self.split_k == 0

    def constants(self, m: int, n: int, k: int, *, bias: bool, num_units: int, ahead: bool = False) -> dict[str, int]:
        """The kernel's compile-time arguments, in the order of its parameters.

        Args:
            m, n, k: sizes of the product.
            bias: whether there is one.
            num_units: multiprocessors of the device.
            ahead: weights are read before the kernel waits for the one in front of it, if it can.
        """
        return {
            "M": m, "N": n, "K": k,
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "SPLIT_K": self.split_k, "PROGRAMS": self.programs(m, n, k, num_units) if self.waves else 0,
            "MODE": MODES.index(self.mode), "TMA": int(self.tma), "TILE_FIRST": int(self.tile_first),
            "HAS_BIAS": int(bias), "STAGES": self.num_stages, "AHEAD": int(ahead and self.reads_ahead(k)),
        }  # fmt: skip

    def to_ints(self) -> list[int]:
        """As the operator takes it."""
        values = {name: getattr(self, name) for name in _NAMES}
        return [MODES.index(self.mode), *(int(values[name]) for name in _NAMES[1:])]

    @classmethod
    def from_ints(cls, values: list[int]) -> SkinnyConfig:
        """The inverse of `to_ints`."""
        mode, *rest = values
        named: dict[str, Any] = dict(zip(_NAMES[1:], rest, strict=True))
        named |= {name: bool(named[name]) for name in _FLAGS}
        return cls(mode=MODES[mode], **named)

    @classmethod
    def from_entry(cls, config: Mapping[str, object]) -> SkinnyConfig:
        """From a candidate's config, whose names are those of search_spaces/.

        Raises:
            ValueError: a parameter is missing or not one of the kernel's.
        """
        given = {name.lower(): value for name, value in config.items() if name not in _OF_ENTRIES}
        unknown = sorted(set(given) - set(_NAMES))
        missing = sorted({"mode", "block_m", "block_n", "block_k"} - set(given))
        if unknown or missing or given["mode"] not in MODES:
            raise ValueError(
                f"skinny_mm takes {', '.join(_NAMES)} with mode one of {', '.join(MODES)}; "
                f"unknown: {', '.join(unknown) or 'none'}, missing: {', '.join(missing) or 'none'}, mode: {given.get('mode')}"
            )
        named: dict[str, Any] = {
            name: bool(value) if name in _FLAGS else value if name == "mode" else int(str(value))
            for name, value in given.items()
        }
        return cls(**named)


_NAMES = tuple(field.name for field in fields(SkinnyConfig))
_FLAGS = ("tma", "tile_first")
_OF_ENTRIES = ("kernel", "merge", "m_min", "m_max")  # what a config says beside the kernel's parameters
