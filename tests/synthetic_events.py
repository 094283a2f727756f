"""A run's events with invented numbers, for tests of what displays them. Nothing here was measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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
    StageProgress,
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
from autokernel.tracking.journal import Journal

NAME, RUN_ID = "invented", "20990101-000000-abcd"
ENVIRONMENT = Environment(
    device="cpu", device_name="Invented CPU 9000", isa="AVX512", num_units=2, torch="2.13.0+cpu", python="3.11.7"
)
PASSED = Verdict(checks=(Check(name="error", value=0.5, limit=1.0, passed=True),))


def gemm(m: int, n: int, k: int, op: str = "mm", epilogue: tuple[str, ...] = ()) -> Problem:
    """A bf16 GEMM with a constant weight."""
    x, w = TensorSpec.contiguous((m, k), "bfloat16"), TensorSpec.contiguous((k, n), "bfloat16")
    extra = tuple(TensorSpec.contiguous((m, n), "bfloat16") for name in epilogue if name in ("add", "mul"))
    return Problem(op=op, inputs=(x, w, *extra), device="cpu", constants=(1,), epilogue=epilogue)


def merged(m: int, ns: tuple[int, ...], k: int) -> Problem:
    """GEMMs that share their input."""
    weights = tuple(TensorSpec.contiguous((k, n), "bfloat16") for n in ns)
    x = TensorSpec.contiguous((m, k), "bfloat16")
    return Problem(op="merged_mm", inputs=(x, *weights), device="cpu", constants=tuple(range(1, len(ns) + 1)))


UP, DOWN, QKV, HEAD, TINY = gemm(512, 1280, 384), gemm(512, 384, 1280, epilogue=("add",)), merged(1, (384, 128, 128), 384), \
    gemm(1, 256, 384), gemm(1, 8, 384)  # fmt: skip
STOCK, PACKED = {"prepack": False}, {"template": "onednn", "prepack": True}
CPP = {"template": "cpp_gemm", "prepack": True, "thread_factors": "1,2,1", "cache_blocking": "4,2,6"}


def hotspot(problem: Problem, scenario: str, share: float, time_us: float) -> Hotspot:
    return Hotspot(
        problem=problem,
        scenario=scenario,
        num_calls=6,
        time_us=time_us,
        share=share,
        weight=share / 2,
        roofline_us=time_us / 3,
        producers=("aten.mul.Tensor",),
        consumers=("aten.silu.default",),
    )


def trial(
    number: int, problem: Problem, us: float | None, config: dict[str, object], origin: str = "tpe", status: Status = Status.OK
) -> Evaluated:
    """OK with a time, or failed with a status."""
    backend = "aten" if config == STOCK else "inductor"
    candidate = Candidate(problem=problem, backend=backend, config=config)  # type: ignore[arg-type]
    if us is None:
        evaluation = Evaluation(candidate=candidate, status=status, message=f"it was {status} on purpose")
    else:
        measured = Measurement(median_us=us, spread_us=0.1, num_samples=30, regime="invented")
        evaluation = Evaluation(candidate=candidate, status=Status.OK, verdict=PASSED, measurement=measured)
    return Evaluated(evaluation=evaluation, origin=origin, number=number)


def confirmation(spot: Hotspot, contender: Evaluated, stock: Evaluated, low: float, accepted: bool) -> Confirmed:
    evaluation, baseline = contender.evaluation, stock.evaluation
    assert evaluation.measurement is not None
    assert baseline.measurement is not None
    speedup = Speedup(ratio=low + 0.03, low=low, high=low + 0.06, num_rounds=41)
    winner = None
    if accepted:
        winner = Winner(
            hotspot=spot,
            evaluation=evaluation,
            baseline=baseline.candidate,
            baseline_us=baseline.measurement.median_us,
            winner_us=evaluation.measurement.median_us,
            speedup=speedup,
        )
    return Confirmed(
        problem_key=spot.problem.key,
        candidate=evaluation.candidate,
        baseline=baseline.candidate,
        speedup=speedup,
        accepted=accepted,
        reason=f"lower bound {low:.3f} is {'' if accepted else 'not '}above 1.020",
        winner=winner,
    )


def scenario(name: str, times: tuple[float, float, float, float], low: float) -> ScenarioResult:
    modes = zip(("eager", "default", "max-autotune", "bundle"), times, strict=True)
    return ScenarioResult(
        scenario=name,
        modes=tuple(ModeTiming(mode=mode, median_us=us, spread_us=1.0, compile_s=3.0) for mode, us in modes),
        best_stock="default",
        speedup=Speedup(ratio=low + 0.02, low=low, high=low + 0.05, num_rounds=41),
        passed=low > 0.95,
    )


def start(*, resumed: bool = False, experiment: str = "name: invented\n") -> RunStarted:
    return RunStarted(
        run_id=RUN_ID,
        name=NAME,
        experiment=experiment,
        experiment_digest="0" * 16,
        environment=ENVIRONMENT,
        seed=0,
        version="0.1.0",
        resumed=resumed,
    )


def profile_events() -> list[Event]:
    spots = (
        hotspot(UP, "prefill", 0.42, 5120.0),
        hotspot(DOWN, "prefill", 0.23, 2710.5),
        hotspot(QKV, "decode", 0.19, 46.25),
        hotspot(HEAD, "decode", 0.08, 9.75),
        hotspot(TINY, "decode", 0.01, 1.5),
    )
    return [
        StageStarted(stage="profile", total=3),
        StageProgress(stage="profile", done=1, total=3, message="scenario prefill"),
        Profiled(
            hotspots=spots,
            scenario_us={"prefill": 12190.0, "decode": 243.4},
            read_gb_per_s=31.4,
            peak_tflops={"float32": 0.41, "bfloat16": 1.93},
        ),
        StageFinished(stage="profile", seconds=12.25),
    ]


TRIALS: tuple[Evaluated, ...] = (
    trial(1, UP, 853.0, STOCK, "stock"),
    trial(2, UP, 640.0, PACKED, "stock seeds"),
    trial(3, UP, 561.5, CPP),
    trial(4, UP, None, {**CPP, "thread_factors": "2,1,1"}, status=Status.WRONG),
    trial(5, DOWN, 452.0, STOCK, "stock"),
    trial(6, DOWN, 450.0, PACKED),
    trial(7, QKV, 46.2, {"merge": "none", **STOCK}, "stock"),
    trial(8, QKV, 30.1, {"merge": "concat", **PACKED}),
    trial(9, HEAD, 9.75, STOCK, "stock"),
    trial(10, HEAD, None, CPP, status=Status.INVALID),
    trial(11, HEAD, None, PACKED, status=Status.CRASHED),
)


def search_events() -> list[Event]:
    events: list[Event] = [
        StageStarted(stage="search", total=40, budget_s=240.0, note="4 hotspots"),
        SearchPlanned(trials={UP.key: 20, DOWN.key: 10, QKV.key: 6, HEAD.key: 4}),
    ]
    for event in TRIALS:
        message = f"{event.evaluation.candidate.problem.op} tried"
        events += [event, StageProgress(stage="search", done=event.number, total=40, message=message)]
    return [*events, StageFinished(stage="search", seconds=101.5)]


def confirm_events() -> list[Event]:
    profiled = next(e for e in profile_events() if isinstance(e, Profiled))
    spots = {h.problem.key: h for h in profiled.hotspots}
    return [
        StageStarted(stage="confirm", total=3),
        confirmation(spots[UP.key], TRIALS[2], TRIALS[0], 1.47, True),
        confirmation(spots[DOWN.key], TRIALS[5], TRIALS[4], 0.99, False),
        confirmation(spots[QKV.key], TRIALS[7], TRIALS[6], 1.48, True),
        StageFinished(stage="confirm", seconds=21.0),
    ]


def final_events(folder: Path, *, outcome: str = "won") -> list[Event]:
    won = outcome == "won"
    bundle = folder / "bundle"
    low = 1.24 if won else 0.98
    metric = EvalResult(
        metric="bits_per_byte", stock=2.1412, bundle=2.1415, worse_by=0.00014, worse_by_high=0.0004, limit=0.002, passed=True,
        num_samples=256,
    )  # fmt: skip
    scenarios = (
        scenario("prefill", (14210.0, 12190.0, 12044.0, 9610.0), low),
        scenario("decode", (310.5, 243.4, 251.0, 238.8), 0.99),
    )
    dropped = {QKV.key: "the model was not equivalent with it: error 1.31, limit 1"} if won else {}
    return [
        GraphTrial(options={"cpp.enable_kernel_profile": False}, speedups={}, score=0.98, accepted=False, reason="slower"),
        StageFinished(stage="graph", seconds=14.0),
        ModelValidated(verdict=PASSED, evals=(metric,), scenarios=scenarios, dropped=dropped),
        StageFinished(stage="validate", seconds=40.5),
        Exported(folder=str(bundle), archive=f"{bundle}.zip", digest="f" * 64, num_entries=1 if won else 0, stock=not won),
        Proved(passed=True, num_hits=1, num_entries=1, num_benchmarks=0, compile_s=11.2, stock_compile_s=10.9),
        RunFinished(outcome=outcome, message="Faster than the best stock mode: prefill 1.26x.", seconds=222.5),
    ]


def whole_run(folder: Path, *, outcome: str = "won") -> list[Event]:
    """Every event of a run that went through all its stages."""
    confirmed = confirm_events() if outcome == "won" else [StageFinished(stage="confirm", seconds=3.0)]
    return [start(), *profile_events(), *search_events(), *confirmed, *final_events(folder, outcome=outcome)]


def write_run(runs: Path, events: Iterable[Event] | None = None, *, run_id: str = RUN_ID, name: str = NAME) -> Path:
    """A run's folder with a journal of these events; default: a whole run that won."""
    folder = runs / name / run_id
    journal = Journal(folder)
    try:
        for event in events if events is not None else whole_run(folder):
            journal.record(event)
    finally:
        journal.close()
    return folder
