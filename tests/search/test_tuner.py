"""The tuner with real Optuna and real SQLite: order, legality, what it tells, and resuming after kill -9."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from autokernel.errors import ConfigError, StorageError
from autokernel.records import Candidate, Evaluation, Problem, Status, TensorSpec
from autokernel.search.seeds import Seed, SeedContext, stock_seeds
from autokernel.search.space import DeviceFacts, Space, names_for
from autokernel.search.space_file import load_space
from autokernel.search.tuner import Proposal, Tuner

Evaluate = Callable[..., Evaluation]
CPU = DeviceFacts(device="cpu", threads=4, isa="AVX512", num_units=4)
PROBLEM = Problem(
    op="mm",
    device="cpu",
    inputs=(TensorSpec.contiguous((128, 256), "bfloat16"), TensorSpec.contiguous((256, 512), "bfloat16")),
    constants=(1,),
)
NAMES = names_for({"m": 128, "n": 512, "k": 256, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}, CPU)


def spaces() -> dict[str, Space]:
    return load_space("mm")


def tuner(**arguments: Any) -> Tuner:
    return Tuner(**{"problem": PROBLEM, "spaces": spaces(), "names": NAMES, "max_trials": 100, **arguments})


def stock() -> list[Seed]:
    return stock_seeds(SeedContext(problem=PROBLEM, spaces=spaces(), names=NAMES))


def landscape(candidate: Candidate) -> float:
    """Microseconds; smooth, with one best config that random draws seldom meet."""
    config: Any = candidate.config
    if candidate.backend == "aten":
        return 120 - 10 * config["prepack"]
    threads = {(1, 4, 1): 0.0, (2, 2, 1): 0.1, (0, 0, 0): 0.15}.get(tuple(config[f"threads_{a}"] for a in "mnk"), 0.3)
    if config["block_m"] == 0:
        return 100 * math.exp(threads)
    away = (
        abs(math.log2(config["block_m"] / 8)) + abs(math.log2(config["block_n"] / 4)) + abs(math.log2(config["block_k"] / 32))
    )
    return 80 * math.exp(threads + 0.1 * away)


def drive(t: Tuner, evaluate: Evaluate, count: int = 4, rounds: int = 10_000) -> list[Proposal]:
    done: list[Proposal] = []
    for _ in range(rounds):
        proposals = t.ask(count)
        if not proposals:
            break
        for proposal in proposals:
            t.tell(proposal.number, evaluate(proposal.candidate, landscape(proposal.candidate)))
        done += proposals
    return done


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_seeds_first_then_distinct_legal_configs(sampler: str, evaluate: Evaluate) -> None:
    trials = 100 if sampler != "gp" else 12
    t = tuner(sampler=sampler, max_trials=trials)
    assert t.enqueue(stock()) == 2
    assert t.enqueue(stock()) == 0
    done = drive(t, evaluate)
    assert len(done) == trials
    assert [p.origin for p in done[:2]] == ["stock", "default"]
    assert done[2].origin == "enumerated"  # the other config of aten
    assert {p.origin for p in done[3:]} == {sampler}
    assert len({p.candidate.id for p in done}) == trials
    assert len({p.number for p in done}) == trials
    for proposal in done:
        assert spaces()[proposal.candidate.backend].violations(proposal.candidate.config, NAMES) == []
    assert not t.exhausted
    best = t.best()
    assert best is not None
    assert best.median_us == min(landscape(p.candidate) for p in done)
    t.max_trials += 3  # what the scheduler passes on
    assert len(t.ask(10)) == 3


def test_batches_are_distinct_while_in_flight(evaluate: Evaluate) -> None:
    t = tuner()
    drive(t, evaluate, rounds=10)
    batch = t.ask(16)
    assert len({p.candidate.id for p in batch}) == 16
    numbers = [proposal.number for proposal in batch]
    with pytest.raises(ValueError, match=re.escape(f"in flight are {sorted(numbers)}")):
        t.tell(max(numbers) + 1, evaluate(batch[0].candidate, 50.0))
    for proposal in reversed(batch):
        t.tell(proposal.number, evaluate(proposal.candidate, 50.0))
    with pytest.raises(ValueError, match=r"in flight are \[\]"):
        t.tell(numbers[0], evaluate(batch[0].candidate, 50.0))
    assert t.num_finished == 56


def test_small_spaces_are_exhausted(tmp_path: Path, evaluate: Evaluate) -> None:
    (tmp_path / "mm.yaml").write_text(
        "op: mm\nbackends: {aten: {cpu: {choices: {a: [1, 2, 3], b: [1, 2, 3]}, constraints: [a <= b], default: {a: 3, b: 3}}}}"
    )
    t = tuner(spaces=load_space("mm", tmp_path))
    assert t.size == 6
    proposals = t.ask(100)
    assert len(proposals) == 6
    assert t.exhausted
    assert t.ask(1) == []
    lost = proposals[2]
    t.tell(lost.number, evaluate(lost.candidate, Status.LOST))
    assert not t.exhausted
    assert [p.candidate.id for p in t.ask(5)] == [lost.candidate.id]


def test_a_sampled_space_is_exhausted_too(tmp_path: Path, evaluate: Evaluate) -> None:
    (tmp_path / "mm.yaml").write_text(
        "op: mm\nbackends: {inductor: {cpu: {choices: {block_m: [1, 2, 4, 8], block_n: [1, 2, 4, 8], block_k: [1, 2, 4]},"
        "constraints: [block_m * block_n * block_k >= 8], default: {block_m: 8, block_n: 4, block_k: 1}}}}"
    )
    t = tuner(spaces=load_space("mm", tmp_path), max_trials=30)
    t.max_trials = 1000
    seen = 0
    while proposals := t.ask(3):
        for proposal in proposals:
            t.tell(proposal.number, evaluate(proposal.candidate, float(seen % 7 + 1)))
            seen += 1
    assert t.exhausted
    assert seen == t.size == 38


def test_every_status_is_told_as_it_should_be(tmp_path: Path, evaluate: Evaluate) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    t = tuner(storage=url, study_name="s")
    results: list[float | Status] = [100.0, 200.0, *(s for s in Status if s is not Status.OK), 50.0] * 3
    for result in results:
        (proposal,) = t.ask(1)
        t.tell(proposal.number, evaluate(proposal.candidate, result))
    t.close()
    trials = optuna.load_study(study_name="s", storage=url).trials
    assert len(trials) == len(results)
    for trial in trials:
        status = trial.user_attrs["candidate"]["status"]
        if status == "LOST":
            assert trial.state is optuna.trial.TrialState.FAIL
            continue
        assert trial.state is optuna.trial.TrialState.COMPLETE
        if status == "OK":
            assert round(math.exp(trial.value or 0)) in (50, 100, 200)
            assert max(trial.constraints.values()) <= 0
        else:
            assert (trial.value or 0) > math.log(200)  # worse than the worst
            assert max(trial.constraints.values()) > 0


def test_lost_is_tried_again_but_not_for_ever(evaluate: Evaluate) -> None:
    t = tuner()
    t.enqueue(stock())
    first = t.ask(1)[0]
    for _ in range(2):
        t.tell(first.number, evaluate(first.candidate, Status.LOST))
        again = t.ask(1)[0]
        assert again.candidate == first.candidate
        assert again.origin == "stock"
        assert again.number != first.number
        first = again
    t.tell(first.number, evaluate(first.candidate, Status.LOST))
    assert all(p.candidate != first.candidate for p in t.ask(20))


def test_failures_steer_the_sampler_away(evaluate: Evaluate) -> None:
    t = tuner(max_trials=120)
    failed = []
    for _ in range(120):
        (proposal,) = t.ask(1)
        bad = proposal.candidate.config.get("block_m") in (16, 32)
        failed.append(bad)
        t.tell(proposal.number, evaluate(proposal.candidate, Status.WRONG if bad else landscape(proposal.candidate)))
    assert sum(failed[60:]) < 20  # two of seven choices: random meets them 17 times in 60, uniform over legal ones 27


def test_the_sampler_is_told_of_violated_constraints(evaluate: Evaluate) -> None:
    t = tuner()
    for i in range(30):
        (proposal,) = t.ask(1)
        t.tell(proposal.number, evaluate(proposal.candidate, Status.CRASHED if i % 2 else 10.0 + i))
    study: Any = t._study
    trials = study._study.get_trials(deepcopy=False)
    assert {trial.state for trial in trials} == {optuna.trial.TrialState.COMPLETE}
    slowest = max(trial.value for trial in trials if max(trial.constraints.values()) <= 0)
    violated = [trial for trial in trials if max(trial.constraints.values()) > 0]
    assert len(violated) >= 13
    assert all(trial.value > math.log(10) for trial in violated)
    assert slowest <= math.log(40)


def test_same_seed_same_proposals(evaluate: Evaluate) -> None:
    runs = [[p.candidate.id for p in drive(tuner(seed=seed, max_trials=60), evaluate)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_tell_refuses_what_was_not_asked(evaluate: Evaluate) -> None:
    t = tuner()
    one, two = t.ask(2)
    with pytest.raises(ValueError, match="proposal 77 is not in flight"):
        t.tell(77, evaluate(one.candidate, 1.0))
    with pytest.raises(ValueError, match=f"proposal {one.number} is .*, not "):
        t.tell(one.number, evaluate(two.candidate, 1.0))
    t.tell(one.number, evaluate(one.candidate, 1.0))
    with pytest.raises(ValueError, match="not in flight"):
        t.tell(one.number, evaluate(one.candidate, 1.0))


def test_illegal_and_foreign_seeds_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    t = tuner()
    foreign = Problem(op="mm", device="cpu", inputs=PROBLEM.inputs)
    seeds = [
        Seed(candidate=Candidate(problem=PROBLEM, backend="aten", config={"prepack": 7}), origin="x"),
        Seed(candidate=Candidate(problem=PROBLEM, backend="triton", config={}), origin="x"),
        Seed(candidate=Candidate(problem=foreign, backend="aten", config={"prepack": False}), origin="x"),
    ]
    with caplog.at_level("INFO"):
        assert t.enqueue(seeds) == 0
    assert len([r for r in caplog.records if "left out" in r.message]) == 3


def test_warm_start_repeats_nothing_and_learns(tmp_path: Path, evaluate: Evaluate) -> None:
    first = drive(tuner(max_trials=50), evaluate)
    evaluations = [evaluate(p.candidate, landscape(p.candidate)) for p in first[:-1]]
    evaluations.append(evaluate(first[-1].candidate, Status.LOST))
    url = f"sqlite:///{tmp_path / 'study.db'}"
    t = tuner(storage=url, max_trials=100)
    assert t.warm_start(evaluations) == 49
    assert t.warm_start(evaluations) == 0
    rest = drive(t, evaluate)
    assert len(rest) == 51
    assert not {p.candidate.id for p in rest} & {p.candidate.id for p in first[:-1]}
    t.close()
    again = tuner(storage=url)
    assert again.num_finished == 100
    assert again.ask(1) == []


def test_tpe_beats_random(evaluate: Evaluate) -> None:
    best: dict[str, list[float]] = {"tpe": [], "random": []}
    for sampler, results in best.items():
        for seed in range(6):
            t = tuner(sampler=sampler, seed=seed, max_trials=60)
            drive(t, evaluate)
            found = t.best()
            assert found is not None
            results.append(found.median_us or math.inf)
    assert statistics.median(best["tpe"]) < statistics.median(best["random"])
    assert statistics.mean(best["tpe"]) < 0.97 * statistics.mean(best["random"])
    assert statistics.median(best["tpe"]) <= 80 * math.exp(0.1) + 1e-6  # within one step of the best


def test_two_sampled_backends_with_conditional_parameters(tmp_path: Path, evaluate: Evaluate) -> None:
    part = "choices: {kind: [x, y], size: {range: [1, 64], log2: true}, extra: {range: [0, 9]}}, when: {extra: kind == 'y'}"
    default = "default: {kind: x, size: 4}"
    (tmp_path / "mm.yaml").write_text(
        f"op: mm\nbackends: {{aten: {{cpu: {{{part}, {default}}}}}, inductor: {{cpu: {{{part}, {default}}}}}}}"
    )
    t = tuner(spaces=load_space("mm", tmp_path), max_trials=70)

    def cost(candidate: Candidate) -> float:
        config: Any = candidate.config
        return (
            10
            + abs(math.log2(config["size"]) - 5)
            + (0 if config["kind"] == "y" else 4)
            + abs(config.get("extra", 0) - 3)
            + (5 if candidate.backend == "aten" else 0)
        )

    for _ in range(70):
        (proposal,) = t.ask(1)
        assert ("extra" in proposal.candidate.config) == (proposal.candidate.config["kind"] == "y")
        t.tell(proposal.number, evaluate(proposal.candidate, cost(proposal.candidate)))
    best = t.best()
    assert best is not None
    assert best.median_us == pytest.approx(10)


KILLED = """
    import os, signal, sys
    from test_tuner import *
    from conftest import evaluate as fixture
    evaluate = fixture.__wrapped__() if hasattr(fixture, "__wrapped__") else fixture._get_wrapped_function()()
    t = tuner(storage=sys.argv[1], study_name="s", max_trials=60)
    t.enqueue(stock())
    for i in range(25):
        for proposal in t.ask(2):
            t.tell(proposal.number, evaluate(proposal.candidate, landscape(proposal.candidate)))
            print(proposal.candidate.id, flush=True)
        if i == 11:
            t.ask(4)  # in flight when it dies
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_and_repeats_nothing(tmp_path: Path, evaluate: Evaluate) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    here = Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), url],
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent.parent}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    finished = process.stdout.split()
    assert len(finished) == 24
    t = tuner(storage=url, study_name="s", max_trials=60)
    assert t.num_finished == 24
    t.enqueue(stock())
    rest = drive(t, evaluate)
    assert len(rest) == 36
    assert not {p.candidate.id for p in rest} & set(finished)
    t.close()
    trials = optuna.load_study(study_name="s", storage=url).trials
    assert len(trials) == 60
    assert len({json.dumps(trial.user_attrs["candidate"]["config"]) for trial in trials}) == 60


