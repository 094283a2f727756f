"""A run of the Llama experiment on a device that need not be here, and a listener that keeps what a run says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autokernel.config import load_experiment
from autokernel.environment import Environment
from autokernel.stages.context import RunContext

LLAMA = Path(__file__).parent.parent / "experiments" / "llama.yaml"
ENVIRONMENT = Environment(device="cuda", device_name="A GPU", isa="sm_90", num_units=132, torch="2.11.0")


class Listener:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def record(self, event: Any) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Nothing is open."""


def context_of(pool: Any, device: str = "cuda", *recorders: Listener, overrides: Sequence[str] = ()) -> RunContext:
    """Of llama.yaml with these settings of it changed."""
    return RunContext(
        loaded=load_experiment(LLAMA, list(overrides)), folder=Path("unused"), run_id="r", device=device, threads=2,
        environment=ENVIRONMENT, pool=pool, recorders=recorders,
    )  # fmt: skip
