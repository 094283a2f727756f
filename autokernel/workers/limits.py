"""What a worker's processes are given: threads, memory, and silence."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

OVERDUE_EXIT_CODE = 124  # of a process that kept the device too long
_ALL_WORKERS = 0.8  # of the machine's memory
_CHECKPOINT = 1.25  # of its size, while it is read: the file's pages, or the tensors, and the largest of them once more
# CUDA, its libraries and Triton take three, the graph of a large model several, and the proof starts a compiler per core
_LEAST_WITH_GPU = 16 << 30


def worker_env(threads: int) -> dict[str, str]:
    """Variables that decide how fast CPU kernels run and what phones home, for every process that measures."""
    env = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # threads that spin between parallel regions turn a 0.4 ms kernel into 10 ms on a busy machine
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    return {name: os.environ.get(name, value) if name.startswith("TORCHINDUCTOR") else value for name, value in env.items()}


def memory_limit(num_workers: int, model_bytes: int = 0) -> int:
    """Bytes that one worker may take: a candidate that allocates without end must not take the machine along.

    Args:
        num_workers: that share the machine.
        model_bytes: size of a checkpoint that jobs load, one at a time on a GPU: it goes through the host's memory.
    """
    import psutil

    most = int(psutil.virtual_memory().total * _ALL_WORKERS)
    share = most // num_workers
    if model_bytes:
        share = max(share, min(most, int(_CHECKPOINT * model_bytes) + _LEAST_WITH_GPU))
    # hosts of GPUs have memory, but a virtual one may say so only once it is used
    return max(share, _LEAST_WITH_GPU) if Path("/proc/driver/nvidia").exists() else share


@contextlib.contextmanager
def deadline(seconds: float | None, what: str) -> Iterator[None]:
    """End this process, at once, if the block takes longer than `seconds`.

    For the time in which a process keeps others from the device. A kernel that hangs is ended with its process alone; the
    pool's own deadline comes later, and those who wait for the device would run into theirs first.

    Args:
        seconds: how long the block may take; None for no limit.
        what: what is overdue, for the log.
    """
    if seconds is None:
        yield
        return

    def end() -> None:
        os.write(2, f"{what} took more than {seconds:g} s; this process ends here\n".encode())
        os._exit(OVERDUE_EXIT_CODE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
