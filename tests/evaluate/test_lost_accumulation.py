"""Products whose parts are rounded before they are added: refused wherever the left matrix stands among the inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autokernel.backends import Built
from autokernel.evaluate.numerics import check
from autokernel.evaluate.probes import contraction_input, make_constants
from autokernel.ops import get_op
from autokernel.records import Problem, TensorSpec

M, K, N, COPIES = 8, 512, 64, 2
X, W, RESIDUAL = (TensorSpec.contiguous(shape, "bfloat16") for shape in ((M, K), (K, N), (M, N)))


def generated(program: str, *inputs: TensorSpec, weight: int) -> Problem:
    return Problem(op="generated", inputs=inputs, device="cpu", constants=(weight,), scalars=(("program", program),))


CASES: dict[str, tuple[Problem, int]] = {
    "mm": (Problem(op="mm", inputs=(X, W), device="cpu", constants=(1,)), 0),
    "addmm": (Problem(op="addmm", inputs=(RESIDUAL, X, W), device="cpu", constants=(2,)), 1),
    "residual first": (generated("t0 = mm(i1, i2); o0 = add(i0, t0)", RESIDUAL, X, W, weight=2), 1),
    "residual last": (generated("t0 = mm(i0, i1); o0 = add(t0, i2)", X, W, RESIDUAL, weight=1), 0),
}


def accurate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.float() @ w.float()


def in_rounded_parts(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    half = K // 2
    return (x[:, :half] @ w[:half]).float() + (x[:, half:] @ w[half:]).float()


def passes(name: str, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bool:
    problem, left = CASES[name]
    constants = make_constants(problem, 1, COPIES)
    each = len(problem.inputs) - len(problem.constants)

    def run(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = []
        for copy in range(COPIES):
            given = list(flat[copy * each : (copy + 1) * each])
            value = product(given.pop(left), constants[copy][0])
            rounded = value if name in ("mm", "addmm") else value.bfloat16()
            results.append(sum(given, rounded).bfloat16())
        return tuple(results)

    return check(get_op(problem.op), problem, Built(run=run, num_copies=COPIES), constants, seed=1).passed


@pytest.mark.parametrize("name", CASES)
def test_a_sum_of_rounded_parts_is_refused_and_an_accurate_one_is_not(name: str) -> None:
    assert contraction_input(CASES[name][0]) == CASES[name][1]
    assert passes(name, accurate)
    assert not passes(name, in_rounded_parts)
