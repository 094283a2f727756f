"""What max-autotune makes of a product on a GPU takes part in its confirmation, and its pick can be the entry."""

from __future__ import annotations

import pytest
import torch

from autokernel.backends.max_autotune import max_autotune_of
from autokernel.evaluate.confirm import Confirmation, ConfirmCandidates
from autokernel.records import Candidate, Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

if torch.cuda.is_available():
    from gpu.cuda_problems import TILE, merged_problem, mm_problem


def confirmed(problem: Problem, *finalists: Candidate) -> Confirmation:
    torch.compiler.reset()
    config = {"prepack": False, "merge": "none"} if problem.op == "merged_mm" else {"prepack": False}
    stock = Candidate(problem=problem, backend="aten", config=config)
    job = ConfirmCandidates(
        problem=problem, finalists=finalists, baselines=(stock,), rounds=15, max_copies=8, max_autotune=True, pick_may_win=True
    )
    return job()


@pytest.mark.parametrize("m", [16, 256])
def test_a_products_pick_is_raced(m: int) -> None:
    problem = mm_problem(m=m, n=1024, k=2048)
    finalist = Candidate(problem=problem, backend="inductor", config=TILE)
    result = confirmed(problem, finalist)
    assert [(f.candidate.label, f.message) for f in result.failures] == []
    assert result.max_autotune is not None
    assert result.max_autotune.candidate == max_autotune_of(problem)
    assert result.picked.startswith(("aten ", "inductor "))
    raced = {contender.candidate for contender in result.finalists}
    assert finalist in raced
    assert result.comparison is not None
    over = result.comparison.faster(finalist.id, max_autotune_of(problem).id)
    assert over.low <= over.ratio <= over.high
    if result.picked.startswith("inductor "):
        names = result.picked.split(", ")  # copies of the weight may have picks of their own: nearly equal ones
        picks = [candidate for candidate in raced if candidate.label in names]
        assert picks, f"{result.picked} is none of {sorted(candidate.label for candidate in raced)}"
        same = [result.comparison.faster(pick.id, max_autotune_of(problem).id).ratio for pick in picks]
        assert all(0.9 < ratio < 1.1 for ratio in same), "an entry with the pick's config is the pick"


def test_one_row_is_a_reduction_that_coordinate_descent_has_tuned() -> None:
    problem = mm_problem(m=1, n=4096, k=14336)
    result = confirmed(problem, Candidate(problem=problem, backend="inductor", config=TILE))
    assert [(f.candidate.label, f.message) for f in result.failures] == []
    assert result.picked == "reduction"
    assert [dict(c.candidate.config) for c in result.finalists] == [TILE, {"template": "reduction"}]
    assert result.max_autotune is not None


def test_merged_products_meet_the_picks_of_each() -> None:
    problem = merged_problem(m=16)
    merged = Candidate(problem=problem, backend="inductor", config={**TILE, "merge": "concat"})
    result = confirmed(problem, merged)
    assert [(f.candidate.label, f.message) for f in result.failures] == []
    assert result.max_autotune is not None
    assert [c.candidate for c in result.finalists] == [merged]
