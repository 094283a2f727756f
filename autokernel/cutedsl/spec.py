"""What decides the machine code of one kernel (`KernelSpec`), and what is known of its shared object (`ObjectInfo`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autokernel.cutedsl.config import AT_CALLS, CuteConfig
from autokernel.ops.epilogue import BINARY_EPILOGUES, GATED_EPILOGUES, MATRIX_EPILOGUES
from autokernel.records import ConfigValue, Record, canonical_json, digest_of

REVISION = 6  # of our own part in a shared object: raised, every one is compiled again
BIAS = "bias"  # a vector of N elements, added to each row
SCALE_A, SCALE_B = "scale_a", "scale_b"  # fp32 vectors of M and of N elements, by which rows and columns are multiplied
TENSOR_SCALE_A, TENSOR_SCALE_B = "tensor_scale_a", "tensor_scale_b"  # fp32 tensors of one element, [1]
MATRICES = MATRIX_EPILOGUES  # with an operand like the result
SQUARES = "squares"  # the last step: sums of squares of each row, one for each tile of columns, as a second result
TRANSPOSED = "^T"  # behind a tensor's name in a `Launch`
AT_A_CALL = "swizzle"  # in a `Launch`: a number that the caller chooses


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec(Record):
    """A kernel for every problem with these dtypes, majors, config and epilogue; the sizes are its arguments.

    A is [M, K], B [K, N], of one dtype or of two of 8-bit floating point, the result [M, N] row by row; batched ones have a
    dimension in front. `a_major` and `b_major` name the dimension that is contiguous. `epilogue` names the steps between
    accumulator and result in order: scales first if there are any, then "bias", then names of `ops.epilogue`. Operands have
    the result's dtype, scales are fp32. One of its `GATED_EPILOGUES` stands alone: B is two weights side by side, and the
    result [M, N / 2]. Parts of K that the kernel does not sum are a dimension in front of the result, in fp32. "squares" comes
    last: a second result, fp32 [M, tiles of N], has the sums of squares of what the first one has before it is rounded.
    """

    config: Mapping[str, ConfigValue]  # of `CuteConfig.from_entry`
    dtype: str
    out_dtype: str
    a_major: str  # "m" or "k"
    b_major: str  # "k" or "n"
    batched: bool = False
    epilogue: tuple[str, ...] = ()
    arch: str = "sm_90a"
    num_units: int = 132  # multiprocessors: some kernels keep in their code how many tiles run at once
    b_dtype: str = ""  # of B where it is not A's
    pdl: bool = False  # programmatic dependent launch: its blocks come while the kernel in front ends, if that one lets them

    @property
    def cute(self) -> CuteConfig:
        """The config, checked."""
        return CuteConfig.from_entry(self.config)

    def operands(self) -> dict[str, str]:
        """What the epilogue's operands are called in a `Launch` -> the epilogue's name that takes it, in order."""
        takers = (BIAS, SCALE_A, SCALE_B, TENSOR_SCALE_A, TENSOR_SCALE_B, *BINARY_EPILOGUES)
        return {f"operand{i}": name for i, name in enumerate(name for name in self.epilogue if name in takers)}

    @property
    def dtypes(self) -> tuple[str, str]:
        """Of A and B."""
        return self.dtype, self.b_dtype or self.dtype

    @property
    def num_parts(self) -> int:
        """Of K, where the result is not their sum: [num_parts, M, N]; else 0."""
        config = self.cute
        return config.split_k if config.separate else 0

    @property
    def gated(self) -> bool:
        """Whether pairs of columns, one of each half of B, become one."""
        return self.epilogue[:1] != () and self.epilogue[0] in GATED_EPILOGUES

    @property
    def squares(self) -> bool:
        """Whether there is a second result."""
        return SQUARES in self.epilogue

    @property
    def squared_columns(self) -> int:
        """Of the result, in one of its sums of squares; the last one of a row may have fewer."""
        config = self.cute
        return config.tile_m if config.swap else config.tile_n

    def num_columns(self, n: int) -> int:
        """Of the result, for B of n columns."""
        return n // 2 if self.gated else n

    @property
    def identity(self) -> str:
        """Equal for kernels that serve the same calls: records of earlier versions also say what is left to calls now."""
        left = AT_CALLS.get(str(self.config.get("source")), ())
        return canonical_json(self.to_json() | {"config": {k: v for k, v in self.config.items() if k not in left}})

    def key(self, versions: Mapping[str, str]) -> str:
        """Names the shared object: hash of the spec, of the compilers' versions, and of our own part in it."""
        return digest_of([REVISION, self.to_json(), dict(versions)], length=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch(Record):
    """How the object's function is called.

    `arguments` is a template of nested lists: strings are the names of tensors ("a", "b", "out", "squares", "operand0", ...,
    with "^T" behind for a transposed view, "semaphore", "workspace", "stream") or "swizzle", numbers and None stand for
    themselves.
    `scratch_tile` is given for a kernel that splits K: per tile of the product as the kernel sees it, one int32 that is zero,
    and tile_m x tile_n fp32 elements, zero unless parts are summed in order. Tiles are counted in whole clusters.
    """

    function: str
    arguments: tuple[object, ...]
    scratch_tile: tuple[int, ...] = ()  # tile_m, tile_n, cluster_m, cluster_n
    transposed: bool = False  # the kernel's M is the caller's N
    zeroed_workspace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo(Record):
    """One compiled kernel: its spec and key, how to call it, and what must hold before it is loaded."""

    key: str
    spec: KernelSpec
    launch: Launch
    sha256: str  # of the shared object's bytes
    num_bytes: int
    machine: str  # of the host code: "x86_64"
    cuda_major: int  # of the CUDA runtime that it calls
    versions: Mapping[str, str] = field(default_factory=dict)  # of the compilers: distribution -> version
    compile_s: float = 0.0

    @property
    def file_name(self) -> str:
        return f"{self.key}.so"
