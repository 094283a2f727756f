"""What is said, and written, of a metric that no relative limit can measure: stock's is 0, the bundle's is not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from autokernel.display.tables import eval_table
from autokernel.events import EvalResult, ModelValidated
from autokernel.records import Verdict
from autokernel.stages.model import Quality
from autokernel.tracking.journal import JOURNAL_NAME, Journal, read_journal


def result_of(worse_by: float, high: float) -> EvalResult:
    return EvalResult(
        metric="errors",
        stock=0,
        bundle=0.25,
        worse_by=worse_by,
        worse_by_high=high,
        limit=0.01,
        passed=high <= 0.01,
        num_samples=8,
    )


def test_the_reason_is_plain() -> None:
    quality = Quality(verdict=Verdict(checks=()), evals=(result_of(math.inf, math.inf),))
    assert not quality.passed
    assert quality.why_not == (
        "errors is 0.25 with the bundle and 0 with stock code: at the bad end of the interval infinitely worse, limit 0.01"
    )
    assert Quality(verdict=Verdict(checks=()), evals=(result_of(0.5, 0.75),)).why_not == "errors is worse by 0.75, limit 0.01"


@pytest.mark.parametrize("worse", [math.inf, -math.inf])
def test_the_journal_holds_it_as_valid_json(tmp_path: Path, worse: float) -> None:
    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    validated = ModelValidated(
        verdict=Verdict(checks=()), evals=(result_of(worse, worse),), scenarios=(), dropped={}, applied_digest="d"
    )
    journal = Journal(tmp_path)
    journal.record(validated)
    journal.close()
    (line,) = (tmp_path / JOURNAL_NAME).read_text().splitlines()
    assert json.loads(line, parse_constant=refused)["evals"][0]["worse_by"] == str(worse)
    assert read_journal(tmp_path) == [validated]
    shown = eval_table(validated)
    assert [next(iter(column.cells)) for column in shown.columns][3:5] == [f"{worse:+.3%}"] * 2
