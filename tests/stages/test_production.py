"""What is exported, and what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pretended_run import Listener, context_of

from autokernel.errors import AutokernelError
from autokernel.events import EvalResult, Exported, ModelValidated, ScenarioResult
from autokernel.export.bundle import read_bundle
from autokernel.records import Check, Speedup, Verdict
from autokernel.stages.production import export_bundle, make_bundle

FINE = ModelValidated(
    verdict=Verdict(checks=(Check(name="max error", value=1, limit=2, passed=True),)),
    evals=(
        EvalResult(metric="loss", stock=1, bundle=1, worse_by=0, worse_by_high=0, limit=1, passed=True, num_samples=9),
    ),
    scenarios=(
        ScenarioResult(
            scenario="one", modes=(), best_stock="default", speedup=Speedup(ratio=1, low=1, high=1, num_rounds=9), passed=True
        ),
    ),
)  # fmt: skip
FAILED = {
    "max error": replace(FINE, verdict=Verdict(checks=(Check(name="max error", value=3, limit=2, passed=False),))),
    "loss": replace(FINE, evals=(replace(FINE.evals[0], passed=False),)),
    "the time of one": replace(FINE, scenarios=(replace(FINE.scenarios[0], passed=False),)),
    "nothing was checked": replace(FINE, verdict=Verdict(checks=())),
}


@pytest.mark.parametrize("what", FAILED)
def test_what_failed_validation_is_not_exported(what: str, tmp_path: Path) -> None:
    listener = Listener()
    context = context_of(None, "cpu", listener)
    context.folder = tmp_path
    options = make_bundle(context, (), {"combo_kernels": True})
    with pytest.raises(AutokernelError, match=f"failed validation is not exported: {what}$"):
        export_bundle(context, options, FAILED[what])
    assert not list(tmp_path.iterdir())
    stock = make_bundle(context, (), {})
    for bundle, validated in ((options, FINE), (stock, FAILED[what])):
        export_bundle(context, bundle, validated)
        assert read_bundle(tmp_path / "bundle").graph_options == bundle.graph_options
    assert [event.stock for event in listener.events if isinstance(event, Exported)] == [False, True]
