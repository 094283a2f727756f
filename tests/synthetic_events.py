"""A run's events with invented numbers, for tests of what displays them. Nothing here was measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from autokernel.environment import Environment
from autokernel.events import (
    Ablated,
    Confirmed,
    ContendersTimed,
    EvalResult,
    Evaluated,
    Event,
    Exported,
    GraphTrial,
    MeasuredRow,
    ModelValidated,
    ModeTiming,
    PlanTrial,
    Profiled,
    Proved,
    RowMeasured,
    RowsHeld,
    RunFinished,
    RunStarted,
    ScenarioResult,
    ScenarioTimed,
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


def gemm(
    m: int, n: int, k: int, op: str = "mm", epilogue: tuple[str, ...] = (), device: str = "cpu", dtype: str = "bfloat16"
) -> Problem:
    """A GEMM with a constant weight, stored as torch.nn.Linear does; `addmm` has a bias."""
    x, w = TensorSpec.contiguous((m, k), dtype), TensorSpec(shape=(k, n), dtype=dtype, stride=(1, k))
    inputs = (TensorSpec.contiguous((n,), dtype), x, w) if op == "addmm" else (x, w)
    constants = (0, 2) if op == "addmm" else (1,)
    extra = tuple(TensorSpec.contiguous((m, n), dtype) for name in epilogue if name in ("add", "mul"))
    return Problem(op=op, inputs=(*inputs, *extra), device=device, constants=constants, epilogue=epilogue)


def merged(m: int, ns: tuple[int, ...], k: int, device: str = "cpu", dtype: str = "bfloat16") -> Problem:
    """GEMMs that share their input."""
    weights = tuple(TensorSpec(shape=(k, n), dtype=dtype, stride=(1, k)) for n in ns)
    x = TensorSpec.contiguous((m, k), dtype)
    return Problem(op="merged_mm", inputs=(x, *weights), device=device, constants=tuple(range(1, len(ns) + 1)))


UP, DOWN, QKV, HEAD, TINY = gemm(512, 1280, 384), gemm(512, 384, 1280, epilogue=("add",)), merged(1, (384, 128, 128), 384), \
    gemm(1, 256, 384), gemm(1, 8, 384)  # fmt: skip
STOCK, PACKED = {"prepack": False}, {"template": "onednn", "prepack": True}
CPP = {"template": "cpp_gemm", "prepack": True, "thread_factors": "1,2,1", "cache_blocking": "4,2,6"}


def hotspot(
    problem: Problem, scenario: str, share: float, time_us: float, roofline: float = 1 / 3, scenarios: int = 2, calls: int = 6
) -> Hotspot:
    """`roofline` is the fraction of its time that it would take there; `scenarios` is how many there are."""
    return Hotspot(
        problem=problem,
        scenario=scenario,
        num_calls=calls,
        time_us=time_us,
        share=share,
        weight=share / scenarios,
        roofline_us=time_us * roofline,
        sites=("layers.0.mlp.up_proj",),
        producers=("aten.mul.Tensor",),
        consumers=("aten.silu.default",),
    )


def evaluated(
    number: int,
    candidate: Candidate,
    us: float | None,
    origin: str = "tpe",
    status: Status = Status.WRONG,
    message: str = "",
    *,
    used: float = 0.5,
    regime: str = "invented",
    **seconds: float,
) -> Evaluated:
    """OK with a time, or failed with a status and a message; `used` is the error as a part of its limit."""
    wrong = us is None and status is Status.WRONG
    checks = (
        Check(name="error", value=14.2 if wrong else used, limit=1.0, passed=not wrong),
        Check(name="unwritten", value=0.0, limit=0.0, passed=True),
    )
    verdict = Verdict(checks=checks) if us is not None or wrong else None
    if us is None:
        message = message or f"it was {status} on purpose"
        tail = f"... last lines of the invented log of {candidate.label}"
        made = Evaluation(candidate=candidate, status=status, message=message, verdict=verdict, log_tail=tail, **seconds)
    else:
        measured = Measurement(median_us=us, spread_us=0.02 * us, num_samples=30, regime=regime)
        made = Evaluation(candidate=candidate, status=Status.OK, verdict=verdict, measurement=measured, **seconds)
    return Evaluated(evaluation=made, origin=origin, number=number)


def trial(
    number: int, problem: Problem, us: float | None, config: dict[str, object], origin: str = "tpe", status: Status = Status.OK
) -> Evaluated:
    """`evaluated` on a CPU, with the backend that goes with the config."""
    backend = "aten" if config == STOCK else "inductor"
    candidate = Candidate(problem=problem, backend=backend, config=config)  # type: ignore[arg-type]
    return evaluated(number, candidate, us, origin, status)


def confirmation(
    spot: Hotspot,
    contender: Evaluated,
    stock: Evaluated,
    speedup: Speedup,
    accepted: bool | None = None,
    conditions: dict[str, float] | None = None,
) -> Confirmed:
    """Accepted, unless that is given, if its interval is clear of 1.02."""
    evaluation, baseline = contender.evaluation, stock.evaluation
    assert evaluation.measurement is not None
    assert baseline.measurement is not None
    accepted = speedup.low > 1.02 if accepted is None else accepted
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
        reason=f"lower bound {speedup.low:.3f} is {'' if accepted else 'not '}above 1.020",
        winner=winner,
        conditions=conditions or {},
    )


def above(low: float) -> Speedup:
    """A speed-up whose interval begins there."""
    return Speedup(ratio=low + 0.03, low=low, high=low + 0.06, num_rounds=41)


MODES = ("eager", "default", "max-autotune", "bundle")


def scenario(
    name: str, times: tuple[float, ...], speedup: Speedup, passed: bool = True, best_stock: str = "default"
) -> ScenarioResult:
    """`times` are those of `MODES`, in microseconds."""
    timings = (
        ModeTiming(mode=mode, median_us=us, spread_us=0.02 * us, compile_s=0.0 if mode == "eager" else 14.5)
        for mode, us in zip(MODES, times, strict=True)
    )
    return ScenarioResult(scenario=name, modes=tuple(timings), best_stock=best_stock, speedup=speedup, passed=passed)


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
    qkv, rows = (
        TRIALS[7].evaluation.candidate,
        (MeasuredRow(m=2, speedup=above(1.2)), MeasuredRow(m=3, message="WRONG: invented")),
    )
    return [
        StageStarted(stage="confirm", total=3),
        confirmation(spots[UP.key], TRIALS[2], TRIALS[0], above(1.47)),
        confirmation(spots[DOWN.key], TRIALS[5], TRIALS[4], above(0.99)),
        confirmation(spots[QKV.key], TRIALS[7], TRIALS[6], above(1.48)),
        StageFinished(stage="confirm", seconds=21.0),
        *(RowMeasured(candidate=qkv, row=row) for row in rows),
        RowsHeld(candidate=qkv, wanted=(1, 3), held=(1, 2), measured=rows),
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
        scenario("prefill", (14210.0, 12190.0, 12044.0, 9610.0), above(low)),
        scenario("decode", (310.5, 243.4, 251.0, 238.8), above(0.99)),
    )
    dropped = {QKV.key: "the model was not equivalent with it: error 1.31, limit 1"} if won else {}
    return [
        ContendersTimed(scenario="decode", asked="d", timing={"scenario": "decode"}),
        PlanTrial(scenario="decode", keys=(QKV.key,), saved_us=4.0, speedup=None, accepted=True, reason="no other plan"),
        StageFinished(stage="plan", seconds=6.5),
        GraphTrial(options={"cpp.enable_kernel_profile": False}, speedups={}, score=0.98, accepted=False, reason="slower"),
        StageFinished(stage="graph", seconds=14.0),
        Ablated(applied_digest="d"),
        *(ScenarioTimed(scenario=s.scenario, applied_digest="d", result=s, timing={"scenario": s.scenario}) for s in scenarios),
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
