"""Weights as constants: which, how many bytes, and that no call ever runs with weights it should not."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from autokernel.environment import current_environment
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.freezing import MAX_REFREEZES, MAX_SETS, FrozenGraph
from autokernel.records import Problem, TensorSpec

pytestmark = pytest.mark.clock

M, K, N = 4, 64, 96


class Compiler:
    """Counts, and "compiles" a sum of what is frozen times what is not."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.num_frozen = 0
        self.num_stock = 0
        self.delay_s = delay_s

    def frozen(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        time.sleep(self.delay_s)
        self.num_frozen += 1
        constant = sum(float(weight.sum()) for weight in inputs[:-1])
        return lambda x: constant * x

    def stock(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.num_stock += 1
        return lambda *inputs: sum(weight.sum() for weight in inputs[:-1]) * inputs[-1]

    def graph(self, weights: Sequence[torch.Tensor]) -> FrozenGraph:
        inputs = [*weights, torch.ones(1)]
        return FrozenGraph(
            self.frozen, self.stock, self.stock, lambda compiled: compiled(), range(len(weights)), len(inputs), inputs
        )


def weights(count: int, size: int = 2) -> list[torch.Tensor]:
    return [nn.Parameter(torch.full((size,), float(i + 1)), requires_grad=False) for i in range(count)]


def test_changed_weights_are_seen_and_their_old_constants_dropped() -> None:
    compiler, held = Compiler(), weights(3)
    graph = compiler.graph(held)
    two = torch.tensor([2.0])
    assert graph(*held, two).item() == 24
    first = weakref.ref(graph._variants[0].compiled)
    held[1].add_(1)
    assert graph(*held, two).item() == 28
    assert compiler.num_frozen == 2
    assert first() is None, "constants of weights that changed in place can never be right again"


def test_equal_weights_are_not_the_same_weights() -> None:
    """One-element tensors compare to a single True: identity decides, not equality."""
    compiler, held = Compiler(), weights(2, size=1)
    graph = compiler.graph(held)
    twins = [nn.Parameter(weight.clone(), requires_grad=False) for weight in held]
    assert graph(*twins, torch.ones(1)).item() == 3
    assert compiler.num_frozen == 2
    twins[0].add_(4)
    assert graph(*twins, torch.ones(1)).item() == 7
    assert graph(*held, torch.ones(1)).item() == 3
    assert compiler.num_frozen == 3, "the first set is still there"


def test_weights_that_never_rest_end_in_stock_code(caplog: pytest.LogCaptureFixture) -> None:
    compiler, held = Compiler(), weights(1)
    graph = compiler.graph(held)
    with caplog.at_level(logging.WARNING):
        for step in range(MAX_REFREEZES + 4):
            held[0].fill_(step)
            assert graph(*held, torch.ones(1)).item() == 2 * step
    assert (compiler.num_frozen, compiler.num_stock) == (MAX_REFREEZES + 1, 1)
    assert [r.message for r in caplog.records if "runs without packed weights" in r.message]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "refreshed"])
def test_what_is_written_behind_a_tensors_back(exchange: bool) -> None:
    """`.data` counts nothing: another tensor in its place is seen by its address, a write through it never."""
    compiler, held = Compiler(), weights(2)
    graph = compiler.graph(held)
    assert graph(*held, torch.ones(1)).item() == 6
    if exchange:
        held[0].data = torch.full((2,), 5.0)
    else:
        held[0].data += 4
        graph.forget()
    assert graph(*held, torch.ones(1)).item() == 14
    assert (compiler.num_frozen, compiler.num_stock) == (2, 0)


def test_weights_that_go_take_their_constants_with_them() -> None:
    compiler, held = Compiler(), weights(2)
    graph = compiler.graph(held)
    code, first, x = weakref.ref(graph._variants[0].compiled), weakref.ref(held[0]), torch.ones(1)
    argument = weakref.ref(x)
    assert graph(*held, x).item() == 6
    del held, x
    gc.collect()
    assert (code(), first(), argument()) == (None, None, None)
    fresh = weights(2)
    assert graph(*fresh, torch.ones(1)).item() == 6
    assert len(graph._variants) == 1


def test_many_layers_may_share_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    """Sets of weights that never changed are no changes; there is a limit of its own for them."""
    compiler, layers = Compiler(), [weights(1) for _ in range(MAX_SETS + 2)]
    graph = compiler.graph(layers[0])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for layer in layers[: MAX_REFREEZES + 4]:
                graph(*layer, torch.ones(1))
        assert (compiler.num_frozen, compiler.num_stock, caplog.records) == (MAX_REFREEZES + 4, 0, [])
        for layer in layers:
            graph(*layer, torch.ones(1))
    assert (compiler.num_frozen, compiler.num_stock) == (MAX_SETS, 1)
    assert [f"serves more than {MAX_SETS} sets of weights" in record.message for record in caplog.records] == [True]


def test_two_threads_with_the_same_new_weights_compile_once() -> None:
    compiler, held = Compiler(delay_s=0.05), weights(2)
    graph = compiler.graph(held)
    held[0].add_(1)
    results: list[float] = []
    threads = [threading.Thread(target=lambda: results.append(graph(*held, torch.ones(1)).item())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [8.0] * 4
    assert compiler.num_frozen == 2


def test_inference_tensors_go_by_identity_alone() -> None:
    with torch.inference_mode():
        held = weights(2)
        graph = Compiler().graph(held)
        assert graph(*held, torch.ones(1)).item() == 6


def test_the_check_is_cheap_for_hundreds_of_weights() -> None:
    """An 8B model has some 300. Measured on two busy cores: 44 us a call; the limit leaves room."""
    held = weights(300)
    graph = Compiler().graph(held)
    args = (*held, torch.ones(1))
    variant = graph._variants[0]
    best = 1e9
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            assert variant.matches(args)
        best = min(best, (time.perf_counter() - start) / 50)
    assert best < 150e-6


def test_usage_tells_how_much_memory_the_constants_take() -> None:
    weight = TensorSpec(shape=(K, N), dtype="float32", stride=(1, K))
    x = TensorSpec.contiguous((M, K), "float32")
    problem = Problem(op="merged_mm", inputs=(x, weight, weight), device="cpu", constants=(1, 2))
    entry = Entry(problem=problem, backend="aten", config={"prepack": False, "merge": "concat"})
    backend = BundleBackend(Bundle(name="t", created="", version="", environment=current_environment("cpu"), entries=(entry,)))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, N, bias=False), nn.Linear(K, N, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x), self.b(x)])

    torch.compiler.reset()
    model, inputs = Pair(), torch.randn(M, K)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    (usage,) = backend.usage().values()
    assert (usage.hits, usage.constant_bytes) == (1, 2 * K * N * 4)
