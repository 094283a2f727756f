"""Runs as large as real ones, made up at random from a seed; here: one on a CPU. Nothing here was measured."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import synthetic_events as synthetic
from synthetic_events import MODES

from autokernel.environment import Environment
from autokernel.events import (
    Confirmed,
    EvalResult,
    Evaluated,
    Event,
    Exported,
    GraphTrial,
    ModelValidated,
    Profiled,
    Proved,
    RunFinished,
    RunStarted,
    ScenarioResult,
    SearchPlanned,
    StageFinished,
    StageStarted,
)
from autokernel.records import Candidate, Check, ConfigValue, Hotspot, Problem, Speedup, Status, Verdict

Config = dict[str, ConfigValue]

_FAILURES = (
    (Status.INVALID, "constraint `k_slices * 64 <= k` does not hold: 8 * 64 > 256"),
    (Status.BUILD_ERROR, "g++ failed: error: 'tile_m' was not declared in this scope"),
    (Status.RUN_ERROR, "RuntimeError: expected a contiguous weight"),
    (Status.WRONG, "max_error is 14.2x eager's own error; 2x is allowed"),
    (Status.TIMEOUT, "ran past 120 s and was killed"),
    (Status.CRASHED, "died of SIGSEGV <while timing>"),
    (Status.LOST, "the node went away"),
)
_ONE = Speedup(ratio=1.03, low=1.01, high=1.05, num_rounds=41)
_NONE = Speedup(ratio=0.99, low=0.97, high=1.0, num_rounds=41)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One candidate to be: `factor` is its time over the stock choice's."""

    backend: str
    config: Config
    origin: str
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a run is about: machine, hotspots, end-to-end results."""

    name: str
    experiment: str
    environment: Environment
    spots: tuple[Hotspot, ...]
    stock_us: tuple[float, ...]  # one call, by hotspot
    step_us: dict[str, float]
    read_gb_per_s: float
    peak_tflops: dict[str, float]
    regime: str
    gains: tuple[tuple[str, float, float], ...]  # scenario, best stock mode's time in us, speed-up
    best_stock: str
    mode_factors: tuple[float, ...]  # of eager, default, max-autotune over the best stock mode
    dropped: int  # index of the hotspot whose winner the whole model refuses


def story(
    setting: Setting, draws: Iterator[tuple[int, Draw]], count: int, rng: random.Random, run_id: str, gpu: bool
) -> list[Event]:
    evaluated = _evaluations(setting, draws, count, rng, gpu)
    confirmed = [c for index in range(len(setting.spots)) for c in _confirmed(setting, index, evaluated, rng, gpu)]
    options = {"coordinate_descent_tuning": True} if gpu else {"freezing": True}
    refused = options | ({"triton.enable_pdl": True} if gpu else {"cpp.gemm_max_k_slices": 4})
    scenarios = [name for name, _, _ in setting.gains]
    winners = sum(c.accepted for c in confirmed) - 1
    return [
        RunStarted(
            run_id=run_id,
            name=setting.name,
            experiment=setting.experiment,
            experiment_digest="d1gest",
            environment=setting.environment,
            seed=0,
            version="0.1.0",
            git_commit="0123456789abcdef0123456789abcdef01234567",
        ),
        StageStarted(stage="profile", total=3),
        Profiled(
            hotspots=setting.spots,
            scenario_us=setting.step_us,
            read_gb_per_s=setting.read_gb_per_s,
            peak_tflops=setting.peak_tflops,
        ),
        StageFinished(stage="profile", seconds=31.2),
        SearchPlanned(trials={spot.problem.key: count // len(setting.spots) for spot in setting.spots}),
        StageStarted(stage="search", total=count, budget_s=600),
        *evaluated,
        StageFinished(stage="search", seconds=1.2 * sum(e.evaluation.device_s for e in evaluated) if gpu else 141.0),
        StageStarted(stage="confirm", total=len(setting.spots)),
        *confirmed,
        StageFinished(stage="confirm", seconds=22.0),
        GraphTrial(options=options, speedups=dict.fromkeys(scenarios[-2:], _ONE), score=1.03, accepted=True),
        GraphTrial(options=refused, speedups={scenarios[1]: _NONE}, score=0.99, accepted=False, reason="slower"),
        _validated(setting),
        StageFinished(stage="validate", seconds=40.0),
        Exported(folder="bundle", archive="bundle.zip", digest="ab12cd34ef56ab78", num_entries=winners, stock=False),
        Proved(
            passed=True,
            num_hits=winners,
            num_entries=winners,
            num_benchmarks=0,
            compile_s=15.1,
            stock_compile_s=14.5,
            message="all entries hit",
            scenario_us={name: us / gain for name, us, gain in setting.gains},
        ),
        StageFinished(stage="prove", seconds=30.0),
        RunFinished(outcome="won", message=f"{winners} winners; {scenarios[0]} is faster", seconds=268.4),
    ]


def _evaluations(
    setting: Setting, draws: Iterator[tuple[int, Draw]], count: int, rng: random.Random, gpu: bool
) -> list[Evaluated]:
    out: list[Evaluated] = []
    seen: set[str] = set()
    for index, draw in draws:
        candidate = Candidate(problem=setting.spots[index].problem, backend=draw.backend, config=draw.config)
        if candidate.id in seen:
            continue
        seen.add(candidate.id)
        number = len(out) + 1
        seconds = {"build_s": 1.25, "total_s": 3.5} | ({"device_s": rng.uniform(0.3, 0.5)} if gpu else {})
        us, status, message = setting.stock_us[index] * draw.factor, Status.OK, ""
        used = rng.uniform(0.1, 0.9)
        if draw.origin == "tpe" and number % 5 == 0:
            status, message = _FAILURES[(number // 5) % len(_FAILURES)]
        made = synthetic.evaluated(
            number,
            candidate,
            us if status is Status.OK else None,
            draw.origin,
            status,
            message,
            used=used,
            regime=setting.regime,
            **seconds,
        )
        out.append(made)
        if len(out) == count:
            return out
    return out


def _confirmed(setting: Setting, index: int, evaluated: list[Evaluated], rng: random.Random, gpu: bool) -> Iterator[Confirmed]:
    """The best two of a hotspot against stock; the third hotspot's are too uncertain."""
    spot = setting.spots[index]
    mine = [e for e in evaluated if e.evaluation.candidate.problem == spot.problem and e.evaluation.measurement is not None]
    ranked = sorted((e.evaluation.measurement.median_us, e.number, e) for e in mine if e.evaluation.measurement is not None)
    stock = next((e for _, _, e in ranked if e.origin == "stock"), None)
    finalists = [e for _, _, e in ranked if e.origin != "stock"][: 2 if gpu else 1]
    conditions = {}
    if gpu:
        heat = rng.random()
        start = {"clock_mhz": 1980.0, "power_w": 300 + 60 * heat, "temperature_c": 40 + 10 * heat}
        end = {"clock_mhz": 1980 - 225 * heat, "power_w": 480 + 215 * heat, "temperature_c": 45 + 14 * heat}
        conditions = {f"before_{k}": v for k, v in start.items()} | {f"after_{k}": v for k, v in end.items()}
    accepted = False
    for contender in finalists:
        if stock is None or stock.evaluation.measurement is None or contender.evaluation.measurement is None:
            return
        ratio = stock.evaluation.measurement.median_us / contender.evaluation.measurement.median_us
        low = ratio * (0.8 if index % 7 == 2 else 0.985 if gpu else 0.97)
        speedup = Speedup(ratio=ratio, low=low, high=ratio * (1.015 if gpu else 1.03), num_rounds=41, num_discarded=index % 3)
        made = synthetic.confirmation(spot, contender, stock, speedup, False if accepted else None, conditions)
        accepted = accepted or made.accepted
        yield made


