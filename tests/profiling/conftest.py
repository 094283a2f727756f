"""The quickstart's experiment and model, loaded once per module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.profiling.workload import load_model

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def loaded() -> LoadedExperiment:
    return load_experiment(QUICKSTART)


@pytest.fixture(scope="session")
def model(loaded: LoadedExperiment) -> torch.nn.Module:
    return load_model(loaded, "cpu")
