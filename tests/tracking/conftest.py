"""A synthetic run: invented numbers that have the form of a real one. Nothing here was measured."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from autokernel.environment import Environment
from autokernel.events import (
    Confirmed,
    EvalResult,
    Evaluated,
    Event,
    Exported,
    GraphTrial,
    ModelValidated,
    ModeTiming,
    Profiled,
    Proved,
    RunFinished,
    RunStarted,
    ScenarioResult,
    SearchPlanned,
    StageFinished,
    StageStarted,
)
from autokernel.records import (
    Candidate,
    Check,
    Evaluation,
    Hotspot,
    Measurement,
    Problem,
    Speedup,
    Status,
    TensorSpec,
    Verdict,
    Winner,
)

EXPERIMENT = """\
# synthetic: for tests and previews of the report only
name: synthetic-llama
model: {checkpoint: models/tiny_llama}
scenarios:
  prefill-1x512: {kind: prefill, batch: 1, length: 512}
  decode-b1: {kind: decode, batch: 1, context: 256}
  decode-b8: {kind: decode, batch: 8, context: 256}
search: {trials: 60, seconds: 600}
"""
_SHAPES = (  # op, M, K, N, epilogue, scenario, share
    ("mm", 512, 256, 1376, (), "prefill-1x512", 0.31),
    ("mm", 512, 688, 256, ("add",), "prefill-1x512", 0.17),
    ("mm", 512, 256, 768, (), "prefill-1x512", 0.14),
    ("mm", 1, 256, 1376, (), "decode-b1", 0.29),
    ("addmm", 8, 256, 1376, (), "decode-b8", 0.27),
    ("mm", 8, 688, 256, ("add",), "decode-b8", 0.12),
)
_FAILURES = (
    (Status.INVALID, "constraint `k_slices * 64 <= k` does not hold: 8 * 64 > 256"),
    (Status.BUILD_ERROR, "g++ failed: error: 'tile_m' was not declared in this scope"),
    (Status.RUN_ERROR, "RuntimeError: expected a contiguous weight"),
    (Status.WRONG, "max_error is 14.2x eager's own error; 2x is allowed"),
    (Status.TIMEOUT, "ran past 120 s and was killed"),
    (Status.CRASHED, "died of SIGSEGV <while timing>"),
    (Status.LOST, "the node went away"),
)


def problems() -> list[Problem]:
    """The synthetic hotspots' problems."""
    out = []
    for op, m, k, n, epilogue, _, _ in _SHAPES:
        weight = TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))
        inputs = (TensorSpec.contiguous((m, k), "bfloat16"), weight)
        out.append(Problem(op=op, inputs=inputs, device="cpu", constants=(1,), epilogue=epilogue))
    return out


def hotspots() -> tuple[Hotspot, ...]:
    out = []
    for problem, (_, _, _, _, _, scenario, share) in zip(problems(), _SHAPES, strict=True):
        time_us = share * 9000
        out.append(
            Hotspot(
                problem=problem,
                scenario=scenario,
                num_calls=6,
                time_us=time_us,
                share=share,
                weight=share / 3,
                roofline_us=time_us * 0.35,
                sites=("layers.0.mlp.up_proj",),
                producers=("rms_norm",),
                consumers=("silu",),
            )
        )
    return tuple(out)


def evaluation(candidate: Candidate, status: Status, latency_us: float, message: str = "", used: float = 0.5) -> Evaluation:
    passed = status is not Status.WRONG
    checks = (
        Check(name="max_error", value=used if passed else 14.2, limit=2.0, passed=passed),
        Check(name="unwritten", value=0.0, limit=0.0, passed=True),
    )
    timed = status is Status.OK
    return Evaluation(
        candidate=candidate,
        status=status,
        message=message,
        verdict=Verdict(checks=checks) if timed or not passed else None,
        measurement=Measurement(
            median_us=latency_us,
            spread_us=latency_us * 0.03,
            num_samples=20,
            regime="cpu, 2 threads, cold L2, 8 calls a sample",
        )
        if timed
        else None,
        log_tail="" if timed else f"... last lines of the synthetic log of {candidate.label}",
        build_s=1.25,
        total_s=3.5,
    )


