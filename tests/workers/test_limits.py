"""How much memory a worker may take."""

from __future__ import annotations

from pathlib import Path

import psutil

from autokernel.config import load_experiment
from autokernel.workers.limits import memory_limit

EXPERIMENT = Path(__file__).parent.parent / "data" / "gated.yaml"
GIB = 1 << 30


def test_workers_share_the_machine_but_a_checkpoint_has_to_fit() -> None:
    total = psutil.virtual_memory().total
    alone, one_of_many = memory_limit(1), memory_limit(1000)
    assert alone == int(total * 0.8)
    assert one_of_many < alone / 100 or one_of_many == 8 * GIB, "a machine with a GPU gives at least that"
    assert one_of_many < memory_limit(1000, model_bytes=GIB) <= alone
    assert memory_limit(1000, model_bytes=1000 * total) == alone, "what the machine has not, nobody may take"


def test_a_checkpoint_s_size_is_that_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 300)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 44)
    loaded = load_experiment(EXPERIMENT)
    assert loaded.checkpoint_bytes == 0
    model = loaded.experiment.model.model_copy(update={"factory": None, "checkpoint": tmp_path})
    assert (
        loaded.model_copy(update={"experiment": loaded.experiment.model_copy(update={"model": model})}).checkpoint_bytes == 344
    )
