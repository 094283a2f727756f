"""Kernels that are wrong, or only look right: each is caught, by the check that is named for it."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.evaluate.roofline import Ceilings
from autokernel.records import Candidate, Status

pytestmark = pytest.mark.clock

linear_of = torch.nn.functional.linear


def zeros() -> Any:
    return lambda x, w: torch.zeros(x.shape[0], w.shape[0], dtype=x.dtype)


def constant_output() -> Any:
    kept: list[torch.Tensor] = []

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if not kept:
            kept.append(linear_of(x, w))
        return kept[0].clone()

    return kernel


def cached_by_address() -> Any:
    kept: dict[int, torch.Tensor] = {}

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in kept:
            kept[x.data_ptr()] = linear_of(x, w)
        return kept[x.data_ptr()].clone()

    return kernel


def cached_by_first_call() -> Any:
    """Keeps the weights' product with what it saw first, per weight."""
    kept: dict[int, torch.Tensor] = {}

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(w.data_ptr(), linear_of(x, w)).clone()

    return kernel


def remembers_buffers() -> Any:
    """Right as long as nobody moves the inputs: reads the addresses of its first call, like a captured graph."""
    kept: dict[int, torch.Tensor] = {}

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_of(kept.setdefault(w.data_ptr(), x), w)

    return kernel


def mutates_input() -> Any:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = linear_of(x, w)
        x[0, 0] += 1
        return out

    return kernel


def mutates_constant() -> Any:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = linear_of(x, w)
        w[-1, -1] *= 1.0001
        return out

    return kernel


def aliases_earlier_output() -> Any:
    kept: dict[int, torch.Tensor] = {}

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = kept.setdefault(w.data_ptr(), torch.empty(x.shape[0], w.shape[0], dtype=x.dtype))
        return torch.mm(x, w.t(), out=out)

    return kernel


def leaves_elements_unwritten() -> Any:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
        out[:, :-1] = linear_of(x, w[:-1])
        out[:-1, -1] = linear_of(x[:-1], w[-1:])[:, 0]
        return out

    return kernel


def wrong_dtype() -> Any:
    return lambda x, w: linear_of(x, w).double()


def wrong_strides() -> Any:
    return lambda x, w: torch.mm(w, x.t()).t()


def wrong_shape() -> Any:
    return lambda x, w: linear_of(x, w)[:-1].clone()


def too_many_outputs() -> Any:
    return lambda x, w: (linear_of(x, w), torch.zeros(1))


def low_precision_accumulation() -> Any:
    """Sums partial products in bfloat16 along K."""

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.bfloat16)
        for k in range(0, x.shape[1], 16):
            total += linear_of(x[:, k : k + 16].bfloat16(), w[:, k : k + 16].bfloat16())
        return total.to(x.dtype)

    return kernel


def low_precision_inputs() -> Any:
    return lambda x, w: linear_of(x.bfloat16(), w.bfloat16()).to(x.dtype)


def swallows_nan() -> Any:
    return lambda x, w: torch.nan_to_num(linear_of(x, w), nan=0.0)


def saturates() -> Any:
    """Right at the model's scale only."""
    return lambda x, w: linear_of(x, w).clamp(-1e4, 1e4)


def flushes_tiny() -> Any:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = linear_of(x, w)
        return torch.where(out.abs() < 1e-7, 0, out)

    return kernel


def skips_zero_rows_wrongly() -> Any:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = linear_of(x, w)
        out[(x == 0).all(dim=1)] = 1e-3
        return out

    return kernel


def finishes_later() -> Any:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], w.shape[0], dtype=x.dtype)

        def work() -> None:
            time.sleep(0.002)
            with torch.no_grad():
                out.copy_(linear_of(x, w))

        threading.Thread(target=work).start()
        return out

    return kernel


class Lazy(torch.Tensor):
    """Would compute when somebody looks."""


def lazy_tensor() -> Any:
    return lambda x, w: linear_of(x, w).as_subclass(Lazy)


def noise_within_budget() -> Any:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        exact = linear_of(x, w)
        return exact * (1 + 1e-8 * torch.randint(0, 2, exact.shape, dtype=torch.float64)).float().nextafter(
            torch.ones(()) + torch.randint(0, 2, exact.shape)
        )

    return kernel


def skips_every_second_call() -> Any:
    """Per weight: computes, then gives the same again, then computes."""
    kept: dict[int, torch.Tensor] = {}

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if w.data_ptr() in kept:
            return kept.pop(w.data_ptr())
        kept[w.data_ptr()] = linear_of(x, w)
        return kept[w.data_ptr()].clone()

    return kernel


def skips_some_copies() -> Any:
    """One copy of all is computed; the others get its output."""
    calls = [0]
    kept: list[torch.Tensor] = []

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] % 4 == 1:
            kept[:] = [linear_of(x, w)]
        return kept[0].clone()

    return kernel


def idle_after(num_calls: int, *, slow: bool) -> Any:
    """Honest for a while, then hands out whatever memory holds."""
    calls = [0]

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] <= num_calls:
            return linear_of(x, w)
        if slow:
            time.sleep(1e-4)
        return torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)

    return kernel