def test_running_trials_are_reclaimed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    tuner(storage=url, study_name="s").close()
    optuna.load_study(study_name="s", storage=url).ask()
    tuner(storage=url, study_name="s").close()
    assert [trial.state for trial in optuna.load_study(study_name="s", storage=url).trials] == [optuna.trial.TrialState.FAIL]


def test_sqlite_is_opened_for_many_small_commits(tmp_path: Path) -> None:
    t = tuner(storage=f"sqlite:///{tmp_path / 'study.db'}")
    mirror: Any = t._mirror
    with mirror._storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1


def test_a_changed_space_starts_a_study_beside_the_old_one(tmp_path: Path, evaluate: Evaluate) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    t = tuner(storage=url, study_name="s", max_trials=5)
    drive(t, evaluate)
    other = names_for(
        {"m": 1, "n": 512, "k": 256, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0},
        DeviceFacts(device="cpu", threads=2),
    )
    changed = tuner(storage=url, study_name="s", names=other)
    assert changed.num_finished == 0
    assert len(drive(changed, evaluate, rounds=2)) == 8
    assert tuner(storage=url, study_name="s", names=other).num_finished == 8
    assert tuner(storage=url, study_name="s").num_finished == 5


def test_storage_trouble_is_a_storage_error(tmp_path: Path, evaluate: Evaluate) -> None:
    with pytest.raises(StorageError, match="folder writable"):
        tuner(storage=f"sqlite:///{tmp_path}/none/study.db")
    (tmp_path / "broken.db").write_text("this is no database" * 100)
    with pytest.raises(StorageError, match=r"broken.db.*not a database"):
        tuner(storage=f"sqlite:///{tmp_path / 'broken.db'}")
    with pytest.raises(StorageError):
        tuner(storage="nonsense://")
    t = tuner(storage=f"sqlite:///{tmp_path / 'full.db'}")
    (proposal,) = t.ask(1)
    mirror: Any = t._mirror
    with mirror._storage.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    from sqlalchemy import event

    event.listen(mirror._storage.engine, "connect", lambda c, _r: c.execute(f"PRAGMA max_page_count={pages}"))
    mirror._storage.engine.dispose()

    def fill() -> None:
        for each in [proposal, *t.ask(60)]:
            t.tell(each.number, evaluate(each.candidate, 10.0))

    with pytest.raises(StorageError, match="full"):
        fill()


def test_cmaes_without_its_package() -> None:
    try:
        import cmaes  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install cmaes"):
            tuner(sampler="cmaes")
    else:
        assert tuner(sampler="cmaes").ask(1)
