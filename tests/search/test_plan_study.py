"""What Optuna proposes where parts have several configs, and what is believed of plans that were not timed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import pytest

from autokernel.search.budget import plans_to_time
from autokernel.search.plan_beliefs import Beliefs, improvement_us
from autokernel.search.plan_study import PlanStudy
from autokernel.search.plans import WITHIN_MODEL, Part, Plan, at_stake_us, best_plans, completed, differing_us, with_config

STEP_US = 1000.0
TOLD_APART_US = 0.002 * STEP_US


def part(key: str, saved_us: float, stock_us: float, *rivals: str, **runners_up: float) -> Part:
    return Part(
        key=key,
        saved_us=saved_us,
        rivals=frozenset(rivals),
        stock_us=stock_us,
        own_us=stock_us - saved_us,
        runners_up=runners_up,
    )


# As in a decoding step of a language model: attention with or without what rotates its queries, norms in front of products or
# apart, two ways to merge gate and up; and products that nothing excludes. Most have kernels that are nearly as fast.
DECODE = [
    part("attention", 200, 300, "rope"), part("rope", 4, 10, "attention"),
    part("norm qkv", 14, 130, "norm", "qkv", second=13),
    part("norm", 6, 20, "norm qkv"), part("qkv", 7, 110, "norm qkv", second=6.5, third=6),
    part("swiglu", 20, 260, "gate up", second=19, third=16), part("gate up", 17, 250, "swiglu", second=16.5),
    part("down", 8, 140, second=7.5, third=6), part("o", 3, 60, second=2.8),
]  # fmt: skip


def search(
    parts: Sequence[Part], truth: Callable[[Plan], float], limit: int, seed: int = 0, rounds: int = 2
) -> tuple[Plan, list[Plan]]:
    """As the stage does it: (the plan that is kept, all that were timed). `truth` is what a plan saves in the model."""
    study = PlanStudy(parts, STEP_US, limit, seed, TOLD_APART_US)
    best, *challengers = study.first()
    challengers = challengers or study.next()
    timed = [best]
    for _ in range(rounds):
        gained = {plan: truth(plan) - truth(best) for plan in challengers}
        timed += challengers
        for plan, us in gained.items():
            study.tell(plan, best, us, TOLD_APART_US / 2)
        clear = [plan for plan in challengers if gained[plan] > TOLD_APART_US]
        best = max(clear, key=lambda plan: gained[plan], default=best)
        challengers = study.next(best)
    return best, timed


def planted(gain_us: float, **configs: str) -> Callable[[Plan], float]:
    """Savings add up, but these configs together save so much more in the model."""
    return lambda plan: plan.saved_us + gain_us * all(dict(plan.configs).get(key) == one for key, one in configs.items())


def test_a_plan_saves_what_its_configs_save() -> None:
    norm = Part(key="norm", saved_us=10, rivals=frozenset(), taken={"whole": 0.4}, own_us=50, runners_up={"second": 8})
    parts = [norm, part("whole", 7, 20, "left"), part("left", 6, 20)]
    (best, *_) = best_plans(parts, 3)
    assert (best.keys, best.saved_us, best.configs) == (("norm", "left"), 16, ())
    other = with_config(best, "norm", "second", parts)
    assert (other.keys, other.saved_us, other.configs) == (best.keys, 14, (("norm", "second"),))
    beside = completed(["whole"], parts, {"norm": "second", "left": "gone"})
    assert (beside.keys, beside.saved_us) == (("norm", "whole"), pytest.approx(7 + 8 * 0.6))
    assert beside.configs == (("norm", "second"),), "what is left out has no config"
    assert with_config(best, "whole", "third", parts) is best
    assert differing_us(best, other, parts) == pytest.approx(50 * WITHIN_MODEL)
    assert differing_us(beside, completed(["whole"], parts), parts) == pytest.approx(50 * WITHIN_MODEL * 0.6)
    assert differing_us(best, beside, parts) == pytest.approx(20 + 20 + 50 * WITHIN_MODEL * 0.6), "parts that only one has, too"


def test_what_is_at_stake_is_what_plans_differ_in() -> None:
    assert at_stake_us(best_plans(DECODE, 1), DECODE) == pytest.approx(WITHIN_MODEL * (116 + 240 + 132 + 57))
    lone = [part("down", 8, 140, second=7.5), part("o", 3, 60)]
    assert at_stake_us(best_plans(lone, 9), lone) == pytest.approx(WITHIN_MODEL * 132)
    rivals = [part("a", 3, 20, "b"), part("b", 2, 30)]
    assert at_stake_us(best_plans(rivals, 9), rivals) == 50


@pytest.mark.parametrize(
    ("limit", "at_stake", "plans"),
    [
        (4, 0.0, 1),
        (4, 0.001, 2),
        (4, 0.02, 2),
        (4, 0.021, 3),
        (4, 0.06, 4),
        (4, math.inf, 4),
        (1, 0.5, 1),
        (9, 0.06, 4),
        (99, 9, 51),
    ],
)
def test_more_plans_are_timed_where_more_is_at_stake(limit: int, at_stake: float, plans: int) -> None:
    assert plans_to_time(limit, at_stake) == plans


@pytest.mark.parametrize("limit", range(1, 10))
def test_at_least_a_third_of_the_limit_is_optunas(limit: int) -> None:
    study = PlanStudy(DECODE, STEP_US, limit, told_apart_us=TOLD_APART_US)
    first = study.first()
    assert 1 <= len(first) <= max(1, limit - math.ceil(limit / 3))
    proposed = list(first)
    while more := study.next():
        assert len(more) <= math.ceil(limit / 2)
        proposed += more
    assert len(proposed) == limit
    assert {plan.origin for plan in first} == {"sum"}
    assert {plan.origin for plan in proposed[len(first) :]} == ({"optuna"} if limit > 1 else set())
    pairs = itertools.combinations(proposed, 2)
    assert all(differing_us(a, b, DECODE) > TOLD_APART_US for a, b in pairs), "each could be told from all others"


@pytest.mark.parametrize("seed", range(4))
def test_optuna_proposes_where_the_sums_were_confirmed(seed: int) -> None:
    """In the setting of llama.yaml: four plans, half of them Optuna's; and what won by the sums stays."""
    best, timed = search(DECODE, lambda plan: plan.saved_us, 4, seed)
    assert [plan.origin for plan in timed] == ["sum", "sum", "optuna", "optuna"]
    assert best == timed[0]
    assert any(plan.configs for plan in timed), "configs are proposed with the plan"


