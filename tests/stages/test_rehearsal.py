"""Which stage rehearses which scenarios of max-autotune, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autokernel.config import load_experiment
from autokernel.environment import Environment
from autokernel.events import ScenarioTimed
from autokernel.stages.context import RunContext
from autokernel.stages.rehearsal import rehearsals
from autokernel.tracking.state import RunState
from autokernel.workers.pool import InlinePool

LLAMA = Path(__file__).parents[2] / "experiments" / "llama.yaml"
SCENARIOS = ["decode-b1", "decode-b16", "decode-b64", "decode-b128", "prefill-1x2048", "prefill-4x2048"]
ENVIRONMENT = Environment(device="cuda", device_name="A GPU", isa="sm_90", num_units=132, torch="2.11.0")


def context_of(device: str = "cuda", **overrides: str) -> RunContext:
    loaded = load_experiment(LLAMA, [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()])
    return RunContext(
        loaded=loaded, folder=Path("unused"), run_id="r", device=device, threads=2,
        environment=ENVIRONMENT, pool=InlinePool(), recorders=[],
    )  # fmt: skip


def names(context: RunContext, stage: str) -> list[str]:
    return [scenario for _, scenario, _ in rehearsals(context, stage)]


def test_stages_share_the_scenarios() -> None:
    context = context_of()
    assert names(context, "profile") == []
    assert names(context, "plan") == SCENARIOS[:2]
    assert names(context, "plan") == [], "a second round has none"
    assert names(context, "graph") == SCENARIOS[2:4]
    assert names(context, "validate") == SCENARIOS[4:]


def test_what_a_stage_did_not_run_the_next_ones_do() -> None:
    context = context_of()
    assert names(context, "graph") == SCENARIOS[:3]
    assert names(context, "validate") == SCENARIOS[3:]
    assert names(context_of(), "validate") == SCENARIOS


def test_stages_that_are_off_have_no_share() -> None:
    context = context_of(graph__enabled="false")
    assert names(context, "graph") == []
    assert names(context, "plan") == SCENARIOS[:3]
    assert names(context, "validate") == SCENARIOS[3:]


def test_a_resumed_run_leaves_out_what_it_has_timed() -> None:
    context = context_of()
    started: Any = None
    context.state = RunState(
        started=started, profiled=None, planned=None, evaluated={}, confirmed={}, graph_trials=(), validated=None,
        exported=None, proved=None, finished=None, stages_done=frozenset({"plan", "graph"}), num_trials=0,
        timed=tuple(ScenarioTimed(scenario=name, applied_digest="d", result=None, timing={}) for name in SCENARIOS[:4]),
    )  # fmt: skip
    assert names(context, "validate") == SCENARIOS[4:]


def test_they_load_few_layers() -> None:
    jobs: list[Any] = [job for _, _, job in rehearsals(context_of(), "plan")]
    assert [job.scenario for job in jobs] == SCENARIOS[:2]
    assert all(job.loaded.experiment.model.config_overrides == {"num_hidden_layers": 4} for job in jobs)


@pytest.mark.parametrize(
    "context",
    [
        context_of("cpu"),
        context_of(validation__baselines="[eager, default]"),
        context_of(validation__ablation_layers="null"),
    ],
    ids=["cpu", "no such baseline", "no few layers"],
)
def test_there_is_nothing_to_rehearse(context: RunContext) -> None:
    assert [names(context, stage) for stage in ("plan", "graph", "validate")] == [[], [], []]
    assert context.rehearsed == {}
