"""How much memory a worker may take."""

from __future__ import annotations

import psutil

from autokernel.workers.limits import memory_limit

GIB = 1 << 30


def test_workers_share_the_machine_but_a_checkpoint_has_to_fit() -> None:
    total = psutil.virtual_memory().total
    alone, one_of_many = memory_limit(1), memory_limit(1000)
    assert alone == int(total * 0.8)
    assert one_of_many < alone / 100 or one_of_many == 16 * GIB, "a machine with a GPU gives at least that"
    assert one_of_many < memory_limit(1000, model_bytes=GIB) <= alone
    assert memory_limit(1000, model_bytes=1000 * total) == alone, "what the machine has not, nobody may take"
