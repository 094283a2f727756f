"""Packages are linked with the shared libstdc++, also where the compiler finds only the static one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch  # noqa: F401 -- has libstdc++ loaded

from autokernel.export.host_compiler import shared_libstdcxx

SOURCE = '#include <iostream>\nextern "C" void said() { std::cout << 1; }\n'


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def needed(compiler: str, folder: Path) -> bool:
    """Whether what a compiler links needs the shared library."""
    source, built = folder / "x.cpp", folder / "x.so"
    source.write_text(SOURCE)
    output_of(compiler, "-shared", "-fPIC", "-o", str(built), str(source))
    return "libstdc++.so" in output_of("ldd", str(built))


def test_a_compiler_without_a_shared_library_is_shown_the_one_that_is_loaded(static_gxx: str, tmp_path: Path) -> None:
    assert not needed(static_gxx, tmp_path)
    with shared_libstdcxx(static_gxx) as compiler:
        assert compiler is not None
        assert needed(compiler, tmp_path)
        output_of(compiler, "-c", "-o", str(tmp_path / "x.o"), str(tmp_path / "x.cpp"))  # nothing is linked
        output_of(compiler, "--version")
    assert not Path(compiler).exists()


def test_a_compiler_that_links_the_shared_library_is_left_alone() -> None:
    with shared_libstdcxx("g++") as compiler:
        assert compiler is None


def test_where_no_script_can_be_run_the_compiler_stays(
    static_gxx: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "chmod", lambda *_, **__: None)  # as with a folder for temporary files that is mounted noexec
    with shared_libstdcxx(static_gxx) as compiler:
        assert compiler is None
    assert "links libstdc++ statically" in caplog.text


@pytest.mark.parametrize("name", ["no-such-compiler", os.devnull])
def test_one_that_does_not_work_is_left_to_torch(name: str) -> None:
    with shared_libstdcxx(name) as compiler:
        assert compiler is None


def test_where_it_cannot_be_helped_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    fake.chmod(0o755)
    with shared_libstdcxx(str(fake)) as compiler:
        assert compiler is None
    assert "links libstdc++ statically" in caplog.text
