"""Small real ops and backends: plain torch functions behind the package's protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import autokernel.backends
import autokernel.ops
from autokernel.backends import Built
from autokernel.evaluate.probes import join
from autokernel.records import DTYPE_BYTES, Candidate, Problem, TensorSpec

Kernel = Callable[..., Any]


class LinearOp:
    """x [M, K] times w [N, K] transposed."""

    name = "linear"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.nn.functional.linear(*inputs),)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        (m, k), (n, _) = problem.inputs[0].shape, problem.inputs[1].shape
        return {"m": m, "n": n, "k": k}

    def flops(self, problem: Problem) -> int:
        d = self.dims(problem)
        return 2 * d["m"] * d["n"] * d["k"]

    def num_bytes(self, problem: Problem) -> int:
        d = self.dims(problem)
        return sum(s.num_bytes for s in problem.inputs) + d["m"] * d["n"] * DTYPE_BYTES[problem.inputs[0].dtype]

    def find(self, graph: Any, constants: frozenset[str], device: str) -> list[Any]:
        return []


class AffineOp(LinearOp):
    """2 x + 1, of any dtype; no constants."""

    name = "affine"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * 2 + 1,)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        return {"n": problem.inputs[0].num_elements}

    def flops(self, problem: Problem) -> int:
        return 2 * problem.inputs[0].num_elements

    def num_bytes(self, problem: Problem) -> int:
        return 2 * problem.inputs[0].num_bytes


class SoftmaxOp(AffineOp):
    """Softmax over the last dimension, and its logarithm: two outputs."""

    name = "softmax"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inputs[0].softmax(-1), inputs[0].log_softmax(-1)


OPS = {op.name: op for op in (LinearOp(), AffineOp(), SoftmaxOp())}


def per_copy(problem: Problem, constants: list[list[torch.Tensor]], kernel: Kernel) -> Built:
    """A kernel for one copy, called for every copy with all inputs in order."""
    num_variables = len(problem.inputs) - len(problem.constants)

    def run(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs: list[Any] = []
        for i, fixed in enumerate(constants):
            result = kernel(*join(problem, flat[i * num_variables : (i + 1) * num_variables], fixed))
            outputs += result if isinstance(result, tuple) else (result,)
        return tuple(outputs)

    return Built(run=run, num_copies=len(constants))


@dataclass
class FakeBackend:
    """Builds what a function says; each test sets `make`."""

    name: str = "fake"
    make: Callable[[Candidate, list[list[torch.Tensor]]], Built] = field(
        default=lambda c, constants: per_copy(c.problem, constants, lambda *x: OPS[c.problem.op].reference(c.problem, *x))
    )
    missing: str | None = None
    unsupported: str | None = None

    def unavailable(self, device: str) -> str | None:
        return self.missing

    def supports(self, problem: Problem) -> str | None:
        return self.unsupported

    def build(self, candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        return self.make(candidate, constants)

    def export(self, candidate: Candidate) -> dict[str, Any]:
        return dict(candidate.config)


@pytest.fixture
def ops() -> Mapping[str, Any]:
    return OPS


@pytest.fixture
def wrap() -> Callable[[Problem, list[list[torch.Tensor]], Kernel], Built]:
    return per_copy


@pytest.fixture
def linear() -> Callable[..., Problem]:
    def make(dtype: str = "float32", m: int = 32, k: int = 256, n: int = 64) -> Problem:
        inputs = (TensorSpec.contiguous((m, k), dtype), TensorSpec.contiguous((n, k), dtype))
        return Problem(op="linear", inputs=inputs, device="cpu", constants=(1,))

    return make


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> FakeBackend:
    """The only backend there is, with the ops of this file; locks live in the test's own folder."""
    fake = FakeBackend()
    monkeypatch.setattr(autokernel.backends, "get_backend", lambda name: fake, raising=False)
    monkeypatch.setattr(autokernel.ops, "get_op", OPS.__getitem__, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return fake


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
