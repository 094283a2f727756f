"""Sets of entries that go together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from autokernel.search.plan_study import PlanStudy
from autokernel.search.plans import Part, best_plans, completed, differing_us


def part(key: str, saved_us: float, *rivals: str) -> Part:
    return Part(key=key, saved_us=saved_us, rivals=frozenset(rivals))


def is_plan(keys: Sequence[str], parts: Sequence[Part]) -> bool:
    """Whether no two of the keys are rivals."""
    chosen = set(keys)
    return not any(part.key in chosen and part.rivals & chosen for part in parts)


def test_the_best_plan_is_not_the_greedy_one() -> None:
    parts = [part("whole", 10, "left", "right"), part("left", 6), part("right", 7), part("apart", 1)]
    plans = best_plans(parts, 5)
    assert [(plan.keys, plan.saved_us) for plan in plans] == [(("right", "left", "apart"), 14), (("whole", "apart"), 11)]


def test_a_rivalry_counts_both_ways_and_strangers_do_not() -> None:
    plans = best_plans([part("a", 1, "b", "gone"), part("b", 2)], 9)
    assert [plan.keys for plan in plans] == [("b",), ("a",)]


def test_what_is_taken_in_part_saves_the_rest() -> None:
    norm = replace(part("norm", 10), taken={"whole": 0.4, "other": 0.5})
    parts = [norm, part("whole", 7, "left"), part("left", 6), part("other", 1, "right"), part("right", 0.5)]
    plans = best_plans(parts, 9)
    assert [(plan.keys, plan.saved_us) for plan in plans] == [
        (("norm", "left", "right"), 16.5),
        (("norm", "whole", "right"), 13.5),
        (("norm", "left", "other"), 12),
        (("norm", "whole", "other"), 9),
    ]
    assert completed(["whole"], parts) == plans[3], "nothing excludes the norm"
    everything = replace(norm, taken={"whole": 0.6, "other": 0.6})
    assert best_plans([everything, part("whole", 7), part("other", 5)], 1)[0].saved_us == 12, "no less than nothing is left"


def test_what_excludes_nothing_is_in_every_plan_even_where_it_seems_to_cost() -> None:
    assert [plan.keys for plan in best_plans([part("a", -1), part("b", 2)], 9)] == [("b", "a")]
    assert best_plans([], 3) == [best_plans([], 3)[0]]
    assert best_plans([], 3)[0].keys == ()


@pytest.mark.parametrize("seed", range(6))
def test_as_all_sets_say(seed: int) -> None:
    chosen = random.Random(seed)
    keys = "abcdefgh"
    pairs = [pair for pair in itertools.combinations(keys, 2) if chosen.random() < 0.35]
    parts = [part(key, chosen.uniform(0, 9), *(b for a, b in pairs if a == key)) for key in keys]
    sets = [set(s) for n in range(len(keys) + 1) for s in itertools.combinations(keys, n)]
    legal = [s for s in sets if not any(a in s and b in s for a, b in pairs)]
    maximal = [s for s in legal if not any(s < other for other in legal)]
    saved = {p.key: p.saved_us for p in parts}
    ranked = sorted((sum(saved[key] for key in s) for s in maximal), reverse=True)
    plans = best_plans(parts, 4)
    assert [plan.saved_us for plan in plans] == pytest.approx(ranked[:4])
    assert all(is_plan(plan.keys, parts) for plan in plans)
    assert all(completed(plan.keys, parts).keys == plan.keys for plan in plans)


def test_many_small_groups_take_no_time() -> None:
    parts = [
        p
        for i in range(15)
        for p in (part(f"whole{i}", 3 + i / 100, f"l{i}", f"r{i}"), part(f"l{i}", 2), part(f"r{i}", 1.5))
    ]  # fmt: skip
    plans = best_plans(parts, 4)
    assert len(plans) == 4
    assert all(is_plan(plan.keys, parts) for plan in plans)
    assert plans[0].saved_us == pytest.approx(15 * 3.5)


def test_the_study_proposes_each_plan_once_and_learns() -> None:
    parts = [
        p
        for i in range(4)
        for p in (part(f"whole{i}", 10, f"l{i}", f"r{i}"), part(f"l{i}", 6), part(f"r{i}", 5))
    ]  # fmt: skip
    study = PlanStudy(parts, 1000, 6, seed=0)
    first = study.first()
    assert len(first) == 3
    assert first[0].keys == best_plans(parts, 1)[0].keys
    for plan in first[1:]:  # in the model, the large kernels are much better than the sum says
        wholes = sum(key.startswith("whole") for key in plan.keys) - sum(key.startswith("whole") for key in first[0].keys)
        study.tell(plan, first[0], plan.saved_us - first[0].saved_us + 50 * wholes)
    later = study.next()
    assert 1 <= len(later) <= 3
    everything = [plan.keys for plan in (*first, *later)]
    assert len(set(everything)) == len(everything)
    assert all(is_plan(plan.keys, parts) for plan in later)
    assert study.next() == [] or len(everything) < 6


def calls(key: str, saved_us: float, stock_us: float, nodes: str, *rivals: str) -> Part:
    return replace(part(key, saved_us, *rivals), stock_us=stock_us, nodes=frozenset(nodes))


def test_plans_differ_in_the_calls_that_only_one_of_them_replaces() -> None:
    parts = [calls("a", 3, 20, "wxyz", "b"), calls("b", 2, 5, "xyz"), replace(part("c", 9), stock_us=100)]
    first, second = best_plans(parts, 2)
    assert differing_us(first, second, parts) == 20 / 4
    assert differing_us(first, first, parts) == 0
    parts[1] = replace(parts[1], nodes=frozenset())
    assert differing_us(first, second, parts) == 25, "not known: all of them"


def test_of_plans_that_cannot_be_told_apart_the_best_is_proposed_alone() -> None:
    parts = [calls("a", 3, 20, "wxyz", "b", "c"), calls("b", 2, 5, "xyz", "c"), calls("c", 1, 20, "pq")]
    study = PlanStudy(parts, 10, 9, told_apart_us=5)
    assert [plan.keys for plan in study.first()] == [("a",), ("c",)]
    assert [(plan.keys, us) for plan, us in study.left_out] == [(("b",), 5)]
    assert study.next() == []
    assert [plan.keys for plan in PlanStudy(parts, 10, 9, told_apart_us=4.9).first()] == [("a",), ("b",), ("c",)]


def test_two_plans_are_all_there_are() -> None:
    study = PlanStudy([part("a", 1, "b"), part("b", 2)], 10, 9)
    assert [plan.keys for plan in study.first()] == [("b",), ("a",)]
    assert study.next() == []
