"""Evaluation on a GPU: honest kernels pass, dishonest ones are caught, builds launch nothing, memory and processes survive."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

import autokernel.backends
from autokernel.errors import JobCrashed
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.evaluate.probes import make_constants
from autokernel.evaluate.roofline import Ceilings, measure_ceilings, physics_check
from autokernel.ops import get_op
from autokernel.records import Candidate, Evaluation, Measurement, Status
from autokernel.workers.limits import worker_env
from autokernel.workers.pool import LocalPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]

if torch.cuda.is_available():
    from gpu import cuda_problems
    from gpu.cuda_problems import TILE, FunctionBackend, Kernel, merged_problem, mm_problem


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return measure_ceilings("cuda", dtypes=("bfloat16",), budget_s=1.0)


def test_stock_passes_and_costs_the_device_little(ceilings: Ceilings) -> None:
    job = EvaluateCandidate(
        candidate=Candidate(problem=mm_problem(), backend="aten", config={"prepack": False}), ceilings=ceilings, max_copies=32
    )
    job()  # what a process does once (handles, modules) is no part of the second
    result, phases = job.in_phases()
    assert result.status is Status.OK, result.message
    assert result.measurement is not None
    assert result.measurement.regime.startswith("cuda graph, cold L2, ")
    assert 0 < result.device_s < 1
    assert result.device_s == phases["device"]
    assert {"reference", "build", "wait", "device"} == set(phases)


def test_a_large_prefill_fits_and_stays_quick(ceilings: Ceilings) -> None:
    problem = mm_problem(m=8192, n=28672, k=4096)
    job = EvaluateCandidate(candidate=Candidate(problem=problem, backend="aten", config={"prepack": False}), ceilings=ceilings)
    result = job()
    assert result.status is Status.OK, result.message
    assert result.device_s < 4


@pytest.mark.parametrize("problem", ["mm", "merged"])
def test_building_launches_nothing(problem: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    from autokernel.backends.compiled import build

    def kernels_of(action: Callable[[], object]) -> list[str]:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            action()
            torch.cuda.synchronize()
        on_device = [e for e in trace.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
        return [e.name for e in on_device if "sync" not in e.name.lower()]

    if not kernels_of(lambda: torch.ones(8, device="cuda") + 1):
        pytest.skip("the profiler sees no kernels on this machine")
    target = mm_problem() if problem == "mm" else merged_problem()
    candidate = Candidate(problem=target, backend="aten", config={"prepack": False})
    constants = make_constants(target, 0, 2)
    build(candidate, constants, stock=True)  # what Inductor sets up once is not what this is about
    built: list[Any] = []
    assert kernels_of(lambda: built.append(build(candidate, constants, stock=True))) == []
    inputs = [torch.randn(16, target.inputs[0].shape[1], device="cuda").bfloat16() for _ in range(2)]
    outputs: list[Any] = []
    assert kernels_of(lambda: outputs.append(built[0].run(*inputs)))
    torch.testing.assert_close(outputs[0][0], inputs[0] @ constants[0][0])


@pytest.mark.parametrize("config", [{"prepack": False}, {"merge": "concat"}], ids=["stock", "folded weights"])
def test_memory_is_given_back(config: dict[str, Any]) -> None:
    problem = merged_problem()
    job = EvaluateCandidate(candidate=Candidate(problem=problem, backend="aten", config=config), max_copies=32)
    job()
    gc.collect()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for seed in range(2):
        result = EvaluateCandidate(candidate=job.candidate, seed=seed, max_copies=32)()
        assert result.status is Status.OK, result.message
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert torch.cuda.memory_reserved() <= reserved + (64 << 20)


def _late() -> Kernel:
    side = torch.cuda.Stream()

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], w.shape[1], dtype=x.dtype, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)
            torch.mm(x, w, out=out)
        return out

    return kernel


def _unwritten() -> Kernel:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[0], w.shape[1], dtype=x.dtype, device="cuda")
        out[:, :-8] = torch.mm(x, w[:, :-8])
        return out

    return kernel


def _changes_input() -> Kernel:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.mm(x, w)
        x[0, 0] += 1
        return out

    return kernel


def _changes_weight() -> Kernel:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch.mm(x, w)
        w[-1, -1] += 1
        return out

    return kernel


def _reuses_output() -> Kernel:
    kept: dict[int, torch.Tensor] = {}

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = kept.setdefault(w.data_ptr(), torch.empty(x.shape[0], w.shape[1], dtype=x.dtype, device="cuda"))
        return torch.mm(x, w, out=out)

    return kernel


def _idle_when_timed() -> Kernel:
    """Computes until it is captured, and returns what it knows from then on."""
    kept: dict[int, torch.Tensor] = {}

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            return kept[w.data_ptr()].clone()
        kept[w.data_ptr()] = torch.mm(x, w)
        return kept[w.data_ptr()].clone()

    return kernel


def _remembers_address() -> Kernel:
    kept: dict[int, torch.Tensor] = {}

    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(x.data_ptr(), torch.mm(x, w)).clone()

    return kernel


def _drops_half_of_k() -> Kernel:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        half = x.shape[1] // 2
        return torch.mm(x[:, :half], w[:half]) * 2

    return kernel


def _honest() -> Kernel:
    return torch.mm


DISHONEST: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "late": (_late, ("finished_on_return",)),
    # the allocator may hand out a block that was not poisoned, but never one with the right values in it
    "unwritten": (_unwritten, ("outputs_written", "nonfinite_placement", "error_max[model]")),
    "changes input": (_changes_input, ("inputs_unchanged",)),
    "changes weight": (_changes_weight, ("inputs_unchanged",)),
    "reuses output": (_reuses_output, ("no_alias",)),
    "idle when timed": (_idle_when_timed, ("audit_while_timing",)),
    "remembers address": (_remembers_address, ("follows_inputs",)),
    "drops half of k": (_drops_half_of_k, ("error_max[model]",)),
}


def _evaluate(name: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    backend = FunctionBackend({name: make})
    monkeypatch.setattr(autokernel.backends, "get_backend", lambda _: backend)
    problem = mm_problem(m=16, n=1024, k=1024)
    candidate = Candidate(problem=problem, backend="functions", config={"kernel": name})
    return EvaluateCandidate(candidate=candidate, max_copies=4)()


@pytest.mark.parametrize("kind", DISHONEST)
def test_dishonest_kernels_are_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, checks = DISHONEST[kind]
    result = _evaluate(kind, make, monkeypatch)
    assert result.status is Status.WRONG, result.message
    assert result.verdict is not None
    assert {check.name for check in result.verdict.failures} & set(checks), result.message


def test_the_same_kernel_honest_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _evaluate("honest", _honest, monkeypatch)
    assert result.status is Status.OK, result.message
    assert result.measurement is not None
    assert "warm L2" in result.measurement.regime  # four copies of 2 MB


def test_faster_than_memory_is_impossible(ceilings: Ceilings) -> None:
    problem = mm_problem()
    measurement = Measurement(median_us=1.0, spread_us=0.0, num_samples=9, regime="cuda graph")
    assert not physics_check(measurement, problem, get_op("mm"), ceilings, num_copies=4).passed


def test_no_product_reads_faster_than_the_ceiling(ceilings: Ceilings) -> None:
    problem = mm_problem(m=1, n=128256)
    config = {
        "kernel": "skinny_mm", "mode": "vector", "BLOCK_M": 1, "BLOCK_N": 4, "BLOCK_K": 1024, "num_stages": 4, "num_warps": 2,
        "split_k": 1, "tma": False, "waves": 0,
    }  # fmt: skip
    result = EvaluateCandidate(candidate=Candidate(problem=problem, backend="triton", config=config), ceilings=ceilings)()
    assert result.measurement is not None, result.message
    speed = problem.inputs[1].num_bytes / (result.measurement.median_us * 1e3)
    assert 0.9 * ceilings.read_gb_per_s < speed < 1.02 * ceilings.read_gb_per_s


def test_an_illegal_access_costs_its_job_and_its_process_only() -> None:
    pool = LocalPool(1, env=worker_env(1), preload=("torch",))
    try:
        with pytest.raises(JobCrashed, match="unable to use the GPU"):
            pool.submit(cuda_problems.IllegalAccess(), 60).result()
        assert pool.submit(cuda_problems.UseDevice(), 60).result() == 4
    finally:
        pool.close()


def test_a_turn_that_never_ends_ends_its_process() -> None:
    pool = LocalPool(1, env=worker_env(1), preload=("torch",))
    try:
        start = time.monotonic()
        hanging = pool.submit(cuda_problems.Hang(3.0), 60)
        with pytest.raises(JobCrashed, match="exit code 124"):
            hanging.result()
        assert time.monotonic() - start < 45
        assert pool.submit(cuda_problems.UseDevice(), 60).result() == 4
    finally:
        pool.close()


def test_many_workers_share_the_device(ceilings: Ceilings) -> None:
    problems = [mm_problem(m=m) for m in (1, 16)]
    candidates = [Candidate(problem=p, backend="aten", config={"prepack": False}) for p in problems]
    candidates += [Candidate(problem=p, backend="inductor", config=TILE) for p in problems]
    candidates += [Candidate(problem=merged_problem(), backend="aten", config={"merge": "concat"})]
    pool = LocalPool(4, env=worker_env(1), preload=("torch",))
    start = time.monotonic()
    try:
        futures: list[Future[Evaluation]] = [
            pool.submit(EvaluateCandidate(candidate=c, ceilings=ceilings, max_copies=32), 120) for c in candidates
        ]
        results = [future.result() for future in futures]
    finally:
        pool.close()
    assert [r.status for r in results] == [Status.OK] * len(results), [r.message for r in results]
    assert sum(r.device_s for r in results) < time.monotonic() - start
