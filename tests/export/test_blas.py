"""The BLAS library is chosen for the length of a call."""

from __future__ import annotations

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
