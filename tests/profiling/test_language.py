"""Steps of language models: exact twins to judge by, caches that repeat their rows, models with parts replaced."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autokernel.config import DecodeScenario, load_experiment
from autokernel.errors import WorkloadError
from autokernel.profiling.footprint import footprint
from autokernel.profiling.language import Decode, Prefill, raised
from autokernel.profiling.workload import build_scenario, empty_model, load_model

ROOT = Path(__file__).parents[2]
TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    path = tmp_path_factory.mktemp("tiny") / "x.yaml"
    scenarios = {"p": {"kind": "prefill", "length": 8}}
    path.write_text(json.dumps({"name": "x", "model": {"config": TINY}, "scenarios": scenarios, "device": "cpu"}))
    return load_model(load_experiment(path), "cpu")


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_raised_is_the_model_in_higher_precision(tiny: nn.Module) -> None:
    ids = tokens(2, 16)
    before = {name: (p, p._version) for name, p in tiny.named_parameters()}
    with torch.no_grad():
        expected = copy.deepcopy(tiny).float()(ids).logits
        with raised(tiny, torch.float32):
            logits = tiny(ids).logits
        plain = tiny(ids).logits
    assert torch.equal(logits, expected)
    assert plain.dtype == torch.bfloat16
    assert all(p is before[name][0] and p._version == before[name][1] for name, p in tiny.named_parameters())


def test_raised_puts_the_weights_back_after_an_error(tiny: nn.Module) -> None:
    with pytest.raises(IndexError), raised(tiny, torch.float32):
        tiny(torch.full((1, 4), 10_000))
    assert {p.dtype for p in tiny.parameters()} == {torch.bfloat16}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny.modules())


def test_the_exact_step_reads_the_same_cache(tiny: nn.Module) -> None:
    step = Decode(tiny, tokens(20, 32))
    last, positions = tokens(20, 1, 1), torch.full((20, 1), 32)
    with torch.no_grad():
        plain = step(last, positions)
        exact = step.exact(last, positions, torch.float32)
        assert torch.equal(step(last, positions), plain)
    assert exact.dtype == torch.float32
    assert exact.shape == plain.shape == (20, 1, 64)
    assert 0 < (plain - exact).abs().max() < 0.02


def test_a_greedy_step_returns_the_likeliest_tokens(tiny: nn.Module) -> None:
    scenario = DecodeScenario(kind="decode", batch=3, context=16, sample="argmax")
    program = build_scenario(tiny, scenario, "g", 0, "cpu", "bfloat16")
    plain = build_scenario(tiny, scenario.model_copy(update={"sample": "none"}), "d", 0, "cpu", "bfloat16")
    assert plain.scores is None
    assert program.scores is not None
    with torch.no_grad():
        chosen, logits = program.module(*program.inputs), plain.module(*plain.inputs)
        assert torch.equal(program.scores(*program.inputs), logits)
        assert torch.equal(chosen, logits.argmax(-1))
        assert program.module.exact(*program.inputs, torch.float32).shape == logits.shape  # type: ignore[operator]
    assert (chosen.shape, chosen.dtype) == ((3, 1), torch.int64)


def test_a_step_may_return_the_likeliest_tokens_with_their_logits(tiny: nn.Module) -> None:
    scenario = DecodeScenario(kind="decode", batch=3, context=16, sample="top_k", top_k=7)
    program = build_scenario(tiny, scenario, "g", 0, "cpu", "bfloat16")
    assert program.scores is not None
    assert program.choose is not None
    with torch.no_grad():
        values, chosen = program.module(*program.inputs)
        logits = program.scores(*program.inputs)
    assert (values.shape, chosen.shape, chosen.dtype) == ((3, 1, 7), (3, 1, 7), torch.int64)
    assert torch.equal(values, logits.gather(-1, chosen))
    for got, expected in zip((values, chosen), program.choose(logits), strict=True):
        assert torch.equal(got, expected)
    many = scenario.model_copy(update={"top_k": 65})
    with pytest.raises(WorkloadError, match="scenario g: top_k: 65 of 64 tokens; use fewer"):
        build_scenario(tiny, many, "g", 0, "cpu", "bfloat16")


def test_a_large_batch_repeats_the_first_prompts(tiny: nn.Module) -> None:
    prompts = tokens(20, 24)
    large, small = Decode(tiny, prompts), Decode(tiny, prompts[:8])
    for full, part in zip(large.cache.layers, small.cache.layers, strict=True):
        for row in range(20):
            assert torch.equal(full.keys[row], part.keys[row % 8])
            assert torch.equal(full.values[row], part.values[row % 8])
        assert int(full.cumulative_length) == 24
    last, positions = tokens(20, 1, 1), torch.full((20, 1), 24)
    with torch.no_grad():
        together = large(last, positions)
        apart = small(last[:8], positions[:8])
    torch.testing.assert_close(together[:8], apart, rtol=0, atol=0.01)


def test_prefill_may_keep_the_last_position_only(tiny: nn.Module) -> None:
    ids = tokens(3, 10)
    with torch.no_grad():
        every, last = Prefill(tiny)(ids), Prefill(tiny, last_only=True)(ids)
    assert last.shape == (3, 1, 64)
    torch.testing.assert_close(last, every[:, -1:], rtol=0, atol=0.01)


def test_a_model_without_that_argument_says_so() -> None:
    with pytest.raises(WorkloadError, match="Linear computes logits of all positions; use `logits: all`"):
        Prefill(nn.Linear(2, 2), last_only=True)


@pytest.mark.parametrize("name", ["llama_3_1_8b", "qwen_3_8b", "mistral_7b"])
def test_the_experiment_takes_other_models_by_one_line(name: str) -> None:
    loaded = load_experiment(ROOT / "experiments" / "llama.yaml", (f"model.config=models/{name}/config.json",))
    model: Any = empty_model(loaded)
    assert type(model).__name__.lower().startswith(name.partition("_")[0])
    assert 7e9 < sum(p.numel() for p in model.parameters()) < 8.5e9
    sizes = footprint(loaded, 0).scenarios
    assert sizes["decode-b1"] < sizes["decode-b16"] < sizes["decode-b64"] < sizes["decode-b128"] < 90e9


def test_overrides_replace_keys_of_the_config(tmp_path: Path) -> None:
    override = "model.config_overrides.num_hidden_layers=3"
    model: Any = empty_model(load_experiment(ROOT / "experiments" / "llama.yaml", (override,)))
    assert len(model.model.layers) == 3
    quick = load_experiment(ROOT / "experiments" / "quickstart.yaml", ("model.config_overrides.num_hidden_layers=1",))
    smaller: Any = load_model(quick, "cpu")
    whole: Any = load_model(load_experiment(ROOT / "experiments" / "quickstart.yaml"), "cpu")
    assert len(smaller.model.layers) == 1 < len(whole.model.layers)
    assert torch.equal(smaller.lm_head.weight, whole.lm_head.weight)
    listed = {**TINY, "model_type": "qwen3", "head_dim": 8, "layer_types": ["full_attention"] * 2}
    data = {"name": "x", "model": {"config": listed}, "scenarios": {"p": {"kind": "prefill", "length": 8}}}
    (tmp_path / "x.yaml").write_text(json.dumps(data))
    loaded = load_experiment(tmp_path / "x.yaml", ("model.config_overrides.num_hidden_layers=1",))
    assert len(empty_model(loaded).model.layers) == 1  # type: ignore[union-attr,arg-type]
