"""Jobs on the whole model: how many at once, and which entries are found useless."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from pretended_run import ENVIRONMENT, LLAMA, Listener, context_of

from autokernel.config import load_experiment
from autokernel.errors import JobCrashed, JobLost
from autokernel.evaluate.end_to_end import ScenarioTiming, TimeScenario
from autokernel.events import ModelValidated, RunStarted, ScenarioResult
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.proof import Proof, ScenarioProof
from autokernel.export.prove import Prove
from autokernel.profiling.footprint import Footprint, MeasureFootprints
from autokernel.profiling.workload import load_model
from autokernel.records import Problem, Speedup, TensorSpec, Verdict
from autokernel.stages.ablation import without_useless
from autokernel.stages.beside import BesideJob
from autokernel.stages.graph import search_graph_options
from autokernel.stages.production import prove
from autokernel.stages.rehearsal import Rehearse
from autokernel.stages.whole_model import footprint_of, measure_ahead, run_on_model, size_of, with_layers
from autokernel.tracking.state import RunState

pytestmark = pytest.mark.clock

SIZES = {"decode-b1": 30, "decode-b16": 40, "decode-b64": 55, "decode-b128": 75, "prefill-1x2048": 30, "prefill-4x2048": 35}


@dataclass
class Threads:
    """A pool of threads that notes which jobs run at once."""

    num_workers: int = 8
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: set[str] = field(default_factory=set)
    together: list[frozenset[str]] = field(default_factory=list)
    renewed: int = 0
    measured: int = 0

    def renew(self) -> None:
        assert not self.running & SIZES.keys(), "no job of a stage runs between stages"
        self.renewed += 1

    def submit(self, job: Callable[[], Any], timeout_s: float) -> Future[Any]:
        if isinstance(job, MeasureFootprints):
            self.measured += 1
            answer = tuple(Footprint(scenarios=SIZES, device=150, copies=10) for _ in job.models)
            return self.executor.submit(lambda: answer)
        return self.executor.submit(self._run, job)

    def _run(self, job: Any) -> Any:
        name = job.scenario
        with self.lock:
            self.running.add(name)
            self.together.append(frozenset(self.running))
        try:
            return job()
        finally:
            with self.lock:
                self.running.discard(name)

    def close(self) -> None:
        self.executor.shutdown()


@dataclass
class Job:
    scenario: str
    problems: list[BaseException] = field(default_factory=list)
    meet: Callable[[], object] = lambda: time.sleep(0.02)

    def __call__(self) -> str:
        self.meet()
        if self.problems:
            raise self.problems.pop()
        return self.scenario.upper()


def test_no_more_run_at_once_than_fit() -> None:
    pool = Threads()
    jobs = [(name, name, Job(name)) for name in SIZES]
    frozen = Bundle(name="t", created="", version="", environment=ENVIRONMENT, entries=(), graph_options={"freezing": "all"})
    assert run_on_model(context_of(pool), "s", jobs, 10, bundle=frozen) == [name.upper() for name in SIZES]
    room = 150 * context_of(pool).experiment.cluster.model_memory
    assert all(sum(SIZES[name] for name in names) <= room for names in pool.together)
    assert any(len(names) == 3 for names in pool.together)
    assert "decode-b128" in pool.together[0], "the largest starts first"
    assert pool.renewed == 2, "what earlier jobs left on the device is gone, and so is what these leave"


def test_stock_jobs_need_no_room_for_copies() -> None:
    pool = Threads()
    run_on_model(context_of(pool), "s", [(name, name, Job(name)) for name in SIZES], 10)
    room = 150 * context_of(pool).experiment.cluster.model_memory
    assert any(sum(SIZES[name] for name in names) > room for names in pool.together)
    assert all(sum(SIZES[name] - 10 for name in names) <= room for names in pool.together)


def test_what_a_bundle_merges_needs_room() -> None:
    x = TensorSpec.contiguous((1, 64), "bfloat16")
    w = TensorSpec(shape=(64, 16), dtype="bfloat16", stride=(1, 64))
    problem = Problem(op="merged_mm", inputs=(x, w, w), device="cuda", constants=(1, 2))
    merged = Entry(problem=problem, backend="aten", config={"merge": "concat"}, scenario="a")
    found = Footprint(scenarios={"a": 100_000, "b": 100_000}, device=0, copies=30_000, layers=4)
    bundle = Bundle(name="t", created="", version="", environment=ENVIRONMENT, entries=(merged, entry(16, "b")))
    assert size_of(found, "a", None) == 70_000
    assert size_of(found, "a", bundle) == 70_000 + 4 * 2 * 64 * 16 * 2
    assert size_of(found, "b", bundle) == 70_000
    assert size_of(found, "b", replace(bundle, graph_options={"freezing": "all"})) == 100_000
    assert size_of(replace(found, copies=10_000), "a", bundle) == 100_000, "never more than all"


def beside(name: str, size: int, job: Callable[[], object] | None = None) -> BesideJob:
    return BesideJob(label=name, job=job or Job(name), size=size, timeout_s=10)


def test_jobs_beside_may_fail() -> None:
    pool = Threads()
    context = context_of(pool)
    context.beside.waiting = [beside("x", 1, Job("x", [JobCrashed("why")])), beside("y", 1)]
    assert run_on_model(context, "s", [("a", "decode-b64", Job("decode-b64"))], 10) == ["DECODE-B64"]
    context.beside.finish()
    assert pool.running == set()
    assert frozenset().union(*pool.together) == {"x", "y", "decode-b64"}


def test_jobs_beside_outlive_a_stage_and_leave_it_room() -> None:
    pool, end, begun = Threads(), threading.Event(), threading.Semaphore(0)
    context = context_of(pool)

    @dataclass
    class Long(Job):
        def __call__(self) -> str:
            begun.release()
            end.wait(60)
            return ""

    # the room is 135: three fifths of it are theirs
    context.beside.waiting = [beside("small", 5, Long("small")), beside("large", 75, Long("large")), beside("next", 10)]
    first = [(name, name, Job(name)) for name in ("decode-b1", "decode-b16")]
    assert run_on_model(context, "s", first, 10) == ["DECODE-B1", "DECODE-B16"]
    assert all(begun.acquire(timeout=60) for _ in range(2)), "they were started, and threads take their time"
    assert pool.running == {"large", "small"}
    assert [job.label for job in context.beside.waiting] == ["next"], "81 are their share"
    assert run_on_model(context, "s", [("a", "decode-b64", Job("decode-b64"))], 10) == ["DECODE-B64"]
    assert {"large", "small", "decode-b64"} in pool.together
    wide = threading.Timer(0.2, end.set)
    wide.start()
    assert run_on_model(context, "s", [("a", "decode-b128", Job("decode-b128"))], 10) == ["DECODE-B128"]
    assert frozenset({"decode-b128"}) in pool.together, "it fits beside neither of them, and waits"
    context.beside.finish()
    assert not context.beside.running
    assert not pool.running


def test_jobs_beside_leave_workers_to_the_stages() -> None:
    pool = Threads(num_workers=3)
    context = context_of(pool)
    context.beside.waiting = [beside(str(number), 1) for number in range(4)]
    run_on_model(context, "s", [("a", "decode-b64", Job("decode-b64"))], 10)
    assert max(len(names - {"decode-b64"}) for names in pool.together) == 1
    context.beside.finish()
    assert not context.beside.waiting, "validation does what nobody rehearsed"


def test_what_jobs_take_may_be_measured_ahead_and_is_so_once() -> None:
    pool = Threads()
    context = context_of(pool)
    for _ in range(2):
        measure_ahead(context)
        assert footprint_of(context, 4).scenarios == SIZES
    assert pool.measured == 1
    measure_ahead(context_of(pool, "cpu"))
    assert pool.measured == 1


def test_of_a_model_that_tells_nothing_jobs_take_what_profiling_did() -> None:
    """Three times that, and what a process takes; before it was profiled, each runs alone."""
    device = 100 << 30
    jobs = [(name, name, Job(name)) for name in ("a", "b", "c")]
    together = []
    for peaks in ({}, {"a": 21 << 30, "b": 8 << 30, "c": 2 << 30}):
        pool = Threads()
        context = context_of(pool)
        context.footprints = {None: Footprint(scenarios={}, device=device)}
        context.peak_bytes = peaks
        run_on_model(context, "s", jobs, 10)
        together.append(pool.together)
    assert all(len(names) == 1 for names in together[0])
    assert set(together[1]) >= {frozenset("a"), frozenset("ac")}, "66 and 9 GiB"
    assert not any({"a", "b"} <= names for names in together[1]), "66 and 27 GiB"
    sizes = footprint_of(context).scenarios
    assert {name: size >> 30 for name, size in sizes.items()} == {"a": 66, "b": 27, "c": 9}


def test_on_a_cpu_all_are_handed_over() -> None:
    pool, all_of_them = Threads(), threading.Barrier(len(SIZES), timeout=30)
    run_on_model(context_of(pool, "cpu"), "s", [(name, name, Job(name, meet=all_of_them.wait)) for name in SIZES], 10)
    assert max(map(len, pool.together)) == len(SIZES)


def test_a_lost_job_is_tried_again_and_a_crash_waits_for_the_others() -> None:
    pool = Threads()
    lost = Job("decode-b1", [JobLost("node"), JobLost("node")])
    assert run_on_model(context_of(pool), "s", [("a", "decode-b1", lost)], 10) == ["DECODE-B1"]
    lost.problems = [JobLost("node") for _ in range(3)]
    with pytest.raises(JobLost):
        run_on_model(context_of(pool), "s", [("a", "decode-b1", lost)], 10)
    others = [(name, name, Job(name)) for name in SIZES]
    with pytest.raises(JobCrashed):
        run_on_model(context_of(pool), "s", [("x", "decode-b1", Job("decode-b1", [JobCrashed("why")])), *others], 10)
    assert pool.running == set()
    assert frozenset().union(*pool.together) == set(SIZES)


def test_fewer_layers_change_the_model_alone() -> None:
    loaded = load_experiment(LLAMA)
    smaller = with_layers(loaded, 4)
    assert smaller.experiment.model.config_overrides == {"num_hidden_layers": 4}
    assert smaller.experiment.scenarios == loaded.experiment.scenarios
    assert with_layers(loaded, None) is loaded
    of_a_class = load_experiment(LLAMA.parent / "zimage.yaml")
    assert with_layers(of_a_class, 4) is of_a_class, "its layers share products"


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("vit", "config_overrides", {"num_hidden_layers": 4}),
        ("chronos2", "config_overrides", {"num_layers": 4}),
    ],
)
def test_any_model_has_fewer_layers_where_its_file_says_what_counts_them(
    name: str, field: str, expected: dict[str, int]
) -> None:
    loaded = load_experiment(LLAMA.parent / f"{name}.yaml")
    smaller = with_layers(loaded, 4)
    assert expected.items() <= getattr(smaller.experiment.model, field).items()
    assert smaller.experiment.scenarios == loaded.experiment.scenarios
    assert with_layers(loaded, 64) is loaded, "it has no more"
    assert with_layers(smaller, 4) is smaller
    unknown = loaded.experiment.model.model_copy(update={"depth_key": None})
    assert unknown.with_depth(4) is unknown


def test_what_counts_the_layers_may_be_an_argument() -> None:
    model = load_experiment(LLAMA.parent / "zimage.yaml").experiment.model
    said = model.model_copy(update={"depth_key": "n_layers"})
    assert (said.depth, said.with_depth(4).arguments) == (30, {**model.arguments, "n_layers": 4})


def test_a_vit_of_four_layers_is_built() -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 6}
    changes = ("device=cpu", "backends=[aten]", *(f"model.config.{name}={size}" for name, size in sizes.items()))
    loaded = load_experiment(LLAMA.parent / "vit.yaml", changes)
    models = [load_model(one, "cpu") for one in (loaded, with_layers(loaded, 4))]
    counts = [sum(name.endswith("layernorm_before.weight") for name, _ in model.named_parameters()) for model in models]
    assert counts == [6, 4]


def entry(n: int, scenario: str) -> Entry:
    x, w = TensorSpec.contiguous((16, 64), "bfloat16"), TensorSpec(shape=(64, n), dtype="bfloat16", stride=(1, 64))
    problem = Problem(op="mm", inputs=(x, w), device="cuda", constants=(1,))
    return Entry(problem=problem, backend="aten", config={"prepack": False}, scenario=scenario)


@dataclass
class Ablations(Threads):
    """Answers ablations: how much faster the model is without each entry."""

    gains: dict[str, float] = field(default_factory=dict)
    jobs: list[TimeScenario] = field(default_factory=list)
    rehearsed: list[str] = field(default_factory=list)

    def _run(self, job: Any) -> Any:
        if isinstance(job, Rehearse):
            self.rehearsed.append(job.scenario)
            return 1.0
        self.jobs.append(job)
        speedups = {}
        for contender in job.contenders[1:]:
            ratio = self.gains.get(contender.name, 0.98)
            speedups[contender.name] = Speedup(ratio=ratio, low=ratio - 0.01, high=ratio + 0.01, num_rounds=11)
        return ScenarioTiming(scenario=job.scenario, baseline=job.contenders[0].name, modes=(), speedups=speedups)


def test_ablation_drops_what_the_model_is_clearly_faster_without() -> None:
    entries = (entry(16, "decode-b1"), entry(32, "decode-b1"), entry(48, "decode-b1"), entry(64, "decode-b16"))
    pool = Ablations(gains={entries[1].key: 1.05, entries[2].key: 1.005})
    bundle = Bundle(name="t", created="", version="", environment=ENVIRONMENT, entries=entries)
    gone: dict[str, str] = {}
    context = context_of(pool)
    left = without_useless(context, bundle, gone)
    assert left.entries == (entries[0], entries[2], entries[3])
    assert list(gone) == [entries[1].key]
    assert "decode-b1 is 1.050 times as fast without it" in gone[entries[1].key]
    context.beside.finish()
    assert pool.rehearsed == ["decode-b128"], "nobody did before; the others find no room"
    assert sorted((job.scenario, len(job.contenders)) for job in pool.jobs) == [
        ("decode-b1", 2), ("decode-b1", 3), ("decode-b16", 2),
    ]  # fmt: skip
    assert all(job.loaded.experiment.model.config_overrides == {"num_hidden_layers": 4} for job in pool.jobs)
    for contender in pool.jobs[0].contenders[1:]:
        assert contender.bundle is not None
        assert {e.key for e in entries} - {e.key for e in contender.bundle.entries} == {contender.name}


def test_a_resumed_run_does_not_ablate_again() -> None:
    entries = (entry(16, "decode-b1"), entry(32, "decode-b16"))
    pool, listener = Ablations(gains={entries[1].key: 1.05}), Listener()
    bundle = Bundle(name="t", created="", version="", environment=ENVIRONMENT, entries=entries)
    context = context_of(pool, "cuda", listener)
    left = without_useless(context, bundle, {})
    assert left.entries == entries[:1]
    started = RunStarted(
        run_id="r", name="t", experiment="", experiment_digest="", environment=ENVIRONMENT, seed=0, version="0", git_commit="",
        resumed=False,
    )  # fmt: skip
    again, gone = context_of(Threads()), dict[str, str]()
    again.state = RunState.from_events([started, *listener.events])
    assert without_useless(again, bundle, gone) == left, "Threads has no answer to a job"
    assert list(gone) == [entries[1].key]
    pool.jobs.clear()
    other = context_of(pool)
    other.state = again.state
    assert without_useless(other, left, {}) == left
    assert pool.jobs, "what was found out of another bundle does not count"


def test_stock_modes_are_rehearsed_beside_graph_options() -> None:
    pool = Ablations()
    context = context_of(pool)
    stock = Bundle(name="t", created="", version="", environment=ENVIRONMENT, entries=())
    assert search_graph_options(context, stock) == ({}, ())
    context.beside.finish()
    assert len(pool.jobs) == len(SIZES)
    assert pool.rehearsed == ["decode-b64"], "the largest beside which the largest job of the stage still has room"


@dataclass
class Proofs(Threads):
    """Answers proofs: every entry of a job's scenarios is hit."""

    jobs: list[Prove] = field(default_factory=list)

    def _run(self, job: Any) -> Any:
        self.jobs.append(job)
        return Proof(
            scenarios=tuple(ScenarioProof(scenario=name, compile_s=1.0, difference=0.0) for name in job.scenarios),
            num_benchmarks=0,
            hits={entry.key: int(entry.scenario in job.scenarios) for entry in job.bundle.entries},
            compile_s={"default": 2.0, "bundle": 1.0} if job.compare else {},
        )


