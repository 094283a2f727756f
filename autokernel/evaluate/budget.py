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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autokernel.ops import ChoosingOp, Op
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch

EAGER_FACTOR = 2.0
_BLOCK_ELEMENTS = 1 << 25
TOGETHER_ELEMENTS = 1 << 22  # what is judged in one go: 32 MB in float64, a few times


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
    return expected_of_copies(op, problem, [inputs])[0]


def expected_of_copies(op: Op, problem: Problem, copies: Iterable[Sequence[torch.Tensor]]) -> list[tuple[Expected, ...]]:
    """`expected_outputs` of several copies' inputs. Small outputs are judged together: on a GPU an operation costs more than
    the few elements that it is for."""
    import torch

    found: list[tuple[Expected, ...]] = []
    held: list[_Computed] = []
    with torch.no_grad():
        for inputs in copies:
            held.append(_computed(op, problem, inputs))
            if len(held) * sum(x.numel() for x in held[-1].eager) >= TOGETHER_ELEMENTS:
                found += _expected_of(held)
                held.clear()
        return found + _expected_of(held)


@dataclass(frozen=True, slots=True)
class _Computed:
    """What one copy has to return: eager's outputs, the exact ones, and of the last ones the scores that they choose among."""

    eager: tuple[torch.Tensor, ...]
    exact: tuple[torch.Tensor, ...]
    scored: list[Expected]

    @property
    def shares(self) -> list[tuple[int, ...]]:
        """Per output, the earlier ones whose storage it shares."""
        starts = [own.untyped_storage().data_ptr() for own in self.eager]
        return [tuple(j for j in range(i) if starts[j] == start) for i, start in enumerate(starts)]


def _computed(op: Op, problem: Problem, inputs: Sequence[torch.Tensor]) -> _Computed:
    eager = op.reference(problem, *inputs)
    scored = _scored(op, problem, inputs) if isinstance(op, ChoosingOp) else []
    return _Computed(eager, eager if len(scored) == len(eager) else run_reference(op, problem, inputs), scored)


def _expected_of(copies: Sequence[_Computed]) -> list[tuple[Expected, ...]]:
    """What copies of one problem have to return."""
    if not copies:
        return []
    shares = [copy.shares for copy in copies]
    by_output = [
        _expected([copy.eager[i] for copy in copies], [copy.exact[i] for copy in copies], [shared[i] for shared in shares])
        for i in range(len(copies[0].eager))
    ]
    found = []
    for copy, expected in zip(copies, zip(*by_output, strict=True), strict=True):
        first = len(expected) - len(copy.scored)
        chosen = zip(expected[first:], copy.scored, strict=True)
        found.append(
            (
                *expected[:first],
                *(replace(index, scores=score.reference, limit_max=2 * score.limit_max) for index, score in chosen),
            )
        )
    return found


def _scored(op: ChoosingOp, problem: Problem, inputs: Sequence[torch.Tensor]) -> list[Expected]:
    """What the scores have to be."""
    pairs = zip(op.scores(problem, *inputs), _raised(op.scores, problem, inputs), strict=True)
    return [_expected([own], [reference], [()])[0] for own, reference in pairs]


def errors_of(out: torch.Tensor, expected: Expected) -> Errors:
    """Errors of an output of the expected shape and dtype, over the elements where eager and reference are finite."""
    if expected.scores is not None:
        return shortfall(out, expected.scores)
    if expected.exact:
        different = out != expected.reference
        worst = (out.double() - expected.reference.double()).abs().max().item() if out.numel() else 0.0
        return Errors(max=max(worst, 1.0) if bool(different.any()) else 0.0, norm=0.0, misplaced=0)
    return _distances([_wide(out)], [expected.reference], [expected.classes])[0][0]


def errors_of_outputs(outputs: Sequence[torch.Tensor], expected: Sequence[Expected]) -> list[Errors]:
    """`errors_of` of each output, in order; those of one shape together."""
    found: dict[int, Errors] = {}
    alike: dict[object, list[int]] = {}
    for i, (out, want) in enumerate(zip(outputs, expected, strict=True)):
        if want.scores is not None or want.exact:
            found[i] = errors_of(out, want)
        else:
            alike.setdefault((out.dtype, want.reference.dtype, want.shape), []).append(i)
    for group in alike.values():
        distances = _distances(
            [_wide(outputs[i]) for i in group],
            [expected[i].reference for i in group],
            [expected[i].classes for i in group],
        )
        found |= {i: errors for i, (errors, _) in zip(group, distances, strict=True)}
    return [found[i] for i in range(len(outputs))]


