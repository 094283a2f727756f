"""Which backend won, and by how much the others lost."""

from __future__ import annotations

import math

import pytest
import synthetic_events as synthetic

from autokernel.events import Event, Profiled
from autokernel.records import Candidate, ConfigValue, Problem
from autokernel.tracking.backends import backend_summaries, best_of_each
from autokernel.tracking.mlflow_layout import campaign_note, hotspot_note
from autokernel.tracking.summary import RunSummary, summarize
from autokernel.tracking.titles import config_title

CUTE: dict[str, ConfigValue] = {
    "source": "quack", "tile_m": 128, "tile_n": 64, "pingpong": False, "swap": True, "cluster_m": 2, "cluster_n": 1,
    "split_k": 4,
}  # fmt: skip


def made_up() -> RunSummary:
    """Two problems, none confirmed: stock is used. cutedsl is faster for the first, and 10 % slower for the second."""
    first, second = synthetic.gemm(16, 4096, 4096, device="cuda"), synthetic.gemm(2048, 4096, 4096, device="cuda")
    spots = (synthetic.hotspot(first, "a", 0.4, 10.0), synthetic.hotspot(second, "a", 0.4, 20.0))
    events: list[Event] = [
        synthetic.start(), Profiled(hotspots=spots, scenario_us={"a": 50.0}, read_gb_per_s=1.0, peak_tflops={})
    ]  # fmt: skip
    told = (
        (first, 10.0, "aten"),
        (first, 12.0, "inductor"),
        (first, 8.0, "cutedsl"),
        (first, 9.0, "cutedsl"),
        (second, 100.0, "aten"),
        (second, 110.0, "cutedsl"),
    )
    for number, (problem, us, backend) in enumerate(told, start=1):
        config: dict[str, ConfigValue] = {**CUTE, "split_k": number} if backend == "cutedsl" else {"prepack": False}
        events.append(trial(number, problem, us, backend, config))
    return summarize(events)


def trial(number: int, problem: Problem, us: float, backend: str, config: dict[str, ConfigValue]) -> Event:
    candidate = Candidate(problem=problem, backend=backend, config=config)
    return synthetic.evaluated(number, candidate, us, "stock" if backend == "aten" else "nvmatmul")


def test_every_backend_against_the_one_that_is_used() -> None:
    run = made_up()
    best = best_of_each(run.problems[0] if run.problems[0].title.startswith("mm 16") else run.problems[1])
    assert {name: b.us for name, b in best.items()} == {"cutedsl": 8.0, "aten": 10.0, "inductor": 12.0}
    assert best["cutedsl"].behind == pytest.approx(0.8)
    assert best["cutedsl"].candidate.config["split_k"] == 3
    rows = {row.backend: row for row in backend_summaries(run)}
    assert next(iter(rows)) == "aten"
    assert (rows["aten"].num_timed, rows["aten"].num_used, rows["aten"].behind) == (2, 2, None)
    assert rows["aten"].lead == pytest.approx(math.sqrt(0.8 * 1.1))
    assert (rows["cutedsl"].num_timed, rows["cutedsl"].num_used, rows["cutedsl"].lead) == (2, 0, None)
    assert rows["cutedsl"].behind == pytest.approx(math.sqrt(0.8 * 1.1))
    assert rows["inductor"].behind == pytest.approx(1.2)


def test_mlflow_shows_them_side_by_side() -> None:
    run = made_up()
    assert "| inductor | 1 | 0 | – | +20.0 % |" in campaign_note(run)
    note = next(hotspot_note(p) for p in run.problems if p.title.startswith("mm 16"))
    assert "Of each backend, as screened (aten is used):" in note
    assert "| cutedsl | cutedsl source=quack tile=128×64 cluster=2×1 split_k=3 swap | 8 | -20.0 % |" in note


def test_nothing_is_said_before_anything_was_timed() -> None:
    run = summarize([synthetic.start()])
    assert backend_summaries(run) == ()
    assert "Backends" not in campaign_note(run)


def test_a_cute_kernels_title_is_short() -> None:
    candidate = Candidate(problem=synthetic.gemm(8, 64, 32), backend="cutedsl", config=CUTE)
    assert config_title(candidate) == "cutedsl source=quack tile=128×64 cluster=2×1 split_k=4 swap"
