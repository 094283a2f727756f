"""Plans with configs: runners-up that are the better ones in the model are found, shipped, recorded and read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from pretended_run import ENVIRONMENT, Listener, context_of

from autokernel.errors import JobCrashed
from autokernel.evaluate.end_to_end import Contender, ScenarioTiming, TimeScenario
from autokernel.events import (
    Confirmed,
    ContendersTimed,
    Event,
    ModeTiming,
    PlanTrial,
    Profiled,
    RunStarted,
    StageFinished,
    StageStarted,
    event_from_json,
    event_to_json,
)
from autokernel.profiling.footprint import Footprint, MeasureFootprints
from autokernel.records import (
    Candidate,
    Check,
    ConfigValue,
    Evaluation,
    Hotspot,
    Measurement,
    Problem,
    RunnerUp,
    Speedup,
    Status,
    TensorSpec,
    Verdict,
    Winner,
)
from autokernel.stages.plan import choose_plans
from autokernel.stages.plan_parts import parts_of
from autokernel.stages.rehearsal import Rehearse
from autokernel.tracking.state import RunState

PASSED = Verdict(checks=(Check(name="all", value=0, limit=1, passed=True),))
SCENARIO, STEP_US = "decode-b64", 1000.0
STARTED = RunStarted(run_id="r", name="t", experiment="", experiment_digest="", environment=ENVIRONMENT, seed=0, version="")
PROFILED = Profiled(hotspots=(), scenario_us={SCENARIO: STEP_US}, read_gb_per_s=1, peak_tflops={})


def product(n: int) -> Problem:
    inputs = TensorSpec.contiguous((64, 64), "float32"), TensorSpec(shape=(64, n), dtype="float32", stride=(1, 64))
    return Problem(op="mm", inputs=inputs, device="cpu", constants=(1,))


def attention(scale: float) -> Problem:
    x = TensorSpec.contiguous((1, 2, 1, 64), "float32")
    return Problem(op="attention", inputs=(x, x, x), device="cpu", scalars=(("scale", scale),))


def evaluated(problem: Problem, us: float, **config: ConfigValue) -> Evaluation:
    measured = Measurement(median_us=us, spread_us=1, num_samples=5, regime="r")
    candidate = Candidate(problem=problem, backend="triton", config=config)
    return Evaluation(candidate=candidate, status=Status.OK, verdict=PASSED, measurement=measured)


def winner(problem: Problem, stock_us: float, *times: float, rivals: Sequence[Problem] = ()) -> Winner:
    """The first of these times won; `config=1` is its config, and those of the others are 2, 3, ..."""
    first, *others = (evaluated(problem, us, config=number) for number, us in enumerate(times, start=1))

    def speedup(us: float) -> Speedup:
        return Speedup(ratio=stock_us / us, low=stock_us / us - 0.01, high=stock_us / us + 0.01, num_rounds=31)

    stock = Candidate(problem=problem, backend="aten", config={"implementation": "stock"})
    hotspot = Hotspot(
        problem=problem, scenario=SCENARIO, num_calls=1, time_us=stock_us, share=0.3, weight=0.1, roofline_us=1,
        rivals=tuple(rival.key for rival in rivals),
    )  # fmt: skip
    runners_up = tuple(RunnerUp(evaluation=one, speedup=speedup(us)) for one, us in zip(others, times[1:], strict=True))
    return Winner(
        hotspot=hotspot, evaluation=first, baseline=stock, baseline_us=stock_us, winner_us=times[0], speedup=speedup(times[0]),
        runners_up=runners_up,
    )  # fmt: skip


WHOLE, LEFT, LARGE, SMALL = attention(1.0), attention(2.0), product(8), product(16)
WINNERS = [
    winner(WHOLE, 300, 200, 203, rivals=(LEFT,)),
    winner(LEFT, 280, 195, 196),
    winner(LARGE, 260, 240, 241, 246),
    winner(SMALL, 20, 15, 15.1),
]


def configs_of(contender: Contender) -> dict[str, ConfigValue]:
    assert contender.bundle is not None
    return {entry.problem.key: entry.config["config"] for entry in contender.bundle.entries}


@dataclass
class Model:
    """A pool whose model takes stock's step less what entries save by themselves, but for what `planted` adds."""

    planted: Callable[[Mapping[str, ConfigValue]], float] = lambda configs: 0.0
    broken: bool = False
    num_workers: int = 2
    asked: list[TimeScenario] = field(default_factory=list)

    def submit(self, job: Callable[[], Any], timeout_s: float) -> Future[Any]:
        future: Future[Any] = Future()
        if isinstance(job, MeasureFootprints):
            future.set_result(tuple(Footprint(scenarios={SCENARIO: 10}, device=100) for _ in job.models))
            return future
        if isinstance(job, Rehearse):
            future.set_result(1.0)
            return future
        assert isinstance(job, TimeScenario)
        self.asked.append(job)
        if self.broken:
            future.set_exception(JobCrashed("it broke"))
            return future
        times = {contender.name: self._step_us(contender) for contender in job.contenders}
        first = job.contenders[0].name
        ratios = {name: times[first] / us for name, us in times.items() if name != first}
        speedups = {name: Speedup(ratio=r, low=r - 0.0015, high=r + 0.0015, num_rounds=11) for name, r in ratios.items()}
        modes = tuple(ModeTiming(mode=name, median_us=us, spread_us=1) for name, us in times.items())
        future.set_result(ScenarioTiming(scenario=job.scenario, baseline=first, modes=modes, speedups=speedups))
        return future

    def _step_us(self, contender: Contender) -> float:
        assert contender.bundle is not None
        saved_us = sum(entry.baseline_us - entry.winner_us for entry in contender.bundle.entries)
        return STEP_US - saved_us - self.planted(configs_of(contender))

    def renew(self) -> None:
        """There is nothing to end."""

    def close(self) -> None:
        """There is nothing to close."""


