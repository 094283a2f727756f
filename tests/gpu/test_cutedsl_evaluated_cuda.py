"""CuTe DSL candidates of every op, dtype and source, evaluated on the card as a search does it: by the error budget."""

from __future__ import annotations

import pytest
import torch
from gpu.cute_cases import EVALUATED, NEVER, NEW_IN_CUBLAS, product

from autokernel.cutedsl.compiler import unavailable
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.evaluate.probes import make_inputs
from autokernel.ops import get_op
from autokernel.records import Candidate, Status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("AUTOKERNEL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cute-cache"))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", EVALUATED)
def test_candidates_are_evaluated(name: str) -> None:
    problem, config = EVALUATED[name]
    if name in NEW_IN_CUBLAS:
        try:
            get_op(problem.op).reference(problem, *make_inputs(problem, 0))
        except (RuntimeError, ValueError) as error:
            pytest.skip(f"torch has nothing to compare with: {error}")
    candidate = Candidate(problem=problem, backend="cutedsl", config=config)
    evaluation = EvaluateCandidate(candidate=candidate, seed=1)()
    assert evaluation.status is Status.OK, evaluation.message + evaluation.log_tail
    assert evaluation.verdict is not None
    assert len(evaluation.verdict.checks) > 4, "checked by several draws"
    assert evaluation.deterministic


@pytest.mark.parametrize(("op", "left", "right"), NEVER)
def test_what_is_left_out_is_what_torch_does_not_compute(op: str, left: str, right: str) -> None:
    problem = product(op, left, right)
    with pytest.raises((RuntimeError, ValueError), match=r"not implemented|not supported|Expected"):
        get_op(op).reference(problem, *make_inputs(problem, 0))
