"""Times are per call, paired, and say how they were taken."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from autokernel.backends import Built
from autokernel.evaluate import timing
from autokernel.evaluate.timing import Comparison, compare, conditions, measure

pytestmark = pytest.mark.clock


def busy(us: float) -> None:
    """Computes for so long by this thread's own clock, so that waiting for a core does not make it shorter."""
    end = time.perf_counter_ns() + us * 1000
    while time.perf_counter_ns() < end:
        pass


def built_of(us: float, num_copies: int = 4) -> Built:
    return Built(run=lambda *inputs: (busy(us * num_copies),), num_copies=num_copies)  # type: ignore[return-value]


def test_time_is_per_copy() -> None:
    result = measure(built_of(500), [], device="cpu", threads=1)
    assert 500 <= result.median_us < 1000
    assert result.num_samples >= 7
    assert result.regime == "cpu, 1 threads, cold L2, 4 calls a sample"
    assert "warm L2" in measure(built_of(10), [], device="cpu", threads=1, cold=False).regime


def test_a_screen_is_short() -> None:
    start = time.monotonic()
    measure(built_of(20), [], device="cpu")
    assert time.monotonic() - start < 3


def test_audit_happens_once_at_a_point_that_the_seed_decides() -> None:
    def audited_at(seed: int) -> int:
        calls, seen = [0], []

        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            calls[0] += 1
            busy(2000)
            return ()

        def audit(call: Any) -> None:
            seen.append(calls[0])
            call()

        measure(Built(run=run, num_copies=1), [], device="cpu", audit=audit, seed=seed)
        assert len(seen) == 1
        assert calls[0] > seen[0] + 1
        return seen[0]

    assert len({audited_at(seed) for seed in range(4)}) > 1


def test_garbage_collection_is_off_inside_and_back_after() -> None:
    seen = []
    measure(Built(run=lambda: (seen.append(gc.isenabled()),), num_copies=1), [], device="cpu")  # type: ignore[arg-type, return-value]
    assert not any(seen)
    assert gc.isenabled()


def test_comparison_is_interleaved_and_paired() -> None:
    order: list[str] = []

    def contender(name: str, us: float) -> Any:
        def run() -> None:
            order.append(name)
            busy(us)

        return run

    result = compare(
        {"a": contender("a", 1000), "b": contender("b", 500), "c": contender("c", 1000)}, "a", 21, seed=1, min_sample_us=0
    )
    assert set(result.speedups) == {"b", "c"}
    assert result.speedups["b"].ratio == pytest.approx(2, rel=0.25)
    assert result.speedups["c"].ratio == pytest.approx(1, rel=0.25)
    assert 1000 <= result.medians_us["a"] < 1500
    assert result.num_rounds == 21
    assert result.speedups["b"].num_rounds + result.num_discarded == 21
    rounds = [tuple(order[-3 * (i + 1) : len(order) - 3 * i]) for i in range(21)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2
    assert Comparison.from_json(result.to_json()) == result


def test_rounds_where_the_baseline_was_disturbed_are_discarded() -> None:
    chosen = random.Random(0)
    count = [0]

    def baseline() -> None:
        count[0] += 1
        busy(3000 if chosen.random() < 0.15 else 1000)

    result = compare({"base": baseline, "other": lambda: busy(1000)}, "base", 41, seed=0, min_sample_us=0)
    assert 2 <= result.num_discarded <= 20
    assert result.speedups["other"].num_discarded == result.num_discarded
    assert result.medians_us["base"] < 1300
    kept = result.num_rounds - result.num_discarded
    assert {name: len(times) for name, times in result.rounds_us.items()} == {"base": kept, "other": kept}
    assert result.faster("other", "base").ratio == result.speedups["other"].ratio
    assert result.faster("base", "other").ratio == pytest.approx(1 / result.speedups["other"].ratio, rel=0.05)


def test_short_calls_are_repeated_and_times_stay_per_call() -> None:
    count = [0]

    def short() -> None:
        count[0] += 1
        busy(10)

    result = compare({"a": short, "b": lambda: busy(10)}, "a", 5, min_sample_us=300, calls_per_sample={"a": 2, "b": 1})
    assert count[0] > 5 * 10
    assert 5 <= result.medians_us["a"] < 10
    assert 10 <= result.medians_us["b"] < 20


def test_comparison_needs_its_baseline() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        compare({"a": lambda: None}, "b", 5)


def test_conditions_are_numbers() -> None:
    assert all(isinstance(value, float) for value in conditions("cpu").values())


def test_the_hopeless_get_a_first_look_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.EFFORTS, "cpu", replace(timing.EFFORTS["cpu"], look_samples=2))  # type: ignore[arg-type]
    assert measure(built_of(500), [], device="cpu", best_us=100).num_samples == 2
    assert measure(built_of(500), [], device="cpu", best_us=490).num_samples >= 7


def test_a_screen_holds_a_gpu_for_a_moment() -> None:
    assert set(timing.EFFORTS) == {"cpu", "cuda"}
    assert timing.EFFORTS["cuda"].budget_s <= 0.06
