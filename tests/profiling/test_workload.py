"""Models from every source, and the programs of their scenarios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autokernel.config import CallScenario, DecodeScenario, LoadedExperiment, PrefillScenario, load_experiment
from autokernel.errors import ConfigError, WorkloadError
from autokernel.profiling.workload import ScenarioProgram, build_scenario, draw_tokens, load_model

TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
FACTORY = """
import torch

def mlp(width=8):
    return torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.ReLU())

def inputs(batch, seed, device, dtype):
    torch.manual_seed(seed)
    return (torch.randn(batch, 8, device=device, dtype=dtype),)

def wrong(batch, seed, device, dtype):
    return torch.zeros(2)

number = 7

def not_a_module():
    return number
"""
PREFILL = {"p": {"kind": "prefill", "length": 8}}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """write(model section, scenarios) -> the experiment, in a folder with parts.py."""
    (tmp_path / "parts.py").write_text(FACTORY)

    def make(model: dict[str, Any], scenarios: dict[str, Any] | None = None) -> LoadedExperiment:
        data = {"name": "x", "model": {"dtype": "float32"} | model, "scenarios": scenarios or PREFILL, "device": "cpu"}
        path = tmp_path / "x.yaml"
        path.write_text(json.dumps(data))
        return load_experiment(path)

    return make


def run(program: ScenarioProgram, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return program.module(*(inputs or program.inputs))


def decode(model: nn.Module, loaded: LoadedExperiment, batch: int = 2, context: int = 32, seed: int = 0) -> ScenarioProgram:
    scenario = DecodeScenario(kind="decode", batch=batch, context=context)
    return build_scenario(model, scenario, "d", seed, "cpu", "bfloat16", loaded=loaded)


def test_the_checkpoint_is_loaded_for_inference(model: nn.Module) -> None:
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_prefill_is_the_model_without_a_cache(model: nn.Module, loaded: LoadedExperiment) -> None:
    scenario = PrefillScenario(kind="prefill", batch=2, length=24)
    program = build_scenario(model, scenario, "p", 3, "cpu", "bfloat16", loaded=loaded)
    logits = run(program)
    assert logits.shape == (2, 24, 256)
    with torch.no_grad():
        assert torch.equal(logits, model(program.inputs[0]).logits)
    again = program.fresh_inputs(3)
    assert torch.equal(again[0], program.inputs[0])
    assert not torch.equal(program.fresh_inputs(4)[0], again[0])


def test_tokens_are_passages_of_the_text(model: nn.Module, loaded: LoadedExperiment) -> None:
    from autokernel.profiling.corpus import read_text

    program = build_scenario(model, PrefillScenario(kind="prefill", length=64), "p", 0, "cpu", "bfloat16", loaded=loaded)
    assert bytes(program.inputs[0][0].tolist()) in read_text(loaded)


def test_a_decode_step_is_a_step_of_plain_generation(model: nn.Module, loaded: LoadedExperiment) -> None:
    from transformers import StaticCache

    program = decode(model, loaded)
    tokens, positions = program.inputs
    assert positions.tolist() == [[32], [32]]
    text = _text_of(model, loaded)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(input_ids=text, past_key_values=cache, use_cache=True)
        plain = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        without_cache = model(input_ids=torch.cat([text, tokens], dim=1)).logits[:, -1:]
    logits = run(program)
    assert logits.shape == (2, 1, 256)
    torch.testing.assert_close(logits, plain, rtol=0, atol=0.25)
    torch.testing.assert_close(logits, without_cache, rtol=0, atol=0.25)
    assert torch.equal(logits.argmax(-1), plain.argmax(-1))


def _text_of(model: nn.Module, loaded: LoadedExperiment) -> torch.Tensor:
    """The prompt that seed 0 puts into the cache of `decode`."""
    scenario = PrefillScenario(kind="prefill", batch=2, length=33)
    return build_scenario(model, scenario, "p", 0, "cpu", "bfloat16", loaded=loaded).inputs[0][:, :-1]


def test_a_decode_step_repeats_and_depends_on_its_inputs_alone(model: nn.Module, loaded: LoadedExperiment) -> None:
    program, other = decode(model, loaded), decode(model, loaded, batch=1, context=20)
    first = run(program)
    for _ in range(40):  # more than the cache has room for
        run(program, *program.fresh_inputs(1))
    run(other)
    assert torch.equal(run(program), first)
    assert not torch.equal(run(program, *program.fresh_inputs(1)), first)
    program.reset()
    assert torch.equal(run(program), first)
    assert not torch.equal(run(decode(model, loaded, seed=5)), first)


def test_reset_forgets_what_was_written_behind_the_context(model: nn.Module, loaded: LoadedExperiment) -> None:
    program = decode(model, loaded)
    first = run(program)
    for layer in program.module.cache.layers:
        layer.keys[:, :, 32:].fill_(float("nan"))
        layer.values[:, :, 32:].fill_(float("nan"))
    program.reset()
    assert torch.equal(run(program), first)


def test_random_weights_follow_the_seed(write: Any, tmp_path: Path) -> None:
    first = load_model(write({"config": TINY, "seed": 1}), "cpu").state_dict()
    second = load_model(write({"config": TINY, "seed": 1}), "cpu").state_dict()
    third = load_model(write({"config": TINY, "seed": 2}), "cpu").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    from_file = load_model(write({"config": "config.json", "seed": 1, "dtype": "bfloat16"}), "cpu").state_dict()
    assert from_file["lm_head.weight"].dtype == torch.bfloat16


def test_a_model_without_text_reads_random_tokens(write: Any) -> None:
    loaded = write({"config": TINY})
    program = build_scenario(load_model(loaded, "cpu"), PrefillScenario(kind="prefill", length=8), "p", 0, "cpu", "float32")
    assert run(program).shape == (1, 8, 64)


def test_a_factory_in_a_file(write: Any) -> None:
    call = {"c": {"kind": "call", "inputs": "parts.py:inputs", "batch": 3}}
    loaded = write({"factory": "parts.py:mlp", "arguments": {"width": 8}}, call)
    model = load_model(loaded, "cpu")
    scenario = loaded.experiment.scenarios["c"]
    program = build_scenario(model, scenario, "c", 0, "cpu", "float32", loaded=loaded)
    assert run(program).shape == (3, 4)
    assert not torch.equal(program.fresh_inputs(1)[0], program.inputs[0])


def test_a_factory_in_a_module(write: Any) -> None:
    call = {"c": {"kind": "call", "inputs": "parts.py:inputs"}}
    model = load_model(write({"factory": "torch.nn:Linear", "arguments": {"in_features": 8, "out_features": 2}}, call), "cpu")
    assert isinstance(model, nn.Linear)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"factory": "parts.py:nothing"}, r"model.factory: parts.py has no function or class 'nothing'; it has inputs, mlp"),
        ({"factory": "no_such_package:f"}, r"no_such_package.*install the package, or name a file"),
        ({"factory": "parts.py:mlp", "arguments": {"depth": 2}}, r"parts.py:mlp does not take \['depth'\]"),
        ({"factory": "parts.py:not_a_module"}, r"must return a torch.nn.Module, not int"),
        ({"config": {"hidden_size": 8}}, r"model_type is missing"),
        ({"config": {"model_type": "no_such"}}, r"builds no 'no_such' model"),
        ({"config": "parts.py"}, r"parts.py is no JSON"),
        ({"checkpoint": "empty"}, r"empty cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(write: Any, tmp_path: Path, section: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(TINY))
    scenarios = {"c": {"kind": "call", "inputs": "parts.py:inputs"}} if "factory" in section else None
    loaded = write(section, scenarios)
    with pytest.raises((ConfigError, WorkloadError), match=message):
        load_model(loaded, "cpu")


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (PrefillScenario(kind="prefill", length=33), "33 tokens are more than the model's 32"),
        (DecodeScenario(kind="decode", context=32), "33 tokens are more than the model's 32"),
        (CallScenario(kind="call", inputs="parts.py:wrong"), "must return a tuple of tensors, not Tensor"),
    ],
)
def test_a_scenario_that_cannot_be_built_says_why(write: Any, scenario: Any, message: str) -> None:
    loaded = write({"config": TINY})
    with pytest.raises(WorkloadError, match=message):
        build_scenario(load_model(loaded, "cpu"), scenario, "s", 0, "cpu", "float32", loaded=loaded)


def test_a_language_scenario_needs_a_language_model() -> None:
    with pytest.raises(WorkloadError, match="not Linear; use kind call"):
        build_scenario(nn.Linear(2, 2), PrefillScenario(kind="prefill", length=8), "p", 0, "cpu", "float32")


def test_decode_refuses_states_that_a_step_cannot_be_repeated_on(write: Any) -> None:
    chunks = TINY | {"model_type": "llama4_text", "attention_chunk_size": 8, "intermediate_size_mlp": 64, "head_dim": 8}
    model = load_model(write({"config": chunks | {"num_local_experts": 2, "layer_types": ["chunked_attention"]}}), "cpu")
    program = build_scenario(model, DecodeScenario(kind="decode", context=6), "d", 0, "cpu", "float32")
    assert torch.equal(run(program), run(program))
    with pytest.raises(WorkloadError, match=r"context 12 does not fit into the chunk of layer 0.*at most 7"):
        build_scenario(model, DecodeScenario(kind="decode", context=12), "d", 0, "cpu", "float32")


@pytest.mark.parametrize(("kind", "layers"), [("mistral", 2), ("gemma2", 3), ("gemma3_text", 6)])
@pytest.mark.parametrize("context", [7, 8, 21])
def test_a_full_window_forgets_its_oldest_token_at_each_step(write: Any, kind: str, layers: int, context: int) -> None:
    """The same step each time, and what reading one token more would say; of layers that see all tokens beside it."""
    keys = TINY | {"model_type": kind, "sliding_window": 8, "head_dim": 8, "num_hidden_layers": layers}
    model = load_model(write({"config": keys}), "cpu")
    scenario = DecodeScenario(kind="decode", batch=2, context=context)
    program = build_scenario(model, scenario, "d", 0, "cpu", "float32")
    step: Any = program.module
    assert {layer.max_cache_len for layer in step.cache.layers} == {8} | ({32, 48} & {step.num_slots} if layers > 2 else set())
    first = run(program)
    assert torch.equal(first, run(program))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(*program.inputs), first, rtol=1e-4, atol=1e-5)
        exact = step.exact(*program.inputs, torch.float64)
    torch.testing.assert_close(first, exact.float(), rtol=1e-4, atol=1e-5)
    tokens, _ = program.inputs
    text = draw_tokens(None, keys["vocab_size"], 2, context + 1, 0)  # as the scenario drew it
    assert torch.equal(text[:, -1:], tokens)
    with torch.no_grad():
        read = model(input_ids=text, use_cache=False, logits_to_keep=1).logits
    torch.testing.assert_close(first, read, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
