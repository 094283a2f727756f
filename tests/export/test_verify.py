"""A bundle looked at from outside: what it says of this machine, and of another one's."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.environment import current_environment, physical_cores
from autokernel.errors import JobCrashed
from autokernel.evaluate.confirm import Confirmation, Contender
from autokernel.evaluate.end_to_end import BUNDLE, ScenarioTiming, TimeScenario
from autokernel.events import ModeTiming, ScenarioResult
from autokernel.export.bundle import Bundle, Entry, write_bundle
from autokernel.export.verify import at_rows, other_ends, verify
from autokernel.records import Candidate, Check, Evaluation, Measurement, Problem, Speedup, Status, TensorSpec, Verdict

FINE = ScenarioResult(
    scenario="four", modes=(), best_stock="default", speedup=Speedup(ratio=1, low=1, high=1, num_rounds=9), passed=True
)
EXPERIMENT = Path(__file__).parent.parent / "data" / "gated.yaml"


class NoPool:
    """Fails whoever asks it for work."""

    def submit(self, job: Any, timeout_s: float) -> Future[Any]:
        raise AssertionError(f"nothing is to be measured: {job}")


@pytest.fixture
def loaded() -> LoadedExperiment:
    return load_experiment(EXPERIMENT)


def bundle_for(loaded: LoadedExperiment) -> Bundle:
    """The down projection of four rows, with its weight packed."""
    x = TensorSpec.contiguous((4, 1024), "bfloat16")
    w = TensorSpec(shape=(1024, 256), dtype="bfloat16", stride=(1, 1024))
    problem = Problem(op="mm", inputs=(x, w), device="cpu", constants=(1,))
    entry = Entry(
        problem=problem, backend="aten", config={"prepack": True}, scenario="four",
        speedup=Speedup(ratio=1.2, low=1.1, high=1.3, num_rounds=21),
    )  # fmt: skip
    environment = current_environment("cpu", loaded.experiment.threads or physical_cores())
    return Bundle(name="gated", created="", version="", environment=environment, entries=(entry,))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"device": "cuda"}, "no cuda device"), ({"device_name": "Another CPU"}, "Another CPU")],
    ids=["no such device", "another machine"],
)
def test_a_bundle_of_another_machine_is_not_measured(
    loaded: LoadedExperiment, tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    here = bundle_for(loaded)
    write_bundle(replace(here, environment=replace(here.environment, **changed)), tmp_path / "bundle")
    report = verify(tmp_path / "bundle", loaded, pool=NoPool())  # type: ignore[arg-type]
    assert reason in str(report.environment_reason)
    assert (report.passed, report.scenarios) == (False, ())
    (check,) = report.entries
    assert (check.hits, check.holds, check.promised) == (0, False, 1.2)
    assert reason in check.message


@pytest.mark.clock
@pytest.mark.timeout(600)
def test_a_bundle_of_this_machine_is_measured_entry_by_entry(loaded: LoadedExperiment, tmp_path: Path) -> None:
    here = bundle_for(loaded)
    unknown = replace(here.entries[0], problem=replace(here.entries[0].problem, inputs=_wider(here.entries[0].problem)))
    write_bundle(replace(here, entries=(here.entries[0], unknown)), tmp_path / "bundle")
    report = verify(tmp_path / "bundle", loaded, rounds=5)
    known, other = report.entries
    assert report.environment_reason is None
    assert [result.scenario for result in report.scenarios] == ["one", "four"]
    assert known.hits == 2, "two layers at four rows"
    assert known.speedup is not None
    assert known.holds == (known.speedup.low > 1)
    assert (other.hits, other.holds, other.message) == (0, False, other.message)
    assert other.reason == "the compiled model has nothing like it"
    assert not report.passed


@dataclass
class Answering:
    """A pool whose jobs are done: scenarios hit every entry, and confirmations find what is said for their number of rows."""

    speedups: dict[int, Speedup | None]
    asked: list[Candidate] = field(default_factory=list)

    def submit(self, job: Any, timeout_s: float) -> Future[Any]:
        future: Future[Any] = Future()
        if isinstance(job, TimeScenario):
            (contender,) = [
                contender for contender in job.contenders if contender.bundle is not None and contender.bundle.entries
            ]
            hits = {entry.key: 2 for entry in contender.bundle.entries}
            future.set_result(SimpleNamespace(scenario=job.scenario, hits={BUNDLE: hits}, failures={}, reasons={}))
            return future
        (finalist,), (stock,) = job.finalists, job.baselines
        self.asked.append(finalist)
        speedup = self.speedups[job.problem.inputs[0].shape[0]]
        made = Contender(
            candidate=finalist, verdict=Verdict(checks=(Check(name="all", value=0, limit=1, passed=True),)), speedup=speedup,
            measurement=Measurement(median_us=1, spread_us=0, num_samples=9, regime=""), deterministic=True,
        )  # fmt: skip
        wrong = Evaluation(candidate=finalist, status=Status.WRONG, message="error of 3, limit 2")
        found = {"finalists": (made,)} if speedup is not None else {"failures": (wrong,)}
        future.set_result(Confirmation(problem=job.problem, baseline=stock, **found))
        return future


FASTER, EQUAL, SLOWER = (Speedup(ratio=r, low=r - 0.02, high=r + 0.02, num_rounds=11) for r in (1.1, 0.99, 0.9))


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (FASTER, EQUAL, "still faster than stock; no slower at 2 and 6 rows"),
        (SLOWER, EQUAL, "still faster than stock; at 2 rows: slower than stock"),
        (FASTER, None, "still faster than stock; at 6 rows: WRONG: error of 3, limit 2"),
    ],
    ids=["holds", "slower", "wrong"],
)
def test_both_ends_of_a_range_are_measured_again(
    loaded: LoadedExperiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: Speedup,
    last: Speedup | None,
    message: str,
) -> None:
    here = bundle_for(loaded)
    config = {"kernel": "skinny_mm", "m_min": 2, "m_max": 6}
    ranged = replace(here.entries[0], backend="triton", config=config)
    write_bundle(replace(here, entries=(ranged,)), tmp_path / "bundle")
    monkeypatch.setattr("autokernel.export.verify.result_with", lambda bundle, timing: FINE)
    pool = Answering({4: FASTER, 2: first, 6: last})
    report = verify(tmp_path / "bundle", loaded, pool=pool)  # type: ignore[arg-type]
    (check,) = report.entries
    assert check.message == message
    assert [row.m for row in check.rows] == [2, 6]
    assert check.holds == report.passed == (message.endswith("rows"))
    assert [dict(candidate.config) for candidate in pool.asked] == [config, {"kernel": "skinny_mm"}, {"kernel": "skinny_mm"}]


def test_an_end_that_was_tuned_itself_is_not_measured_twice(loaded: LoadedExperiment) -> None:
    ranged = replace(bundle_for(loaded).entries[0], config={"m_min": 2, "m_max": 4})
    assert other_ends(ranged) == (2,)
    assert other_ends(replace(ranged, config={})) == ()
    assert at_rows(ranged, 2).problem.inputs[0].shape == (2, 1024)


class Answers:
    """A pool whose models have no place for an entry, and say why; nothing else can be checked."""

    def submit(self, job: Any, timeout_s: float) -> Future[Any]:
        answer: Future[Any] = Future()
        if isinstance(job, TimeScenario):
            (contender,) = (item for item in job.contenders if item.bundle is not None)
            (key,) = (entry.key for entry in contender.bundle.entries)
            same = Speedup(ratio=1.0, low=1.0, high=1.0, num_rounds=5)
            modes = tuple(ModeTiming(mode=mode, median_us=1.0, spread_us=0.0) for mode in ("default", BUNDLE))
            answer.set_result(
                ScenarioTiming(
                    scenario=job.scenario,
                    baseline="default",
                    modes=modes,
                    speedups={BUNDLE: same},
                    hits={BUNDLE: {key: 0}},
                    reasons={key: "it is written as an einsum"} if job.scenario == "four" else {},
                )
            )
        else:
            answer.set_exception(JobCrashed("no kernels today"))
        return answer


def test_why_an_entry_is_not_hit_is_said(loaded: LoadedExperiment, tmp_path: Path) -> None:
    write_bundle(bundle_for(loaded), tmp_path / "bundle")
    report = verify(tmp_path / "bundle", loaded, pool=Answers())  # type: ignore[arg-type]
    (check,) = report.entries
    assert (check.hits, check.reason, check.holds) == (0, "it is written as an einsum", False)
    assert not report.passed


def _wider(problem: Problem) -> tuple[TensorSpec, ...]:
    x, w = problem.inputs
    return x, replace(w, shape=(1024, 512))
