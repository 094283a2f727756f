"""Which stage rehearses which scenarios of max-autotune, and on what."""

from __future__ import annotations

from typing import Any

import pytest
from pretended_run import context_of

from autokernel.events import ScenarioTimed
from autokernel.stages.context import RunContext
from autokernel.stages.rehearsal import rehearsals
from autokernel.tracking.state import RunState
from autokernel.workers.pool import InlinePool

SCENARIOS = ["decode-b1", "decode-b16", "decode-b64", "decode-b128", "prefill-1x2048", "prefill-4x2048"]


def run(device: str = "cuda", *overrides: str) -> RunContext:
    return context_of(InlinePool(), device, overrides=overrides)


def names(context: RunContext, stage: str) -> list[str]:
    return [scenario for _, scenario, _ in rehearsals(context, stage)]


def test_stages_share_the_scenarios() -> None:
    context = run()
    assert names(context, "profile") == []
    assert names(context, "plan") == SCENARIOS[:2]
    assert names(context, "plan") == [], "a second round has none"
    assert names(context, "graph") == SCENARIOS[2:4]
    assert names(context, "validate") == SCENARIOS[4:]


def test_what_a_stage_did_not_run_the_next_ones_do() -> None:
    context = run()
    assert names(context, "graph") == SCENARIOS[:3]
    assert names(context, "validate") == SCENARIOS[3:]
    assert names(run(), "validate") == SCENARIOS


def test_stages_that_are_off_have_no_share() -> None:
    context = run("cuda", "graph.enabled=false")
    assert names(context, "graph") == []
    assert names(context, "plan") == SCENARIOS[:3]
    assert names(context, "validate") == SCENARIOS[3:]


def test_a_resumed_run_leaves_out_what_it_has_timed() -> None:
    context = run()
    started: Any = None
    context.state = RunState(
        started=started, profiled=None, planned=None, evaluated={}, confirmed={}, graph_trials=(), validated=None,
        exported=None, proved=None, finished=None, stages_done=frozenset({"plan", "graph"}), num_trials=0,
        timed=tuple(ScenarioTimed(scenario=name, applied_digest="d", result=None, timing={}) for name in SCENARIOS[:4]),
    )  # fmt: skip
    assert names(context, "validate") == SCENARIOS[4:]


def test_they_load_few_layers() -> None:
    jobs: list[Any] = [job for _, _, job in rehearsals(run(), "plan")]
    assert [job.scenario for job in jobs] == SCENARIOS[:2]
    assert all(job.loaded.experiment.model.config_overrides == {"num_hidden_layers": 4} for job in jobs)


@pytest.mark.parametrize(
    "context",
    [
        run("cpu"),
        run("cuda", "validation.baselines=[eager, default]"),
        run("cuda", "validation.ablation_layers=null"),
    ],
    ids=["cpu", "no such baseline", "no few layers"],
)
def test_there_is_nothing_to_rehearse(context: RunContext) -> None:
    assert [names(context, stage) for stage in ("plan", "graph", "validate")] == [[], [], []]
    assert context.rehearsed == {}