def test_a_proof_of_a_few_layers_is_shared_among_processes() -> None:
    names = list(SIZES)
    entries = tuple(entry(16 * (number + 1), name) for number, name in enumerate(names))
    bundle = Bundle(name="t", created="", version="", environment=ENVIRONMENT, entries=entries)
    results = tuple(
        ScenarioResult(
            scenario=name, modes=(), best_stock="default", passed=True,
            speedup=Speedup(ratio=2.0 if name == "decode-b64" else 1.0, low=1, high=2, num_rounds=11),
        )
        for name in names
    )  # fmt: skip
    pool = Proofs()
    validated = ModelValidated(verdict=Verdict(checks=()), evals=(), scenarios=results)
    proved = prove(context_of(pool), bundle, validated)
    assert proved is not None
    assert (proved.passed, proved.num_hits, proved.stock_compile_s, proved.scenarios) == (True, 6, 2.0, tuple(names))
    assert sorted(name for job in pool.jobs for name in job.scenarios) == sorted(names)
    assert [(job.scenarios, job.compare) for job in pool.jobs if job.compare] == [(("decode-b64",), "decode-b64")]
    assert len(pool.jobs) == 4
    assert all(job.loaded.experiment.model.config_overrides == {"num_hidden_layers": 4} for job in pool.jobs)
    on_cpu = Proofs()
    prove(context_of(on_cpu, "cpu"), bundle, validated)
    assert [job.scenarios for job in on_cpu.jobs] == [tuple(names)], "where the whole model is compiled, one by one"
    assert not any(batches for job in (*pool.jobs, *on_cpu.jobs) for batches in job.rows.values())


