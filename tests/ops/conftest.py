"""Graphs as Inductor sees them, without paying for code generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph

PostGrad = Callable[..., tuple[Graph, frozenset[str]]]


class _Seen(Exception):
    """Raised once the graph is known: nothing is compiled."""


@pytest.fixture(scope="session")
def post_grad() -> PostGrad:
    """post_grad(module, *inputs) -> (the post-grad graph, the names of its parameters)."""
    from torch._inductor.compile_fx import compile_fx

    def make(module: torch.nn.Module, *inputs: torch.Tensor) -> tuple[Graph, frozenset[str]]:
        found: dict[str, Any] = {}

        def keep(graph: Graph) -> None:
            copy = Graph()
            copy.output(copy.graph_copy(graph, {}))
            found["graph"] = copy
            raise _Seen

        def backend(gm: Any, examples: list[torch.Tensor]) -> Any:
            found["fixed"] = [isinstance(x, torch.nn.Parameter) for x in examples]
            return compile_fx(gm, examples, config_patches={"post_grad_custom_post_pass": keep})

        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.TorchDynamoException):
            torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(*inputs)
        placeholders = [node.name for node in found["graph"].nodes if node.op == "placeholder"]
        return found["graph"], frozenset(n for n, fixed in zip(placeholders, found["fixed"], strict=True) if fixed)

    return make
