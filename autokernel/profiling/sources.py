"""Where models come from: classes and functions that an experiment names. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autokernel.config import LoadedExperiment
from autokernel.errors import ConfigError, JobLost, WorkloadError
from autokernel.profiling.functions import call_function, load_function

if TYPE_CHECKING:
    import torch
    from torch import nn

# What constructors and loaders raise about what they are given.
_BUILD_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, AssertionError, ImportError)


def stay_offline() -> None:
    """Read when such libraries are first imported: a typo in a path must not become a download."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def from_class(loaded: LoadedExperiment, class_path: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A model of a class: from a folder by its `from_pretrained`, from a config, or from its constructor's arguments.

    It is built on the device with `dtype` as torch's default: parameters have it, and buffers for which the class says another
    one keep theirs.

    Raises:
        ConfigError: the class cannot be imported, is none of a module, or is not built like that.
        WorkloadError: the folder cannot be loaded.
        JobLost: the device has no room for it now.
    """
    import torch

    stay_offline()
    section = loaded.experiment.model
    kind = class_of(loaded, class_path)
    if section.checkpoint is not None:
        return _pretrained(kind, class_path, loaded.resolve(section.checkpoint), dtype)
    build = _from_arguments(kind, class_path, section.arguments) if section.config is None else _from_keys(kind, loaded)
    key = "model.arguments" if section.config is None else "model.config"
    try:
        with _default_dtype(dtype), torch.device(device) if device != "cpu" else contextlib.nullcontext():
            return build()
    except torch.OutOfMemoryError as error:
        raise no_room(error) from None
    except _BUILD_ERRORS as error:
        raise ConfigError(
            f"{key}: {class_path} cannot be built of that: {type(error).__name__}: {first_line(error)}"
        ) from error


def class_of(loaded: LoadedExperiment, class_path: str) -> Any:
    from torch import nn

    kind = load_function(loaded, class_path, "model.class_path")
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind
    raise ConfigError(
        f"model.class_path: {class_path} is no class of a torch.nn.Module; a function that returns one belongs under `factory`"
    )


def _pretrained(kind: Any, class_path: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    if not hasattr(kind, "from_pretrained"):
        raise ConfigError(
            f"model.checkpoint: {class_path} has no from_pretrained; build it from `arguments`, or load it in a `factory`"
        )
    try:
        model: nn.Module = kind.from_pretrained(folder, dtype=dtype, local_files_only=True)
        return model
    except _BUILD_ERRORS as error:
        raise WorkloadError(f"model.checkpoint: {class_path} cannot load {folder}: {first_line(error)}") from error


def _from_arguments(kind: Any, class_path: str, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    check_arguments(kind, class_path, arguments)
    return lambda: kind(**arguments)  # type: ignore[no-any-return]


def check_arguments(function: Callable[..., Any], reference: str, arguments: Mapping[str, Any]) -> None:
    """Arguments of the experiment must be those of the function.

    Raises:
        ConfigError: it does not take them.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"model.arguments: {reference} does not take {sorted(arguments)}: {error}") from None


def _from_keys(kind: Any, loaded: LoadedExperiment) -> Callable[[], nn.Module]:
    """By the class' own `config_class`, or by its `from_config`: the conventions of transformers and of diffusers."""
    section = loaded.experiment.model
    if isinstance(section.config, dict):
        keys = dict(section.config)
    else:
        assert section.config is not None
        keys = read_json(loaded.resolve(section.config), "model.config")
    keys = overridden(keys, section.config_overrides)
    if isinstance(getattr(kind, "config_class", None), type):
        return lambda: kind(kind.config_class.from_dict(keys))  # type: ignore[no-any-return]
    if hasattr(kind, "from_config"):
        return lambda: kind.from_config(keys)  # type: ignore[no-any-return]
    raise ConfigError(
        f"model.config: {section.class_path} has neither config_class nor from_config; give `arguments` of its constructor"
    )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def from_factory(loaded: LoadedExperiment, factory: str, arguments: dict[str, Any]) -> nn.Module:
    """What a function returns.

    Raises:
        ConfigError: it cannot be imported, or does not take the arguments.
        WorkloadError: it returns something else than a module.
    """
    from torch import nn

    function = load_function(loaded, factory, "model.factory")
    check_arguments(function, factory, arguments)
    model = call_function(function, factory, "model.factory", **arguments)
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"model.factory: {factory} must return a torch.nn.Module, not {kind_of(model)}")
    return model


def read_json(path: Path, key: str) -> dict[str, Any]:
    """The keys of a config.

    Raises:
        ConfigError: the file holds none.
    """
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} is no JSON: {error}") from None
    if not isinstance(keys, dict):
        raise ConfigError(f"{key}: {path} must hold the keys of a config, not {type(keys).__name__}")
    return keys


def overridden(keys: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a config with others in their place; a list of the layers' types gets as many as there are layers."""
    result = {**keys, **overrides}
    types = result.get("layer_types")
    if "num_hidden_layers" in overrides and isinstance(types, list):
        result["layer_types"] = types[: overrides["num_hidden_layers"]]
    return result


def no_room(error: BaseException) -> JobLost:
    """Other jobs may end and make room; nothing is wrong with the model."""
    return JobLost(f"the device has no room for the model beside other jobs: {first_line(error)}")


def kind_of(value: object) -> str:
    """For messages: its type, and for a tuple those of its items."""
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in value)}"
    return type(value).__name__


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
