"""What max-autotune picks on a GPU, by Inductor's own lowering for a pretended H200, and whether an entry can stand for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from autokernel.backends.max_autotune import Picks, listening, max_autotune_of, options
from autokernel.export.apply import inductor_options
from autokernel.export.bundle import Entry
from autokernel.export.plan import minor
from autokernel.records import Problem, TensorSpec

pytest.importorskip("triton", reason="Inductor's templates are Triton's")
if minor(torch.__version__) != "2.13":
    pytest.skip("the pretended device is made for torch 2.13", allow_module_level=True)

from export.pretended_h200 import generated_code, plan_with

N, K = 6144, 4096


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def mm(m: int, n: int = N, k: int = K) -> Problem:
    right = TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))
    return Problem(op="mm", inputs=(spec(m, k), right), device="cuda", constants=(1,))


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w.t())


def batched(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, y)


@contextmanager
def timed_by(wanted: Callable[[str], bool]) -> Iterator[None]:
    """Nothing is built or run: the first choice whose name and fields please is the fastest of all."""
    from torch._inductor.codecache import PersistentCache
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    def lookup(self: Any, choices: list[Any], *_: Any, **__: Any) -> dict[Any, float]:
        found = next(choice for choice in choices if wanted(f"{choice.name} {choice.description}"))
        return {choice: 1.0 if choice is found else 2.0 for choice in choices}

    with (
        mock.patch.object(PersistentCache, "lookup", lookup),
        mock.patch.object(AlgorithmSelectorCache, "make_precompile_fn", return_value=dict),
    ):
        yield


def asked(
    function: Callable[..., Any], problem: Problem, specs: list[TensorSpec], wanted: Callable[[str], bool]
) -> tuple[Picks, str]:
    # where a process has them switched on, persistent kernels are in the list
    with timed_by(wanted), listening(problem) as picks:
        code = generated_code(function, specs, options() | {"triton.enable_persistent_tma_matmul": True})
    return picks, code


@pytest.mark.parametrize(
    ("function", "problem", "specs", "wanted", "template"),
    [
        (linear, mm(16), [spec(16, K), spec(N, K)], "BLOCK_N=64", "mm"),
        (linear, mm(512), [spec(512, K), spec(N, K)], "NUM_SMS", "mm_persistent_tma"),
        (linear, mm(16, 256, 16384), [spec(16, 16384), spec(256, 16384)], "decompose_k", "decompose_k"),
        (
            batched,
            Problem(op="bmm", inputs=(spec(8, 64, K), spec(8, K, N)), device="cuda"),
            [spec(8, 64, K), spec(8, K, N)],
            "BLOCK_N=64",
            "bmm",
        ),
    ],
    ids=["mm", "TMA", "decompose_k", "bmm"],
)
def test_an_entry_builds_the_very_pick(
    function: Callable[..., Any], problem: Problem, specs: list[TensorSpec], wanted: str, template: str
) -> None:
    picks, stock = asked(function, problem, specs, lambda text: wanted in text)
    (pick,) = picks.candidates
    assert pick.config["template"] == template
    assert picks.text == pick.label
    entry = Entry(problem=problem, backend=pick.backend, config=dict(pick.config))
    plan = plan_with((entry,))
    code = generated_code(function, specs, inductor_options(plan, {}, frozen=False))
    assert plan.usage[entry.key].hits == 1
    if template == "decompose_k":
        assert "extern_kernels.bmm_dtype(" in stock
        assert "extern_kernels.bmm_dtype(" in code
        return
    fields = [dict(re.findall(r"(BLOCK_\w|GROUP_M) : tl\.constexpr = (\d+)\n", text)) for text in (stock, code)]
    assert len(fields[0]) == 4
    assert fields[0] == fields[1]
    assert re.findall(r"num_stages=\d,\s*num_warps=\d", stock) == re.findall(r"num_stages=\d,\s*num_warps=\d", code)


def test_the_library_is_no_candidate() -> None:
    picks, code = asked(linear, mm(16), [spec(16, K), spec(N, K)], lambda text: text.startswith("mm "))
    assert (picks.text, picks.candidates) == ("aten mm", [])
    assert "extern_kernels.mm(" in code


def test_of_one_row_it_makes_a_reduction_without_a_choice() -> None:
    picks, code = asked(linear, mm(1), [spec(1, K), spec(N, K)], lambda text: pytest.fail("nothing is chosen from"))
    assert [dict(pick.config) for pick in picks.candidates] == [{"template": "reduction"}]
    assert "tl.sum(" in code
    assert "extern_kernels." not in code


def test_products_that_could_be_merged_have_a_pick_each() -> None:
    right = TensorSpec(shape=(K, N), dtype="bfloat16", stride=(1, K))
    problem = Problem(op="merged_mm", inputs=(spec(16, K), right, right), device="cuda", constants=(1, 2))
    picks, _ = asked(linear, problem, [spec(16, K), spec(N, K)], lambda text: "BLOCK_N=64" in text)
    assert picks.candidates == []
    assert picks.text


def test_it_is_a_stock_choice_that_no_entry_can_stand_for() -> None:
    from autokernel.backends import get_backend

    candidate = max_autotune_of(mm(16))
    with pytest.raises(ValueError, match="stock code"):
        get_backend(candidate.backend).export(candidate)
