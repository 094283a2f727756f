"""Entries for rotary embeddings, normed before or not, in Inductor's code for a GPU that is not there."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from export.pretended_h200 import generated_code, plan_with

from autokernel.export.bundle import Entry
from autokernel.export.plan import Plan
from autokernel.export.regions import RegionPass
from autokernel.records import ConfigValue, Problem, TensorSpec

pytest.importorskip("triton", reason="Triton is not installed")

CONFIG: dict[str, ConfigValue] = {"kernel": "rotary", "block_rows": 4, "num_warps": 1}
EPS = (("eps", 1e-6),)
B, T, H, G, D = 2, 9, 4, 2, 64
CALLS = re.compile(r"rotary_kernel_\d+\.run\(")


def spec(*shape: int, dtype: str = "bfloat16") -> TensorSpec:
    return TensorSpec.contiguous(shape, dtype)


Q, K, GAIN, TABLE, TURNS = spec(B, T, H, D), spec(B, T, G, D), spec(D), spec(1, 1, T, D), spec(B, T, D // 2, dtype="complex64")


def problem(op: str, *inputs: TensorSpec, scalars: tuple[tuple[str, ConfigValue], ...] = EPS) -> Problem:
    return Problem(op=op, inputs=inputs, device="cuda", scalars=scalars)


class _Linted(RegionPass):
    """Leaves a graph in order: Inductor would sort it, but the passes behind this one come before."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        super().__call__(graph)
        graph.lint()


def code_of(
    function: Callable[..., Any], specs: list[TensorSpec], *entries: Problem, config: dict[str, ConfigValue] = CONFIG
) -> tuple[str, Plan]:
    found = tuple(Entry(problem=entry, backend="triton", config=config) for entry in entries)
    plan = plan_with(found)
    options = {"post_grad_custom_post_pass": _Linted(plan), "joint_graph_constant_folding": False}
    return generated_code(function, specs, options), plan


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    before, behind = x.narrow(-1, 0, D // 2), x.narrow(-1, D // 2, D // 2)  # x[...] asks for the device
    return x * cos + torch.cat((-behind, before), dim=-1) * sin


def qwen3(q: torch.Tensor, k: torch.Tensor, a: torch.Tensor, b: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """The keys are projected behind what is done to the queries, as Inductor orders them."""
    first = turned(norm(q * 2, a).transpose(1, 2), cos, sin)
    second = turned(norm(k.exp(), b).transpose(1, 2), cos, sin)
    return first @ second.repeat_interleave(H // G, 1).transpose(2, 3), first.relu()


INPUTS = [Q, K, GAIN, GAIN, TABLE, TABLE]
PAIR = problem("rotary_qk", Q, GAIN, K, GAIN, TABLE, TABLE)
APART = tuple(problem("norm_rotary", x, GAIN, TABLE, TABLE) for x in (Q, K))


@pytest.mark.parametrize(("entries", "calls"), [((PAIR,), 1), (APART, 2), ((PAIR, *APART), 1), ((*APART, PAIR), 2)])
def test_normed_queries_and_keys_are_turned_in_one_launch_or_in_two(entries: tuple[Problem, ...], calls: int) -> None:
    code, plan = code_of(qwen3, INPUTS, *entries)
    hits = [plan.usage[key].hits for key in plan.usage]
    assert sum(hits) == calls
    assert not [reason for usage in plan.usage.values() for reason in usage.reasons]
    assert len(CALLS.findall(code)) == calls
    assert "rsqrt" not in re.sub(r"def turn_\w+\(.*?'''", "", code, flags=re.DOTALL), "no norm of Inductor's own is left"


def test_complex_numbers_are_handed_over_as_pairs() -> None:
    def rotate(x: torch.Tensor, weight: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor]:
        normed = norm(x, weight)
        numbers = torch.view_as_complex(normed.float().reshape(B, T, H, -1, 2))
        return (torch.view_as_real(numbers * turns.unsqueeze(2)).flatten(3).type_as(x),)

    code, plan = code_of(rotate, [Q, GAIN, TURNS], problem("norm_rotary_complex", Q, GAIN, TURNS))
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(1, [])]
    assert len(CALLS.findall(code)) == 1
    called = code.split("def call(")[1]
    assert "view_as_complex" not in called
    assert "aten.mul.Tensor(" not in called


def test_what_the_kernel_does_not_take_stays_inductors(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        code, plan = code_of(qwen3, INPUTS, PAIR, config={**CONFIG, "block_rows": 256})
    (usage,) = plan.usage.values()
    assert usage.hits == 0
    assert "256 rows of 64 with 1 warps are 256" in usage.reasons[0]
    assert not CALLS.findall(code)
    assert len([r for r in caplog.records if "256 rows of 64" in r.getMessage()]) == 1