@pytest.mark.parametrize("seed", range(4))
def test_a_config_that_is_better_in_the_model_alone_is_found(seed: int) -> None:
    """By the sum, the second config of swiglu costs a microsecond; in the model it saves seven."""
    best, timed = search(DECODE, planted(8, swiglu="second"), 4, seed)
    assert dict(best.configs)["swiglu"] == "second"
    assert best.origin == "optuna"
    assert len(timed) == 4
    alone, _ = search([*map(without_runners_up, DECODE)], planted(8, swiglu="second"), 4, seed)
    assert alone.configs == ()


def without_runners_up(one: Part) -> Part:
    return Part(key=one.key, saved_us=one.saved_us, rivals=one.rivals, stock_us=one.stock_us, own_us=one.own_us)


@pytest.mark.parametrize("seed", range(4))
def test_two_configs_that_need_each_other_are_found_with_more_trials(seed: int) -> None:
    parts = [part("qkv", 7, 260, second=6.5), part("down", 8, 240, second=7.5), part("o", 3, 60)]
    best, _ = search(parts, planted(9, qkv="second", down="second"), 4, seed)
    assert dict(best.configs) == {"qkv": "second", "down": "second"}


def test_where_nothing_excludes_anything_the_largest_part_is_tried_first() -> None:
    parts = [part("down", 8, 440, second=7.9), part("o", 3, 60, second=2.9), part("norm", 1, 10, second=0.9)]
    study = PlanStudy(parts, STEP_US, 2, told_apart_us=TOLD_APART_US)
    assert len(study.first()) == 1
    (plan,) = study.next()
    assert dict(plan.configs)["down"] == "second"
    small = PlanStudy(parts[1:2] + parts[2:], STEP_US, 2, told_apart_us=4)
    assert len(small.first()) == 1
    assert small.next() == [], "nobody could tell"


