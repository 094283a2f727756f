"""What a worker's processes are given: threads, memory, and silence."""

from __future__ import annotations

import os


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


def memory_limit(num_workers: int) -> int:
    """Bytes that one worker may take: a candidate that allocates without end must not take the machine along."""
    import psutil

    return int(psutil.virtual_memory().total * 0.8 / num_workers)
