"""A language model with windows and with tokens for results, in a fresh process with a bundle for what its layers have."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from small_experiments import SMALL

from autokernel.config import load_experiment
from autokernel.environment import current_environment
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.prove import Prove
from autokernel.records import Problem, TensorSpec

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "gemma.yaml"
LAYERS, THREADS = 3, 1


def gate(scenario: str, batch: int, length: int) -> Entry:
    specs = (TensorSpec.contiguous((batch, length, 160), "bfloat16"),) * 2
    problem = Problem(op="gated", inputs=specs, device="cpu", scalars=(("activation", "gelu_tanh"),))
    return Entry(problem=problem, backend="inductor", config={"implementation": "by_sigmoid"}, scenario=scenario)


@pytest.mark.slow
@pytest.mark.clock
def test_a_fresh_process_hits_every_gate_and_gets_the_tokens_of_eager() -> None:
    overrides = ("device=cpu", "backends=[aten, inductor]", *SMALL["gemma"])
    loaded = load_experiment(EXPERIMENT, (*overrides, f"model.config_overrides.num_hidden_layers={LAYERS}"))
    entries = gate("decode-b1", 1, 1), gate("decode-b16", 16, 1), gate("prefill-1x2048", 1, 64)
    environment = current_environment("cpu", THREADS)
    bundle = Bundle(name="gates", created="", version="", environment=environment, entries=entries)
    proof = Prove(
        loaded=loaded,
        scenarios=tuple(str(entry.scenario) for entry in entries),
        device="cpu",
        threads=THREADS,
        bundle=bundle,
        compare="decode-b1",
        max_compile_ratio=math.inf,
    )()
    assert [proof.hits[entry.key] for entry in entries] == [LAYERS] * 3
    assert [(scenario.scenario, scenario.problem) for scenario in proof.scenarios] == [
        ("decode-b1", ""), ("decode-b16", ""), ("prefill-1x2048", ""),
    ]  # fmt: skip
    assert (proof.num_benchmarks, proof.modules) == (0, ())
