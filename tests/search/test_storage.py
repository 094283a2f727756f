"""Studies in a real PostgreSQL, as an experiment's `storage` may ask for."""

from __future__ import annotations

import pytest

from autokernel.records import Check, Evaluation, Measurement, Problem, Status, TensorSpec, Verdict
from autokernel.search.seeds import SeedContext, stock_seeds
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space
from autokernel.search.tuner import Proposal, Tuner
from autokernel.tracking.mlflow_env import with_driver

PROBLEM = Problem(
    op="mm",
    device="cpu",
    inputs=(TensorSpec.contiguous((8, 256), "bfloat16"), TensorSpec(shape=(256, 512), dtype="bfloat16", stride=(1, 256))),
    constants=(1,),
)
NAMES = names_for(
    {"m": 8, "n": 512, "k": 256, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0},
    DeviceFacts(device="cpu", threads=2),
)


def open_tuner(storage: str) -> Tuner:
    spaces = load_space("mm")
    tuner = Tuner(problem=PROBLEM, spaces=spaces, names=NAMES, storage=with_driver(storage), study_name="s", max_trials=12)
    tuner.enqueue(stock_seeds(SeedContext(problem=PROBLEM, spaces=spaces, names=NAMES)))
    return tuner


def tell(tuner: Tuner, proposal: Proposal) -> None:
    evaluation = Evaluation(
        candidate=proposal.candidate,
        status=Status.OK,
        verdict=Verdict(checks=(Check(name="none", value=0, limit=1, passed=True),)),
        measurement=Measurement(median_us=10 + proposal.number, spread_us=1, num_samples=5, regime="none"),
    )
    tuner.tell(proposal.number, evaluation)


def test_a_study_in_postgresql_is_resumed_by_another_process(postgresql: str) -> None:
    first = open_tuner(postgresql)
    seen = [first.ask(1)[0] for _ in range(1)]
    for _ in range(5):
        tell(first, seen[-1])
        seen += first.ask(1)
    first.close()
    second = open_tuner(postgresql)
    assert second.num_finished == 5
    rest = []
    while proposals := second.ask(2):
        for proposal in proposals:
            tell(second, proposal)
            rest.append(proposal.candidate.id)
    assert len(rest) == 7
    assert not {p.candidate.id for p in seen[:5]} & set(rest)
    best = second.best()
    assert best is not None
    assert best.median_us == pytest.approx(10)
    second.close()