def reads_freed_memory() -> Any:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        result = linear_of(x, w)
        address, size = result.data_ptr(), result.nbytes
        out = torch.empty_like(result)
        del result
        ctypes.memmove(out.data_ptr(), address, size)
        return out

    return kernel


# kind -> (kernel, the check named for it)
DISHONEST: dict[str, tuple[Callable[[], Any], str]] = {
    "zeros": (zeros, "error_norm[model]"),
    "constant output": (constant_output, "follows_inputs"),
    "cached by address": (cached_by_address, "follows_inputs"),
    "cached by first call": (cached_by_first_call, "follows_inputs"),
    "remembers buffers": (remembers_buffers, "fresh_buffers"),
    "mutates an input": (mutates_input, "inputs_unchanged"),
    "mutates a constant": (mutates_constant, "inputs_unchanged"),
    "aliases an earlier output": (aliases_earlier_output, "no_alias"),
    "leaves elements unwritten": (leaves_elements_unwritten, "outputs_written"),
    "wrong dtype": (wrong_dtype, "metadata"),
    "wrong strides": (wrong_strides, "metadata"),
    "wrong shape": (wrong_shape, "metadata"),
    "too many outputs": (too_many_outputs, "metadata"),
    "low-precision accumulation": (low_precision_accumulation, "error_norm[cancellation]"),
    "low-precision inputs": (low_precision_inputs, "error_norm[model]"),
    "swallows NaN": (swallows_nan, "nonfinite_placement"),
    "saturates": (saturates, "error_max[large]"),
    "flushes tiny values": (flushes_tiny, "error_norm[tiny]"),
    "wrong on zero rows": (skips_zero_rows_wrongly, "error_max[zero_rows]"),
    "finishes later": (finishes_later, "finished_on_return"),
    "lazy tensor": (lazy_tensor, "plain_tensors"),
    "skips every second call": (skips_every_second_call, "follows_inputs"),
    "skips some copies": (skips_some_copies, "error_norm[model]"),
    "reads freed memory": (reads_freed_memory, "error_norm[model]"),
}


def evaluate(backend: Any, wrap: Any, problem: Any, kernel: Any, **options: Any) -> Any:
    backend.make = lambda candidate, constants: wrap(candidate.problem, constants, kernel)
    candidate = Candidate(problem=problem, backend="fake")
    return EvaluateCandidate(candidate=candidate, threads=1, max_copies=4, **options)()


@pytest.mark.parametrize("kind", DISHONEST)
def test_caught_by_the_check_named_for_it(kind: str, backend: Any, wrap: Any, linear: Any) -> None:
    make, name = DISHONEST[kind]
    evaluation = evaluate(backend, wrap, linear(), make())
    assert evaluation.status is Status.WRONG, evaluation.message
    failed = [check.name for check in evaluation.verdict.failures]
    assert name in failed
    assert evaluation.measurement is None
    assert failed[0] in evaluation.message


def test_input_returned_as_output(backend: Any, wrap: Any) -> None:
    from autokernel.records import Problem, TensorSpec

    problem = Problem(op="affine", inputs=(TensorSpec.contiguous((64, 64), "float32"),), device="cpu")
    evaluation = evaluate(backend, wrap, problem, lambda x: x.mul_(2).add_(1))
    assert {"no_alias", "inputs_unchanged"} <= {check.name for check in evaluation.verdict.failures}
    evaluation = evaluate(backend, wrap, problem, lambda x: x)
    assert "no_alias" in {check.name for check in evaluation.verdict.failures}


def test_right_before_timing_and_wrong_after(backend: Any, wrap: Any, linear: Any) -> None:
    # 4 copies: 5 calls before timing; memory handed out unwritten often still holds the right result of the last call
    evaluation = evaluate(backend, wrap, linear(), idle_after(4 * 8, slow=True))
    assert evaluation.status is Status.WRONG
    failed = {check.name for check in evaluation.verdict.failures}
    assert {"audit_while_timing", "repeat_fresh"} <= failed
    assert not any(name.startswith("error_") for name in failed)


def test_faster_than_physics(backend: Any, wrap: Any, linear: Any) -> None:
    ceilings = Ceilings(read_gb_per_s=40, tflops={"float32": 0.15})
    problem = linear(m=512, k=1024, n=1024)
    # 2 copies of 6 MiB: 6 calls before timing, and what is left is used up by warming up
    evaluation = evaluate(backend, wrap, problem, idle_after(2 * 8, slow=False), ceilings=ceilings)
    physics = next(check for check in evaluation.verdict.failures if check.name == "physics")
    assert physics.value > 10
    assert evaluation.status is Status.WRONG
    assert "GB/s" in evaluation.message


def test_nondeterminism_is_a_remark_unless_it_is_forbidden(backend: Any, wrap: Any, linear: Any) -> None:
    evaluation = evaluate(backend, wrap, linear(), noise_within_budget())
    assert evaluation.status is Status.OK, evaluation.message
    assert not evaluation.deterministic
    evaluation = evaluate(backend, wrap, linear(), noise_within_budget(), deterministic_required=True)
    assert evaluation.status is Status.WRONG
    assert [check.name for check in evaluation.verdict.failures] == ["deterministic"]
