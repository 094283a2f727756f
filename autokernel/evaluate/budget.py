"""How wrong an output may be: twice as wrong as eager PyTorch in the problem's own dtype. No other tolerance anywhere.

Errors are against the op in float64 (float32 where float64 does not run), both as the largest difference of an element and
as the relative norm. The floor is a rounding's worth: half a unit in the last place of the reference's largest element
(a quarter of that for the norm), so that an eager result that happens to be exact does not forbid a rounded one. Integers
are exact. NaN, +Inf and -Inf must be where eager has them, or where the exact result has them.

Indices of the largest of some scores are integers too, and right where their scores are: an index passes if its exact score is
below the largest by at most twice the budget of the scores. That is what is left of the gap where the one is computed too low
and the other too high, each by no more than that budget; so no index passes that scores within it could not have. Where the k
largest are wanted, in order, the same holds for each place: its score is as near to the largest, the second largest, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autokernel.ops import ChoosingOp, Op
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch

EAGER_FACTOR = 2.0
_BLOCK_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What one output has to be.

    `reference` holds the exact result (integers: eager's own), `classes` says where eager is not finite (0 finite, 1 NaN,
    2 +Inf, 3 -Inf; None: all finite). `shares_with` are earlier outputs of the same call whose storage eager shares.
    `scores` of indices are the exact values that they choose among, in the last dimension; `limit_max` is in their unit then.
    """

    reference: torch.Tensor
    classes: torch.Tensor | None
    limit_max: float
    limit_norm: float
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    num_bytes: int
    shares_with: tuple[int, ...]
    scores: torch.Tensor | None = None

    @property
    def exact(self) -> bool:
        return not self.dtype.is_floating_point and self.scores is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """How wrong one output is. `misplaced` counts elements whose NaN/Inf/finite class is neither eager's nor, where the exact
    result is not finite, that one's. Of indices `max` is how far their scores are from the largest, and misplaced are those of
    nothing, those that a row has twice, and those of a score that is finite or not where the largest is the other.
    """

    max: float
    norm: float
    misplaced: int


def expectation_bytes(op: Op, problem: Problem, num_references: int) -> int:
    """Least memory that this many references of a problem take."""
    dtype = problem.inputs[0].dtype
    out_bytes = op.dims(problem).get("out_bytes", DTYPE_BYTES[dtype])
    outputs = max(0, op.num_bytes(problem) - sum(spec.num_bytes for spec in problem.inputs)) // out_bytes
    if isinstance(op, ChoosingOp):
        outputs = sum(spec.num_elements for spec in _scores_of(op, problem))
    kept_bytes = (8 if out_bytes > 2 else 4) if dtype.startswith(("float", "bfloat")) else out_bytes
    return num_references * outputs * kept_bytes


def _scores_of(op: ChoosingOp, problem: Problem) -> tuple[TensorSpec, ...]:
    """What the scores look like, without computing them."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        inputs = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in problem.inputs]
        return tuple(TensorSpec.contiguous(tuple(x.shape), problem.inputs[0].dtype) for x in op.scores(problem, *inputs))


def run_reference(op: Op, problem: Problem, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The op in float64, or in float32 where it does not run in float64. Integer inputs stay as they are."""
    return _raised(op.reference, problem, inputs)