def all_finite(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether no output holds a NaN or an infinity."""
    import torch

    return all(bool(torch.isfinite(_wide(out)).all()) for out in outputs if out.dtype.is_floating_point)


def _expected(
    eager: Sequence[torch.Tensor], references: Sequence[torch.Tensor], shares: Sequence[tuple[int, ...]]
) -> list[Expected]:
    """What one output of several copies has to be."""
    import torch

    first = eager[0]
    limits = [(0.0, 0.0)] * len(eager)
    classes: list[torch.Tensor | None] = [None] * len(eager)
    if not first.dtype.is_floating_point:
        references = [own.clone() for own in eager]
    else:
        classes = [None if finite else _classes(own) for own, finite in zip(eager, _each_finite(eager), strict=True)]
        info = torch.finfo(first.dtype)
        unit = info.eps / 2
        limits = [
            (EAGER_FACTOR * errors.max + unit * largest + info.smallest_normal * unit, EAGER_FACTOR * errors.norm + unit / 4)
            for errors, largest in _distances([_wide(own) for own in eager], references, classes)
        ]
        # float32 holds the reference of a 16-bit problem to a ten-thousandth of its budget, in half the memory.
        kept = torch.float64 if first.dtype.itemsize > 2 else torch.float32
        references = [reference.to(kept) for reference in references]
    return [
        Expected(
            reference=reference,
            classes=kinds,
            limit_max=limit_max,
            limit_norm=limit_norm,
            dtype=own.dtype,
            shape=tuple(own.shape),
            stride=tuple(own.stride()),
            device=own.device,
            num_bytes=own.numel() * own.element_size(),
            shares_with=shared,
        )
        for own, reference, kinds, (limit_max, limit_norm), shared in zip(
            eager, references, classes, limits, shares, strict=True
        )
    ]


def _each_finite(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each of some tensors of one shape holds no NaN and no infinity."""
    import torch

    if len(tensors) * tensors[0].numel() > TOGETHER_ELEMENTS or tensors[0].numel() == 0:
        return [all_finite([tensor]) for tensor in tensors]
    rows = (
        torch.stack([_wide(tensor) for tensor in tensors]).flatten(1)
        if tensors[0].dim()
        else torch.stack(list(tensors))[:, None]
    )
    found: list[bool] = torch.isfinite(rows).all(1).tolist()
    return found


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


def _distances(
    outputs: Sequence[torch.Tensor], references: Sequence[torch.Tensor], classes: Sequence[torch.Tensor | None]
) -> list[tuple[Errors, float]]:
    """Of each output of one shape: errors where both should be finite (the largest, and their norm over the reference's), and
    the largest reference.

    In float64: small outputs all at once, of large ones a few rows at a time (one of a large prefill has a quarter of a billion
    elements).
    """
    import torch

    size = outputs[0].numel()
    if size == 0:
        return [(Errors(max=0.0, norm=0.0, misplaced=0), 0.0)] * len(outputs)
    count = max(1, min(len(outputs), TOGETHER_ELEMENTS // size))
    sums = []
    for i in range(0, len(outputs), count):
        if count > 1:
            kinds = classes[i : i + count]
            known = None
            if any(one is not None for one in kinds):
                zeros = torch.zeros_like(outputs[i], dtype=torch.uint8)
                known = torch.stack([zeros if one is None else one for one in kinds]).reshape(-1, size)
            ours, exact = (torch.stack(list(each[i : i + count])).reshape(-1, size) for each in (outputs, references))
            sums.append(_sums(ours, exact, known))
        else:
            sums.append(_sums_in_blocks(outputs[i], references[i], classes[i]))
    found = []
    for error_max, largest, error, scale, num_misplaced in torch.cat(sums).tolist():
        norm = 0.0
        if error != 0:
            norm = math.sqrt(error / scale) if scale > 0 else math.inf
        # A NaN or Inf where a number belongs compares false with any limit, and must not pass for that.
        worst, norm = (math.inf if math.isnan(x) else x for x in (error_max, norm))
        found.append((Errors(max=worst, norm=norm, misplaced=int(num_misplaced)), largest))
    return found


def _sums_in_blocks(out: torch.Tensor, reference: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
    """`_sums` of one output, [1, 5]."""
    import torch

    blocks = torch.cat(
        [
            _sums(*(x if x is None else x[rows].reshape(1, -1) for x in (out, reference, classes)))  # type: ignore[arg-type]
            for rows in _blocks(out)
        ]
    )
    return torch.cat([blocks[:, :2].amax(0), blocks[:, 2:].sum(0)])[None, :]


def _sums(ours: torch.Tensor, exact: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
    """For each row: the largest error and the largest reference, squared errors, squared references, misplaced elements.

    Args:
        ours: [rows, elements].
        exact: as many.
        classes: of eager's, uint8; None: all finite.
    """
    import torch

    exact = exact.double()
    number = torch.isfinite(exact)
    wrong = ~torch.isfinite(ours) if classes is None else _classes(ours) != classes
    finite = number if classes is None else number & (classes == 0)
    # eager's own kernels may swallow a NaN: whoever has it where the exact result has it is right as well
    misplaced = (wrong & (number | (_classes(ours) != _classes(exact)))).sum(1)
    difference = torch.where(finite, ours.double() - exact, 0.0)
    exact = torch.where(finite, exact, 0.0)
    # the largest of numbers with a NaN among them is a NaN
    columns = [difference.abs().amax(1), exact.abs().amax(1), difference.square().sum(1), exact.square().sum(1)]
    return torch.stack([*columns, misplaced.double()], 1)


def _blocks(tensor: torch.Tensor) -> list[slice]:
    """Ranges of the first dimension with about `_BLOCK_ELEMENTS` elements each."""
    if tensor.dim() == 0:
        return [...]  # type: ignore[list-item]  # indexes a scalar
    rows = max(1, _BLOCK_ELEMENTS * tensor.shape[0] // tensor.numel())
    return [slice(i, i + rows) for i in range(0, tensor.shape[0], rows)]
