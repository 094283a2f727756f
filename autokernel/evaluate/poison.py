"""Fresh memory that is visibly not a result: what a kernel forgets to write, or reads after freeing, cannot look right.

On a CPU with glibc, `mallopt(M_PERTURB)` fills every block at allocation and again when it is freed, a kernel's own
workspaces included. Elsewhere, and always on a GPU, blocks as large as the outputs are filled with NaN and freed just
before the run, so that the allocator hands them out again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_PERTURB = -6
# Bytes that fresh memory is made of. With glibc, freed memory holds the complement. All of the four differ, and in every
# float format 0x7F repeated is huge or NaN. 0xFF repeated is NaN in every float format.
PERTURB_BYTES = (0x7F, 0x5A)
NAN_BYTE = 0xFF
# An allocator has several free blocks that fit; filling a few more than needed makes it likely that all of them are.
_SPARE_BLOCKS, _SPARE_LIMIT_BYTES = 4, 64 << 20
_WORKSPACE_BYTES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)


def can_perturb() -> bool:
    """Whether this process's allocator really fills fresh memory when told to (not so with musl or a preloaded jemalloc)."""
    import torch

    mallopt = _mallopt()
    if mallopt is None:
        return False
    mallopt(_M_PERTURB, PERTURB_BYTES[0] ^ 0xFF)
    try:
        probe = torch.empty(1 << 16, dtype=torch.uint8)
        return bool((probe == PERTURB_BYTES[0]).all())
    finally:
        mallopt(_M_PERTURB, 0)


@contextmanager
def poisoned(device: str, byte: int, sizes: Sequence[int], *, perturb: bool = True) -> Iterator[None]:
    """Memory allocated inside is poisoned; outside, nothing is slower than usual.

    Args:
        device: "cpu" or "cuda".
        byte: one of `PERTURB_BYTES`, or `NAN_BYTE` to fill and free blocks instead.
        sizes: bytes of the outputs to come.
        perturb: let the allocator do it (see `can_perturb`); otherwise blocks are filled and freed.
    """
    mallopt = _mallopt() if perturb and device == "cpu" and byte != NAN_BYTE else None
    if mallopt is None:
        fill_and_free(device, byte, sizes)
        yield
        return
    mallopt(_M_PERTURB, byte ^ 0xFF)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def fill_and_free(device: str, byte: int, sizes: Sequence[int]) -> None:
    """Leave blocks of these sizes (and of usual workspaces' sizes on a GPU) filled with `byte` in the allocator's hands."""
    import torch

    spare = _SPARE_BLOCKS if sum(sizes) < _SPARE_LIMIT_BYTES else 1
    wanted = [*sizes] * spare + [*(_WORKSPACE_BYTES if device == "cuda" else ())]
    blocks = [torch.full((size,), byte, dtype=torch.uint8, device=device) for size in wanted if size]
    if device == "cuda":
        torch.cuda.synchronize()
    del blocks


def looks_poisoned(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    """Mask of the elements all of whose bytes are `byte`, or all its complement. Shape as the tensor's."""
    import torch

    if tensor.numel() == 0:
        return torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = tensor.element_size()
    words = tensor.contiguous().view(kinds[size])
    patterns = [int.from_bytes(bytes([b]) * size, "little", signed=size > 1) for b in (byte, byte ^ 0xFF)]
    return (words == patterns[0]) | (words == patterns[1])


def _mallopt() -> Callable[[int, int], int] | None:
    try:
        function = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not Linux with glibc
        return None
    function.argtypes, function.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return function  # type: ignore[no-any-return]
