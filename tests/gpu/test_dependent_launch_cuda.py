"""Kernels that are launched while the one in front runs, on the card: the same bits as one behind the other, in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional

from autokernel.environment import current_environment
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.dependent_launch import dependent
from autokernel.ops.attention import Attention
from autokernel.ops.generated import Generated
from autokernel.records import ConfigValue, Problem, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs an NVIDIA GPU of compute capability 9.0 or more",
    ),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]

D, F, LAYERS = 2048, 4096, 6
VECTOR: dict[str, ConfigValue] = {
    "kernel": "generated_mm", "mode": "vector", "block_m": 1, "block_n": 4, "block_k": 1024, "block_s": 512, "split_k": 1,
    "num_warps": 4, "num_stages": 1, "precision": "ieee",
}  # fmt: skip
SKINNY: dict[str, ConfigValue] = {
    "kernel": "skinny_mm", "mode": "vector", "BLOCK_M": 1, "BLOCK_N": 4, "BLOCK_K": 512, "split_k": 1, "num_warps": 4,
    "num_stages": 1,
}  # fmt: skip


class Layer(torch.nn.Module):
    """A norm with two products and their gating, a product behind it, and the residual: all small, so that launches show."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(D))
        self.gate, self.up = (torch.nn.Linear(D, F, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(F, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        product: torch.Tensor = self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return torch.tanh(product) + x


def entries_of(model: torch.nn.Module, x: torch.Tensor, config: dict[str, ConfigValue]) -> list[Entry]:
    """Norm, both products and their gating in one kernel; down in another."""
    entries: dict[str, Entry] = {}

    def keep(graph: torch.fx.Graph) -> None:
        for region in Generated().match(graph, frozenset(), "cuda"):
            if "rsqrt" in str(region.problem) and "exp" in str(region.problem):
                entries[region.problem.key] = Entry(problem=region.problem, backend="triton", config=VECTOR)

    torch._dynamo.reset()
    torch.compile(model, options={"post_grad_custom_post_pass": keep, "fx_graph_cache": False})(x)
    weight = TensorSpec(shape=(F, D), dtype="bfloat16", stride=(1, F))
    down = Problem(op="mm", inputs=(TensorSpec.contiguous((1, F), "bfloat16"), weight), device="cuda", constants=(1,))
    assert len(entries) == 1, list(entries)
    return [*entries.values(), Entry(problem=down, backend="triton", config=config)]


def bundle_with(entries: Sequence[Entry], option: bool | str) -> Bundle:
    """A bundle for this machine, with the graph option or without."""
    options: dict[str, ConfigValue] = {"pdl": option} if option else {}
    environment = current_environment("cuda")
    return Bundle(name="d", created="", version="", environment=environment, entries=tuple(entries), graph_options=options)


def replays(
    model: torch.nn.Module, bundle: Bundle, draws: Sequence[tuple[torch.Tensor, ...]], num_sites: int, rounds: int
) -> tuple[list[torch.Tensor], int]:
    """Results of a CUDA graph for these inputs, by a bundle; and how many kernels read or ask for something ahead."""
    inputs, ahead = [x.clone() for x in draws[0]], 0

    def look(body: str, *, only_ahead: bool = False) -> str:
        nonlocal ahead
        made = dependent(body, only_ahead=only_ahead)
        ahead += made.count("'AHEAD': 1") > 0
        return made

    torch._dynamo.reset()
    backend = BundleBackend(bundle)
    with mock.patch("autokernel.export.dependent_launch.dependent", look):
        compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
        compiled(*inputs)
    assert [(usage.hits, usage.reasons) for usage in backend.usage().values()] == [(num_sites, [])] * len(bundle.entries)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        compiled(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compiled(*inputs)
    found = []
    for _ in range(rounds):
        for draw in draws:
            for x, value in zip(inputs, draw, strict=True):
                x.copy_(value)
            graph.replay()
            found.append(out.clone())
    return found, ahead


@pytest.mark.parametrize(
    ("config", "num_ahead"),
    [(SKINNY, 2), ({**SKINNY, "num_stages": 2}, 1)],
    ids=["both read ahead", "down has a pipeline"],
)
def test_results_are_the_same_bits_with_dependent_launches(config: dict[str, ConfigValue], num_ahead: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Layer() for _ in range(LAYERS))).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    draws = [torch.randn(1, D, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
    with torch.no_grad():
        entries = tuple(entries_of(model, draws[0], config))
        expected: list[torch.Tensor] = []
        for option in (False, True, "all", "ahead", "one_wave"):
            results, ahead = replays(model, bundle_with(entries, option), [(x,) for x in draws], LAYERS, rounds=20)
            expected_ahead = {False: 0, "ahead": num_ahead, "one_wave": num_ahead}.get(option, 2)
            assert ahead == expected_ahead, "the kernel of the norm and both products, and that of down"
            expected = expected or results
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), option
        for draw, result in zip(draws, expected, strict=False):
            torch.testing.assert_close(result, model(draw), rtol=5e-2, atol=5e-2)


HEADS, GROUPS, DIM, SLOTS = 8, 2, 128, 1040
ATTENTION: dict[str, ConfigValue] = {
    "kernel": "decode_attention", "BLOCK_S": 64, "num_splits": 9, "skip": False, "num_warps": 2, "num_stages": 4,
}  # fmt: skip


class Step(torch.nn.Module):
    """Attention over a static cache, whose newest row the kernels in front of it write."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(D, HEADS * DIM, bias=False)
        self.k, self.v = (torch.nn.Linear(D, GROUPS * DIM, bias=False) for _ in range(2))
        self.register_buffer("keys", torch.zeros(1, GROUPS, SLOTS, DIM))
        self.register_buffer("values", torch.zeros(1, GROUPS, SLOTS, DIM))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(1, 1, -1, DIM).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = (torch.arange(SLOTS, device=x.device) <= position)[None, None, None, :]
        cached = []
        for cache, row in ((self.keys, k), (self.values, v)):
            cache.index_copy_(2, position, row)  # type: ignore[operator]
            wide = cache[:, :, None].expand(1, GROUPS, HEADS // GROUPS, SLOTS, DIM)  # type: ignore[index]
            cached.append(wide.reshape(1, HEADS, SLOTS, DIM))
        return functional.scaled_dot_product_attention(q, *cached, attn_mask=mask).transpose(1, 2).reshape(1, 1, -1)


def test_attention_that_asks_for_the_cache_early_sees_what_is_written_meanwhile() -> None:
    torch.manual_seed(0)
    model = Step().to("cuda", torch.bfloat16).eval().requires_grad_(False)
    draws = [torch.randn(1, 1, D, device="cuda", dtype=torch.bfloat16) for _ in range(40)]
    places = [torch.tensor([place], device="cuda") for place in range(len(draws))]
    problems: dict[str, Problem] = {}

    def keep(graph: torch.fx.Graph) -> None:
        problems.update({region.problem.key: region.problem for region in Attention().match(graph, frozenset(), "cuda")})

    found: dict[object, list[torch.Tensor]] = {}
    with torch.no_grad():
        found["eager"] = [model(x, place) for x, place in zip(draws, places, strict=True)]
        torch._dynamo.reset()
        torch.compile(model, options={"post_grad_custom_post_pass": keep, "fx_graph_cache": False})(draws[0], places[0])
        (problem,) = problems.values()
        for option in (False, "all", "ahead", "one_wave"):
            model.keys.zero_()  # type: ignore[operator]
            model.values.zero_()  # type: ignore[operator]
            bundle = bundle_with([Entry(problem=problem, backend="triton", config=ATTENTION)], option)
            found[option], ahead = replays(model, bundle, [*zip(draws, places, strict=True)], 1, rounds=1)
            assert ahead == int(option in ("all", "ahead"))
    for option in ("all", "ahead", "one_wave"):
        assert all(torch.equal(a, b) for a, b in zip(found[False], found[option], strict=True)), option
    for exact, got in zip(found["eager"], found["all"], strict=True):
        torch.testing.assert_close(got, exact, rtol=2e-2, atol=2e-2)