def test_a_round_is_half_of_the_limit_so_that_the_next_one_knows_more() -> None:
    study = PlanStudy([part(key, 8, 240, second=7.5, third=7) for key in "abcd"], STEP_US, 6, told_apart_us=TOLD_APART_US)
    assert [len(study.first()), len(study.next()), len(study.next()), len(study.next())] == [1, 3, 2, 0]


def test_what_cannot_be_better_is_not_proposed() -> None:
    """The other config of a kernel of 60 us would have to be a quarter faster in the model than alone."""
    study = PlanStudy([part("o", 20, 80, second=5)], STEP_US, 4, told_apart_us=1)
    assert len(study.first()) == 1
    assert study.next() == []


@pytest.mark.parametrize("truth", [lambda plan: plan.saved_us, planted(8, swiglu="second"), planted(9, down="third")])
def test_the_same_seed_proposes_the_same(truth: Callable[[Plan], float]) -> None:
    runs = [[(plan.keys, plan.configs) for plan in search(DECODE, truth, 6, seed)[1]] for seed in (0, 0, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert any(run != runs[0] for run in runs[2:]), "the seed matters"


def test_what_is_measured_corrects_plans_with_the_same_parts_and_configs() -> None:
    beliefs = Beliefs(DECODE, STEP_US, 1)
    best = best_plans(DECODE, 1)[0]
    swapped, other = with_config(best, "swiglu", "second", DECODE), with_config(best, "down", "second", DECODE)
    both = with_config(swapped, "down", "second", DECODE)
    before = {plan: beliefs.gain_us(plan, best) for plan in (swapped, other, both)}
    assert [mean for mean, _ in before.values()] == [-1, -0.5, -1.5]
    assert before[swapped][1] == pytest.approx(WITHIN_MODEL / 2 * 240)
    assert before[both][1] == pytest.approx(math.hypot(before[swapped][1], before[other][1]))
    beliefs.tell(swapped, best, 7)
    assert beliefs.gain_us(swapped, best)[0] == pytest.approx(7, abs=0.3)
    assert beliefs.gain_us(swapped, best)[1] == pytest.approx(1, abs=0.05), "the measurement's own noise is left"
    assert beliefs.gain_us(both, best)[0] == pytest.approx(6.5, abs=0.3)
    assert beliefs.gain_us(both, best)[1] == pytest.approx(before[other][1], rel=0.06)
    assert beliefs.gain_us(other, best) == pytest.approx(before[other])
    expecting = beliefs.expecting(other, best)
    assert expecting.gain_us(other, best)[0] == pytest.approx(-0.5)
    assert expecting.gain_us(other, best)[1] < 0.5 * before[other][1]
    assert beliefs.gain_us(other, best) == pytest.approx(before[other]), "the original knows nothing of it"


def test_noise_is_not_believed() -> None:
    best = best_plans(DECODE, 1)[0]
    swapped = with_config(best, "o", "second", DECODE)
    exact, vague = (Beliefs(DECODE, STEP_US, 0.01) for _ in range(2))
    exact.tell(swapped, best, 5)
    vague.tell(swapped, best, 5, noise_us=20)
    assert exact.gain_us(swapped, best)[0] == pytest.approx(5, abs=0.1)
    assert vague.gain_us(swapped, best)[0] == pytest.approx(-0.2, abs=0.1)


@pytest.mark.parametrize(
    ("gain", "deviation", "expected"), [(2, 0, 2), (-2, 0, 0), (0, 1, 0.3989), (1, 1, 1.0833), (-1, 1, 0.0833)]
)
def test_expected_improvement(gain: float, deviation: float, expected: float) -> None:
    assert improvement_us(gain, deviation) == pytest.approx(expected, abs=1e-4)


def test_plans_are_read_back_from_the_studys_choices() -> None:
    """Every choice of the study leads to a plan, and every plan is told with the choices that lead to it."""
    study = PlanStudy(DECODE, STEP_US, 4)
    plans = best_plans(DECODE, 8)
    plans += [with_config(plan, one.key, config, DECODE) for plan in plans for one in DECODE for config in one.runners_up]
    for plan in plans:
        params: Mapping[str, str] = study._params(plan)
        assert study._asked(params) == plan
