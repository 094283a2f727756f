"""Kinds of kernels whose first candidates are all refused: no more of them are proposed, and the others get the trials."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from autokernel.records import Candidate, ConfigValue, Evaluation, Problem, Status, TensorSpec
from autokernel.search.ledger import MAX_WRONG, Kind
from autokernel.search.seeds import Seed
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space
from autokernel.search.tuner import Tuner

Evaluate = Callable[..., Evaluation]
H200 = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232448, l2_bytes=60 << 20)
PROBLEM = Problem(
    op="mm",
    device="cuda",
    inputs=(TensorSpec.contiguous((37, 768), "bfloat16"), TensorSpec(shape=(768, 768), dtype="bfloat16", stride=(1, 768))),
    constants=(1,),
)
NAMES = names_for(
    {"m": 37, "n": 768, "k": 768, "batch": 1, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}, H200
)
WRONG_TEMPLATES = ("mm", "mm_persistent_tma")


def tuner(sampler: str = "model", **arguments: Any) -> Tuner:
    spaces = {"inductor": load_space("mm")["inductor"]}
    return Tuner(**{"problem": PROBLEM, "spaces": spaces, "names": NAMES, "sampler": sampler, "max_trials": 200, **arguments})


def ending(candidate: Candidate) -> float | Status:
    """As sums of fp32 end: one long chain of additions is not exact enough, parts of K are."""
    return Status.WRONG if candidate.config["template"] in WRONG_TEMPLATES else 10.0


def told(search: Tuner, evaluate: Evaluate, count: int, end: Callable[[Candidate], float | Status]) -> list[Evaluation]:
    done = []
    for _ in range(count):
        for proposal in search.ask(1):
            done.append(evaluate(proposal.candidate, end(proposal.candidate)))
            search.tell(proposal.number, done[-1])
    return done


@pytest.mark.parametrize("sampler", ["model", "tpe", "random"])
def test_templates_that_are_always_wrong_are_left(sampler: str, evaluate: Evaluate, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    done = told(tuner(sampler), evaluate, 40, ending)
    spent = Counter(evaluation.candidate.config["template"] for evaluation in done)
    assert all(spent[name] <= MAX_WRONG for name in WRONG_TEMPLATES)
    assert spent["decompose_k"] > 0
    said = [record.getMessage() for record in caplog.records if "no more are tried" in record.getMessage()]
    assert len(said) == sum(spent[name] == MAX_WRONG for name in WRONG_TEMPLATES) > 0
    for name in WRONG_TEMPLATES:
        named = [text for text in said if f"inductor template={name}: its first 5 candidates" in text]
        assert len(named) == (spent[name] == MAX_WRONG)


@pytest.mark.parametrize("sampler", ["model", "tpe"])
@pytest.mark.parametrize(("status", "limit"), [(Status.WRONG, 5), (Status.BUILD_ERROR, 15), (Status.INVALID, 15)])
def test_nothing_is_proposed_once_all_kinds_are_given_up(
    sampler: str, status: Status, limit: int, evaluate: Evaluate
) -> None:  # fmt: skip
    done = told(tuner(sampler), evaluate, 50, lambda _: status)
    spent = Counter(evaluation.candidate.config["template"] for evaluation in done)
    assert len(spent) == 3
    assert max(spent.values()) == limit


def test_seeds_of_a_kind_that_is_given_up_wait_until_one_is_right(evaluate: Evaluate) -> None:
    search = tuner()
    configs = [c for c in load_space("mm")["inductor"].bind(NAMES).enumerate() if c["template"] == "mm"][:9]
    candidates = [Candidate(problem=PROBLEM, backend="inductor", config=config) for config in configs]
    assert search.enqueue(Seed(candidate=candidate, origin="history") for candidate in candidates) == 9
    first = search.ask(6)
    for proposal in first[:5]:
        search.tell(proposal.number, evaluate(proposal.candidate, Status.WRONG))
    (other,) = search.ask(1)
    assert other.candidate.config["template"] != "mm"
    search.tell(first[5].number, evaluate(first[5].candidate, 10.0))
    assert [proposal.candidate for proposal in search.ask(3)] == candidates[6:]


@pytest.mark.parametrize("status", [Status.TIMEOUT, Status.CRASHED, Status.LOST])
def test_what_a_busy_machine_may_cause_counts_for_nothing(status: Status, evaluate: Evaluate) -> None:
    search = tuner()
    told(search, evaluate, 12, lambda _: status)
    assert search._ledger.given_up == frozenset()


def test_one_that_is_right_keeps_its_kind(evaluate: Evaluate) -> None:
    search = tuner()
    (first,) = told(search, evaluate, 1, lambda _: 10.0)
    kind = Kind.of("inductor", first.candidate.config)
    done = told(search, evaluate, 30, lambda c: Status.WRONG if Kind.of("inductor", c.config) == kind else 10.0)
    assert sum(Kind.of("inductor", e.candidate.config) == kind for e in done) > MAX_WRONG
    assert search._ledger.given_up == frozenset()


def test_a_resumed_search_gives_up_the_same_whatever_the_order(evaluate: Evaluate) -> None:
    search = tuner()
    done = told(search, evaluate, 12, ending)
    again, backwards = tuner(), tuner()
    again.warm_start(done)
    backwards.warm_start(reversed(done))
    assert again._ledger.given_up == backwards._ledger.given_up == search._ledger.given_up != frozenset()
    (next_one,), (expected,) = again.ask(1), search.ask(1)
    assert next_one.candidate == expected.candidate


def test_kinds_are_algorithms_and_not_tiles() -> None:
    config: dict[str, ConfigValue] = {
        "kernel": "generated_mm",
        "mode": "rows",
        "block_m": 64,
        "precision": "tf32x3",
        "num_warps": 4,
    }
    kind = Kind.of("triton", config)
    assert kind == Kind.of("triton", {**config, "block_m": 32, "num_warps": 8})
    assert kind != Kind.of("triton", {**config, "precision": "ieee"})
    assert kind.label == "triton kernel=generated_mm mode=rows precision=tf32x3"