def second_is_better(configs: Mapping[str, ConfigValue]) -> float:
    """A microsecond slower by itself, eight faster in the model."""
    return 9.0 if configs.get(LARGE.key) == 2 else 0.0


@dataclass
class Chosen:
    """What a run of the stage came to."""

    winners: list[Winner]
    dropped: dict[str, str]
    asked: list[TimeScenario]
    events: list[Any]

    @property
    def configs(self) -> dict[str, ConfigValue]:
        return {one.hotspot.problem.key: one.evaluation.candidate.config["config"] for one in self.winners}

    @property
    def trials(self) -> list[PlanTrial]:
        return [event for event in self.events if isinstance(event, PlanTrial)]


def choose(
    pool: Model, winners: Sequence[Winner] = WINNERS, limit: int = 4, state: RunState | None = None, seed: int = 0
) -> Chosen:
    listener = Listener()
    overrides = [f"plan.trials={limit}", "graph.enabled=false", f"search.seed={seed}"]
    context = context_of(pool, "cuda", listener, overrides=overrides)
    context.state = state
    kept, dropped = choose_plans(context, PROFILED, winners)
    return Chosen(kept, dropped, pool.asked, listener.events)


def resumed(events: Sequence[Event]) -> RunState:
    journal = [json.loads(json.dumps(event_to_json(event))) for event in (STARTED, *events)]
    return RunState.from_events(map(event_from_json, journal))


@pytest.mark.parametrize("seed", range(3))
def test_a_runner_up_that_is_better_in_the_model_is_shipped(seed: int) -> None:
    found = choose(Model(second_is_better), seed=seed)
    assert found.configs[LARGE.key] == 2
    assert set(found.configs) == {WHOLE.key, LARGE.key, SMALL.key}
    assert set(found.dropped) == {LEFT.key}
    (large,) = [one for one in found.winners if one.hotspot.problem == LARGE]
    assert (large.winner_us, large.speedup) == (241, WINNERS[2].runners_up[0].speedup), "its own numbers, not the winner's"
    chosen = found.trials[-1]
    assert (chosen.accepted, chosen.origin) == (True, "optuna")
    assert chosen.configs[LARGE.key] == WINNERS[2].runners_up[0].evaluation.candidate.id
    assert chosen.speedup is not None
    assert chosen.speedup.low > 1, "the interval supports it"


def test_optuna_proposes_where_savings_add_up_and_the_sum_stays() -> None:
    found = choose(Model())
    assert found.configs == {WHOLE.key: 1, LARGE.key: 1, SMALL.key: 1}
    timed = [job for job in found.asked if job.scenario == SCENARIO]
    assert [len(job.contenders) for job in timed] == [2, 3], "two rounds, and four plans in all"
    origins = {tuple(trial.keys) + tuple(trial.configs.values()): trial.origin for trial in found.trials}
    assert sorted(origins.values()) == ["optuna", "optuna", "sum", "sum"]
    assert [trial.accepted for trial in found.trials][-1]
    named = [configs_of(contender) for contender in timed[1].contenders[1:]]
    assert any(set(configs.values()) != {1} for configs in named), "other configs were timed"


