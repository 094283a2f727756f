"""What max-autotune makes of a problem takes part in its confirmation, compiled and timed for real on this processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.codecache import PersistentCache

from autokernel.backends.aten import stock_config
from autokernel.backends.max_autotune import MODE, max_autotune_of
from autokernel.evaluate.confirm import Confirmation, ConfirmCandidates
from autokernel.records import Candidate, Problem, Status, TensorSpec

BMM = Problem(
    op="bmm",
    inputs=(TensorSpec.contiguous((8, 32, 64), "float32"), TensorSpec.contiguous((8, 64, 96), "float32")),
    device="cpu",
)
STOCK = Candidate(problem=BMM, backend="aten", config=stock_config("bmm"))


def template(**fields: Any) -> Candidate:
    blocks = dict.fromkeys(("threads_m", "threads_n", "threads_k", "block_m", "block_n", "block_k"), 0)
    config = {"template": "cpp_bmm", **blocks, "k_slices": 1, **fields}
    return Candidate(problem=BMM, backend="inductor", config=config)


def confirmed(*finalists: Candidate, **options: Any) -> Confirmation:
    torch.compiler.reset()
    job = ConfirmCandidates(
        problem=BMM,
        finalists=finalists,
        baselines=(STOCK,),
        rounds=11,
        threads=torch.get_num_threads(),
        max_copies=2,
        **options,
    )
    return job()


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Inductor's timings say is the fastest: a kernel whose name begins so."""
    wanted: list[str] = []

    def lookup(self: Any, choices: list[Any], *_: Any, **__: Any) -> dict[Any, float]:
        return {choice: 1.0 if choice.name.startswith(wanted[0]) else 2.0 for choice in choices}

    monkeypatch.setattr(PersistentCache, "lookup", lookup)
    return wanted


def test_its_pick_is_a_finalist(fastest: list[str]) -> None:
    fastest.append("cpp_")
    result = confirmed(template(block_m=1, block_n=1, block_k=16), max_autotune=True, pick_may_win=True)
    assert result.failures == ()
    assert result.picked == template().label
    assert [c.candidate for c in result.finalists] == [template(block_m=1, block_n=1, block_k=16), template()]
    assert result.max_autotune is not None
    assert result.max_autotune.candidate == max_autotune_of(BMM)
    assert result.max_autotune.verdict.passed
    assert result.asked_s > 0
    assert result.comparison is not None
    assert result.comparison.faster(template().id, result.max_autotune.candidate.id).num_rounds > 0
    assert result.baseline == STOCK
    assert Confirmation.from_json(result.to_json()) == result
    alone = confirmed(template(block_m=1, block_n=1, block_k=16), max_autotune=True)
    assert len(alone.finalists) == 1
    assert alone.max_autotune is not None


def test_the_librarys_kernel_is_no_finalist_but_takes_part(fastest: list[str]) -> None:
    fastest.append("bmm")
    result = confirmed(template(), max_autotune=True, pick_may_win=True)
    assert (result.picked, [c.candidate for c in result.finalists]) == ("aten bmm", [template()])
    assert result.max_autotune is not None


def test_it_does_not_take_part_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConfirmCandidates, "_ask_max_autotune", lambda *_: pytest.fail("nobody asked"))
    result = confirmed(template())
    assert (result.max_autotune, result.picked, result.asked_s) == (None, "", 0.0)


def test_what_does_not_compile_says_so_and_the_others_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(PersistentCache, "lookup", raising)
    result = confirmed(template(), max_autotune=True, pick_may_win=True)
    assert result.max_autotune is None
    ((candidate, status, message),) = [(f.candidate, f.status, f.message) for f in result.failures]
    assert (candidate.config["mode"], status) == (MODE, Status.BUILD_ERROR)
    assert "no kernel image" in message
    assert [c.candidate for c in result.finalists] == [template()]
