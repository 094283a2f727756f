"""Fixtures for CuTe DSL kernels: everything that compiles happens in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from autokernel.cutedsl import compiler
from autokernel.cutedsl.cache import ObjectCache
from autokernel.cutedsl.spec import KernelSpec, ObjectInfo

Child = Callable[..., subprocess.CompletedProcess[str]]
CompileAll = Callable[[Sequence[KernelSpec]], list[tuple[ObjectInfo, Path] | str]]
_SCRIPT = Path(__file__).parent / "child.py"


def run_child(*words: str, given: Any = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_SCRIPT), *words],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        timeout=480,
    )


@pytest.fixture(scope="session")
def child() -> Child:
    """Runs child.py; skips, with the cure, where nothing can be compiled."""
    if (reason := compiler.unavailable()) is not None:
        pytest.skip(reason)
    return run_child


@pytest.fixture(scope="module")
def compile_all(child: Child, tmp_path_factory: pytest.TempPathFactory) -> CompileAll:
    """Specs -> what was compiled, or the sentence that says why not."""
    folder = tmp_path_factory.mktemp("kernels")

    def compile_specs(specs: Sequence[KernelSpec]) -> list[tuple[ObjectInfo, Path] | str]:
        done = child("compile", str(folder), given=[spec.to_json() for spec in specs])
        assert done.returncode == 0, done.stderr[-3000:]
        answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(answers) == len(specs), done.stdout
        cache, found = ObjectCache(folder), []
        for answer in answers:
            kept = cache.get(Path(answer["path"]).stem) if "path" in answer else answer["error"]
            assert kept is not None
            found.append(kept)
        return found

    return compile_specs