def _raised(
    function: Callable[..., tuple[torch.Tensor, ...]], problem: Problem, inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    import torch

    for dtype in (torch.float64, torch.float32):
        raised = [x.to(dtype) if x.dtype.is_floating_point else x for x in inputs]
        try:
            return function(problem, *raised)
        except (RuntimeError, NotImplementedError):
            if dtype is torch.float32:
                raise
    raise AssertionError("one of the two dtypes either returns or raises")


def expected_outputs(op: Op, problem: Problem, inputs: Sequence[torch.Tensor]) -> tuple[Expected, ...]:
    """The reference and eager's own error for each output of one copy."""
    import torch

    with torch.no_grad():
        eager = op.reference(problem, *inputs)
        scored = _scored(op, problem, inputs) if isinstance(op, ChoosingOp) else []
        exact = eager if len(scored) == len(eager) else run_reference(op, problem, inputs)
        expected = []
        for i, (own, reference) in enumerate(zip(eager, exact, strict=True)):
            shared = tuple(j for j in range(i) if eager[j].untyped_storage().data_ptr() == own.untyped_storage().data_ptr())
            expected.append(_expected(own, reference, shared))
        first = len(eager) - len(scored)
        return *expected[:first], *(
            replace(index, scores=score.reference, limit_max=2 * score.limit_max)
            for index, score in zip(expected[first:], scored, strict=True)
        )


def _scored(op: ChoosingOp, problem: Problem, inputs: Sequence[torch.Tensor]) -> list[Expected]:
    """What the scores have to be."""
    pairs = zip(op.scores(problem, *inputs), _raised(op.scores, problem, inputs), strict=True)
    return [_expected(own, reference, ()) for own, reference in pairs]


def errors_of(out: torch.Tensor, expected: Expected) -> Errors:
    """Errors of an output of the expected shape and dtype, over the elements where eager and reference are finite."""

    if expected.scores is not None:
        return shortfall(out, expected.scores)
    if expected.exact:
        different = out != expected.reference
        worst = (out.double() - expected.reference.double()).abs().max().item() if out.numel() else 0.0
        return Errors(max=max(worst, 1.0) if bool(different.any()) else 0.0, norm=0.0, misplaced=0)
    return _distance(_wide(out), expected.reference, expected.classes)[0]


def all_finite(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether no output holds a NaN or an infinity."""
    import torch

    return all(bool(torch.isfinite(_wide(out)).all()) for out in outputs if out.dtype.is_floating_point)


def _expected(eager: torch.Tensor, reference: torch.Tensor, shared: tuple[int, ...]) -> Expected:
    import torch

    limit_max = limit_norm = 0.0
    classes = None
    if not eager.dtype.is_floating_point:
        reference = eager.clone()
    else:
        if not all_finite([eager]):
            classes = _classes(eager)
        info = torch.finfo(eager.dtype)
        unit = info.eps / 2
        errors, largest = _distance(_wide(eager), reference, classes)
        limit_max = EAGER_FACTOR * errors.max + unit * largest + info.smallest_normal * unit
        limit_norm = EAGER_FACTOR * errors.norm + unit / 4
        # float32 holds the reference of a 16-bit problem to a ten-thousandth of its budget, in half the memory.
        reference = reference.to(torch.float64 if eager.dtype.itemsize > 2 else torch.float32)
    return Expected(
        reference=reference,
        classes=classes,
        limit_max=limit_max,
        limit_norm=limit_norm,
        dtype=eager.dtype,
        shape=tuple(eager.shape),
        stride=tuple(eager.stride()),
        device=eager.device,
        num_bytes=eager.numel() * eager.element_size(),
        shares_with=shared,
    )


def shortfall(indices: torch.Tensor, scores: torch.Tensor) -> Errors:
    """How far the scores of indices are from the largest ones. Who has a NaN where there is one, or an infinity, lacks nothing.

    Args:
        indices: one for each row of the scores, or k of them, the largest first.
        scores: `[..., choices]`.
    """
    import torch

    scores = scores.reshape(-1, scores.shape[-1])
    count = indices.numel() // max(1, len(scores))
    picked = indices.reshape(len(scores), count)
    exists = (picked >= 0) & (picked < scores.shape[1])
    chosen = scores.gather(1, picked.clamp(0, scores.shape[1] - 1)).double()
    # NaN first, where there are any
    best = (scores.amax(1, keepdim=True) if count == 1 else scores.topk(count, 1).values).double()
    missing = torch.where((chosen == best) | (chosen.isnan() & best.isnan()), 0.0, (best - chosen).abs())
    earlier = torch.ones(count, count, dtype=torch.bool, device=picked.device).tril(-1)
    again = ((picked[:, :, None] == picked[:, None, :]) & earlier).any(2)
    misplaced = ~exists | again | ~torch.isfinite(missing)
    worst = torch.where(misplaced, 0.0, missing).max().item() if missing.numel() else 0.0
    return Errors(max=worst, norm=0.0, misplaced=int(misplaced.sum()))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """float8 has next to no operations of its own."""
    return tensor.float() if tensor.dtype.is_floating_point and tensor.element_size() == 1 else tensor


def _classes(tensor: torch.Tensor) -> torch.Tensor:
    """0 where finite, 1 where NaN, 2 where +Inf, 3 where -Inf; uint8, shape as the tensor's."""
    import torch

    tensor = _wide(tensor)
    infinite = torch.isinf(tensor)
    return torch.isnan(tensor).byte() + infinite.byte() * 2 + (infinite & (tensor < 0)).byte()


def _distance(out: torch.Tensor, reference: torch.Tensor, classes: torch.Tensor | None) -> tuple[Errors, float]:
    """Errors where both should be finite (the largest, and their norm over the reference's), and the largest reference.

    In float64, a few rows at a time: an output of a large prefill has a quarter of a billion elements.
    """
    import torch

    if out.numel() == 0:
        return Errors(max=0.0, norm=0.0, misplaced=0), 0.0
    worst = largest = torch.zeros((), dtype=torch.float64, device=out.device)
    sums = torch.zeros(3, dtype=torch.float64, device=out.device)  # squared errors, squared references, misplaced
    for rows in _blocks(out):
        ours, exact = out[rows], reference[rows].double()
        finite = torch.isfinite(exact)
        wrong = ~torch.isfinite(ours) if classes is None else _classes(ours) != classes[rows]
        if classes is not None:
            finite &= classes[rows] == 0
        # eager's own kernels may swallow a NaN: whoever has it where the exact result has it is right as well
        misplaced = (wrong & (torch.isfinite(exact) | (_classes(ours) != _classes(exact)))).sum()
        difference = torch.where(finite, ours.double() - exact, 0.0)
        exact = torch.where(finite, exact, 0.0)
        worst = torch.maximum(worst, difference.abs().max())  # a NaN stays one
        largest = torch.maximum(largest, exact.abs().max())
        sums += torch.stack([difference.square().sum(), exact.square().sum(), misplaced.double()])
    error_max, largest_exact, error, scale, num_misplaced = torch.cat([torch.stack([worst, largest]), sums]).tolist()
    norm = 0.0
    if error != 0:
        norm = math.sqrt(error / scale) if scale > 0 else math.inf
    # A NaN or Inf where a number belongs compares false with any limit, and must not pass for that.
    error_max, norm = (math.inf if math.isnan(x) else x for x in (error_max, norm))
    return Errors(max=error_max, norm=norm, misplaced=int(num_misplaced)), largest_exact


def _blocks(tensor: torch.Tensor) -> list[slice]:
    """Ranges of the first dimension with about `_BLOCK_ELEMENTS` elements each."""
    if tensor.dim() == 0:
        return [...]  # type: ignore[list-item]  # indexes a scalar
    rows = max(1, _BLOCK_ELEMENTS * tensor.shape[0] // tensor.numel())
    return [slice(i, i + rows) for i in range(0, tensor.shape[0], rows)]
