"""A job's turns on the device: who else has to wait, for how long, and in what state the device is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from autokernel.workers.limits import deadline

# An evaluation holds a GPU for a second at most. Whoever holds it much longer hangs, and keeps every other worker waiting.
_LONGEST_TURN_S = 45.0
_WORTH_RETURNING_BYTES = 1 << 30


def wake(device: str) -> None:
    """Make this process's CUDA context and cuBLAS's handle: half a second, once, for which nobody else should wait."""
    if device != "cuda":
        return
    import torch

    torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]


class Turns:
    """Takes the device's lock for a job, and counts the seconds of waiting for it and of having it alone.

    Args:
        device: "cpu" or "cuda".
        longest_s: what a turn on a GPU is used for ends the process if it takes longer (see `limits.deadline`); None for no
            limit.
    """

    def __init__(self, device: str, longest_s: float | None = _LONGEST_TURN_S) -> None:
        self._device = device
        self._longest_s = longest_s if device == "cuda" else None
        self._limit = contextlib.ExitStack()  # holds the deadline of what the turn is used for now
        self.waited_s = 0.0
        self.alone_s = 0.0

    @contextlib.contextmanager
    def take(self, what: str, *, exclusive: bool) -> Iterator[None]:
        """Hold the device while the block runs.

        Args:
            what: the block does, for the log of a turn that never ends.
            exclusive: alone, or along with other shared holders.
        """
        from autokernel.workers.device_lock import device_lock

        asked = time.monotonic()
        with device_lock(self._device, exclusive=exclusive), self._limit:
            self.go_on(what)
            got = time.monotonic()
            self.waited_s += got - asked
            try:
                yield
            finally:
                if exclusive:
                    self.alone_s += time.monotonic() - got

    def go_on(self, what: str | None) -> None:
        """Within a turn: the device is used for something else from now on, and that has as long as a turn may last.

        Args:
            what: it is used for. None for builds, which have until the job's own deadline: others wait, but their time does
                not count meanwhile.
        """
        self._limit.close()
        if what is not None:
            self._limit.enter_context(deadline(self._longest_s, what))


def return_spare_memory(device: str) -> None:
    """Between turns, other processes need what this one only keeps for later."""
    if device != "cuda":
        return
    import torch

    if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > _WORTH_RETURNING_BYTES:
        torch.cuda.empty_cache()


def leave(device: str, why: str = "") -> None:
    """At a job's end: free what it took. Nothing may refer to its tensors any more.

    Args:
        device: "cpu" or "cuda".
        why: what went wrong in the job, if anything.

    Raises:
        SystemExit: the CUDA context is dead (an illegal access); this process cannot use the device again.
    """
    if device != "cuda" and "torch._inductor" not in sys.modules:  # nothing was compiled
        return
    import torch

    from autokernel.backends.compiled import release

    try:
        if device == "cuda":
            torch.cuda.synchronize()
        release()
    except RuntimeError as error:
        reason = why or str(error).partition("\n")[0]
        raise SystemExit(f"the candidate left the process unable to use the GPU: {reason}") from error