def test_the_proof_compiles_scenarios_with_ranges_of_rows_at_other_batches_too() -> None:
    ranged = replace(entry(16, "decode-b16"), config={"m_min": 9, "m_max": 16})
    bundle = Bundle(name="t", created="", version="", environment=ENVIRONMENT, entries=(ranged, entry(64, "decode-b64")))
    speedup = Speedup(ratio=1.0, low=1, high=1, num_rounds=11)
    result = ScenarioResult(scenario="decode-b64", modes=(), best_stock="default", passed=True, speedup=speedup)
    pool = Proofs()
    prove(context_of(pool), bundle, ModelValidated(verdict=Verdict(checks=()), evals=(), scenarios=(result,)))
    assert {name: job.rows[name] for job in pool.jobs for name in job.scenarios} == {"decode-b16": (9, 17), "decode-b64": ()}


def test_what_finds_no_room_beside_is_started_as_its_smaller_one() -> None:
    pool, ends = Threads(num_workers=8), threading.Event()
    context = context_of(pool)

    def waits(name: str, size: int, smaller: BesideJob | None = None) -> BesideJob:
        return replace(beside(name, size, Job(name, meet=lambda: ends.wait(60))), smaller=smaller)

    context.beside.waiting = [waits("large", 50, beside("few layers", 8)), waits("small", 12, beside("fewer", 4))]
    context.beside.start(pool, room=100, used=88)
    assert [job.label for job, _ in context.beside.running.values()] == ["few layers", "fewer"], "12 were left, then 4"
    context.beside.waiting = [waits("whole", 6, beside("part", 5)), waits("none", 20, beside("nothing", 19))]
    context.beside.start(pool, room=100, used=82)
    assert [job.label for job, _ in context.beside.running.values()][2:] == ["whole"]
    assert [job.label for job in context.beside.waiting] == ["none"], "until something has ended"
    context.beside.waiting = [waits("in the way", 10, beside("small enough", 2))]
    context.beside.start(pool, room=100, used=0, largest=80)  # 18 are taken: the stage's largest job would wait for it
    assert [job.label for job, _ in context.beside.running.values()][3:] == ["small enough"]
    ends.set()
    context.beside.finish()
