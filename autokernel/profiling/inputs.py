"""Inputs that an experiment declares: which tensors they are, and where in the model's arguments they belong."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.config import CallScenario, TensorInput
from autokernel.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Slot:
    """Where in a model's arguments a tensor goes: its place among all tensors of the call."""

    index: int


def layout_of(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[TensorInput, ...]]:
    """Declared inputs as keyword arguments with slots instead of tensors, and the tensors in the order of their slots."""
    tensors: list[TensorInput] = []

    def place(value: Any) -> Any:
        if isinstance(value, TensorInput):
            tensors.append(value)
            return Slot(len(tensors) - 1)
        return tuple(place(item) for item in value) if isinstance(value, tuple) else value

    return {name: place(value) for name, value in inputs.items()}, tuple(tensors)


def filled(value: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    """An argument with tensors in its slots; tuples become lists."""
    if isinstance(value, Slot):
        return tensors[value.index]
    return [filled(item, tensors) for item in value] if isinstance(value, tuple) else value


def check_names(model: nn.Module, scenario: CallScenario, name: str) -> None:
    """The declared inputs must be arguments of the model's forward.

    Raises:
        ConfigError: there are others, or one is missing.
    """
    assert isinstance(scenario.inputs, dict)
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**scenario.inputs)
    except TypeError as error:
        known = ", ".join(signature.parameters)
        raise ConfigError(
            f"scenarios.{name}.inputs: {type(model).__name__} cannot be called with {', '.join(scenario.inputs)}: {error}; "
            f"its arguments are {known}"
        ) from None


def draw(specs: tuple[TensorInput, ...], batch: int, seed: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Tensors as declared, the same for the same seed on every device.

    Args:
        specs: what they are.
        batch: sizes named so.
        seed: of all of them together.
        device: "cpu" or "cuda".
        dtype: of tensors that have none of their own.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    result = []
    for spec in specs:
        own = getattr(torch, spec.dtype_name) if spec.dtype_name is not None else dtype
        values = _values(spec, [batch if size == "batch" else int(size) for size in spec.shape], generator)
        if spec.missing:
            values[torch.rand(values.shape, generator=generator) < spec.missing] = float("nan")
        result.append(values.to(own).to(device))
    return tuple(result)


def _values(spec: TensorInput, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """On the CPU, in float32, or int64 for integers."""
    import torch

    match spec.distribution:
        case "normal":
            return torch.randn(shape, generator=generator) * spec.std + spec.mean
        case "uniform":
            return torch.rand(shape, generator=generator) * (spec.high - spec.low) + spec.low
        case "integers":
            return torch.randint(int(spec.low), int(spec.high), shape, generator=generator)
        case "arange":
            steps = torch.arange(shape[-1] if shape else 1, dtype=torch.float64) * spec.step + spec.low
            return steps.expand(shape).clone() if shape else steps[0]
        case "zeros":
            return torch.zeros(shape)
        case "ones":
            return torch.ones(shape)