def test_two_plans_are_the_best_by_the_sum_and_one_of_optunas_in_one_round() -> None:
    found = choose(Model(), limit=2)
    assert [len(job.contenders) for job in found.asked] == [2]
    assert [trial.origin for trial in found.trials] == ["optuna", "sum"]
    alone = choose(Model(), limit=1)
    assert (alone.asked, alone.configs) == ([], found.configs)


def test_what_the_interval_does_not_support_is_not_kept() -> None:
    found = choose(Model(lambda configs: 2.0 if configs.get(LARGE.key) == 2 else 0.0))
    assert found.configs[LARGE.key] == 1, "a thousandth of a step better is not clear"


def test_where_nothing_excludes_anything_runners_up_of_large_kernels_are_tried() -> None:
    found = choose(Model(second_is_better), WINNERS[2:])
    assert found.configs == {LARGE.key: 2, SMALL.key: 1}
    assert found.dropped == {}
    assert sum(len(job.contenders) - 1 for job in found.asked) == 1, "1.2 % of the step are at stake: one trial"
    small = choose(Model(second_is_better), WINNERS[3:])
    assert (small.asked, small.events) == ([], []), "nobody could tell: not even a stage"
    assert small.configs == {SMALL.key: 1}


def test_runners_up_that_copy_more_weights_are_left_out() -> None:
    """Whether copies fit is decided behind the plan."""
    large = WINNERS[2]
    (second, third) = large.runners_up
    copies = replace(second, evaluation=evaluated(LARGE, 241, prepack=True))  # the winner reads the model's own weight
    (part,) = parts_of(SCENARIO, [replace(large, runners_up=(copies, third))])
    assert list(part.runners_up) == [third.evaluation.candidate.id]
    assert part.runners_up[third.evaluation.candidate.id] == 260 - 246
    assert (part.saved_us, part.own_us) == (20, 240)
    packed = replace(large, evaluation=evaluated(LARGE, 240, prepack=True), runners_up=(copies, third))
    assert len(parts_of(SCENARIO, [packed])[0].runners_up) == 2


def test_a_model_that_does_not_run_keeps_the_sum() -> None:
    found = choose(Model(second_is_better, broken=True))
    assert found.configs == {WHOLE.key: 1, LARGE.key: 1, SMALL.key: 1}
    assert found.trials[-1].reason == "the model does not run with the others"


def test_a_run_that_goes_on_finds_its_plan() -> None:
    first = choose(Model(second_is_better))
    times = [event for event in first.events if isinstance(event, ContendersTimed)]
    assert len(times) == 2
    for known, left in ((times, 0), (times[:1], 1), ([], 2)):
        again = choose(Model(second_is_better), state=resumed(known))
        assert len(again.asked) == left, "what was timed is not timed again"
        assert (again.winners, again.dropped, again.trials) == (first.winners, first.dropped, first.trials)
    done = [event for event in first.events if not isinstance(event, StageStarted)]
    assert isinstance(done[-1], StageFinished)
    again = choose(Model(second_is_better), state=resumed(done))
    assert (again.asked, again.events) == ([], [])
    assert (again.winners, again.dropped) == (first.winners, first.dropped)


def test_journals_of_versions_without_configs_are_read() -> None:
    confirmed = Confirmed(
        problem_key=LARGE.key, candidate=WINNERS[2].evaluation.candidate, baseline=WINNERS[2].baseline,
        speedup=WINNERS[2].speedup, accepted=True, reason="", winner=WINNERS[2],
    )  # fmt: skip
    trial = PlanTrial(scenario=SCENARIO, keys=(LARGE.key,), saved_us=1, speedup=None, accepted=True)
    data = [event_to_json(event) for event in (confirmed, trial)]
    assert event_from_json(json.loads(json.dumps(data[0]))) == confirmed
    del data[0]["winner"]["runners_up"], data[1]["configs"], data[1]["origin"]
    old = [event_from_json(one) for one in data]
    assert isinstance(old[0], Confirmed)
    assert old[0].winner is not None
    assert old[0].winner == replace(WINNERS[2], runners_up=())
    assert old[1] == trial
    kept = choose(Model(), [*WINNERS[:2], old[0].winner], state=resumed([trial, StageFinished(stage="plan", seconds=1)]))
    assert kept.configs == {LARGE.key: 1}


def test_a_candidate_that_is_no_runner_up_takes_no_place() -> None:
    with pytest.raises(ValueError, match="no runner-up"):
        WINNERS[0].instead(WINNERS[0].evaluation.candidate.id)
    failed = Evaluation(candidate=WINNERS[0].evaluation.candidate, status=Status.WRONG, message="no")
    with pytest.raises(ValueError, match="lacks"):
        RunnerUp(evaluation=failed, speedup=WINNERS[0].speedup)
