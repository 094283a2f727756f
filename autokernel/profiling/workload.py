"""Build the experiment's model, and a program for each of its scenarios. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autokernel.config import CallScenario, DecodeScenario, LoadedExperiment, PrefillScenario, Scenario
from autokernel.errors import ConfigError, WorkloadError
from autokernel.profiling.corpus import Corpus, load_corpus
from autokernel.profiling.precision import convert
from autokernel.profiling.sources import (
    class_of,
    first_line,
    from_class,
    from_factory,
    no_room,
    overridden,
    read_json,
    stay_offline,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioProgram:
    """One scenario, ready to run: `module(*inputs)` is one step and returns a tensor or a tuple of tensors.

    The module is what is to be compiled, with `fullgraph=True, dynamic=False`. A step depends on its inputs alone: repeated
    calls with the same ones return the same. Where it returns tokens, `scores` is the same step up to the logits that they are
    chosen from, and `choose` takes them from logits, behind their own logits if those are returned, too.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    make_inputs: Callable[[int], Inputs]
    restore: Callable[[], None]
    scores: Callable[..., torch.Tensor] | None = None
    choose: Callable[[torch.Tensor], Any] | None = None

    def fresh_inputs(self, seed: int) -> Inputs:
        """Other inputs of the same shapes."""
        return self.make_inputs(seed)

    def reset(self) -> None:
        """Put back what steps have written (the KV cache behind the context)."""
        self.restore()


def import_model(loaded: LoadedExperiment) -> None:
    """Import the code that `load_model` builds the model with: seconds in a new process, for which nobody needs the device.

    Raises:
        ConfigError: as `load_model`.
    """
    section = loaded.experiment.model
    if section.class_path is not None:
        class_of(loaded, section.class_path)
    elif section.by_auto_class:
        kind, auto = type(model_config(loaded)), _auto_classes()
        for classes in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_MAPPING):
            if kind in classes:
                classes[kind]  # imports its module
                break


