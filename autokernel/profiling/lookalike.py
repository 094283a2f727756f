"""A model that compiles like the experiment's, in the memory of a few of its layers: all others share the weights of these.

Compilers look at a weight's shape, strides and dtype. So what they compile for this model is what they would compile for the
real one, and is found in their caches when that is compiled. What it computes is of no use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autokernel.config import LoadedExperiment
from autokernel.errors import WorkloadError
from autokernel.profiling.workload import empty_model, load_model

if TYPE_CHECKING:
    import torch
    from torch import nn


def lookalike(whole: LoadedExperiment, part: LoadedExperiment, device: str) -> nn.Module:
    """A model of all of `whole`'s layers, whose tensors are those of `part`'s fewer ones, over and over.

    Args:
        whole: a language model of transformers.
        part: the same with fewer layers.
        device: "cpu" or "cuda".

    Raises:
        WorkloadError: the layers are not alike.
        as `load_model`, of the part.
    """
    small = load_model(part, device)
    model = empty_model(whole)
    num_layers = _num_layers(small)
    parameters, buffers = dict(small.named_parameters(remove_duplicate=False)), dict(small.named_buffers())
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for path, module in list(model.named_modules()):
        for name, empty in list(module._parameters.items()):
            if empty is not None:
                if id(empty) not in made:
                    made[id(empty)] = _parameter(_source(parameters, _joined(path, name), num_layers, empty))
                module._parameters[name] = made[id(empty)]
        for name, empty_buffer in list(module._buffers.items()):
            if empty_buffer is not None:
                module._buffers[name] = _source(buffers, _joined(path, name), num_layers, empty_buffer)
    _finish(model, small)
    return model.eval().requires_grad_(False)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    from torch import nn

    return nn.Parameter(tensor.detach(), requires_grad=False)  # a parameter of its own, which shares the storage


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _num_layers(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    return int(config.get_text_config().num_hidden_layers) if config is not None else 1


def _source(tensors: Mapping[str, torch.Tensor], name: str, num_layers: int, like: torch.Tensor) -> torch.Tensor:
    """The tensor of this name, or of the same place in the layer whose number is left when the part's are over."""
    parts = [str(int(part) % num_layers) if part.isdigit() else part for part in name.split(".")]
    found = tensors.get(name, tensors.get(".".join(parts)))
    if found is None or found.shape != like.shape or found.stride() != like.stride():
        raise WorkloadError(f"{name} has no counterpart in a model of {num_layers} layers")
    return found


def _finish(model: nn.Module, small: nn.Module) -> None:
    """What modules keep beside their parameters and buffers must not be left on the meta device."""
    import torch

    twins = dict(small.named_modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                twin = getattr(twins.get(path), name, None)
                if not isinstance(twin, torch.Tensor):
                    raise WorkloadError(f"{path}.{name} is a tensor of no layer that there is")
                setattr(module, name, twin)
