"""The fresh process: which scenarios it compiles, what it finds wrong, and what a run makes of that."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.environment import current_environment
from autokernel.errors import JobCrashed
from autokernel.evaluate.outputs import Trio, compare_outputs
from autokernel.events import ModelValidated
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.proof import Proof, ScenarioProof, together
from autokernel.export.prove import BUNDLE, DEFAULT, Prove
from autokernel.profiling.language import likeliest
from autokernel.records import Problem, Speedup, TensorSpec
from autokernel.stages.production import _shares, _verdict, difference_limits

pytestmark = pytest.mark.clock

K, HIDDEN = 64, 96
THREADS = 2

MODEL = f"""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear({K}, {HIDDEN}, bias=False), nn.Linear({HIDDEN}, {K}, bias=False)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

def make_model():
    return Net()

def make_inputs(batch, seed, device, dtype):
    return (torch.randn(batch, {K}, generator=torch.Generator().manual_seed(seed)).to(device, dtype),)
"""
EXPERIMENT = """
name: small
model: {factory: "small.py:make_model", dtype: float32}
device: cpu
scenarios:
  four: {kind: call, inputs: "small.py:make_inputs", batch: 4}
  eight: {kind: call, inputs: "small.py:make_inputs", batch: 8}
"""


def up(m: int, scenario: str) -> Entry:
    x = TensorSpec.contiguous((m, K), "float32")
    weight = TensorSpec(shape=(K, HIDDEN), dtype="float32", stride=(1, K))
    problem = Problem(op="mm", inputs=(x, weight), device="cpu", constants=(1,))
    return Entry(problem=problem, backend="aten", config={"prepack": True}, scenario=scenario)


def bundle_of(*entries: Entry) -> Bundle:
    environment = current_environment("cpu", THREADS)
    return Bundle(name="small", created="", version="", environment=environment, entries=entries)


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedExperiment:
    (tmp_path / "small.py").write_text(MODEL)
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    return load_experiment(tmp_path / "small.yaml")


def test_one_fresh_process_compiles_every_scenario(loaded: LoadedExperiment) -> None:
    entries = up(4, "four"), up(8, "eight"), up(16, "eight")
    proof = Prove(
        loaded=loaded,
        scenarios=("four", "eight"),
        device="cpu",
        threads=THREADS,
        bundle=bundle_of(*entries),
        limits={"four": 1e-3, "eight": 1e-12},  # the second is beyond what float32 can keep
        compare="four",
        max_compile_ratio=math.inf,
    )()
    assert [scenario.scenario for scenario in proof.scenarios] == ["four", "eight"]
    assert [proof.hits[entry.key] for entry in entries] == [1, 1, 0]
    assert (proof.num_benchmarks, proof.modules) == (0, ())
    assert proof.constant_bytes == 2 * K * HIDDEN * 4
    assert proof.scenarios[0].problem == ""
    assert 0 <= proof.scenarios[0].difference < 1e-5
    assert proof.scenarios[1].difference == 0 or "the error budget allows 1e-12" in proof.scenarios[1].problem
    assert set(proof.compile_s) == set(proof.step_us) == {DEFAULT, BUNDLE}
    assert proof.speedup is not None
    proved = _verdict(proof, [entry.key for entry in entries])
    assert not proved.passed
    assert "1 entries were not hit" in proved.message
    assert proved.scenarios == ("four", "eight")


def test_a_process_that_fails_says_why(loaded: LoadedExperiment) -> None:
    (loaded.path.parent / "small.py").write_text(MODEL.replace("return Net()", "raise MemoryError('no room for the model')"))
    with pytest.raises(JobCrashed, match="no room for the model"):
        Prove(loaded=loaded, scenarios=("four",), device="cpu", threads=THREADS, bundle=None)()


def test_limits_come_from_what_validation_measured() -> None:
    """Names of checks are the link between the two."""

    def trio(name: str, error: float, num_outputs: int) -> Trio:
        def off(by: float) -> object:
            return lambda x: tuple(x * (1 + by) for _ in range(num_outputs)) if num_outputs > 1 else x * (1 + by)

        draws = [(torch.ones(8, 8),)]
        return Trio(name=name, contender=off(error), stock=off(1e-3), reference=off(0.0), draws=draws)  # type: ignore[arg-type]

    verdict = compare_outputs([trio("one", 0.0, 1), trio("two", 0.0, 2), trio("one-more", 0.5, 1)], 0.99)
    validated = ModelValidated(verdict=verdict, evals=(), scenarios=())
    limits = difference_limits(validated, ["one", "two", "unknown"])
    assert set(limits) == {"one", "two"}
    assert all(limit == pytest.approx(3e-3, rel=1e-2) for limit in limits.values())
    tokens = replace(trio("g", 0.0, 1), contender=likeliest, choose=likeliest)
    validated = ModelValidated(verdict=compare_outputs([tokens], 0.99), evals=(), scenarios=())
    assert difference_limits(validated, ["g"]) == {"g": pytest.approx(6e-3, rel=1e-2)}


def proof_with(**changes: object) -> Proof:
    good: dict[str, object] = {
        "scenarios": (ScenarioProof(scenario="s", compile_s=1.0, difference=0.0),),
        "num_benchmarks": 0,
        "hits": {"a": 2},
        "compile_s": {DEFAULT: 2.0, BUNDLE: 2.1},
        "step_us": {DEFAULT: 100.0, BUNDLE: 90.0},
        "speedup": Speedup(ratio=1.11, low=1.1, high=1.12, num_rounds=21),
    }
    return Proof(**(good | changes))  # type: ignore[arg-type]


def test_several_processes_are_judged_as_one() -> None:
    compared = proof_with(hits={"a": 2, "b": 0}, constant_bytes=10)
    other = Proof(
        scenarios=(ScenarioProof(scenario="t", compile_s=1.0, difference=0.5, problem="it is wrong"),),
        num_benchmarks=1,
        hits={"a": 0, "b": 1, "c": 0},
        reasons={"c": "its shape is another"},
        constant_bytes=5,
        modules=("optuna",),
    )
    proof = together([other, compared], ["s", "t"])
    assert [scenario.scenario for scenario in proof.scenarios] == ["s", "t"]
    assert (proof.hits, proof.reasons) == ({"a": 2, "b": 1, "c": 0}, other.reasons)
    assert (proof.num_benchmarks, proof.constant_bytes, proof.modules) == (1, 15, ("optuna",))
    assert (proof.compile_s, proof.step_us, proof.speedup) == (compared.compile_s, compared.step_us, compared.speedup)
    assert together([compared], ["s"]) == compared
    proved = _verdict(proof, ["a", "b", "c"])
    assert (proved.passed, proved.num_hits, proved.stock_compile_s) == (False, 2, 2.0)
    for told in ("its shape is another", "t: it is wrong", "benchmarked 1", "optuna"):
        assert told in proved.message


def test_scenarios_are_shared_among_few_processes() -> None:
    assert _shares(["a", "b", "c", "d", "e", "f"], "c") == [("c",), ("a", "e"), ("b", "f"), ("d",)]
    assert _shares(["a", "b"], "b") == [("b",), ("a",)]
    assert _shares(["a"], "a") == [("a",)]


def test_a_good_proof_passes() -> None:
    proved = _verdict(proof_with(), ["a"])
    assert proved.passed
    assert (proved.compile_s, proved.stock_compile_s, proved.num_hits) == (2.1, 2.0, 1)
    assert Proof.from_json(proof_with().to_json()) == proof_with()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hits": {"a": 0}, "reasons": {"a": "gradients are enabled"}},
            "1 entries were not hit, e.g. a: gradients are enabled",
        ),
        ({"num_benchmarks": 3}, "benchmarked 3 kernels"),
        ({"modules": ("ray",)}, "search stack was imported: ray"),
        ({"speedup": Speedup(ratio=0.9, low=0.8, high=0.95, num_rounds=21)}, "90 us a step, stock 100 us"),
        (
            {"scenarios": (ScenarioProof(scenario="s", compile_s=1.0, difference=2.0, problem="outputs differ"),)},
            "s: outputs differ",
        ),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, object], message: str) -> None:
    proved = _verdict(proof_with(**changes), ["a"])
    assert not proved.passed
    assert message in proved.message