def _evaluations(rng: random.Random, num_evaluations: int) -> list[Evaluated]:
    out: list[Evaluated] = []
    seen: set[str] = set()
    while len(out) < num_evaluations:
        index = len(out)
        which = index % len(_SHAPES)
        problem, base_us = problems()[which], 60.0 + 90 * which
        round_ = index // len(_SHAPES)
        if round_ == 0:
            candidate, origin, latency_us = Candidate(problem=problem, backend="aten"), "stock", base_us
        elif round_ == 1:
            candidate = Candidate(problem=problem, backend="inductor", config={"template": "stock", "freezing": True})
            origin, latency_us = "stock", base_us * 1.04
        else:
            config = {
                "template": "cpp_gemm",
                "thread_factors": rng.choice(["1,2,1", "2,1,1", "1,1,2"]),
                "k_slices": rng.choice([1, 2, 4, 8]),
                "block_m": rng.choice([16, 32, 64]),
                "block_n": rng.choice([16, 32, 64, 128]),
                "block_k": rng.choice([64, 128, 256]),
                "freezing": rng.random() < 0.5,
            }
            candidate = Candidate(problem=problem, backend="inductor", config=config)
            origin = "tpe"
            good = (config["k_slices"] == 2) + (config["block_n"] >= 64) + 0.5 * bool(config["freezing"])
            latency_us = base_us * (1.25 - 0.18 * good) * rng.uniform(0.95, 1.1)
        if candidate.id in seen:
            continue
        seen.add(candidate.id)
        number = len(out) + 1
        if origin == "tpe" and number % 5 == 0:
            status, message = _FAILURES[(number // 5) % len(_FAILURES)]
            out.append(Evaluated(evaluation=evaluation(candidate, status, 0, message), origin=origin, number=number))
        else:
            made = evaluation(candidate, Status.OK, latency_us, used=rng.uniform(0.2, 1.8))
            out.append(Evaluated(evaluation=made, origin=origin, number=number))
    return out


def _confirmations(evaluated: list[Evaluated]) -> list[Confirmed]:
    out = []
    for index, hotspot in enumerate(hotspots()):
        mine = [e.evaluation for e in evaluated if e.evaluation.candidate.problem == hotspot.problem]
        timed = [e for e in mine if e.measurement is not None]
        baseline = next(e for e in timed if e.candidate.backend == "aten")
        best = min((e for e in timed if e.candidate.config), key=lambda e: e.measurement.median_us)  # type: ignore[union-attr]
        assert best.measurement is not None
        assert baseline.measurement is not None
        ratio = baseline.measurement.median_us / best.measurement.median_us
        low = ratio * (0.97 if index != 2 else 0.8)
        accepted = low > 1.02
        speedup = Speedup(ratio=ratio, low=low, high=ratio * 1.03, num_rounds=41, num_discarded=index % 3)
        winner = Winner(
            hotspot=hotspot,
            evaluation=best,
            baseline=baseline.candidate,
            baseline_us=baseline.measurement.median_us,
            winner_us=best.measurement.median_us,
            speedup=speedup,
        )
        out.append(
            Confirmed(
                problem_key=hotspot.problem.key,
                candidate=best.candidate,
                baseline=baseline.candidate,
                speedup=speedup,
                accepted=accepted,
                reason="clear of 1.02" if accepted else f"the interval begins at {low:.3f}, not above 1.02",
                winner=winner if accepted else None,
            )
        )
    return out


def _validation(dropped: str) -> ModelValidated:
    scenarios = []
    for name, us, gain in (("prefill-1x512", 9100.0, 1.31), ("decode-b1", 2350.0, 1.22), ("decode-b8", 3120.0, 1.04)):
        factors = {"eager": 1.21, "default": 1.04, "max-autotune": 1.0, "bundle": 1 / gain}
        modes = tuple(
            ModeTiming(mode=m, median_us=us * f, spread_us=us * f * 0.02, compile_s=0 if m == "eager" else 14.5)
            for m, f in factors.items()
        )
        speedup = Speedup(ratio=gain, low=gain * 0.985, high=gain * 1.015, num_rounds=41)
        scenarios.append(ScenarioResult(scenario=name, modes=modes, best_stock="max-autotune", speedup=speedup, passed=True))
    verdict = Verdict(
        checks=(
            Check(name="prefill-1x512: relative error", value=1.1, limit=2.0, passed=True),
            Check(name="top-1 disagreement", value=0.002, limit=0.01, passed=True),
        )
    )
    metric = EvalResult(
        metric="bits_per_byte",
        stock=1.4213,
        bundle=1.4214,
        worse_by=0.00007,
        worse_by_high=0.0004,
        limit=0.002,
        passed=True,
        num_samples=64,
    )
    why = "decode-b8 was 2 % slower end to end with it"
    return ModelValidated(verdict=verdict, evals=(metric,), scenarios=tuple(scenarios), dropped={dropped: why})


def make_events(num_evaluations: int = 60, seed: int = 7, run_id: str = "20261121-014900-3f2a") -> list[Event]:
    """3 scenarios, 6 hotspots, every status; a winner that is dropped and a finalist that is refused."""
    rng = random.Random(seed)
    environment = Environment(
        device="cpu",
        device_name="Synthetic CPU (family 1 model 2)",
        isa="AVX512",
        num_units=2,
        torch="2.13.0+cpu",
        python="3.11.7",
        platform="Linux-synthetic",
        libraries={"numpy": "2.3.0", "transformers": "5.23.0"},
    )
    evaluated = _evaluations(rng, num_evaluations)
    confirmed = _confirmations(evaluated)
    one = Speedup(ratio=1.03, low=1.01, high=1.05, num_rounds=41)
    none = Speedup(ratio=0.99, low=0.97, high=1.0, num_rounds=41)
    keys = [p.key for p in problems()]
    return [
        RunStarted(
            run_id=run_id,
            name="synthetic-llama",
            experiment=EXPERIMENT,
            experiment_digest="d1gest",
            environment=environment,
            seed=0,
            version="0.1.0",
            git_commit="0123456789abcdef0123456789abcdef01234567",
        ),
        StageStarted(stage="profile", total=3),
        Profiled(
            hotspots=hotspots(),
            scenario_us={"prefill-1x512": 9464.0, "decode-b1": 2444.0, "decode-b8": 3244.8},
            read_gb_per_s=21.4,
            peak_tflops={"bfloat16": 0.61, "float32": 0.2},
        ),
        StageFinished(stage="profile", seconds=31.2),
        SearchPlanned(trials=dict.fromkeys(keys, num_evaluations // 6)),
        StageStarted(stage="search", total=num_evaluations, budget_s=600),
        *evaluated,
        StageFinished(stage="search", seconds=141.0),
        StageStarted(stage="confirm", total=6),
        *confirmed,
        StageFinished(stage="confirm", seconds=22.0),
        GraphTrial(options={"freezing": True}, speedups={"decode-b1": one, "decode-b8": one}, score=1.03, accepted=True),
        GraphTrial(
            options={"freezing": True, "cpp.gemm_max_k_slices": 4},
            speedups={"decode-b1": none},
            score=0.99,
            accepted=False,
            reason="slower",
        ),
        _validation(confirmed[5].problem_key),
        StageFinished(stage="validate", seconds=40.0),
        Exported(folder="bundle", archive="bundle.zip", digest="ab12cd34ef56ab78", num_entries=4, stock=False),
        Proved(
            passed=True,
            num_hits=4,
            num_entries=4,
            num_benchmarks=0,
            compile_s=15.1,
            stock_compile_s=14.5,
            message="all entries hit",
            scenario_us={"prefill-1x512": 6950.0, "decode-b1": 1930.0, "decode-b8": 3001.0},
        ),
        StageFinished(stage="prove", seconds=30.0),
        RunFinished(outcome="won", message="4 winners; prefill-1x512 is 1.31x faster", seconds=268.4),
    ]


@pytest.fixture(scope="session")
def synthetic_run() -> Callable[..., list[Event]]:
    return make_events


@pytest.fixture(scope="session")
def synthetic_events() -> list[Event]:
    return make_events()
