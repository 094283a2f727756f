"""Skinny GEMMs of `skinny_mm.py`: the problems, their configs, and compiling one without a GPU."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from autokernel.kernels.config import SkinnyConfig  # noqa: E402
from autokernel.search.space import BoundSpace, DeviceFacts, names_for  # noqa: E402
from autokernel.search.space_file import load_space  # noqa: E402

NUM_UNITS, SHARED_BYTES, L2_BYTES = 132, 232_448, 60 << 20  # an H200
SHAPES = {
    "o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 14336), "gate-up": (28672, 4096), "lm-head": (128256, 4096),
}  # fmt: skip
ROWS = (16, 1, 128, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """y[m, n] = x[m, k] @ w[n, k]^T in bf16."""

    name: str
    m: int
    n: int
    k: int

    @property
    def label(self) -> str:
        return f"{self.name}-m{self.m}"

    @property
    def num_bytes(self) -> int:
        """Bytes that have to be read and written."""
        return 2 * (self.n * self.k + self.m * self.k + self.m * self.n)


GEMMS = tuple(Gemm(name=name, m=m, n=n, k=k) for m in ROWS for name, (n, k) in SHAPES.items())

Key = tuple[int, ...]  # a config as the operator takes it


def key_of(config: Mapping[str, Any]) -> Key:
    """A config of the search space as a hashable."""
    return tuple(SkinnyConfig.from_entry(config).to_ints())


def space_of(gemm: Gemm) -> BoundSpace:
    """The package's own search space, bound to a problem on an H200."""
    facts = DeviceFacts(device="cuda", isa="sm_90", num_units=NUM_UNITS, smem_bytes=SHARED_BYTES, l2_bytes=L2_BYTES)
    dims = {"m": gemm.m, "n": gemm.n, "k": gemm.k, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}
    return load_space("mm", ROOT / "search_spaces")["triton"].bind(names_for(dims, facts))


def candidates(gemm: Gemm, bound: BoundSpace, seed: int = 0) -> list[dict[str, Any]]:
    """All legal configs in a random order, those that look able to saturate the memory first."""
    configs: list[dict[str, Any]] = list(bound.enumerate())
    random.Random(f"{gemm.label}-{seed}").shuffle(configs)
    return sorted(configs, key=lambda config: not _promising(gemm, config))


def _promising(gemm: Gemm, config: Mapping[str, Any]) -> bool:
    chosen = SkinnyConfig.from_entry(config)
    programs = chosen.programs(gemm.m, gemm.n, gemm.k, NUM_UNITS)
    if chosen.mode == "vector":
        return programs >= 4 * NUM_UNITS
    shared = chosen.num_stages * (chosen.block_m + chosen.block_n) * chosen.block_k * 2
    resident = min(SHARED_BYTES // shared, 64 // chosen.num_warps, -(-programs // NUM_UNITS))
    in_flight = resident * (chosen.num_stages - 1) * chosen.block_n * chosen.block_k * 2
    last_wave = programs % (resident * NUM_UNITS) / (resident * NUM_UNITS)
    even = last_wave == 0 or last_wave > 0.8 or programs > 6 * resident * NUM_UNITS
    rereads = -(-gemm.m // chosen.block_m)
    return in_flight >= 40_000 and even and rereads <= 2 and programs >= 0.9 * NUM_UNITS


def neighbours(config: Mapping[str, Any], bound: BoundSpace, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Legal configs that differ in one parameter by one step, and a few that differ in two, in random order."""
    choices = {domain.name: list(domain.choices) for domain in bound.domains}
    steps = []
    for name, values in choices.items():
        if name not in config or config[name] not in values:
            continue
        at = values.index(config[name])
        steps += [{name: values[i]} for i in (at - 1, at + 1) if 0 <= i < len(values)]
    pairs = [{**a, **b} for a in steps for b in steps if set(a) != set(b)]
    rng.shuffle(steps)
    rng.shuffle(pairs)
    for change in [*steps, *pairs[: 2 * len(steps)]]:
        changed = {**config, **change}
        if not bound.violations(changed):
            yield changed


def compile_kernel(gemm: Gemm, key: Key) -> Any:
    """The compiled kernel, from Triton's cache if it is there; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from autokernel.kernels.skinny_mm import skinny_mm_kernel

    config = SkinnyConfig.from_ints(list(key))
    names = skinny_mm_kernel.arg_names
    constants = config.constants(gemm.m, gemm.n, gemm.k, bias=False, num_units=NUM_UNITS)
    signature = dict.fromkeys(names, "constexpr")
    signature |= dict.fromkeys(("x", "w", "bias", "y"), "*bf16")
    signature |= {"parts": "*fp32", "counters": "*i32"}
    if config.tma:
        signature["x"] = f"tensordesc<bf16[{config.block_m}, {config.block_k}]>"
        signature["w"] = f"tensordesc<bf16[{config.block_n}, {config.block_k}]>"
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=skinny_mm_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def quiet() -> None:
    """Triton prints the whole PTX of what ptxas refuses: let a worker's output go nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)


def build(gemm: Gemm, key: Key) -> tuple[str, str]:
    """A worker's job: compile into Triton's cache. Returns a status and what the compiler said."""
    try:
        shared = int(compile_kernel(gemm, key).metadata.shared)
    except Exception as error:  # noqa: BLE001 -- the boundary of a child process: any compiler error is a status
        return "BUILD_ERROR", f"{type(error).__name__}: {error}"[:200]
    return ("OK", "") if shared <= SHARED_BYTES else ("BUILD_ERROR", f"{shared} bytes of shared memory")
