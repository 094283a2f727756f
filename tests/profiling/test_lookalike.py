"""Models that compile like deep ones, with the weights of few layers."""

from __future__ import annotations

import pytest
import torch
from pretended_run import LLAMA

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.errors import WorkloadError
from autokernel.profiling.lookalike import lookalike
from autokernel.profiling.workload import load_model
from autokernel.stages.whole_model import with_layers

KEYS = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "vocab_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def small(**keys: object) -> LoadedExperiment:
    pairs = ", ".join(f"{key}: {value}" for key, value in {**KEYS, **keys}.items())
    return load_experiment(LLAMA, ["device=cpu", "backends=[aten]", f"model.config_overrides={{{pairs}}}"])


def storages(model: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_it_looks_like_the_whole_in_the_memory_of_a_part() -> None:
    loaded = small()
    real, model = load_model(loaded, "cpu"), lookalike(loaded, with_layers(loaded, 2), "cpu")
    ours, theirs = dict(model.named_parameters()), dict(real.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        twin = ours[name]
        assert (twin.shape, twin.stride(), twin.dtype, twin.requires_grad) == (
            parameter.shape, parameter.stride(), parameter.dtype, False,
        )  # fmt: skip
    assert len(storages(model)) == len(list(load_model(with_layers(loaded, 2), "cpu").parameters()))
    buffers = dict(real.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not model.training
    tokens = torch.randint(0, 128, (1, 8))
    assert model(input_ids=tokens, use_cache=False).logits.shape == (1, 8, 128)


def test_layers_take_turns() -> None:
    loaded = small()
    layers = lookalike(loaded, with_layers(loaded, 2), "cpu").get_submodule("model.layers")
    weights = [layer.self_attn.q_proj.weight for layer in layers.children()]  # type: ignore[union-attr]
    assert [weight.data_ptr() == weights[0].data_ptr() for weight in weights] == [True, False, True, False, True]
    assert len({id(weight) for weight in weights}) == 5, "one parameter in two places would be one input of the graph"


def test_tied_weights_stay_tied() -> None:
    loaded = small(tie_word_embeddings="true")
    model = lookalike(loaded, with_layers(loaded, 1), "cpu")
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_layers_must_be_alike() -> None:
    whole = small()
    with pytest.raises(WorkloadError, match=r"mlp.* has no counterpart in a model of 1 layers"):
        lookalike(whole, small(num_hidden_layers=1, intermediate_size=96), "cpu")
