"""Profiles of a part of a model's layers, captured for real."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.environment import Environment
from autokernel.evaluate.roofline import Ceilings
from autokernel.profiling.hotspots import rank
from autokernel.stages.context import RunContext
from autokernel.stages.profile import ProfileScenario, _complete
from autokernel.workers.pool import InlinePool

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "num_hidden_layers": 5,
}


pytestmark = pytest.mark.usefixtures("own_threads")


def experiment(folder: Path, **config: object) -> LoadedExperiment:
    path = folder / "e.yaml"
    model = {"config": {**CONFIG, **config}, "dtype": "float32"}
    scenarios = {"decode": {"kind": "decode", "batch": 1, "context": 8}}
    path.write_text(yaml.safe_dump({"name": "e", "device": "cpu", "model": model, "scenarios": scenarios}))
    return load_experiment(path)


def calls(loaded: LoadedExperiment, layers: int | None) -> dict[str, int] | None:
    found = ProfileScenario(loaded=loaded, scenario="decode", device="cpu", threads=1, seed=0, layers=layers)()
    if found is None:
        return None
    ceilings = Ceilings(device="cpu", threads=1, read_gb_per_s=100, tflops={"float32": 1.0})
    return {hotspot.problem.key: hotspot.num_calls for hotspot in rank([found], ceilings)}


@pytest.mark.slow
def test_a_part_of_the_layers_tells_the_calls_of_all(tmp_path: Path) -> None:
    loaded = experiment(tmp_path)
    whole = calls(loaded, None)
    assert whole is not None
    assert sum(whole.values()) > 5 * 10
    assert calls(loaded, 2) == whole


STACK = """
import torch


class Stack(torch.nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(depth))
        self.last = torch.nn.Linear(32, 8)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.last(x)
"""


@pytest.mark.slow
def test_of_any_class_whose_file_says_what_counts_its_layers(tmp_path: Path) -> None:
    (tmp_path / "stack.py").write_text(STACK)
    model = {"class_path": "stack.py:Stack", "arguments": {"depth": 7}, "depth_key": "depth", "dtype": "float32"}
    scenarios = {"decode": {"kind": "call", "inputs": {"x": {"shape": ["batch", 32]}}, "batch": 4}}
    path = tmp_path / "stack.yaml"
    path.write_text(yaml.safe_dump({"name": "stack", "device": "cpu", "model": model, "scenarios": scenarios}))
    loaded = load_experiment(path)
    whole = calls(loaded, None)
    assert whole is not None
    assert sorted(set(whole.values())) == [1, 7]
    captured = ProfileScenario(loaded=loaded, scenario="decode", device="cpu", threads=1, seed=0, layers=4)()
    assert captured is not None
    assert sum("32x32" in site.problem.key for site in captured.sites) == 4, "of four layers"
    assert calls(loaded, 4) == whole


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [7, 8])
def test_layers_that_take_turns_tell_those_of_all(tmp_path: Path, num_layers: int) -> None:
    """Two of three have a window, and another problem of attention, then one sees all tokens."""
    kinds = {"model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 3, "head_dim": 32}
    loaded = experiment(tmp_path, **kinds, num_hidden_layers=num_layers)
    whole = calls(loaded, None)
    assert whole is not None
    attention = [count for key, count in whole.items() if " attention(" in key]
    assert sorted(attention) == [2, num_layers - 2]
    assert calls(loaded, 5) == whole


@pytest.mark.parametrize("model", ["gemma3_text", "jamba"])
def test_layers_that_a_config_calls_different_are_not_reckoned_from_the_first(tmp_path: Path, model: str) -> None:
    """The first four are alike, and a later one is not."""
    assert calls(experiment(tmp_path, model_type=model, num_hidden_layers=8), 4) is None


@pytest.mark.slow
def test_where_a_part_does_not_tell_all_layers_are_captured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = Environment(device="cpu", device_name="A CPU", isa="AVX2", num_units=1, torch="2.13.0")
    context = RunContext(
        loaded=experiment(tmp_path), folder=tmp_path, run_id="r", device="cpu", threads=1,
        environment=environment, pool=InlinePool(), recorders=[],
    )  # fmt: skip
    (found,) = _complete(context, {"decode": None})
    assert sum(site.problem.op == "attention" for site in found.sites) == 5
    assert "decode: layers differ in kind" in caplog.text
    assert _complete(context, {"decode": found}) == [found]
