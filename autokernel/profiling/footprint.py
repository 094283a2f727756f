"""How much of a GPU's memory a job on the whole model will take: so that no two of them run it full together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autokernel.config import CallScenario, DecodeScenario, LoadedExperiment
from autokernel.records import DTYPE_BYTES, Record

_OVERHEAD = 3 << 30  # of one process: its CUDA context, the libraries' workspaces, what the allocator rounds up
_STREAMS = 8  # activations of the hidden size that live at once
_MERGED_PART = 0.8  # of the weights, that a bundle may hold a second time: concatenated, or packed
_LOGIT_COPIES = 3
_COMPARED = 3  # times what a scenario takes under Inductor's default that a comparison with bundles and stock modes takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint(Record):
    """Bytes of a whole job per scenario, weights that a bundle copies included, of these copies, and of the device.

    `copies` is the most that a bundle could copy, `weights` what the model's own take, and `layers` its number of equal parts.
    No scenarios: it cannot be told.
    """

    scenarios: Mapping[str, int]
    device: int
    copies: int = 0
    layers: int = 0
    weights: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureFootprints:
    """Job: build models without their weights, and count. One job for all, since importing transformers takes longest."""

    models: tuple[LoadedExperiment, ...]

    def __call__(self) -> tuple[Footprint, ...]:
        import torch

        device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
        return tuple(footprint(loaded, device) for loaded in self.models)


def by_peaks(peak_bytes: Mapping[str, int], device_bytes: int) -> Footprint:
    """Of a model of which nothing else can be told: by what each scenario took of the memory when it was profiled.

    A bundle may hold most weights a second time, and each graph of a comparison its activations: room for both is left.
    """
    scenarios = {name: _COMPARED * peak + _OVERHEAD for name, peak in peak_bytes.items()}
    return Footprint(scenarios=scenarios, device=device_bytes)


def footprint(loaded: LoadedExperiment, device_bytes: int) -> Footprint:
    """An upper estimate for each scenario of a language model; the most that its contenders need together.

    Counted are the weights, once more what of them a bundle concatenates, the KV cache, and the activations of one layer:
    those of attention with the keys and values of one layer repeated for each head, as transformers' code does it. Of other
    models nothing can be told before they have run (`by_peaks`).
    """
    from autokernel.profiling.workload import empty_model

    experiment = loaded.experiment
    only_calls = all(isinstance(scenario, CallScenario) for scenario in experiment.scenarios.values())
    if only_calls or not experiment.model.by_auto_class:
        return Footprint(scenarios={}, device=device_bytes)
    model: Any = empty_model(loaded)
    config = model.config.get_text_config()
    size = DTYPE_BYTES[experiment.model.dtype]
    weights = sum(p.numel() for p in model.parameters()) * size
    copies = int(_MERGED_PART * weights)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    layers, width = int(config.num_hidden_layers), int(getattr(config, "intermediate_size", 4 * config.hidden_size))
    scenarios = {}
    for name, scenario in experiment.scenarios.items():
        if isinstance(scenario, CallScenario):
            continue
        decode = isinstance(scenario, DecodeScenario)
        rows = scenario.batch * (scenario.context if isinstance(scenario, DecodeScenario) else scenario.length)
        tokens = scenario.batch if decode else rows
        positions = scenario.batch if decode or getattr(scenario, "logits", "all") == "last" else rows
        cache = 2 * layers * rows * kv_heads * head_dim * size if decode else 0
        attention = 2 * 2 * rows * heads * head_dim * size
        activations = tokens * (3 * width + _STREAMS * int(config.hidden_size)) * max(size, 4)
        logits = _LOGIT_COPIES * positions * int(config.vocab_size) * 4
        scenarios[name] = weights + copies + cache + attention + activations + logits + _OVERHEAD
    return Footprint(scenarios=scenarios, device=device_bytes, copies=copies, layers=layers, weights=weights)
