"""Makes candidates of a real run misbehave: on the module path of its processes, this file wraps the ATen backend's `build`.

AK_SABOTAGE names a folder. `plan.json` there maps "<op> <config>" to a misdeed; everything else builds as ever. A misdeed
that waits to be killed writes its process and its parent's into `<misdeed>.pids`, and is done only once.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

TARGET = "autokernel.backends.aten"


def misbehave(misdeed: str, folder: Path) -> None:
    if misdeed == "segfault":
        ctypes.string_at(0)
    elif misdeed == "hang":
        ctypes.PyDLL(None).sleep(600)  # with the interpreter lock held
    elif misdeed == "allocate":
        kept = []
        while True:
            kept.append(b"x" * (32 << 20))
            time.sleep(0.01)
    elif misdeed == "print":
        for _ in range(16):
            os.write(1, b"y" * 999_999 + b"\n")
    else:
        file = folder / f"{misdeed}.pids"
        if not file.exists():
            file.with_suffix(".new").write_text(f"{os.getpid()} {os.getppid()}")
            file.with_suffix(".new").rename(file)
            time.sleep(600)


class Saboteur(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: dict[str, str] = json.loads((folder / "plan.json").read_text())
        self.loader: Any = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET or self.loader is not None:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        assert found is not None
        self.loader, found.loader = found.loader, self
        return found

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        backend: Any = module.AtenBackend
        build = backend.build

        def sabotaged(this: Any, candidate: Any, constants: Any) -> Any:
            config = " ".join(f"{name}={value}" for name, value in sorted(candidate.config.items()))
            misdeed = self.plan.get(f"{candidate.problem.op} {config}")
            if misdeed is not None:
                misbehave(misdeed, self.folder)
            return build(this, candidate, constants)

        backend.build = sabotaged


if "AK_SABOTAGE" in os.environ:
    sys.meta_path.insert(0, Saboteur(Path(os.environ["AK_SABOTAGE"])))
