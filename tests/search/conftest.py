"""Problems, devices and evaluations for the tests of search."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autokernel.records import Candidate, Check, Evaluation, Measurement, Status, Verdict

Evaluate = Callable[..., Evaluation]


@pytest.fixture
def evaluate() -> Evaluate:
    """(candidate, median_us or a Status) -> Evaluation."""

    def make(candidate: Candidate, result: float | Status) -> Evaluation:
        if isinstance(result, Status):
            return Evaluation(candidate=candidate, status=result, message="because")
        return Evaluation(
            candidate=candidate,
            status=Status.OK,
            verdict=Verdict(checks=(Check(name="error", value=0, limit=1, passed=True),)),
            measurement=Measurement(median_us=result, spread_us=0.1, num_samples=5, regime="test"),
        )

    return make
