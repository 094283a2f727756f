"""What the search stage decides by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pretended_run import ENVIRONMENT, Listener, context_of

from autokernel.errors import StorageError
from autokernel.events import Evaluated, Event, Profiled, RunStarted, StageFinished
from autokernel.records import Candidate, Check, Evaluation, Hotspot, Measurement, Problem, Status, TensorSpec, Verdict
from autokernel.search.budget import Scheduler
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space
from autokernel.search.tuner import Tuner
from autokernel.stages.confirm import is_stock
from autokernel.stages.search import Hunt, _next, open_hunts, search, study_name
from autokernel.tracking.state import RunState


def test_names_of_studies_fit_into_a_database_and_stay_apart() -> None:
    assert study_name("run", "cpu: mm(a, b)") == "run cpu: mm(a, b)"
    long = [f"cuda: generated({'t1 = add(i0, i1); ' * 100}{end})" for end in ("a", "b")]
    names = [study_name("20261121-142957-f2fcdd28", key) for key in long]
    assert all(len(name) < 480 for name in names), "with the fingerprint that may follow, below 512"
    assert names[0] != names[1]
    assert names == [study_name("20261121-142957-f2fcdd28", key) for key in long]


def hunt(n: int) -> Hunt:
    """For a product of fp32 with n columns, on an H200, by Inductor's templates alone."""
    left, right = TensorSpec.contiguous((37, 768), "bfloat16"), TensorSpec.contiguous((768, n), "bfloat16")
    problem = Problem(op="mm", device="cuda", inputs=(left, right), constants=(1,))
    device = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232448, l2_bytes=60 << 20)
    sizes = {"m": 37, "n": n, "k": 768, "batch": 1, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}
    tuner = Tuner(
        problem=problem, spaces={"inductor": load_space("mm")["inductor"]}, names=names_for(sizes, device), sampler="model",
        max_trials=30,
    )  # fmt: skip
    spot = Hotspot(
        problem=problem, scenario="s", num_calls=1, time_us=10.0, share=0.5, weight=0.5, roofline_us=1.0
    )  # fmt: skip
    return Hunt(hotspot=spot, tuner=tuner)


def test_trials_of_a_problem_whose_candidates_are_all_wrong_go_to_another() -> None:
    wrong, other = hunt(768), hunt(1536)
    hunts = {h.hotspot.problem.key: h for h in (wrong, other)}
    scheduler = Scheduler(dict.fromkeys(hunts, 30), dict.fromkeys(hunts, 0.5))
    spent = dict.fromkeys(hunts, 0)
    while (flight := _next(hunts, scheduler)) is not None:
        candidate = flight.proposal.candidate
        status = Status.WRONG if flight.hunt is wrong else Status.TIMEOUT
        flight.hunt.tuner.tell(flight.proposal.number, Evaluation(candidate=candidate, status=status, message="because"))
        spent[candidate.problem.key] += 1
    assert sum(spent.values()) == 60
    assert spent[wrong.hotspot.problem.key] <= 15, "at most five of each template"


MM = Problem(
    op="mm", device="cpu", constants=(1,),
    inputs=(TensorSpec.contiguous((8, 256), "bfloat16"), TensorSpec(shape=(256, 512), dtype="bfloat16", stride=(1, 256))),
)  # fmt: skip
PROFILED = Profiled(
    hotspots=(Hotspot(problem=MM, scenario="s", num_calls=1, time_us=10.0, share=0.5, weight=0.5, roofline_us=1.0),),
    scenario_us={"s": 20.0}, read_gb_per_s=10.0, peak_tflops={"bfloat16": 1.0},
    ceilings={"read_gb_per_s": 10.0, "tflops": {"bfloat16": 1.0}},
)  # fmt: skip
STARTED = RunStarted(
    run_id="r", name="llama", experiment="", experiment_digest="", environment=ENVIRONMENT, seed=0, version="0"
)


