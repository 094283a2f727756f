"""autokernel makes a PyTorch model faster, with proof.

Search with the `autokernel` command; in production, use what it found:

    model = torch.compile(model, backend=autokernel.backend("path/to/bundle"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autokernel.export.aoti import aoti_compile_and_package
    from autokernel.export.apply import backend, load_bundle, options
    from autokernel.pipeline import run

__all__ = ["__version__", "aoti_compile_and_package", "backend", "load_bundle", "options", "run"]

_HOMES = {
    "aoti_compile_and_package": "autokernel.export.aoti",
    "backend": "autokernel.export.apply",
    "load_bundle": "autokernel.export.apply",
    "options": "autokernel.export.apply",
    "run": "autokernel.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import the public functions on first use: `import autokernel` itself is free."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
