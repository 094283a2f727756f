"""A graph behind a shut gate is compiled, kernels included, and does not run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx

from autokernel.backends import compiled
from autokernel.backends.compiled import release


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_at_once_and_run_when_opened() -> None:
    events: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = compile_fx(gm, list(inputs))
        events.append("compiled")

        def run(*args: Any) -> Any:
            events.append("run")
            return graph(*args)

        return run

    gate = compiled._Gate(backend)
    function = torch.compile(lambda x: (x @ x).relu(), backend=gate, fullgraph=True, dynamic=False)
    with torch.no_grad(), pytest.raises(compiled._CompiledOnly):
        function(torch.empty(8, 8))
    assert events == ["compiled"]
    gate.shut = False
    x = torch.randn(8, 8)
    with torch.no_grad():
        torch.testing.assert_close(function(x), (x @ x).relu())
    assert events == ["compiled", "run"]  # and not compiled again


def test_release_forgets_generated_modules() -> None:
    with torch.no_grad():
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.randn(8))
    assert PyCodeCache.modules
    release()
    assert not PyCodeCache.modules


def test_release_forgets_the_weights_that_were_folded_into_a_graph() -> None:
    model = torch.nn.Linear(8, 8).eval()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.compile(lambda x: x @ (2 * model.weight), fullgraph=True)(torch.randn(8, 8))
    folded = [
        weakref.ref(value)
        for module in PyCodeCache.modules
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
    ]
    assert folded
    release()
    assert [reference() for reference in folded] == [None] * len(folded)
