"""Functions and classes that an experiment names: `package.module:function` or `file.py:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from autokernel.config import LoadedExperiment
from autokernel.errors import AutokernelError, ConfigError, WorkloadError


def load_function(loaded: LoadedExperiment, reference: str, key: str) -> Callable[..., Any]:
    """The function that an experiment refers to.

    Args:
        loaded: says where relative files are.
        reference: `package.module:function` or `file.py:function`.
        key: the key of the experiment that holds the reference, for messages.

    Raises:
        ConfigError: the module cannot be imported, or has no such function.
    """
    target, _, name = reference.rpartition(":")
    module = _import_file(loaded, target, key) if target.endswith(".py") else _import_module(target, reference, key)
    try:
        function = getattr(module, name, None)
    except (ImportError, RuntimeError) as error:  # of a package that imports its parts when they are asked for
        raise ConfigError(f"{key}: {reference}: {error}; install what it needs") from None
    if not callable(function):
        names = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise ConfigError(f"{key}: {target} has no function or class {name!r}; it has {', '.join(names) or 'none'}")
    return function  # type: ignore[no-any-return]


def call_function(function: Callable[..., Any], reference: str, key: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function of the experiment's own.

    Args:
        function: what `load_function` found.
        reference: its name in the experiment, for messages.
        key: the key of the experiment that holds it, likewise.
        args: positional arguments.
        kwargs: named arguments.

    Raises:
        WorkloadError: it raised something; the message says where. Errors of ours, and of a device without room, go through.
    """
    try:
        return function(*args, **kwargs)
    except AutokernelError:
        raise
    except Exception as error:  # somebody else's code: whatever it raises is a sentence with a place
        if type(error).__name__ == "OutOfMemoryError":  # torch's: other jobs may end and make room
            raise
        raise WorkloadError(f"{key}: {reference} failed{_place(error)}") from error


def _place(error: BaseException) -> str:
    """Where something was raised, by the last line that is not of an installed package, and what it says."""
    said = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": ")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f" at {own[-1].filename}:{own[-1].lineno}: {said}" if own else f": {said}"


def _import_module(target: str, reference: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(target)
    except ImportError as error:
        raise ConfigError(f"{key}: {reference}: {error}; install the package, or name a file as file.py:function") from None
    except Exception as error:  # as in `call_function`
        raise ConfigError(f"{key}: {target} cannot be imported{_place(error)}") from error


def _import_file(loaded: LoadedExperiment, target: str, key: str) -> ModuleType:
    path = loaded.resolve(target)
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{key}: {path} does not exist or is no Python file")
    module = importlib.util.module_from_spec(spec)
    # dataclasses, pickle and torch.compile look a module up by its name
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        del sys.modules[name]
        raise ConfigError(f"{key}: {path} cannot be imported: {error}") from None
    except Exception as error:  # as in `call_function`
        del sys.modules[name]
        raise ConfigError(f"{key}: {path} cannot be imported{_place(error)}") from error
    return module