def _validated(setting: Setting) -> ModelValidated:
    scenarios: list[ScenarioResult] = []
    for name, us, gain in setting.gains:
        times = [us * factor for factor in (*setting.mode_factors, 1 / gain)]
        assert len(times) == len(MODES)
        speedup = Speedup(ratio=gain, low=gain * 0.985, high=gain * 1.015, num_rounds=41)
        scenarios.append(synthetic.scenario(name, tuple(times), speedup, best_stock=setting.best_stock))
    checks = (
        Check(name=f"{setting.gains[0][0]}: relative error", value=1.1, limit=2.0, passed=True),
        Check(name="top-1 disagreement", value=0.002, limit=0.01, passed=True),
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
    refused = setting.spots[setting.dropped]
    why = f"{refused.scenario} was 2 % slower end to end with it"
    dropped = {refused.problem.key: why}
    return ModelValidated(verdict=Verdict(checks=checks), evals=(metric,), scenarios=tuple(scenarios), dropped=dropped)


_CPU_EXPERIMENT = """\
# synthetic: for tests and previews of the report only
name: synthetic-llama
model: {checkpoint: models/tiny_llama}
scenarios:
  prefill-1x512: {kind: prefill, batch: 1, length: 512}
  decode-b1: {kind: decode, batch: 1, context: 256}
  decode-b8: {kind: decode, batch: 8, context: 256}
search: {trials: 60, seconds: 600}
"""
_CPU_SHAPES = (  # op, M, K, N, epilogue, scenario, share
    ("mm", 512, 256, 1376, (), "prefill-1x512", 0.31),
    ("mm", 512, 688, 256, ("add",), "prefill-1x512", 0.17),
    ("mm", 512, 256, 768, (), "prefill-1x512", 0.14),
    ("mm", 1, 256, 1376, (), "decode-b1", 0.29),
    ("addmm", 8, 256, 1376, (), "decode-b8", 0.27),
    ("mm", 8, 688, 256, ("add",), "decode-b8", 0.12),
)


def problems() -> list[Problem]:
    """The CPU run's problems."""
    return [synthetic.gemm(m, n, k, op, epilogue) for op, m, k, n, epilogue, _, _ in _CPU_SHAPES]


def hotspots() -> tuple[Hotspot, ...]:
    """The CPU run's hotspots."""
    return tuple(
        synthetic.hotspot(problem, scenario, share, share * 9000, 0.35, 3)
        for problem, (*_, scenario, share) in zip(problems(), _CPU_SHAPES, strict=True)
    )


def _cpu_draws(rng: random.Random) -> Iterator[tuple[int, Draw]]:
    """Two stock choices per hotspot, then configs of which three parameters matter, the hotspots in turn."""
    num = len(_CPU_SHAPES)
    for index in range(num):
        yield index, Draw(backend="aten", config={}, origin="stock", factor=1.0)
    for index in range(num):
        yield index, Draw(backend="inductor", config={"template": "stock", "freezing": True}, origin="stock", factor=1.04)
    while True:
        for index in range(num):
            config: Config = {
                "template": "cpp_gemm",
                "thread_factors": rng.choice(["1,2,1", "2,1,1", "1,1,2"]),
                "k_slices": rng.choice([1, 2, 4, 8]),
                "block_m": rng.choice([16, 32, 64]),
                "block_n": rng.choice([16, 32, 64, 128]),
                "block_k": rng.choice([64, 128, 256]),
                "freezing": rng.random() < 0.5,
            }
            good = (config["k_slices"] == 2) + (int(config["block_n"]) >= 64) + 0.5 * bool(config["freezing"])
            factor = (1.25 - 0.18 * good) * rng.uniform(0.95, 1.1)
            yield index, Draw(backend="inductor", config=config, origin="tpe", factor=factor)


def make_events(num_evaluations: int = 60, seed: int = 7, run_id: str = "20261121-014900-3f2a") -> list[Event]:
    """3 scenarios, 6 hotspots, every status; a winner that is dropped and finalists that are refused."""
    rng = random.Random(seed)
    setting = Setting(
        name="synthetic-llama",
        experiment=_CPU_EXPERIMENT,
        environment=Environment(
            device="cpu",
            device_name="Synthetic CPU (family 1 model 2)",
            isa="AVX512",
            num_units=2,
            torch="2.13.0+cpu",
            python="3.11.7",
            platform="Linux-synthetic",
            libraries={"numpy": "2.3.0", "transformers": "5.23.0"},
        ),
        spots=hotspots(),
        stock_us=tuple(60.0 + 90 * index for index in range(len(_CPU_SHAPES))),
        step_us={"prefill-1x512": 9464.0, "decode-b1": 2444.0, "decode-b8": 3244.8},
        read_gb_per_s=21.4,
        peak_tflops={"bfloat16": 0.61, "float32": 0.2},
        regime="cpu, 2 threads, cold L2, 8 calls a sample",
        gains=(("prefill-1x512", 9100.0, 1.31), ("decode-b1", 2350.0, 1.22), ("decode-b8", 3120.0, 1.04)),
        best_stock="max-autotune",
        mode_factors=(1.21, 1.04, 1.0),
        dropped=5,
    )
    return story(setting, _cpu_draws(rng), num_evaluations, rng, run_id, False)
