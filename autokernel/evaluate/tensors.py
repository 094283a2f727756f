"""What tensors are, rather than what they hold: their bytes, layout, storage, and whether they are tensors at all.

Many small tensors are copied and compared together: on a GPU an operation, and waiting for it, costs more than their elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autokernel.evaluate.budget import Expected

if TYPE_CHECKING:
    import torch

_TOGETHER_BYTES = 32 << 20


def synchronize(device: str) -> None:
    """Wait for everything on the device, on every stream."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage as uint8 [num_bytes], gaps included; a view."""
    import torch

    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage as int64 where its size allows, which compares and copies much faster on a GPU; a view."""
    import torch

    raw = bytes_of(tensor)
    return raw.view(torch.int64) if raw.numel() % 8 == 0 else raw


def fill(tensors: Sequence[torch.Tensor], contents: Sequence[torch.Tensor]) -> None:
    """New contents at the same addresses, for as many tensors of the same layouts; gaps too."""
    import torch

    if tensors:
        torch._foreach_copy_([bytes_of(x) for x in tensors], [bytes_of(x) for x in contents])


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """The same in a memory of its own, gaps included."""
    import torch

    storage: Any = tensor.untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage.clone(), tensor.storage_offset(), tensor.shape, tensor.stride())


class Snapshot:
    """What tensors hold, gaps included, to see later whether they still do."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._small = sum(x.untyped_storage().nbytes() for x in tensors) <= _TOGETHER_BYTES
        self._now = [(bytes_of if self._small else bits_of)(x) for x in tensors]
        self._before = self._taken() if self._small else [x.clone() for x in self._now]

    def num_changed(self) -> int:
        """Tensors that are not what they were."""
        import torch

        now = self._taken() if self._small else self._now
        if all(torch.equal(x, y) for x, y in zip(now, self._before, strict=True)):
            return 0
        before = torch.split(self._before[0], [x.numel() for x in self._now]) if self._small else self._before
        return sum(not torch.equal(x, y) for x, y in zip(self._now, before, strict=True))

    def _taken(self) -> list[torch.Tensor]:
        import torch

        return [torch.cat(self._now)] if self._now else []


def rows_of(tensors: Sequence[torch.Tensor], *, copy: bool = False) -> list[torch.Tensor]:
    """The elements of tensors: those of small ones one behind the other, a row for each dtype; large ones as they are.

    Args:
        tensors: in the same order, give rows that can be compared.
        copy: also of large ones; rows of small ones always are.
    """
    import torch

    if sum(x.numel() * x.element_size() for x in tensors) > _TOGETHER_BYTES:
        return [x.clone() if copy else x for x in tensors]
    alike: dict[torch.dtype, list[torch.Tensor]] = {}
    for x in tensors:
        alike.setdefault(x.dtype, []).append(x.reshape(-1))
    return [torch.cat(parts) for parts in alike.values()]


def num_different(first: torch.Tensor, second: torch.Tensor) -> int:
    """Elements that are not bitwise equal; any NaN equals any other."""
    different = _different(first, second)
    return 0 if different is None else int(different.sum())


