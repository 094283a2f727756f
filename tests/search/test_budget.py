"""Trials follow Amdahl: properties over many random cases."""

from __future__ import annotations

import random

import pytest

from autokernel.records import Hotspot, Problem, TensorSpec
from autokernel.search.budget import Scheduler, allocate, merge


def hotspot(m: int, weight: float, roofline: float = 0.5, scenario: str = "decode") -> Hotspot:
    problem = Problem(op="mm", device="cpu", inputs=(TensorSpec.contiguous((m, 8), "float32"),))
    return Hotspot(
        problem=problem, scenario=scenario, num_calls=1, time_us=100, share=weight, weight=weight, roofline_us=100 * roofline
    )


@pytest.mark.parametrize("seed", range(60))
def test_properties(seed: int) -> None:
    rng = random.Random(seed)
    hotspots = [
        hotspot(rng.randrange(1, 12), rng.random() / 8, rng.choice((0.1, 0.5, 0.99, 1.2)), rng.choice("ab"))
        for _ in range(rng.randrange(0, 12))
    ]
    trials, minimum = rng.randrange(0, 300), rng.randrange(0, 6)
    keys = {h.problem.key for h in hotspots}
    sizes = {key: rng.choice((1, 3, 50)) for key in keys if rng.random() < 0.5}
    given = allocate(hotspots, trials, minimum=minimum, sizes=sizes)
    assert set(given) == keys
    assert all(isinstance(n, int) and n >= 0 for n in given.values())
    assert sum(given.values()) <= trials
    assert all(given[key] <= size for key, size in sizes.items())
    gains = merge(hotspots)
    if trials >= minimum * len(keys):
        assert all(given[key] >= min(minimum, sizes.get(key, minimum)) for key in keys)
        free = [key for key in keys if key not in sizes]
        for a in free:
            for b in free:
                assert gains[a] <= gains[b] or given[a] >= given[b]
        wanting = [key for key in keys if gains[key] > 0 and given[key] < sizes.get(key, trials)]
        assert not wanting or sum(given.values()) == trials  # nothing is left lying while somebody could use it
    shuffled = hotspots[:]
    rng.shuffle(shuffled)
    assert allocate(shuffled, trials, minimum=minimum, sizes=sizes) == pytest.approx(given)


def test_shares_follow_gain_and_scenarios_add_up() -> None:
    hotspots = [
        hotspot(1, 0.2),
        hotspot(2, 0.1, scenario="a"),
        hotspot(2, 0.1, scenario="b"),
        hotspot(3, 0.1),
        hotspot(4, 0.4, 1.0),
    ]
    given = allocate(hotspots, 105, minimum=1)
    assert list(given.values()) == [42, 41, 21, 1] or list(given.values()) == [41, 42, 21, 1]
    assert allocate(hotspots, 3, minimum=2) == dict(zip(given, [2, 1, 0, 0], strict=True))


def test_seconds_bound_the_plan() -> None:
    assert sum(allocate([hotspot(1, 0.5)], 1000, seconds=10).values()) == 100
    assert allocate([], 10) == {}


@pytest.mark.parametrize("seed", range(20))
def test_scheduler_spends_everything_and_passes_on_what_is_unused(seed: int) -> None:
    rng = random.Random(seed)
    hotspots = [hotspot(m, rng.random() / 4) for m in range(1, 5)]
    plan = allocate(hotspots, 120, minimum=3)
    exhausted_after = {key: rng.choice((2, 5, 10_000)) for key in plan}
    key_that_can = max(plan)
    exhausted_after[key_that_can] = 10_000
    scheduler = Scheduler(plan, merge(hotspots), minimum=3)
    spent = dict.fromkeys(plan, 0)
    order: list[str] = []
    while (key := scheduler.next()) is not None:
        if spent[key] >= exhausted_after[key]:
            scheduler.exhaust(key)
            continue
        scheduler.spend(key)
        spent[key] += 1
        order.append(key)
        assert len(order) <= 120
    assert sum(spent.values()) == 120
    assert scheduler.next() is None
    assert all(spent[key] <= exhausted_after[key] for key in spent)
    assert set(order[: 3 * len(plan)]) == set(plan)  # the minimum of each comes first


def test_scheduler_takes_the_largest_expected_gain_next() -> None:
    scheduler = Scheduler({"a": 10, "b": 10}, {"a": 0.3, "b": 0.1})
    order = []
    for _ in range(8):
        key = scheduler.next()
        assert key is not None
        order.append(key)
        scheduler.spend(key)
    assert order[:2] == ["a", "b"]
    assert order.count("a") == 6
    scheduler.exhaust("a")
    scheduler.exhaust("a")
    assert scheduler.limit("a") == 6
    assert scheduler.limit("b") == 14
