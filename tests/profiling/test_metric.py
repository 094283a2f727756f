"""The quickstart model's own metric, and metrics of other kinds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.errors import ConfigError, WorkloadError
from autokernel.profiling.corpus import read_text
from autokernel.profiling.language import Prefill
from autokernel.profiling.metric import load_metric

CHECKPOINT = str(Path(__file__).parents[2] / "experiments" / "models" / "tiny_llama")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """write(eval section) -> an experiment on the quickstart's checkpoint, in a folder with text and parts.py."""
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("aaaa")
    (tmp_path / "folder" / "b.txt").write_text("bbbb")
    (tmp_path / "parts.py").write_text(
        "def score(forward, scale=1):\n    return [scale * forward(i) for i in range(3)]\n"
        "def nothing(forward):\n    return []\n"
        "def placed(forward, device):\n    return [float(device == 'cpu')]\n"
        "def number(forward):\n    return 3\n"
        "def text():\n    return 'no bytes'\n"
    )

    def make(**section: Any) -> LoadedExperiment:
        data = {
            "name": "x",
            "model": {"checkpoint": CHECKPOINT},
            "scenarios": {"p": {"kind": "prefill", "batch": 2, "length": 64}},
            "validation": {"eval": section},
        }
        path = tmp_path / "x.yaml"
        path.write_text(json.dumps(data))
        return load_experiment(path)

    return make


@pytest.mark.slow
def test_the_quickstart_model_has_learnt_the_standard_library(loaded: LoadedExperiment, model: nn.Module) -> None:
    metric = load_metric(loaded, model, "cpu")
    assert (metric.batch, metric.length) == (1, 512)
    samples = metric(Prefill(model))
    assert len(samples) == 128
    assert 0.95 < metric.summary(samples) < 1.2


def test_windows_of_a_call_fill_a_prefill_scenario(write: Any, model: nn.Module) -> None:
    metric = load_metric(write(data="text.txt", length=32, max_bytes=1000), model, "cpu")
    seen: list[tuple[int, ...]] = []

    def forward(ids: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return torch.zeros(*ids.shape, 256)

    samples = metric(forward)
    assert set(seen) == {(4, 32)}
    assert len(samples) == 28  # 31 windows, in calls of four
    assert samples == pytest.approx([8.0] * 28)  # knowing nothing of a byte costs eight bits


def test_perplexity_is_the_exponential_of_the_loss(write: Any, model: nn.Module) -> None:
    metric = load_metric(write(metric="perplexity", data="text.txt", length=32, max_bytes=1000), model, "cpu")
    samples = metric(lambda ids: torch.zeros(*ids.shape, 256))
    assert samples == pytest.approx([math.log(256)] * 28)
    assert metric.summary(samples) == pytest.approx(256)


def test_a_metric_of_ones_own(write: Any, model: nn.Module) -> None:
    metric = load_metric(write(metric="parts.py:score", arguments={"scale": 2}, higher_is_better=True), model, "cpu")
    assert metric(lambda i: i + 1) == [2.0, 4.0, 6.0]
    assert metric.summary([2.0, 4.0, 6.0]) == 4.0
    assert metric.higher_is_better


def test_a_metric_that_asks_for_the_device_is_told(write: Any, model: nn.Module) -> None:
    assert load_metric(write(metric="parts.py:placed"), model, "cpu")(lambda: None) == [1.0]
    assert load_metric(write(metric="parts.py:placed", arguments={"device": "other"}), model, "cpu")(lambda: None) == [0.0]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metric": "parts.py:nothing"}, "returned no samples"),
        ({"metric": "parts.py:number"}, "must return a list of numbers, not int"),
        ({"metric": "parts.py:lost"}, "has no function or class 'lost'"),
        ({"data": "text.txt", "length": 64, "max_bytes": 100}, "100 tokens of text are less than 2 windows of 64"),
        ({"data": "parts.py:text"}, "returned str; it must return bytes"),
    ],
)
def test_a_metric_that_cannot_be_measured_says_why(write: Any, model: nn.Module, section: Any, message: str) -> None:
    loaded = write(**section)
    with pytest.raises((ConfigError, WorkloadError), match=message):
        load_metric(loaded, model, "cpu")(lambda ids: None)


def test_text_is_taken_evenly_from_all_over(write: Any) -> None:
    assert read_text(write(data="folder")) == b"aaaabbbb"
    whole = read_text(write(data="text.txt", max_bytes=1 << 20))
    assert len(whole) == 400 * 27
    part = read_text(write(data="text.txt", max_bytes=8192, length=4096))
    assert len(part) == 8192
    assert part[:4096] == whole[:4096]
    assert part[4096:] == whole[5400 : 5400 + 4096]


def test_a_vocabulary_that_is_not_bytes_needs_a_tokenizer(write: Any) -> None:
    from autokernel.profiling.corpus import load_corpus

    class Config:
        vocab_size = 1000

        def get_text_config(self) -> Config:
            return self

    with pytest.raises(ConfigError, match="tiny_llama holds no tokenizer"):
        load_corpus(write(data="text.txt"), Config())
