"""Inputs that show what a kernel does wrong: several draws, each reproducible from a seed, in the problem's exact layout.

Non-constant inputs vary by draw; constants (weights) are drawn once per copy. Copy 0's constants repeat their first half
along the contraction, so that the draw "cancellation" really cancels there and a lost fp32 accumulation shows.

An attention's mask hides some of the keys, and in the draw "zero_rows" all of them from every other row. The draw "nonfinite"
spoils only what comes out the same of every algorithm (see `_spoil_attention`).

Where matrices have scales (8-bit floating point), these are positive and finite in every draw, and it is they that keep the
result as large as the activations: the matrices themselves are as a quantizer leaves them, well within what 8 bits can hold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autokernel.errors import NoRoomError
from autokernel.evaluate.caches import cache_bytes
from autokernel.ops.attention import Attention, mask_position, num_keys_seen_by_all, sizes_of
from autokernel.ops.generated import Generated
from autokernel.ops.program import contracted_input
from autokernel.ops.scaled_mm import scales_of
from autokernel.records import Problem, TensorSpec

if TYPE_CHECKING:
    import torch

DRAWS = ("model", "large", "tiny", "zero_rows", "cancellation", "nonfinite")
MIN_COPIES, MAX_COPIES = 2, 32
_ALONE_COLD = 4  # times L2
_WARM_COPIES = 12  # on a GPU, where all copies lie in L2 anyway: each takes time to compile, to check and to capture
_CANCELLING_SCALE = 16.0  # the halves that cancel, over what remains
# Powers of two, so that scaling itself rounds nothing; small enough that squares and cubes stay finite and normal.
_SCALES = {
    "large": {"float16": 2.0**4, "float8_e4m3fn": 2.0**4, "float8_e5m2": 2.0**4},
    "tiny": {"float16": 2.0**-6, "float8_e4m3fn": 2.0**-3, "float8_e5m2": 2.0**-6},
}
_WIDE_SCALES = {"large": 2.0**16, "tiny": 2.0**-30}
_ADDED_FIRST = ("addmm", "baddbmm")  # ops whose first input is added to the product of the next two
_INTEGER_RANGES = {"int8": (-128, 128), "uint8": (0, 256), "int16": (-1024, 1024), "bool": (0, 2)}


def derived_seed(*parts: object) -> int:
    """A seed that is fresh for every distinct combination of parts, and the same in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def num_copies_for(
    problem: Problem, cache_size: int | None = None, limit: int = MAX_COPIES, memory_bytes: int | None = None
) -> int:
    """Copies of all inputs that together exceed twice the L2 cache, between 2 and `limit`, as far as memory allows.

    On a GPU one copy is enough where it alone exceeds four times L2: its end drives its beginning out. And where as many copies
    as may be fill not even half of L2, a few will do: they are read from there, as in a model that has just made them.

    Args:
        problem: what is run on each copy.
        cache_size: bytes of L2; default: of the problem's device.
        limit: most copies, 2 or more.
        memory_bytes: what all copies together may take; default: a quarter of what is free. On a GPU, which many workers
            share, only the least number of copies may take that much; more than that get a 32nd (the last of 16 workers
            that all take as much finds three fifths of the memory left).

    Raises:
        NoRoomError: not even the least number of copies fits.
    """
    cache_size = cache_bytes(problem.device) if cache_size is None else cache_size
    each = max(1, sum(spec.num_bytes for spec in problem.inputs))
    on_gpu = problem.device == "cuda"
    least = 1 if on_gpu and each > _ALONE_COLD * cache_size else MIN_COPIES
    shared_bytes = memory_bytes
    if memory_bytes is None:
        free = free_bytes(problem.device)
        memory_bytes, shared_bytes = free // 4, free // 32 if on_gpu else free // 4
    if memory_bytes // each < least:
        raise NoRoomError(
            f"{problem.key}: {least} copies of its inputs ({each} bytes each) must fit in {memory_bytes} bytes, a quarter "
            f"of the free memory; tune a smaller problem or free some"
        )
    affordable = (memory_bytes if shared_bytes is None else shared_bytes) // each
    copies = max(least, min(2 * cache_size // each + 1, limit, affordable))
    return min(copies, _WARM_COPIES) if on_gpu and 2 * copies * each <= cache_size else copies


def is_cold(problem: Problem, num_copies: int, cache_size: int) -> bool:
    """Whether the copies together exceed twice the cache."""
    return num_copies * sum(spec.num_bytes for spec in problem.inputs) > 2 * cache_size


def draw_scale(problem: Problem, draw: str) -> float:
    """Magnitude of a draw's activations over the model's."""
    narrow = [_SCALES[draw][s.dtype] for s in problem.inputs if draw in _SCALES and s.dtype in _SCALES[draw]]
    if narrow:
        return max(narrow) if draw == "tiny" else min(narrow)
    return _WIDE_SCALES.get(draw, 1.0)


def make_inputs(
    problem: Problem, seed: int, draw: str = "model", device: str | None = None, scale: float | None = None
) -> list[torch.Tensor]:
    """One tensor per input of the problem, constants included, with its exact dtype, shape and stride.

    Elements of the storage that no index reaches are NaN, so a kernel that reads past its input is wrong.

    Args:
        problem: says the layout.
        seed: equal seeds give equal tensors.
        draw: one of `DRAWS`; constants are always drawn as "model".
        device: default: the problem's.
        scale: magnitude instead of the draw's own, for "large" where eager itself overflows.

    Raises:
        ValueError: the draw is unknown.
    """
    if draw not in DRAWS:
        raise ValueError(f"draw {draw!r} is not one of {DRAWS}")
    scale = draw_scale(problem, draw) if scale is None else scale
    return [
        _constant(problem, i, seed, device, paired=False)
        if i in problem.constants
        else _variable(problem, i, seed, draw, device, scale)
        for i in range(len(problem.inputs))
    ]


def make_variables(
    problem: Problem, seed: int, draw: str = "model", device: str | None = None, scale: float | None = None
) -> list[torch.Tensor]:
    """`make_inputs` without the constants."""
    if draw not in DRAWS:
        raise ValueError(f"draw {draw!r} is not one of {DRAWS}")
    scale = draw_scale(problem, draw) if scale is None else scale
    positions = [i for i in range(len(problem.inputs)) if i not in problem.constants]
    return [_variable(problem, i, seed, draw, device, scale) for i in positions]


def make_constants(problem: Problem, seed: int, num_copies: int, device: str | None = None) -> list[list[torch.Tensor]]:
    """Per copy, the problem's constant inputs in order: different weights for every copy."""
    return [
        [_constant(problem, i, derived_seed(seed, "copy", copy), device, paired=copy == 0) for i in problem.constants]
        for copy in range(num_copies)
    ]


def join(problem: Problem, variables: Sequence[torch.Tensor], constants: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All inputs of one copy, in the problem's order."""
    rest, fixed = iter(variables), iter(constants)
    return [next(fixed) if i in problem.constants else next(rest) for i in range(len(problem.inputs))]


def contraction_input(problem: Problem) -> int | None:
    """The input whose last dimension outputs sum over, as well as can be told: a product's left matrix, or the first number.

    None where all inputs are constants, or scalars.
    """
    left = 1 if problem.op in _ADDED_FIRST else contracted_input(problem) if problem.op == Generated.name else None
    if left is not None and left not in problem.constants:
        return left
    varying = [i for i, spec in enumerate(problem.inputs) if i not in problem.constants and spec.shape]
    return next((i for i in varying if _is_float(problem.inputs[i])), varying[0] if varying else None)


def contraction_size(problem: Problem) -> int:
    """Elements that one output sums over, as well as can be told."""
    position = contraction_input(problem)
    if position is not None:
        return problem.inputs[position].shape[-1]
    return max((spec.shape[-1] for spec in problem.inputs if spec.shape), default=1)


def _constant(problem: Problem, position: int, seed: int, device: str | None, *, paired: bool) -> torch.Tensor:
    spec = problem.inputs[position]
    generator = _Generator(spec, derived_seed(seed, "constant", position), device or problem.device)
    if not _is_float(spec):
        return generator.place(generator.integers(problem, "model"))
    k = contraction_size(problem)
    scales = scales_of(problem)
    if position in scales:
        return generator.place(generator.positive() / (math.sqrt(k) if position == max(scales) else 1))
    values = generator.normal()
    if len(spec.shape) < 2:
        values = values / 2  # biases and gains of norms
    else:
        if not scales or position > max(scales):
            values = values / math.sqrt(k if k in spec.shape else spec.shape[-1])
        if paired:
            values = _pair(values, k)
    return generator.place(values)


def _variable(problem: Problem, position: int, seed: int, draw: str, device: str | None, scale: float) -> torch.Tensor:
    spec = problem.inputs[position]
    generator = _Generator(spec, derived_seed(seed, draw, "input", position), device or problem.device)
    if position == mask_position(problem):
        return generator.place(generator.mask(draw))
    if not _is_float(spec):
        return generator.place(generator.integers(problem, draw))
    if position in scales_of(problem):
        return generator.place(generator.positive() * scale)
    values = generator.normal() * scale
    if draw == "zero_rows":
        rows = values.reshape(-1, values.shape[-1]) if values.dim() else values.reshape(1, 1)
        rows[:: 1 if rows.shape[0] == 1 else 2] = 0
        values = rows.reshape(values.shape)
    elif draw == "cancellation":
        summed = position == contraction_input(problem)
        values = _cancel(values) if summed else _pair(values, contraction_size(problem))
    elif draw == "nonfinite":
        attention = problem.op == Attention.name
        values = _spoil_attention(problem, position, values, generator) if attention else generator.spoil(values)
    return generator.place(values)


def _spoil_attention(problem: Problem, position: int, values: torch.Tensor, generator: _Generator) -> torch.Tensor:
    """q, k or v of attention with NaN and infinities whose way into the result does not depend on the algorithm.

    - q: a NaN in the first head. An infinity makes scores of both signs: NaN, or zero where all that a row sees are -Inf, or
      NaN anyway where products split numbers into a large part and a rest (three products in tf32, as the library in fp32).
    - k: a NaN in the last head; no infinity, as in q.
    - v: a NaN and both infinities in heads between, in columns of their own. Of a key that every row sees, with a weight that
      is not rounded to zero: 0 * Inf is NaN for those who read what is not seen, and who reads it depends on tiles.

    None hides another: where heads are few, q or k stay as they are.
    """
    if values.numel() == 0:
        return values
    spoilt = values.clone()
    if position == 0:
        sizes = sizes_of(problem)
        spoilt /= max(1.0, float(dict(problem.scalars)["scale"]) * math.sqrt(sizes.head_dim))  # scores of about one
        if sizes.batch * sizes.kv_heads > 2 or sizes.heads // sizes.kv_heads * sizes.q_len > 1:
            spoilt[:1, :1] = generator.spoil(spoilt[:1, :1], kinds=(math.nan,))
        return spoilt
    key = generator.index(min(num_keys_seen_by_all(problem), values.shape[2]))
    heads = values[:, :, key].flatten(0, 1).clone()
    if position == 1:
        heads[1:][-1:] = generator.spoil(heads[1:][-1:], kinds=(math.nan,))
    else:
        between = slice(1, -1) if len(heads) > 2 else slice(0, 1)
        heads[between] = generator.spoil(heads[between].T).T
    spoilt[:, :, key] = heads.reshape(*values.shape[:2], values.shape[3])
    return spoilt


def _cancel(values: torch.Tensor) -> torch.Tensor:
    """Large first halves along the last dimension, and their negatives plus something small behind them."""
    if values.dim() == 0 or values.shape[-1] < 2:
        return values
    half = values.shape[-1] // 2
    cancelled = values.clone()
    cancelled[..., :half] = values[..., :half] * _CANCELLING_SCALE
    cancelled[..., half : 2 * half] -= cancelled[..., :half]
    return cancelled


def _pair(values: torch.Tensor, size: int) -> torch.Tensor:
    """The first half repeated along every dimension that has the contraction's size (only the op knows which it is)."""
    paired = values.clone()
    half = size // 2
    for dim in range(values.dim() if half and values.dim() >= 2 else 0):
        if values.shape[dim] == size:
            paired.narrow(dim, half, half).copy_(paired.narrow(dim, 0, half).clone())
    return paired


def _is_float(spec: TensorSpec) -> bool:
    return spec.dtype.startswith(("float", "bfloat", "complex"))


class _Generator:
    """Draws values for one tensor and puts them into its layout."""

    def __init__(self, spec: TensorSpec, seed: int, device: str) -> None:
        import torch

        self._spec, self._device = spec, device
        self._random = torch.Generator(device=device).manual_seed(seed)
        # A broadcast dimension holds one element, however often it is read.
        self._distinct = [1 if s == 0 else n for n, s in zip(spec.shape, spec.stride, strict=True)]

    def normal(self) -> torch.Tensor:
        import torch

        dtype = torch.complex64 if self._spec.dtype.startswith("complex") else torch.float32
        return torch.randn(self._distinct, generator=self._random, device=self._device, dtype=dtype)

    def positive(self) -> torch.Tensor:
        """Around one, mostly within a factor of two."""
        return self.normal().mul_(0.5).exp2_()

    def integers(self, problem: Problem, draw: str) -> torch.Tensor:
        """Integers of the dtype's range; those wide enough for indices stay within every table of the problem."""
        import torch

        if self._spec.dtype in _INTEGER_RANGES:
            low, high = _INTEGER_RANGES[self._spec.dtype]
        else:
            low, high = 0, min((s.shape[0] for s in problem.inputs if s.shape and _is_float(s)), default=128)
        if draw == "tiny":
            low, high = max(low, 0), min(high, 2)
        values = torch.randint(low, max(high, low + 1), self._distinct, generator=self._random, device=self._device)
        if draw == "large":
            return torch.where(values >= (low + high) / 2, high - 1, low)
        return torch.zeros_like(values) if draw == "zero_rows" and low < 0 else values

    def mask(self, draw: str) -> torch.Tensor:
        """What attention sees: at the model's scale all but the end, as in a cache that is not full; in other draws three
        quarters, the first key always; in "zero_rows" every other row sees nothing.

        Booleans, or numbers that are added: -inf where nothing is seen, and in "nonfinite" a NaN in one row of many.
        """
        import torch

        drawn = torch.rand(self._distinct, generator=self._random, device=self._device)
        hidden = drawn < 0.25
        if draw == "model":
            length = drawn.shape[-1]
            hidden = torch.arange(length, device=self._device) >= length - (drawn[..., :1] * length / 8).floor()
        hidden[..., 0] = False
        if draw == "zero_rows":
            hidden.reshape(-1, hidden.shape[-1])[::2] = True
        if not _is_float(self._spec):
            return ~hidden
        values = torch.where(hidden, -torch.inf, self.normal())
        if draw == "nonfinite" and math.prod(values.shape[:-1]) > 3:  # one row of a few would make too much of the result NaN
            values[..., :1] = self.spoil(values[..., :1], kinds=(math.nan,))
        return values

    def index(self, size: int) -> int:
        """Below `size`."""
        import torch

        return int(torch.randint(size, (1,), generator=self._random, device=self._device))

    def spoil(self, values: torch.Tensor, kinds: Sequence[float] = (math.nan, math.inf, -math.inf)) -> torch.Tensor:
        """Each of the kinds once, in rows of their own where there are enough rows. e4m3 has no infinity: NaN alone."""
        import torch

        rows = values.clone().reshape(-1, values.shape[-1] if values.dim() else 1)
        if rows.numel() == 0:
            return values
        chosen = torch.randperm(rows.shape[0], generator=self._random, device=self._device)[: len(kinds)].tolist()
        order = torch.randperm(len(kinds), generator=self._random, device=self._device).tolist()
        for row, kind in zip(chosen, order, strict=False):
            rows[row, self.index(rows.shape[1])] = kinds[kind] if self._spec.dtype != "float8_e4m3fn" else math.nan
        return rows.reshape(values.shape)

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """The values in a fresh storage with the spec's dtype, shape and stride."""
        import torch

        spec, dtype = self._spec, getattr(torch, self._spec.dtype)
        if spec.num_elements == 0:
            return torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device=self._device)
        length = 1 + spec.reach
        if length == math.prod(self._distinct):
            storage = torch.empty(length, dtype=dtype, device=self._device)  # no gaps: every element is written below
        else:
            storage = torch.zeros(length, dtype=torch.float32 if _is_float(spec) else torch.int64, device=self._device)
            storage = (storage + math.nan if _is_float(spec) else storage).to(dtype)
        target = storage.as_strided(self._distinct, spec.stride)
        if length < math.prod(self._distinct):  # windows that overlap: no order of writing is right, so write the storage
            storage.copy_(values.reshape(-1)[:length])
        else:
            target.copy_(values)
        return storage.as_strided(spec.shape, spec.stride)


def free_bytes(device: str) -> int:
    """Memory that is free on a device, for all processes together."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)
