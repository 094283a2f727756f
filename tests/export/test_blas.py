"""The BLAS library is chosen for the length of a call."""

from __future__ import annotations

import threading

import pytest
import torch

from autokernel.export.blas import with_blas_library


def test_it_is_set_for_the_call_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["cublas"]

    def preferred(library: str | None = None) -> str:  # a torch without CUDA refuses to choose
        if library is not None:
            chosen.append(library)
        return chosen[-1]

    def compiled(x: int) -> str:
        if x < 0:
            raise ValueError("no kernel")
        return f"{chosen[-1]} {x}"

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    run = with_blas_library(compiled, "cublaslt")
    assert run(3) == "cublaslt 3"
    assert chosen[-1] == "cublas"
    with pytest.raises(ValueError, match="no kernel"):
        run(-1)
    assert chosen[-1] == "cublas"


def test_calls_that_overlap_leave_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["cublas"]

    def preferred(library: str | None = None) -> str:
        if library is not None:
            chosen.append(library)
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    second_is_there, first_is_over = threading.Event(), threading.Event()
    seen: list[str] = []

    def first() -> None:
        assert second_is_there.wait(10)

    def second() -> None:
        second_is_there.set()
        assert first_is_over.wait(10)
        seen.append(chosen[-1])

    def run_first() -> None:
        with_blas_library(first, "cublaslt")()
        first_is_over.set()

    threads = [threading.Thread(target=work) for work in (run_first, with_blas_library(second, "cublaslt"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["cublaslt"], "the second call still has its library when the first is over"
    assert chosen[-1] == "cublas"
