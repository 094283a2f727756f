"""What Inductor builds to look at the processor is built ahead, under the names that Inductor looks for."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gated_layers import GATE, Gated, K, M, bundle_of, entry
from torch._inductor import cpp_builder, cpu_vec_isa

import autokernel
from autokernel.export import apply, isa_probes
from autokernel.export.isa_probes import built_ahead

THREAD = "autokernel-isa-probes"


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that has not compiled, on a machine that knows one set of instructions; its cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", functools.cache(list))
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", [cpu_vec_isa.VecAVX2()])
    return folder


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the processor has no AVX2")
def test_inductor_finds_what_was_built(nothing_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with built_ahead():
        (thread,) = threads()
        thread.join()
    assert list(nothing_known.rglob("*.so"))

    def build(self: cpp_builder.CppBuilder) -> None:
        raise AssertionError("it was to be there")

    monkeypatch.setattr(cpp_builder.CppBuilder, "build", build)
    assert cpu_vec_isa.VecAVX2().check_build(cpu_vec_isa.VecISA._avx_code)


def test_nothing_is_built_for_those_who_know(nothing_known: Path) -> None:
    cpu_vec_isa.valid_vec_isa_list()
    with built_ahead():
        assert not threads()


def test_a_machine_that_has_compiled_before_is_left_alone(nothing_known: Path) -> None:
    nothing_known.mkdir()
    (nothing_known / "kernel.so").touch()
    with built_ahead():
        assert not threads()


def test_it_stops_with_the_compilation(nothing_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[cpu_vec_isa.VecISA] = []

    def build(isa: cpu_vec_isa.VecISA) -> None:
        built.append(isa)
        time.sleep(0.2)

    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2"])
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", [cpu_vec_isa.VecAVX2()] * 3)
    monkeypatch.setattr(isa_probes, "_build_one", build)
    with built_ahead():
        (thread,) = threads()
    thread.join()
    assert len(built) <= 1


def test_production_builds_them_while_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    @contextlib.contextmanager
    def recorded() -> Iterator[None]:
        steps.append("started")
        yield
        steps.append("ended")

    monkeypatch.setattr(apply, "built_ahead", recorded)
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(Gated(), backend=autokernel.backend(bundle_of(entry(GATE, "aten", prepack=True))))(torch.randn(M, K))
    assert steps == ["started", "ended"]
