"""Plain functions as post-grad graphs, and the generated regions in these. For the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from autokernel.ops import Region
from autokernel.ops.generated import Explained, Generated, explain
from autokernel.ops.program import program_of

OP = Generated()
K, N = 32, 48
Make = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


class Fn(nn.Module):
    """A function whose parameters are its own."""

    def __init__(self, forward: Make, *weights: torch.Tensor) -> None:
        super().__init__()
        self._forward = forward
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._forward(*inputs, *self.weights)


def rms(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def graph_of(post_grad: Any, function: Make, *inputs: torch.Tensor, weights: tuple[torch.Tensor, ...] = ()) -> Graph:
    return post_grad(Fn(function, *weights), *inputs)[0]  # type: ignore[no-any-return]


def found(graph: Graph) -> list[Region]:
    return OP.match(graph, frozenset(), "cpu")


def ops_of(region: Region) -> str:
    """The ops of a region's program, in order, without what only moves or converts."""
    lines = program_of(region.problem).lines
    return " ".join(line.op for line in lines if line.op not in ("convert", "reshape", "t", "getitem", "full"))


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


W, V = torch.randn(N, K), torch.randn(N, K)
SQUARE = torch.randn(K, K)


def only(graph: Graph, op: str) -> Explained:
    (item,) = [item for item in explain(graph) if item.op == op]
    return item
