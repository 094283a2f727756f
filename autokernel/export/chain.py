"""Several graph passes as one: torch 2.11 takes a single one per place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from autokernel.export.plan import Plan


class PassChain(CustomGraphPass):
    """Runs passes one after another. `plan` is what `pins.current_plan` looks for."""

    def __init__(self, plan: Plan, passes: Sequence[CustomGraphPass]) -> None:
        self.plan = plan
        self._passes = tuple(passes)

    def uuid(self) -> str:
        return " ".join(str(item.uuid()) for item in self._passes)

    def __call__(self, graph: torch.fx.Graph) -> None:
        for item in self._passes:
            item(graph)