def each_different(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> list[bool]:
    """Of each pair, whether it differs as `num_different` counts it."""
    import torch

    alike = len({(x.dtype, x.shape) for x in first}) == 1
    small = sum(x.numel() * x.element_size() for x in first) <= _TOGETHER_BYTES
    if not alike or not small or first[0].numel() == 0:
        return [num_different(x, y) > 0 for x, y in zip(first, second, strict=True)]
    different = _different(torch.stack(list(first)), torch.stack(list(second)))
    found: list[bool] = [False] * len(first) if different is None else different.reshape(len(first), -1).any(1).tolist()
    return found


def _different(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
    """Where two tensors differ; None if nowhere."""
    import torch

    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    different = first.contiguous().view(integer) != second.contiguous().view(integer)
    if not bool(different.any()):
        return None
    if first.dtype.is_floating_point:
        different &= ~(first.float().isnan() & second.float().isnan())
    return different


def plain_problem(outputs: Sequence[Any]) -> str:
    """ "" if every output is a plain strided tensor; otherwise what is not. Touches no data, so nothing lazy is woken up."""
    import torch

    for i, out in enumerate(outputs):
        if type(out) is not torch.Tensor:
            return f"output {i} is a {type(out).__name__}; only plain torch.Tensor is accepted"
        if out.layout != torch.strided or out.is_conj() or out.is_neg() or out.requires_grad:
            return f"output {i} has layout {out.layout}, or a pending conjugate, negation or gradient; it must be plain"
    return ""


def metadata_problem(outputs: Sequence[torch.Tensor], expected: Sequence[Expected], outputs_per_copy: int = 1) -> str:
    """ "" if number, dtype, shape, stride and device of the outputs are the reference's; otherwise the first difference.

    The outputs of an op with several may be columns of one row-major matrix instead: GEMMs that were merged leave them so,
    and in a compiled model their consumers read them there.
    """
    if len(outputs) != len(expected):
        return f"{len(outputs)} outputs, but the reference has {len(expected)}"
    for i, (out, want) in enumerate(zip(outputs, expected, strict=True)):
        stride = _unmerged(out) if outputs_per_copy > 1 else out.stride()
        differences = [
            f"{name} {got} instead of {should}"
            for name, got, should in (
                ("dtype", out.dtype, want.dtype),
                ("shape", tuple(out.shape), want.shape),
                ("stride", _meaningful(stride, out.shape), _meaningful(want.stride, want.shape)),
                ("device", out.device, want.device),
            )
            if got != should
        ]
        if differences:
            return f"output {i}: {', '.join(differences)}"
    return ""


def alias_problem(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    earlier: Sequence[torch.Tensor],
    shares_with: Sequence[tuple[int, ...]],
    outputs_per_copy: int,
) -> str:
    """ "" if no output's storage overlaps an input, an output of the call before, or another output of this one.

    Args:
        outputs: of all copies in order.
        inputs: all inputs and constants.
        earlier: outputs of the call before, still alive.
        shares_with: per output, the earlier outputs of its own copy whose storage eager shares; these may overlap.
        outputs_per_copy: outputs of one copy.
    """
    spans = [_span(x) for x in outputs]
    foreign = [("an input or constant", _span(x)) for x in inputs] + [("an earlier call's output", _span(x)) for x in earlier]
    if not _any_overlap([*spans, *(span for _, span in foreign)]):
        return ""
    for i, span in enumerate(spans):
        for what, other in foreign:
            if _overlap(span, other):
                return f"output {i} shares memory with {what}"
        first = i - i % outputs_per_copy
        for j in range(i):
            if _overlap(span, spans[j]) and j - first not in shares_with[i] and not _disjoint_columns(outputs[i], outputs[j]):
                return f"outputs {j} and {i} share memory"
    return ""


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def _any_overlap(spans: Sequence[tuple[int, int]]) -> bool:
    """Whether any two have a byte in common."""
    end = 0
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if start < end:
            return True
        end = stop
    return False


def _unmerged(out: torch.Tensor) -> tuple[int, ...]:
    """The strides it would have as a matrix of its own, if it is a block of columns of a row-major one."""
    if out.dim() == 2 and out.stride(1) == 1 and out.stride(0) > out.shape[1]:
        return (out.shape[1], 1)
    return tuple(out.stride())


def _disjoint_columns(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are different columns of one row-major matrix: one storage, no common element."""
    if a.dim() != 2 or b.dim() != 2 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if a.shape[0] == 1 and b.shape[0] == 1:
        width = int(max(a.storage_offset() + a.shape[1], b.storage_offset() + b.shape[1]))
    elif a.stride(0) != b.stride(0) or a.shape[0] != b.shape[0]:
        return False
    else:
        width = a.stride(0)
    if a.stride(1) != 1 or b.stride(1) != 1:
        return False
    offsets = [int(x.storage_offset()) for x in (a, b)]
    left, right = sorted((offset % width, x.shape[1]) for offset, x in zip(offsets, (a, b), strict=True))
    same_rows = offsets[0] // width == offsets[1] // width
    return same_rows and left[0] + left[1] <= right[0] and right[0] + right[1] <= width


def _meaningful(stride: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of dimensions that have more than one element; the others say nothing."""
    if any(n == 0 for n in shape):
        return ()
    return tuple(s for s, n in zip(stride, shape, strict=True) if n != 1)
