"""What attention kernels are launched with: their parameters, what follows from them for a problem, and the launches. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autokernel.kernels.launch import AHEAD, Buffer, KernelPlan, Launch, Operand
from autokernel.kernels.parameters import Parameters, Precision, is_power_of_two, precision_problem
from autokernel.ops.attention import AttentionSizes, mask_position, sizes_of
from autokernel.records import ConfigValue, Problem, TensorSpec

DTYPES = ("bfloat16", "float16", "float32")
MAX_ROWS = 64  # of q that share a head of keys, for the kernel of few rows
MAX_HEAD_DIM = 256
MAX_SPLITS = 128
MAX_TILES = 4096  # of keys, where what the mask says of them is looked up
MAX_ELEMENTS = 2**31 - 1  # offsets within a sequence and a head are 32-bit
_MIN_TILE = 16  # of matrix instructions
_COMBINE_ROWS, _COMBINE_SPLITS = 4, 32  # at a time at most, where the parts of splits are put together
_COMBINE_REGISTERS = 160  # of a thread, for the parts that it has on the way at once
_AHEAD_BYTES = 16 << 20  # of keys and values that are asked for before they are read: less than half of an L2
_NO_MASK = "skip looks at the mask, and there is none; set it to false"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig(Parameters):
    """Parameters of `decode_attention`.

    Attributes:
        block_s: keys of a tile.
        num_splits: programs that share a sequence, each with a part of it; the last one to finish combines the parts.
        skip: look at the mask first, and leave out the tiles that it rules out for all rows, at both ends. For caches that
            are longer than what they hold; a NaN behind the mask is then not read.
        num_warps, num_stages: of Triton.
        precision: of products in fp32, as in `generated_config.ProductsConfig`.
        prefetch: ask for all keys and values of a part before q is there, which the first tiles would wait for.
    """

    block_s: int
    num_splits: int
    skip: bool
    num_warps: int
    num_stages: int
    precision: Precision = "ieee"
    prefetch: bool = False

    def may_ask(self, problem: Problem) -> bool:
        """Whether all keys and values may come to the L2 cache early: they find room in it, and fill the lines they touch.

        With skip nobody knows yet which of them will be read.
        """
        cached = problem.inputs[1:3]
        fit = sum(spec.num_bytes for spec in cached) <= _AHEAD_BYTES
        return fit and not self.skip and all(spec.stride[-1] == 1 for spec in cached)

    def problem(self, problem: Problem) -> str | None:
        """The rule that a problem breaks, None if the kernel takes it."""
        sizes = sizes_of(problem)
        rows, blocks = _rows(sizes), -(-sizes.kv_len // self.block_s)
        wrong = (
            _common_problem(problem) or _precision_problem(problem, self.precision) or _tile_problem("block_s", self.block_s)
        )
        if wrong:
            return wrong
        if _is_causal(problem):
            return "decode_attention takes no causal attention: where q is one position, give it a mask or nothing"
        if rows > MAX_ROWS:
            return f"decode_attention is for at most {MAX_ROWS} rows of q for one head of keys; there are {rows}"
        if not 1 <= self.num_splits <= MAX_SPLITS:
            return f"num_splits is 1 to {MAX_SPLITS}; it is {self.num_splits}"
        if (self.num_splits - 1) * -(-blocks // self.num_splits) >= blocks:
            return f"each split has a part: {blocks} blocks of {self.block_s} are too few for {self.num_splits} splits"
        if self.skip and mask_position(problem) is None:
            return _NO_MASK
        if self.prefetch and not self.may_ask(problem):
            return f"prefetch is for contiguous keys and values of {_AHEAD_BYTES >> 20} MiB together at most, without skip"
        if sizes.batch * sizes.kv_heads * self.num_splits * rows * sizes.v_dim > MAX_ELEMENTS:
            return f"offsets into the parts of all splits are 32-bit; num_splits is {self.num_splits}: take fewer"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashConfig(Parameters):
    """Parameters of `flash_attention`.

    Attributes:
        block_m, block_n: rows of q and keys of a tile.
        skip: look at the mask first (a kernel of its own), leave out the tiles that it rules out for all rows, at both ends,
            and the mask where all rows see all. For masks with structure; a NaN behind the mask is then not read.
        num_warps, num_stages: of Triton.
        precision: of products in fp32, as in `generated_config.ProductsConfig`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    skip: bool = False
    precision: Precision = "ieee"

    def problem(self, problem: Problem) -> str | None:
        """The rule that a problem breaks, None if the kernel takes it."""
        wrong = _common_problem(problem) or _precision_problem(problem, self.precision)
        wrong = wrong or _tile_problem("block_m", self.block_m) or _tile_problem("block_n", self.block_n)
        if wrong or not self.skip:
            return wrong
        if mask_position(problem) is None:
            return _NO_MASK
        tiles = -(-sizes_of(problem).kv_len // self.block_n)
        if tiles > MAX_TILES:
            return f"skip takes at most {MAX_TILES} tiles of keys; there are {tiles}: set block_n higher, or skip to false"
        return None


def plan_decode(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """The launch of `decode_attention`; raises ValueError with the rule that is broken."""
    chosen = DecodeConfig.from_entry(config)
    _refuse(chosen.problem(problem))
    from autokernel.kernels.decode_attention import decode_attention_kernel

    sizes, rows = sizes_of(problem), _rows(sizes_of(problem))
    pairs = sizes.batch * sizes.kv_heads
    out, combined = Operand("out", 0), min(_COMBINE_ROWS, _power_of_two(rows))
    shared = chosen.num_splits > 1
    arguments: dict[str, Operand | int | float | bool] = {
        **_operands(problem),
        "parts": Operand("scratch", 0) if shared else out,
        "states": Operand("scratch", 1) if shared else out,
        "counters": Operand("scratch", 2) if shared else out,
        **_constants(problem),
        "GROUPS": sizes.kv_heads,
        "BLOCK_R": max(_MIN_TILE, _power_of_two(rows)),
        "BLOCK_S": chosen.block_s,
        "SPLITS": chosen.num_splits,
        "COMBINE_R": combined,
        "COMBINE_S": _splits_at_once(chosen, combined * _power_of_two(sizes.v_dim)),
        "SKIP": int(chosen.skip),
        "TF32X3": int(chosen.precision == "tf32x3"),
        "PREFETCH": int(chosen.prefetch),
        AHEAD: 0,
    }
    programs = pairs * chosen.num_splits
    scratch = (Buffer((programs, rows, sizes.v_dim), "float32"), Buffer((programs, rows, 2), "float32"))
    ahead = () if chosen.may_ask(problem) else None
    launch = Launch(decode_attention_kernel, (programs, 1, 1), arguments, chosen.num_warps, chosen.num_stages, ahead)
    return KernelPlan(
        (_out_spec(problem),), (*scratch, Buffer((pairs,), "int32", zeroed=True)) if shared else (), (launch,)
    )  # fmt: skip


def _splits_at_once(config: DecodeConfig, elements: int) -> int:
    """How many parts of so many elements a program has on the way at once: as many as its threads have registers for."""
    most = min(_COMBINE_SPLITS, max(1, _COMBINE_REGISTERS * 32 * config.num_warps // elements))
    rounds = -(-config.num_splits // most)
    return -(-config.num_splits // rounds)


def plan_flash(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """The launch of `flash_attention`; raises ValueError with the rule that is broken."""
    chosen = FlashConfig.from_entry(config)
    _refuse(chosen.problem(problem))
    from autokernel.kernels.flash_attention import flash_attention_kernel, mask_tiles_kernel

    sizes = sizes_of(problem)
    constants = {**_constants(problem), "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n}
    blocks, tiles = -(-sizes.q_len // chosen.block_m), -(-sizes.kv_len // chosen.block_n)
    # axes of the mask along which it differs
    whole = {"B": sizes.batch, "H": sizes.heads, "Q": blocks}
    mask_shape = tuple(size if chosen.skip and constants[f"MASK_{axis}"] else 1 for axis, size in whole.items())
    scratch = (Buffer((*mask_shape, tiles), "int32"),) if chosen.skip else ()
    constants |= {"MASK_HEADS": mask_shape[1], "MASK_ROWS": mask_shape[2]}
    arguments: dict[str, Operand | int | float | bool] = {
        **_operands(problem),
        **constants,
        "tiles": Operand("scratch", 0) if chosen.skip else Operand("out", 0),
        "CAUSAL": int(_is_causal(problem)),
        "HEADS": sizes.heads,
        "SKIP": int(chosen.skip),
        "MAX_TILES": _power_of_two(tiles),
        "TF32X3": int(chosen.precision == "tf32x3"),
    }
    programs = blocks * sizes.heads * sizes.batch
    launch = Launch(flash_attention_kernel, (programs, 1, 1), arguments, chosen.num_warps, chosen.num_stages)
    if not chosen.skip:
        return KernelPlan((_out_spec(problem),), (), (launch,))
    looked = {name: arguments[name] for name in mask_tiles_kernel.arg_names}
    look = Launch(mask_tiles_kernel, (math.prod(mask_shape) * tiles, 1, 1), looked, 4, 1)
    return KernelPlan((_out_spec(problem),), scratch, (look, launch))


def _common_problem(problem: Problem) -> str | None:
    """The rule about operands that a problem breaks."""
    sizes = sizes_of(problem)
    dtypes = {spec.dtype for spec in problem.inputs[:3]}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        return f"the attention kernels take q, k and v of one dtype, {', '.join(DTYPES)}; they are {', '.join(sorted(dtypes))}"
    mask = mask_position(problem)
    if mask is not None and problem.inputs[mask].dtype not in (*DTYPES, "bool"):
        return f"the attention kernels take masks of bool or {', '.join(DTYPES)}; it is {problem.inputs[mask].dtype}"
    if max(sizes.head_dim, sizes.v_dim) > MAX_HEAD_DIM:
        return f"the attention kernels take heads of at most {MAX_HEAD_DIM}; they are {sizes.head_dim} and {sizes.v_dim}"
    if min(sizes.batch, sizes.q_len, sizes.kv_len) < 1:
        return "the attention kernels need something to attend to; a size of the problem is 0"
    for name, spec in zip("qkv", problem.inputs, strict=False):
        reach = sum((size - 1) * stride for size, stride in zip(spec.shape[1:], spec.stride[1:], strict=True))
        if reach > MAX_ELEMENTS:
            return f"offsets within a sequence are 32-bit; {name} reaches {reach} elements far"
    if sizes.q_len * sizes.heads * sizes.v_dim > MAX_ELEMENTS:
        return f"offsets within a sequence are 32-bit; the result has {sizes.q_len * sizes.heads * sizes.v_dim} elements"
    return None


def _precision_problem(problem: Problem, precision: str) -> str | None:
    if wrong := precision_problem(precision):
        return wrong
    if precision != "ieee" and problem.inputs[0].dtype != "float32":
        return f"precision is for fp32; q is {problem.inputs[0].dtype}: leave it out"
    return None


def _tile_problem(name: str, size: int) -> str | None:
    if size < _MIN_TILE or not is_power_of_two(size):
        return f"{name} is a power of two of at least {_MIN_TILE}; it is {size}"
    return None


def _refuse(wrong: str | None) -> None:
    if wrong:
        raise ValueError(wrong)


def _rows(sizes: AttentionSizes) -> int:
    """Rows of q that share a head of keys."""
    return sizes.heads // sizes.kv_heads * sizes.q_len


def _is_causal(problem: Problem) -> bool:
    return bool(dict(problem.scalars).get("causal", False))


def _power_of_two(size: int) -> int:
    return 1 << max(0, math.ceil(math.log2(size)))


def _operands(problem: Problem) -> dict[str, Operand | int | float | bool]:
    mask = mask_position(problem)
    return {
        **{name: Operand("in", i) for i, name in enumerate("qkv")},
        "mask": Operand("in", 0 if mask is None else mask),  # a stand-in where there is none
        "out": Operand("out", 0),
    }


def _constants(problem: Problem) -> dict[str, Operand | int | float | bool]:
    """What both kernels are compiled for: sizes, strides, and the kind of the mask."""
    sizes, mask = sizes_of(problem), mask_position(problem)
    found: dict[str, Any] = {
        "SCALE": float(dict(problem.scalars)["scale"]),
        "REPEAT": sizes.heads // sizes.kv_heads,
        "Q_LEN": sizes.q_len,
        "KV_LEN": sizes.kv_len,
        "HEAD_DIM": sizes.head_dim,
        "V_DIM": sizes.v_dim,
        "BLOCK_D": max(_MIN_TILE, _power_of_two(sizes.head_dim)),
        "BLOCK_E": max(_MIN_TILE, _power_of_two(sizes.v_dim)),
        "MASK": 0 if mask is None else 1 if problem.inputs[mask].dtype == "bool" else 2,
        "GUARDED": int(dict(problem.scalars).get("written") != "eager"),
    }
    for name, spec in zip("QKV", problem.inputs, strict=False):
        found |= {f"{name}_{axis}": stride for axis, stride in zip("BHSD", spec.stride, strict=True)}
    strides = (0, 0, 0, 0) if mask is None else broadcast_strides(problem.inputs[mask])
    return found | {f"MASK_{axis}": stride for axis, stride in zip("BHQS", strides, strict=True)}


def broadcast_strides(spec: TensorSpec) -> tuple[int, ...]:
    """Strides that read a tensor as one of larger dimensions: 0 where it has one element."""
    return tuple(0 if size == 1 else stride for size, stride in zip(spec.shape, spec.stride, strict=True))


def _out_spec(problem: Problem) -> TensorSpec:
    """[B, H, Q, E], laid out as [B, Q, H, E]."""
    sizes = sizes_of(problem)
    batch, heads, rows, dim = sizes.batch, sizes.heads, sizes.q_len, sizes.v_dim
    dtype = problem.inputs[0].dtype
    return TensorSpec(shape=(batch, heads, rows, dim), dtype=dtype, stride=(rows * heads * dim, dim, heads * dim, 1))
