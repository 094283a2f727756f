"""Events of a run that was made up: invented numbers in the form of real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import synthetic_gpu
import synthetic_runs

from autokernel.events import Event


@pytest.fixture(scope="session")
def synthetic_run() -> Callable[..., list[Event]]:
    return synthetic_runs.make_events


@pytest.fixture(scope="session")
def synthetic_events() -> list[Event]:
    return synthetic_runs.make_events()


@pytest.fixture(scope="session")
def gpu_events() -> list[Event]:
    return synthetic_gpu.make_gpu_events()
