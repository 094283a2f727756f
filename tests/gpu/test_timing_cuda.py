"""Timing on a GPU: right for known durations, cold where it says so, quick for the hopeless, repeatable."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autokernel.backends import Built
from autokernel.evaluate.caches import cache_bytes
from autokernel.evaluate.call_graphs import CaptureError, graph_of
from autokernel.evaluate.confirm import ConfirmCandidates
from autokernel.evaluate.roofline import measure_ceilings
from autokernel.evaluate.timing import conditions, measure, timer
from autokernel.records import Candidate, ConfigValue
from autokernel.workers.limits import worker_env
from autokernel.workers.pool import LocalPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]

if torch.cuda.is_available():
    from gpu.cuda_problems import TILE, CaptureOfWait, mm_problem


def idle(cycles: int, num_copies: int = 4) -> Built:
    """Every copy keeps one multiprocessor waiting for so many cycles."""
    out = torch.zeros(1, device="cuda")

    def run() -> tuple[torch.Tensor, ...]:
        for _ in range(num_copies):
            torch.cuda._sleep(cycles)
        return (out,)

    return Built(run=run, num_copies=num_copies)


def products(inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> Built:
    return Built(run=lambda *_: tuple(x @ w for x, w in zip(inputs, weights, strict=True)), num_copies=len(weights))


def test_durations_are_proportional_and_agree_with_plain_events() -> None:
    measure(idle(200_000), [], device="cuda")  # the clock rises
    short, long = (measure(idle(cycles), [], device="cuda") for cycles in (100_000, 200_000))
    assert long.median_us / short.median_us == pytest.approx(2, rel=0.08)
    once = timer("cuda", lambda: torch.cuda._sleep(200_000), repeats=50)
    once()
    assert long.median_us == pytest.approx(min(once() for _ in range(5)) / 50, rel=0.1)


def test_launches_do_not_count_in_a_graph() -> None:
    x = torch.zeros(256, device="cuda")
    tiny = Built(run=lambda: tuple([x + 1 for _ in range(8)]), num_copies=8)
    graph = measure(tiny, [], device="cuda", regime="graph")
    eager = measure(tiny, [], device="cuda", regime="eager")
    assert graph.median_us < eager.median_us
    assert graph.median_us < 6
    assert eager.regime.startswith("cuda eager")


def test_cold_and_warm_differ() -> None:
    n = 2048
    size = n * n * 2
    copies = 3 * cache_bytes("cuda") // size + 1
    x = torch.randn(1, n, device="cuda").bfloat16()
    weights = [torch.randn(n, n, device="cuda").bfloat16() for _ in range(copies)]
    cold = measure(products([x] * copies, weights), [], device="cuda")
    warm = measure(products([x] * copies, [weights[0]] * copies), [], device="cuda")
    assert cold.median_us > 1.15 * warm.median_us


def test_the_hopeless_get_a_first_look_only() -> None:
    kernel = idle(200_000)
    full = measure(kernel, [], device="cuda")
    start = time.monotonic()
    look = measure(kernel, [], device="cuda", best_us=full.median_us / 2)
    assert time.monotonic() - start < 0.3
    assert look.num_samples == 3 < 7 <= full.num_samples
    assert look.median_us == pytest.approx(full.median_us, rel=0.1)
    assert measure(kernel, [], device="cuda", best_us=full.median_us).num_samples >= 7


def test_the_audit_sees_what_was_timed() -> None:
    x = torch.randn(16, 512, device="cuda").bfloat16()
    w = torch.randn(512, 512, device="cuda").bfloat16()
    kernel = Built(run=lambda a: (a @ w,), num_copies=1)
    seen: list[torch.Tensor] = []

    def audit(run: Callable[[], tuple[Any, ...]]) -> None:
        before = x.clone()
        x.mul_(2)
        seen.append(run()[0].clone())
        x.copy_(before)

    measure(kernel, [x], device="cuda", audit=audit)
    torch.testing.assert_close(seen[0], (2 * x) @ w)


def test_what_waits_for_the_host_cannot_be_captured() -> None:
    pool = LocalPool(1, env=worker_env(1), preload=("torch",))  # PyTorch itself does not recover from it
    try:
        with pytest.raises(CaptureError, match="cannot be captured"):
            pool.submit(CaptureOfWait(), 60).result()
    finally:
        pool.close()


def test_graphs_hold_all_calls_and_return_the_last_outputs() -> None:
    count = torch.zeros(1, device="cuda")
    graph, out = graph_of(lambda: count.add_(1) * 2, 3, warm_ups=2)
    assert count.item() == 2  # capturing runs nothing
    graph.replay()
    torch.cuda.synchronize()
    assert out.item() == 10


def test_the_state_of_the_card_is_told() -> None:
    state = conditions("cuda")
    assert {"clock_mhz", "memory_mhz", "power_w", "temperature_c", "throttle"} <= set(state), state
    assert 100 < state["clock_mhz"] < 4000
    assert 10 < state["power_w"] < 2000
    assert 10 < state["temperature_c"] < 110


def test_ceilings_are_plausible() -> None:
    ceilings = measure_ceilings("cuda", dtypes=("bfloat16",), budget_s=1.0)
    assert 200 < ceilings.read_gb_per_s < 20_000
    assert 20 < ceilings.tflops["bfloat16"] < 5_000
    assert ceilings.l2_bytes == cache_bytes("cuda") > 1 << 20
    assert ceilings.l2_gb_per_s >= ceilings.read_gb_per_s


def test_the_same_candidates_confirmed_twice_give_the_same_winner() -> None:
    problem = mm_problem(m=16, n=6144, k=4096)
    tiles: list[dict[str, ConfigValue]] = [TILE, {**TILE, "BLOCK_N": 32, "BLOCK_K": 256}, {**TILE, "num_stages": 2}]
    stock = Candidate(problem=problem, backend="aten", config={"prepack": False})
    finalists = tuple(Candidate(problem=problem, backend="inductor", config=tile) for tile in tiles)
    start = time.monotonic()
    first, second = (
        ConfirmCandidates(problem=problem, finalists=finalists, baselines=(stock,), seed=seed, max_copies=32)()
        for seed in (1, 2)
    )
    assert time.monotonic() - start < 60
    assert first.failures == second.failures == ()
    assert first.comparison is not None
    assert {"before_clock_mhz", "after_power_w"} <= set(first.comparison.conditions)
    speedups = [{c.candidate.id: c.speedup for c in result.finalists} for result in (first, second)]
    winners = [min(r.finalists, key=lambda c: c.measurement.median_us).candidate.id for r in (first, second)]
    one, other = speedups[0][winners[0]], speedups[0][winners[1]]
    assert one is not None
    assert other is not None
    assert winners[0] == winners[1] or max(one.low, other.low) <= min(one.high, other.high) + 0.01
    for name, speedup in speedups[0].items():
        again = speedups[1][name]
        assert speedup is not None
        assert again is not None
        assert again.ratio == pytest.approx(speedup.ratio, rel=0.04)