def load_model(loaded: LoadedExperiment, device: str) -> nn.Module:
    """The experiment's model in its dtype on the device, in eval mode and without gradients.

    Raises:
        ConfigError: the factory or class cannot be imported, or the config is not one of it.
        WorkloadError: the model cannot be built.
        JobLost: the device has no room for it now.
    """
    import torch

    section = loaded.experiment.model
    dtype = getattr(torch, section.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        if section.factory is not None:
            model = from_factory(loaded, section.factory, section.arguments)
        elif section.class_path is not None:
            model = from_class(loaded, section.class_path, dtype, device)
        elif section.checkpoint is not None:
            model = _from_checkpoint(loaded, dtype)
        else:
            model = _from_config(loaded, dtype, device)
    # Classes build it in its dtype already, with the buffers in theirs: rotary frequencies stay float32.
    as_built = section.class_path is not None or (device != "cpu" and section.factory is None)
    try:
        model = (model if as_built else convert(model, dtype)).to(device=device)
    except torch.OutOfMemoryError as error:
        raise no_room(error) from None
    return model.eval().requires_grad_(False)


def build_scenario(
    model: nn.Module,
    scenario: Scenario,
    name: str,
    seed: int,
    device: str,
    dtype: str,
    loaded: LoadedExperiment | None = None,
) -> ScenarioProgram:
    """A program of its own for one scenario; several may share a model.

    Args:
        model: from `load_model`, or a copy of it in another dtype.
        scenario: what it does.
        name: of the scenario.
        seed: of the inputs, and of the prompt in the KV cache.
        device: "cpu" or "cuda".
        dtype: of the floating-point inputs, e.g. "bfloat16".
        loaded: its eval data, if any, is what a language model reads; without it, token ids are random. Needed where a
            function makes the inputs.

    Raises:
        ConfigError: the inputs' function cannot be imported, or the model takes no such arguments.
        WorkloadError: the model cannot do that.
        JobLost: the device has no room for a step now.
    """
    if isinstance(scenario, CallScenario):
        return _call_program(model, scenario, name, seed, device, dtype, loaded)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise WorkloadError(
            f"scenario {name}: kind {scenario.kind} is for language models of transformers, not {type(model).__name__}; "
            "use kind call"
        )
    num_tokens = scenario.length if isinstance(scenario, PrefillScenario) else scenario.context + 1
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and num_tokens > longest:
        raise WorkloadError(f"scenario {name}: {num_tokens} tokens are more than the model's {longest}; use fewer")
    section = loaded.experiment.validation.eval if loaded is not None else None
    corpus = load_corpus(loaded, config) if loaded is not None and section is not None and section.data is not None else None
    if isinstance(scenario, DecodeScenario):
        return _decode_program(model, scenario, name, seed, device, corpus)
    return _prefill_program(model, scenario, name, seed, device, corpus)


def _prefill_program(
    model: nn.Module, scenario: PrefillScenario, name: str, seed: int, device: str, corpus: Corpus | None
) -> ScenarioProgram:
    from autokernel.profiling.language import Prefill

    vocabulary = _vocabulary(model)

    def make_inputs(seed: int) -> Inputs:
        return (draw_tokens(corpus, vocabulary, scenario.batch, scenario.length, seed).to(device),)

    module = Prefill(model, last_only=scenario.logits == "last").eval()
    return ScenarioProgram(name=name, module=module, inputs=make_inputs(seed), make_inputs=make_inputs, restore=lambda: None)


def _decode_program(
    model: nn.Module, scenario: DecodeScenario, name: str, seed: int, device: str, corpus: Corpus | None
) -> ScenarioProgram:
    import torch

    from autokernel.profiling.language import Decode

    vocabulary = _vocabulary(model)
    choose = _choose(scenario, name, vocabulary)
    text = draw_tokens(corpus, vocabulary, scenario.batch, scenario.context + 1, seed).to(device)
    module = Decode(model, text[:, :-1], choose=choose).eval()
    # A copy: a column of one row counts as contiguous whatever its strides, and other strides would mean to compile again.
    last = text[:, -1:].clone(memory_format=torch.contiguous_format)
    positions = torch.full((scenario.batch, 1), scenario.context, dtype=torch.long, device=device)

    def make_inputs(seed: int) -> Inputs:
        return draw_tokens(corpus, vocabulary, scenario.batch, 1, seed).to(device), positions

    return ScenarioProgram(
        name=name,
        module=module,
        inputs=(last, positions),
        make_inputs=make_inputs,
        restore=module.reset,
        scores=module.logits if choose is not None else None,
        choose=choose,
    )


def _choose(scenario: DecodeScenario, name: str, vocabulary: int) -> Callable[[torch.Tensor], Any] | None:
    """What a step takes of its logits."""
    from autokernel.profiling.language import likeliest, top

    if scenario.sample == "none":
        return None
    if scenario.sample == "argmax":
        return likeliest
    if scenario.num_sampled > vocabulary:
        raise WorkloadError(f"scenario {name}: top_k: {scenario.num_sampled} of {vocabulary} tokens; use fewer")
    return functools.partial(top, count=scenario.num_sampled)


def _call_program(
    model: nn.Module,
    scenario: CallScenario,
    name: str,
    seed: int,
    device: str,
    dtype: str,
    loaded: LoadedExperiment | None,
) -> ScenarioProgram:
    from autokernel.profiling.call import call_program

    module, make_inputs = call_program(model, scenario, name, device, dtype, loaded)
    return ScenarioProgram(name=name, module=module, inputs=make_inputs(seed), make_inputs=make_inputs, restore=lambda: None)


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def draw_tokens(corpus: Corpus | None, vocabulary: int, batch: int, length: int, seed: int) -> torch.Tensor:
    """Token ids of `[batch, length]` on the CPU: passages of a text that is long enough, else uniformly random."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    if corpus is None or len(corpus.tokens) < length:
        return torch.randint(0, vocabulary, (batch, length), generator=generator)
    starts = torch.randint(0, len(corpus.tokens) - length + 1, (batch,), generator=generator)
    return torch.stack([corpus.tokens[start : start + length] for start in starts.tolist()])


def _from_checkpoint(loaded: LoadedExperiment, dtype: torch.dtype) -> nn.Module:
    section = loaded.experiment.model
    assert section.checkpoint is not None
    folder = loaded.resolve(section.checkpoint)
    auto = _auto_classes()
    try:
        if section.config_overrides:
            keys = overridden(read_json(folder / "config.json", "model.checkpoint"), section.config_overrides)
            config = auto.AutoConfig.for_model(keys.pop("model_type"), **keys)
        else:
            config = auto.AutoConfig.from_pretrained(folder, local_files_only=True)
        model: nn.Module = _auto_class(auto, config).from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
        return model
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WorkloadError(f"model.checkpoint: {folder} cannot be loaded: {first_line(error)}") from None


def _from_config(loaded: LoadedExperiment, dtype: torch.dtype, device: str) -> nn.Module:
    """Random weights, drawn on the device: eight billion take a second on a GPU, and minutes on a CPU."""
    import torch

    config = model_config(loaded)
    auto = _auto_classes()
    try:
        with torch.device(device) if device != "cpu" else contextlib.nullcontext():
            model: nn.Module = _auto_class(auto, config).from_config(config, dtype=dtype)
        return model
    except torch.OutOfMemoryError as error:
        raise no_room(error) from None
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        where = "model.config"
        raise ConfigError(f"{where}: transformers builds no {config.model_type!r} model of it: {first_line(error)}") from None


def empty_model(loaded: LoadedExperiment) -> nn.Module:
    """A model of transformers with the shapes of its weights and without any: built in no time, in no memory."""
    import torch

    config = model_config(loaded)
    with torch.device("meta"):
        model: nn.Module = _auto_class(_auto_classes(), config).from_config(
            config, dtype=getattr(torch, loaded.experiment.model.dtype)
        )
    return model


def model_config(loaded: LoadedExperiment) -> Any:
    """The transformers config of a model that is not made by a factory, overrides included.

    Raises:
        ConfigError: it cannot be read, or is none of transformers.
    """
    section = loaded.experiment.model
    if isinstance(section.config, dict):
        where, keys = "model.config", dict(section.config)
    else:
        place = section.config if section.config is not None else (section.checkpoint or Path()) / "config.json"
        path = loaded.resolve(place)
        where, keys = f"model.config: {path}", read_json(path, "model.config")
    if "model_type" not in keys:
        raise ConfigError(f"{where}: the key model_type is missing; it says which of transformers' models this is (e.g. llama)")
    keys = overridden(keys, section.config_overrides)
    kind = keys.pop("model_type")
    try:
        return _auto_classes().AutoConfig.for_model(kind, **keys)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{where}: transformers builds no {kind!r} model of these keys: {first_line(error)}") from None


def _auto_classes() -> Any:
    stay_offline()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _auto_class(auto: Any, config: Any) -> Any:
    """The language model with its head where transformers has one for the config, else the bare model."""
    architectures = getattr(config, "architectures", None)
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return auto.AutoModel
    return auto.AutoModelForCausalLM if type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING else auto.AutoModel
