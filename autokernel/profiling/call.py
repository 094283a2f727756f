"""Programs of scenarios of kind `call`: any model, from flat tensors to flat tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from autokernel.config import CallScenario, LoadedExperiment, TensorInput
from autokernel.errors import WorkloadError
from autokernel.profiling.functions import call_function, load_function
from autokernel.profiling.inputs import check_names, draw, filled, layout_of
from autokernel.profiling.precision import is_quantized
from autokernel.profiling.sources import first_line, kind_of, no_room

Inputs = tuple[torch.Tensor, ...]

# What a model's own code raises about inputs that do not suit it.
_MODEL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError)
_DICTS = (dict, OrderedDict)


class Call(nn.Module):
    """A model as a function of tensors: puts them where its arguments have them, and picks from what it returns.

    It holds the model as `model`. With neither `named` nor `outputs`, calling it is calling the model.
    """

    def __init__(self, model: nn.Module, named: Mapping[str, Any] | None, outputs: Sequence[str]) -> None:
        """Wrap a model.

        Args:
            model: what is called.
            named: its keyword arguments, with a `Slot` where a tensor goes; None: all tensors are positional.
            outputs: paths of attributes, keys and indices; none: all that it returns.
        """
        super().__init__()
        self.model = model
        self.named = dict(named) if named is not None else None
        self.paths = [tuple(path.split(".")) for path in outputs]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """One step: a tensor, or a tuple of them."""
        if self.named is None:
            result = self.model(*tensors)
        else:
            result = self.model(**{name: filled(value, tensors) for name, value in self.named.items()})
        if not self.paths:
            return tuple(result) if isinstance(result, list) else result
        picked = tuple(_at(result, path) for path in self.paths)
        return picked[0] if len(picked) == 1 else picked


def _at(value: Any, path: Sequence[str]) -> Any:
    for part in path:
        if part.lstrip("-").isdigit():
            value = value[int(part)]
        else:  # what libraries return are dicts with attributes, or no dicts at all
            value = value[part] if type(value) in _DICTS else getattr(value, part)
    return value


def call_program(
    model: nn.Module, scenario: CallScenario, name: str, device: str, dtype: str, loaded: LoadedExperiment | None
) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """The module of a scenario, and the function from a seed to its inputs.

    The model is called once: what makes tables at its first call has them when it is compiled, and inputs that cannot be made
    or do not suit it are told here.

    Raises:
        ConfigError: the inputs' function cannot be imported, or the model takes no such arguments.
        WorkloadError: the inputs cannot be made, or the model does not run on them, or returns something else than tensors
            with finite elements.
        JobLost: the device has no room for a step now.
    """
    own = getattr(torch, dtype)
    make_inputs: Callable[[int], Inputs]
    if isinstance(scenario.inputs, dict):
        check_names(model, scenario, name)
        named, specs = layout_of(scenario.inputs)
        module: nn.Module = Call(model, named, scenario.outputs).eval()

        make_inputs = partial(_draw, specs, scenario.batch, device, own)
    else:
        make_inputs = _from_function(scenario, scenario.inputs, name, device, own, loaded)
        module = Call(model, None, scenario.outputs).eval() if scenario.outputs else model
    if _is_in(model, own):
        _call_once(module, _first_inputs(make_inputs, scenario, name), scenario, name)
    return module, make_inputs


def _draw(specs: tuple[TensorInput, ...], batch: int, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    return draw(specs, batch, seed, device, dtype)


def _from_function(
    scenario: CallScenario, reference: str, name: str, device: str, dtype: torch.dtype, loaded: LoadedExperiment | None
) -> Callable[[int], Inputs]:
    if loaded is None:
        raise WorkloadError(f"scenario {name}: the inputs' function {reference} needs the experiment it belongs to")
    key = f"scenarios.{name}.inputs"
    function = load_function(loaded, reference, key)

    def make_inputs(seed: int) -> Inputs:
        inputs = call_function(function, reference, key, batch=scenario.batch, seed=seed, device=device, dtype=dtype)
        if not isinstance(inputs, tuple) or not all(isinstance(x, torch.Tensor) for x in inputs):
            raise WorkloadError(f"scenario {name}: {reference} must return a tuple of tensors, not {kind_of(inputs)}")
        return inputs

    return make_inputs


def _is_in(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the model is the experiment's own, and not a copy in higher precision: that takes other inputs."""
    own = [
        parameter for module in model.modules() if not is_quantized(module) for parameter in module.parameters(recurse=False)
    ]
    floating = [parameter.dtype for parameter in own if parameter.dtype.is_floating_point]
    return not floating or dtype in floating


def _first_inputs(make_inputs: Callable[[int], Inputs], scenario: CallScenario, name: str) -> Inputs:
    try:
        return make_inputs(0)
    except torch.OutOfMemoryError as error:
        raise no_room(error) from None
    except (*_MODEL_ERRORS, OverflowError) as error:
        raise WorkloadError(
            f"scenario {name}: its inputs cannot be made with scenarios.{name}.batch={scenario.batch}: "
            f"{type(error).__name__}: {first_line(error)}; use a smaller batch, or smaller sizes under scenarios.{name}.inputs"
        ) from error


def _call_once(module: nn.Module, inputs: Inputs, scenario: CallScenario, name: str) -> None:
    try:
        with torch.no_grad():
            result = module(*inputs)
    except torch.OutOfMemoryError as error:
        raise no_room(error) from None
    except _MODEL_ERRORS as error:
        outputs = f" and the outputs {', '.join(scenario.outputs)}" if scenario.outputs else ""
        raise WorkloadError(
            f"scenario {name}: the model does not run with the inputs {_shapes(inputs)}{outputs}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    results = result if isinstance(result, tuple) else (result,)
    if not results or not all(isinstance(item, torch.Tensor) for item in results):
        raise WorkloadError(
            f"scenario {name}: the model returns {_description(result)}; name the tensors that count under `outputs`, "
            "e.g. `outputs: [logits]` or, for an item of a tuple, `outputs: ['0']`"
        )
    for number, item in enumerate(results):
        which = scenario.outputs[number] if scenario.outputs else number
        if not item.numel():
            raise WorkloadError(
                f"scenario {name}: output {which} is empty, so nothing could be compared; with the inputs {_shapes(inputs)} "
                f"its shape is {list(item.shape)}: give inputs for which it is not empty, or name only the outputs that count "
                "under `outputs`"
            )
        if not item.isfinite().any():
            raise WorkloadError(
                f"scenario {name}: output {which} is nowhere finite, so nothing could be compared; give inputs or random "
                "weights of another scale"
            )


def _shapes(inputs: Inputs) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in inputs)


def _description(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {', '.join(map(str, value))}"
    return kind_of(value)
