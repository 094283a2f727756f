"""Problems, kernels and jobs for the tests of evaluation on a GPU. Importable in workers' children."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from autokernel.backends import Built
from autokernel.evaluate.call_graphs import graph_of
from autokernel.evaluate.probes import join
from autokernel.evaluate.turns import Turns, leave
from autokernel.records import Candidate, ConfigValue, Problem, TensorSpec

Kernel = Callable[..., torch.Tensor]

TILE: dict[str, ConfigValue] = {
    "template": "mm", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_stages": 4, "num_warps": 4, "GROUP_M": 8,
}  # fmt: skip


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def weight(k: int, n: int) -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))


def mm_problem(m: int = 16, n: int = 4096, k: int = 4096) -> Problem:
    return Problem(op="mm", inputs=(spec(m, k), weight(k, n)), device="cuda", constants=(1,))


def merged_problem(m: int = 16, n: int = 2048, k: int = 2048) -> Problem:
    return Problem(op="merged_mm", inputs=(spec(m, k), weight(k, n), weight(k, n)), device="cuda", constants=(1, 2))


def per_copy(problem: Problem, constants: list[list[torch.Tensor]], kernel: Kernel) -> Built:
    """A kernel for one copy, called for every copy with all inputs in order."""
    num_variables = len(problem.inputs) - len(problem.constants)

    def run(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [flat[i * num_variables : (i + 1) * num_variables] for i in range(len(constants))]
        return tuple([kernel(*join(problem, part, fixed)) for part, fixed in zip(parts, constants, strict=True)])

    return Built(run=run, num_copies=len(constants))


@dataclass
class FunctionBackend:
    """Builds the kernel that a candidate's config names; a fresh one per build."""

    kernels: dict[str, Callable[[], Kernel]] = field(default_factory=dict)
    name: str = "functions"

    def unavailable(self, device: str) -> str | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        return None

    def build(self, candidate: Candidate, constants: list[list[torch.Tensor]]) -> Built:
        return per_copy(candidate.problem, constants, self.kernels[str(candidate.config["kernel"])]())

    def export(self, candidate: Candidate) -> dict[str, Any]:
        return dict(candidate.config)


@dataclass(frozen=True)
class IllegalAccess:
    """A job whose kernel reads far outside of its tensor: the process's CUDA context is dead after it."""

    def __call__(self) -> int:
        out = torch.zeros(1, device="cuda")
        try:
            _read_far_away[(1,)](out, 1 << 45)
            torch.cuda.synchronize()
        except RuntimeError as error:
            leave("cuda", f"running it failed: {str(error).splitlines()[0]}")
        return 0


@dataclass(frozen=True)
class CaptureOfWait:
    """A job that tries to capture a call which waits for the device."""

    def __call__(self) -> int:
        def waits() -> torch.Tensor:
            return torch.full((1,), torch.ones(4, device="cuda").sum().item(), device="cuda")

        graph_of(waits, 1)
        return 0


@dataclass(frozen=True)
class Hang:
    """A job that keeps the device for longer than a turn may last."""

    longest_s: float

    def __call__(self) -> int:
        with Turns("cuda", self.longest_s).take("a kernel that hangs", exclusive=True):
            torch.cuda._sleep(20_000_000_000)  # ten seconds
            torch.cuda.synchronize()
        return 0


@dataclass(frozen=True)
class UseDevice:
    """A job that any healthy process can do."""

    def __call__(self) -> float:
        return float(torch.ones(4, device="cuda").sum())


try:
    import triton
    import triton.language as tl

    @triton.jit
    def _read_far_away(out, distance):  # type: ignore[no-untyped-def]
        tl.store(out, tl.load(out + distance))

except ImportError:  # no Triton, no GPU
    pass
