"""Which scenarios' stock modes are rehearsed, on what, and that validation then finds them compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pretended_run import LLAMA, context_of

from autokernel.events import ScenarioTimed
from autokernel.profiling.footprint import Footprint
from autokernel.stages.context import RunContext
from autokernel.stages.rehearsal import Rehearse, rehearse_beside
from autokernel.tracking.state import RunState
from autokernel.workers.pool import InlinePool

SCENARIOS = ["decode-b1", "decode-b16", "decode-b64", "decode-b128", "prefill-1x2048", "prefill-4x2048"]
WHOLE = {"decode-b1": 25, "decode-b16": 30, "decode-b64": 45, "decode-b128": 65, "prefill-1x2048": 26, "prefill-4x2048": 29}


def run(device: str = "cuda", *overrides: str) -> RunContext:
    context = context_of(InlinePool(), device, overrides=overrides)
    whole = Footprint(scenarios=WHOLE, device=140, copies=2, weights=16)
    part = Footprint(scenarios=dict.fromkeys(WHOLE, 9), device=140, copies=1, weights=4)
    context.footprints = {None: whole, 4: part}
    return context


def jobs(context: RunContext) -> dict[str, Any]:
    rehearse_beside(context)
    return {waiting.job.scenario: waiting.job for waiting in context.beside.waiting}  # type: ignore[attr-defined]


def test_all_scenarios_are_rehearsed_once() -> None:
    context = run()
    assert list(jobs(context)) == SCENARIOS
    assert [job.label for job in context.beside.waiting][:1] == ["rehearsal decode-b1"]
    context.beside.waiting.clear()
    assert jobs(context) == {}, "a second stage has none to start"


def test_what_fits_is_compiled_as_deep_as_it_is() -> None:
    context = run()
    found = jobs(context)
    assert [name for name, job in found.items() if job.whole is None] == ["decode-b128"]
    assert all(job.loaded.experiment.model.config_overrides == {"num_hidden_layers": 4} for job in found.values())
    assert found["decode-b1"].modes == ("default", "max-autotune")
    assert found["decode-b1"].whole is context.loaded
    assert found["decode-b128"].modes == ("max-autotune",), "what is compiled for few layers is not found for all"
    # 25, without 2 of copies and 12 of weights; two fifths of the room are 44
    assert [job.size for job in context.beside.waiting] == [11, 16, 31, 8, 12, 15]


def test_a_resumed_run_leaves_out_what_it_has_timed() -> None:
    context = run()
    started: Any = None
    context.state = RunState(
        started=started, profiled=None, planned=None, evaluated={}, confirmed={}, graph_trials=(), validated=None,
        exported=None, proved=None, finished=None, stages_done=frozenset({"plan", "graph"}), num_trials=0,
        timed=tuple(ScenarioTimed(scenario=name, applied_digest="d", result=None, timing={}) for name in SCENARIOS[:4]),
    )  # fmt: skip
    assert list(jobs(context)) == SCENARIOS[4:]


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
    assert jobs(context) == {}


def test_only_baselines_are_compiled() -> None:
    assert jobs(run("cuda", "validation.baselines=[max-autotune]"))["decode-b1"].modes == ("max-autotune",)


SMALL = """
import sys
from autokernel.config import load_experiment
from autokernel.evaluate.modes import Contender, build_program, prepare
from autokernel.evaluate.whole_model import model_job
from autokernel.profiling.workload import load_model
from autokernel.stages.rehearsal import Rehearse
from autokernel.stages.whole_model import with_layers

loaded = load_experiment(sys.argv[1], [
    "device=cpu", "backends=[aten]", "scenarios.decode-b1.context=32",
    "model.config_overrides={hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3, vocab_size: 128, head_dim: 32, "
    "num_attention_heads: 2, num_key_value_heads: 1, bos_token_id: 1, eos_token_id: 2}",
])
if sys.argv[2] == "rehearse":
    Rehearse(
        loaded=with_layers(loaded, 1), whole=loaded, scenario="decode-b1", modes=("default",), device="cpu", threads=1, seed=0
    )()
else:
    with model_job("cpu", 1) as turns:
        program = build_program(loaded, load_model(loaded, "cpu"), "decode-b1", "cpu", 3)
        print("seconds", prepare(Contender(name="default"), program, turns).compile_s)
"""


@pytest.mark.slow
def test_validation_finds_compiled_what_was_rehearsed(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def seconds(*arguments: str) -> float:
        command = [sys.executable, "-c", SMALL, str(LLAMA), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1]) if done.stdout else -1.0

    assert seconds("rehearse") == -1.0
    assert seconds("validate") == 0.0, "a graph with other guards, or of other weights, would be another one"
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "another")
    assert seconds("validate") > 0.0


def test_a_job_is_the_last_of_its_process_on_a_gpu() -> None:
    fields = {"whole": None, "scenario": "s", "modes": (), "threads": 1, "seed": 0}
    loaded = run().loaded
    assert Rehearse(loaded=loaded, device="cuda", **fields).ends_process, "it lowers its priority for good"  # type: ignore[arg-type]
    assert not Rehearse(loaded=loaded, device="cpu", **fields).ends_process  # type: ignore[arg-type]
