"""What the whole-model stage drops, and that it drops nothing else. Verdicts are given here; the stage decides."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from pretended_run import Listener

from autokernel.config import load_experiment
from autokernel.environment import Environment
from autokernel.errors import JobCrashed, WorkerError
from autokernel.evaluate.end_to_end import BUNDLE, STOCK_MODES, ScenarioTiming, TimeScenario
from autokernel.evaluate.outputs import ScenarioCheck
from autokernel.events import (
    EvalResult,
    ModelValidated,
    ModeTiming,
    RunStarted,
    ScenarioTimed,
    StageFinished,
    event_from_json,
    event_to_json,
)
from autokernel.export.bundle import Bundle, Entry, ScenarioOptions
from autokernel.profiling.footprint import Footprint
from autokernel.records import Check, Problem, Speedup, TensorSpec, Verdict
from autokernel.stages.context import RunContext
from autokernel.stages.model import CheckModel, CheckScenario, Quality, validate
from autokernel.tracking.state import RunState
from autokernel.workers.device_lock import device_lock
from autokernel.workers.pool import InlinePool

EXPERIMENT = Path(__file__).parent.parent / "data" / "gated.yaml"
ENVIRONMENT = Environment(device="cpu", device_name="A CPU", isa="AVX2", num_units=2, torch="2.13.0")


def entry(m: int, n: int, scenario: str = "one") -> Entry:
    x, w = TensorSpec.contiguous((m, 64), "float32"), TensorSpec(shape=(64, n), dtype="float32", stride=(1, 64))
    problem = Problem(op="mm", inputs=(x, w), device="cpu", constants=(1,))
    return Entry(problem=problem, backend="aten", config={"prepack": True}, scenario=scenario)


STARTED = RunStarted(
    run_id="r", name="t", experiment="", experiment_digest="d", environment=ENVIRONMENT, seed=0, version="", git_commit=""
)
ENTRIES = tuple(entry(1, n) for n in (16, 32, 48, 64, 80)) + tuple(entry(4, n, "four") for n in (16, 32))


def bundle_of(*entries: Entry, **options: str) -> Bundle:
    return Bundle(name="t", created="", version="", environment=ENVIRONMENT, entries=entries, graph_options=options)


FINE = ScenarioCheck(checks=(Check(name="fine", value=1, limit=2, passed=True),))


class Answers:
    """A pool that answers jobs by rule: which entries break the model, and which scenarios a bundle slows down."""

    num_workers = 1

    def __init__(
        self,
        harmful: Callable[[Bundle], str] = lambda bundle: "",
        slower: Callable[[Bundle, str], bool] = lambda bundle, scenario: False,
        unused: Sequence[Entry] = (),
        shared: Sequence[Entry] = (),
    ) -> None:
        self.harmful, self.slower, self.unused, self.shared = harmful, slower, unused, shared
        self.checked: list[Bundle] = []
        self.timed: list[str] = []
        self._inline = InlinePool()

    def submit(self, job: Any, timeout_s: float) -> Any:
        return self._inline.submit(lambda: self.answer(job), timeout_s)

    def renew(self) -> None:
        """There is nothing to end."""

    def close(self) -> None:
        self._inline.close()

    def answer(self, job: Any) -> Quality | ScenarioTiming | ScenarioCheck | EvalResult:
        if isinstance(job, CheckScenario) and job.scenario:
            return FINE
        if isinstance(job, CheckScenario):
            self.checked.append(job.bundle)
            if self.harmful(job.bundle):
                raise JobCrashed("the process was killed by SIGSEGV")
            return EvalResult(
                metric="m", stock=1, bundle=1, worse_by=0, worse_by_high=0, limit=1, passed=True, num_samples=9
            )  # fmt: skip
        if isinstance(job, CheckModel):
            self.checked.append(job.bundle)
            why = self.harmful(job.bundle)
            if why == "crash":
                raise JobCrashed("the process was killed by SIGSEGV")
            return Quality(verdict=Verdict(checks=(Check(name=why or "fine", value=3 if why else 1, limit=2, passed=not why),)))
        assert isinstance(job, TimeScenario)
        self.timed.append(job.scenario)
        bundle = next(c.bundle for c in job.contenders if c.bundle is not None)
        ratio = 0.8 if self.slower(bundle, job.scenario) else 1.2
        hits = {e.key: int(e not in self.unused and (e.scenario == job.scenario or e in self.shared)) for e in bundle.entries}
        modes = [ModeTiming(mode=mode, median_us=100, spread_us=1) for mode in STOCK_MODES]
        return ScenarioTiming(
            scenario=job.scenario,
            baseline="default",
            modes=(*modes, ModeTiming(mode=BUNDLE, median_us=100 / ratio, spread_us=1)),
            speedups={BUNDLE: Speedup(ratio=ratio, low=ratio - 0.01, high=ratio + 0.01, num_rounds=11)},
            hits={BUNDLE: hits},
            products=("x",),
            check=FINE if job.check else None,
        )


def run(
    answers: Answers,
    bundle: Bundle,
    dropped: Mapping[str, str] | None = None,
    listener: Listener | None = None,
    state: RunState | None = None,
    device: str = "cpu",
) -> tuple[ModelValidated, Bundle]:
    context = RunContext(
        loaded=load_experiment(EXPERIMENT),
        folder=Path("unused"),
        run_id="r",
        device=device,
        threads=2,
        environment=ENVIRONMENT,
        pool=cast(Any, answers),
        recorders=[listener or Listener()],
        state=state,
        footprints={None: Footprint(scenarios={"one": 1, "four": 1}, device=100), 4: Footprint(scenarios={}, device=100)},
    )
    return validate(context, bundle, dropped or {})


def keys(entries: Sequence[Entry]) -> set[str]:
    return {e.key for e in entries}


def having(*entries: Entry) -> Callable[[Bundle], str]:
    """Fails with any of these entries."""
    return lambda bundle: "max error" if keys(entries) & keys(bundle.entries) else ""


def test_what_passes_is_kept_whole() -> None:
    validated, bundle = run(Answers(), bundle_of(*ENTRIES, freezing="all"))
    assert bundle.entries == ENTRIES
    assert bundle.graph_options == {"freezing": "all"}
    assert validated.dropped == {}
    assert [s.scenario for s in validated.scenarios] == ["one", "four"]
    assert validated.verdict.passed


@pytest.mark.parametrize("harmful", [ENTRIES[:1], ENTRIES[2:3], ENTRIES[1:2] + ENTRIES[5:6], ENTRIES])
def test_bisection_drops_the_harmful_entries_and_no_others(harmful: tuple[Entry, ...]) -> None:
    answers = Answers(having(*harmful))
    validated, bundle = run(answers, bundle_of(*ENTRIES))
    assert keys(bundle.entries) == keys(ENTRIES) - keys(harmful)
    assert set(validated.dropped) == keys(harmful)
    assert all("max error is 3, limit 2" in why for why in validated.dropped.values())
    assert validated.verdict.passed, "what is exported is what was judged"
    assert answers.checked[-1].entries == bundle.entries


def test_entries_that_only_fail_together_lose_one() -> None:
    pair = keys([ENTRIES[0], ENTRIES[6]])
    validated, bundle = run(Answers(lambda b: "norm" if pair <= keys(b.entries) else ""), bundle_of(*ENTRIES))
    assert len(bundle.entries) == len(ENTRIES) - 1
    assert len(validated.dropped) == 1


def test_graph_options_go_first() -> None:
    answers = Answers(lambda b: "max error" if b.graph_options else "")
    validated, bundle = run(answers, bundle_of(*ENTRIES, freezing="all"))
    assert bundle.entries == ENTRIES
    assert bundle.graph_options == {}
    assert list(validated.dropped) == ["graph options"]


def test_a_crash_of_the_model_is_a_failed_check() -> None:
    _, bundle = run(Answers(lambda b: "crash" if ENTRIES[3] in b.entries else ""), bundle_of(*ENTRIES))
    assert keys(bundle.entries) == keys(ENTRIES) - {ENTRIES[3].key}


def test_a_stock_model_that_crashes_is_the_run_s_failure() -> None:
    with pytest.raises(WorkerError):
        run(Answers(lambda b: "crash"), bundle_of())


@pytest.mark.parametrize("first", [True, False], ids=["all of it", "what is left"])
def test_a_metric_that_crashes_on_a_gpu_is_a_failed_check(first: bool) -> None:
    """Of the bundle as it came, or of what is left once a scenario was slower."""
    fours = keys(ENTRIES[5:])
    answers = Answers(
        lambda b: "crash" if ENTRIES[3] in b.entries and (first or not fours & keys(b.entries)) else "",
        slower=lambda b, s: not first and s == "four" and bool(fours & keys(b.entries)),
    )
    validated, bundle = run(answers, bundle_of(*ENTRIES), device="cuda")
    assert keys(bundle.entries) == keys(ENTRIES) - {ENTRIES[3].key} - (set() if first else fours)
    assert "killed by SIGSEGV" in validated.dropped[ENTRIES[3].key]
    assert validated.verdict.passed
    assert answers.checked[-1].entries == bundle.entries


def test_a_slower_scenario_loses_its_own_entries() -> None:
    answers = Answers(slower=lambda b, s: s == "four" and any(e.scenario == "four" for e in b.entries))
    validated, bundle = run(answers, bundle_of(*ENTRIES))
    assert {e.scenario for e in bundle.entries} == {"one"}
    assert set(validated.dropped) == {e.key for e in ENTRIES if e.scenario == "four"}
    assert all(s.passed for s in validated.scenarios)
    assert "1.250 times as long as stock" in next(iter(validated.dropped.values()))


def test_a_scenario_without_entries_is_stock_code_and_not_slower() -> None:
    answers = Answers(slower=lambda b, s: s == "four")
    validated, bundle = run(answers, bundle_of(*ENTRIES[:5]))
    assert bundle.entries == ENTRIES[:5]
    assert all(s.passed for s in validated.scenarios), "it was measured 0.8 times as fast, of the very same code"
    _, bundle = run(Answers(slower=lambda b, s: s == "four"), bundle_of(*ENTRIES[:5], freezing="all"))
    assert not bundle.graph_options


def test_a_scenario_that_is_slower_by_the_entry_of_another_loses_it() -> None:
    shared = ENTRIES[1]
    answers = Answers(slower=lambda b, s: s == "four" and shared in b.entries, shared=(shared,))
    validated, bundle = run(answers, bundle_of(*ENTRIES))
    assert keys(bundle.entries) == keys(ENTRIES[:5]) - {shared.key}, "its own went first"
    assert all(s.passed for s in validated.scenarios)
    assert answers.timed == ["one", "four", "four", "one", "four"]


def test_who_is_slower_the_second_time_is_looked_at_again() -> None:
    def slower(bundle: Bundle, scenario: str) -> bool:
        return any(e.scenario == scenario for e in bundle.entries) and (scenario == "four" or ENTRIES[5] not in bundle.entries)

    validated, bundle = run(Answers(slower=slower, shared=ENTRIES[5:6]), bundle_of(*ENTRIES))
    assert bundle.stock
    assert all(s.passed for s in validated.scenarios)


def test_options_that_slow_a_scenario_go_before_its_entries() -> None:
    answers = Answers(slower=lambda b, s: s == "one" and bool(b.graph_options))
    validated, bundle = run(answers, bundle_of(*ENTRIES, freezing="all"))
    assert bundle.entries == ENTRIES
    assert list(validated.dropped) == ["graph options"]


def test_a_slower_scenario_loses_its_own_options_first() -> None:
    parts = tuple(ScenarioOptions(scenario=s, products=("x",), options={"combo_kernels": True}) for s in ("one", "four"))
    full = replace(bundle_of(*ENTRIES), scenario_options=parts)
    answers = Answers(slower=lambda b, s: s == "four" and len(b.scenario_options) == 2)
    validated, bundle = run(answers, full)
    assert bundle.entries == ENTRIES
    assert bundle.scenario_options == parts[:1]
    assert list(validated.dropped) == ["graph options of four"]
    assert answers.timed == ["one", "four", "four"], "the other scenario is not timed again"
    worse = Answers(slower=lambda b, s: s == "four" and any(e.scenario == "four" for e in b.entries))
    validated, bundle = run(worse, full)
    assert {e.scenario for e in bundle.entries} == {"one"}
    assert worse.timed == ["one", "four", "four", "four"]


def test_options_measured_on_another_graph_are_dropped() -> None:
    part = ScenarioOptions(scenario="one", products=("y",), options={"combo_kernels": True})
    validated, bundle = run(Answers(), replace(bundle_of(*ENTRIES), scenario_options=(part,)))
    assert bundle.scenario_options == ()
    assert "other products" in validated.dropped["graph options of one"]


def test_entries_that_nothing_is_built_from_are_dropped() -> None:
    validated, bundle = run(Answers(unused=ENTRIES[1:2]), bundle_of(*ENTRIES))
    assert ENTRIES[1] not in bundle.entries
    assert "nothing in the compiled model is built from it" in validated.dropped[ENTRIES[1].key]


def test_what_fails_once_slower_entries_are_gone_is_dropped_too() -> None:
    """ENTRIES[0] is harmless only beside those of the other scenario, which make it slower."""
    fours = keys(ENTRIES[5:])

    def harmful(bundle: Bundle) -> str:
        return "max error" if ENTRIES[0] in bundle.entries and not fours & keys(bundle.entries) else ""

    answers = Answers(harmful, slower=lambda b, s: s == "four" and bool(fours & keys(b.entries)))
    validated, bundle = run(answers, bundle_of(*ENTRIES))
    assert validated.verdict.passed
    assert bundle.entries == ENTRIES[1:5]
    assert set(validated.dropped) == {ENTRIES[0].key, *fours}
    assert "max error is 3, limit 2" in validated.dropped[ENTRIES[0].key]
    assert answers.checked[-1].entries == bundle.entries
    assert answers.timed == ["one", "four", "four", "one", "four"], "what is left was timed as it is"


def test_what_was_left_after_a_failed_check_may_be_slower_again() -> None:
    fours = keys(ENTRIES[5:])

    def slower(bundle: Bundle, scenario: str) -> bool:
        left = keys(bundle.entries)
        return bool(left & fours) if scenario == "four" else bool(left) and ENTRIES[0].key not in left

    harmful = lambda b: "metric" if ENTRIES[0] in b.entries and not fours & keys(b.entries) else ""  # noqa: E731
    validated, bundle = run(Answers(harmful, slower), bundle_of(*ENTRIES))
    assert bundle.stock
    assert set(validated.dropped) == keys(ENTRIES)
    assert all(result.passed for result in validated.scenarios)


def test_where_checks_of_one_bundle_differ_stock_is_left() -> None:
    answers = Answers(lambda b: "norm" if b.entries == ENTRIES and len(answers.checked) != 3 else "")
    validated, bundle = run(answers, bundle_of(*ENTRIES))
    assert [len(one.entries) for one in answers.checked] == [7, 3, 7, 7, 0], "all of it passes the second time alone"
    assert bundle.stock
    assert validated.verdict.passed
    assert all("norm is 3" in why for why in validated.dropped.values())


def test_what_was_timed_before_a_kill_is_not_timed_again() -> None:
    listener = Listener()
    first, _ = run(Answers(), bundle_of(*ENTRIES), listener=listener)
    timed = [event for event in listener.events if isinstance(event, ScenarioTimed)]
    timed.sort(key=lambda event: event.scenario != "one")  # they come in any order
    assert [event.scenario for event in timed] == ["one", "four"]
    killed = RunState.from_events([STARTED, *(event_from_json(event_to_json(event)) for event in timed[:1])])
    answers = Answers()
    again, _ = run(answers, bundle_of(*ENTRIES), state=killed)
    assert answers.timed == ["four"]
    assert again.scenarios == first.scenarios
    others = Answers()
    run(others, bundle_of(*ENTRIES[1:]), state=killed)
    assert others.timed == ["one", "four"], "times with another bundle say nothing about this one"


def test_a_verdict_counts_on_resume_for_the_very_bundle_that_was_judged() -> None:
    listener = Listener()
    first, left = run(Answers(having(ENTRIES[2])), bundle_of(*ENTRIES, freezing="all"), listener=listener)
    told = [event_to_json(event) for event in listener.events if not isinstance(event, ScenarioTimed)]
    done = RunState.from_events([STARTED, *map(event_from_json, told)])
    answers = Answers(lambda b: "norm" if ENTRIES[0] in b.entries else "")
    assert run(answers, bundle_of(*ENTRIES, freezing="all"), state=done) == (first, left)
    assert answers.checked == [], "nothing changed since"
    more, other = (*ENTRIES, entry(1, 96)), Listener()
    validated, bundle = run(answers, bundle_of(*more, freezing="all"), state=done, listener=other)
    assert keys(bundle.entries) == keys(more) - {ENTRIES[0].key}, "the model never saw the one that came later"
    again = RunState.from_events([STARTED, *map(event_from_json, [*told, *map(event_to_json, other.events)])])
    assert run(Answers(lambda b: "crash"), bundle_of(*more, freezing="all"), state=again) == (validated, bundle)


def test_a_verdict_of_an_earlier_version_says_nothing_of_which_bundle_it_is() -> None:
    listener = Listener()
    run(Answers(), bundle_of(*ENTRIES), listener=listener)
    told = [event_to_json(event) for event in listener.events if not isinstance(event, ScenarioTimed)]
    for event in told:
        event.pop("applied_digest", None)
    answers = Answers()
    run(answers, bundle_of(*ENTRIES), state=RunState.from_events([STARTED, *map(event_from_json, told)]))
    assert len(answers.checked) == 1


def test_the_model_is_checked_alone_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_threads: None) -> None:
    """It takes all threads for minutes: what another run times meanwhile would be wrong."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with device_lock("cpu", exclusive=True):
        (lock,) = tmp_path.glob("*/cpu.lock")

    def check_model(*_: Any) -> tuple[Verdict, tuple[EvalResult, ...]]:
        with open(lock) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return Verdict(checks=FINE.checks), ()

    monkeypatch.setattr("autokernel.evaluate.quality.check_model", check_model)
    job = CheckModel(loaded=load_experiment(EXPERIMENT), bundle=bundle_of(), device="cpu", threads=1, seed=0)
    assert job().passed
    with open(lock) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it was given back


def test_the_stage_is_announced_and_ended() -> None:
    listener = Listener()
    context = RunContext(
        loaded=load_experiment(EXPERIMENT), folder=Path("unused"), run_id="r", device="cpu", threads=2,
        environment=ENVIRONMENT, pool=cast(Any, Answers()), recorders=[listener],
    )  # fmt: skip
    validate(context, bundle_of(*ENTRIES), {"an older one": "why"})
    assert [e.stage for e in listener.events if isinstance(e, StageFinished)] == ["validate"]
    assert [e.dropped for e in listener.events if isinstance(e, ModelValidated)] == [{"an older one": "why"}]
