"""Functions and classes that an experiment names: `package.module:function` or `file.py:function`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from autokernel.config import LoadedExperiment
from autokernel.errors import AutokernelError, WorkloadError
from autokernel.requirements import cure_of

_MAX_NAMES = 12  # of a module that are listed


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
    module = _import_file(loaded, target, key) if target.endswith(".py") else _import_module(loaded, target, reference, key)
    try:
        function = getattr(module, name, None)
    except (ImportError, RuntimeError) as error:  # of a package that imports its parts when they are asked for
        cure = cure_of(error) if isinstance(error, ImportError) else ""
        raise loaded.wrong(key, f"{reference}: {error}{cure or '; install what it needs'}") from None
    if not callable(function):
        raise loaded.wrong(key, f"{target} has no function or class {name!r}; {_instead(name, module)}")
    return function  # type: ignore[no-any-return]


def _instead(name: str, module: ModuleType) -> str:
    """What else a module has: what is spelled alike, or the first names of all."""
    near = difflib.get_close_matches(name, [n for n in dir(module) if not n.startswith("_")])
    if near:
        return f"did you mean {', '.join(near[:-1])}{' or ' if near[1:] else ''}{near[-1]}?"
    names = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"it has {', '.join(names[:_MAX_NAMES]) or 'none'}{more}"


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


def _import_module(loaded: LoadedExperiment, target: str, reference: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(target)
    except ImportError as error:
        cure = cure_of(error) or "; install the package, or name a file as file.py:function"
        raise loaded.wrong(key, f"{reference}: {error}{cure}") from None
    except Exception as error:  # as in `call_function`
        raise loaded.wrong(key, f"{target} cannot be imported{_place(error)}") from error


def _import_file(loaded: LoadedExperiment, target: str, key: str) -> ModuleType:
    path = loaded.resolve(target)
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise loaded.wrong(key, f"{path} does not exist or is no Python file")
    module = importlib.util.module_from_spec(spec)
    # dataclasses, pickle and torch.compile look a module up by its name
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        del sys.modules[name]
        cure = cure_of(error) if isinstance(error, ImportError) else ""
        raise loaded.wrong(key, f"{path} cannot be imported: {error}{cure}") from None
    except Exception as error:  # as in `call_function`
        del sys.modules[name]
        raise loaded.wrong(key, f"{path} cannot be imported{_place(error)}") from error
    return module