@dataclass
class Instant:
    """A pool that has evaluated every candidate as soon as it is asked."""

    num_workers: int = 1
    asked: list[Candidate] = field(default_factory=list)

    def submit(self, job: Any, timeout_s: float) -> Future[Evaluation]:
        self.asked.append(job.candidate)
        future: Future[Evaluation] = Future()
        future.set_result(
            Evaluation(
                candidate=job.candidate,
                status=Status.OK,
                verdict=Verdict(checks=(Check(name="all", value=0, limit=1, passed=True),)),
                measurement=Measurement(median_us=10.0 + len(self.asked), spread_us=1, num_samples=5, regime="r"),
            )
        )
        return future


@pytest.fixture
def searched(tmp_path: Path) -> Callable[..., tuple[list[Candidate], dict[str, list[Evaluation]], list[Evaluated]]]:
    """searched(journal, database) -> candidates submitted, evaluations known in the end, and those journaled."""

    def run(journal: Iterable[Event] = (), database: str = "optuna.db") -> Any:
        pool, listener = Instant(), Listener()
        storage = f"storage=sqlite:///{tmp_path / database}"
        context = context_of(pool, "cpu", listener, overrides=[storage, "search.trials=12", "backends=[aten, inductor]"])
        events = list(journal)
        context.state = RunState.from_events([STARTED, PROFILED, *events]) if events else None
        found = search(context, PROFILED)
        return pool.asked, found, [event for event in listener.events if isinstance(event, Evaluated)]

    return run


def test_what_was_cut_off_the_journal_is_tried_again(searched: Any) -> None:
    asked, _, journal = searched()
    assert len(asked) == len(journal) == 12
    cut_off = [event for event in journal if is_stock(event.evaluation.candidate) or event.number > 9]
    assert len(cut_off) == 4
    left = [event for event in journal if event not in cut_off]
    again, found, rest = searched(left)
    assert len(again) == 4
    (stock,) = [event.evaluation.candidate for event in cut_off if is_stock(event.evaluation.candidate)]
    assert stock in again, "without it nothing is confirmed"
    assert len({evaluation.candidate.id for evaluation in found[MM.key]}) == 12
    assert not searched([*left, *rest])[0], "all of it is known now"


def test_a_search_that_is_over_needs_no_database(searched: Any) -> None:
    _, _, journal = searched()
    elsewhere = "no/such/folder/optuna.db"
    again, found, rest = searched([*journal, StageFinished(stage="search", seconds=1.0)], elsewhere)
    assert not again
    assert not rest
    assert found == {MM.key: [event.evaluation for event in journal]}
    with pytest.raises(StorageError):
        searched(journal, elsewhere)


def test_gemms_that_fusions_outrank_are_searched_where_all_are_asked_for(tmp_path: Path) -> None:
    q, longer = (TensorSpec.contiguous((1, 4, length, 16), "float32") for length in (8, 16))
    fused = Problem(op="attention", device="cpu", inputs=(q, q, q), scalars=(("scale", 0.25),))
    narrow = replace(MM, inputs=(MM.inputs[0], TensorSpec(shape=(256, 128), dtype="bfloat16", stride=(1, 256))))
    ranked = (MM, fused, replace(fused, inputs=(longer, longer, longer)), narrow)
    hotspots = tuple(replace(PROFILED.hotspots[0], problem=problem, time_us=40.0 - i) for i, problem in enumerate(ranked))
    profiled = replace(PROFILED, hotspots=hotspots)

    def searched(*overrides: str) -> list[Problem]:
        given = [f"storage=sqlite:///{tmp_path / 'optuna.db'}", "search.hotspots=2", "backends=[aten, inductor]", *overrides]
        hunts = open_hunts(context_of(Instant(), "cpu", Listener(), overrides=given), profiled)
        for hunt in hunts.values():
            hunt.tuner.close()
        return [hunt.hotspot.problem for hunt in hunts.values()]

    assert searched("search.all_gemms=false") == [MM, fused]
    assert searched("search.all_gemms=true") == [MM, fused, narrow]
