"""Which sets of graph-level options are accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from autokernel.errors import ConfigError
from autokernel.evaluate.end_to_end import ScenarioTiming
from autokernel.events import GraphTrial, event_from_json, event_to_json
from autokernel.export.bundle import OWN_OPTIONS, ScenarioOptions
from autokernel.records import Speedup
from autokernel.search.graph_options import Options, load_graph_options, merged, spelled
from autokernel.stages.graph import _decided, _for_single_scenarios, _judge, _unions

OPTIONS = {"cpp.min_chunk_size": 2048}


def timing(scenario: str, low: float, ratio: float, high: float, **failures: str) -> ScenarioTiming:
    speedup = Speedup(ratio=ratio, low=low, high=high, num_rounds=11)
    return ScenarioTiming(
        scenario=scenario, baseline="no options", modes=(), speedups={spelled(OPTIONS): speedup}, failures=failures
    )


@pytest.mark.parametrize(
    ("timings", "accepted", "reason"),
    [
        ([timing("a", 1.01, 1.05, 1.1), timing("b", 1.0, 1.01, 1.02)], True, ""),
        ([timing("a", 1.2, 1.3, 1.4), timing("b", 0.95, 0.97, 0.99)], False, "slower on b"),
        ([timing("a", 0.98, 1.01, 1.03), timing("b", 0.99, 1.0, 1.02)], False, "is not above 1"),
    ],
)
def test_options_must_help_and_hurt_nowhere(timings: list[ScenarioTiming], accepted: bool, reason: str) -> None:
    trial = _judge(OPTIONS, timings)
    assert trial.accepted == accepted
    assert reason in trial.reason
    assert set(trial.speedups) == {"a", "b"}


def test_options_that_tune_in_production_are_measured_and_not_accepted() -> None:
    options: Options = {"coordinate_descent_tuning": True, "freezing": "all"}
    speedup = Speedup(ratio=1.1, low=1.05, high=1.2, num_rounds=11)
    found = ScenarioTiming(scenario="a", baseline="no options", modes=(), speedups={spelled(options): speedup})
    trial = _judge(options, [found, timing("b", 1.0, 1.1, 1.2)])
    assert not trial.accepted
    assert trial.score == pytest.approx(1.1)
    assert set(trial.speedups) == {"a"}, "other jobs tried other sets"
    assert "coordinate_descent_tuning has production time kernels" in trial.reason


def test_what_hurts_somewhere_is_kept_for_the_scenarios_it_helps() -> None:
    products = {"a": ("float32 1x2x3",), "b": ("float32 9x2x3",), "c": (), "d": ("float32 4x2x3",)}

    def trial(ratios: Mapping[str, float], **options: bool) -> GraphTrial:
        speedups = {name: Speedup(ratio=r, low=r - 0.002, high=r + 0.002, num_rounds=11) for name, r in ratios.items()}
        return GraphTrial(options=options, speedups=speedups, score=1, accepted=False, reason="slower on b", products=products)

    combo = trial({"a": 1.02, "b": 0.99, "c": 1.1, "d": 1.0025}, combo_kernels=True)
    freezing = trial({"a": 1.01, "b": 1.001, "c": 1.0, "d": 0.99}, freezing=True)
    tuning = trial({"a": 1.5, "b": 1.5, "c": 1.5, "d": 1.5}, coordinate_descent_tuning=True)
    found = _for_single_scenarios([combo, freezing, tuning])
    assert [one.accepted_for for one in found] == [("a",), (), ()], "c has no products, b and d no clear gain"
    assert "kept for a" in found[0].reason
    part = ScenarioOptions(scenario="a", products=products["a"], options={"combo_kernels": True})
    assert _decided([event_from_json(event_to_json(one)) for one in found]) == ({}, (part,))


def test_what_helps_is_tried_together_and_in_pairs() -> None:
    good = [replace(_judge(OPTIONS, [timing("a", 1.01, 1.05, 1.1)]), options={name: True}) for name in "xyz"]
    assert _unions(good) == [{"x": True, "y": True, "z": True}, {"x": True, "y": True}, {"x": True, "z": True}]
    assert _unions(good[:2]) == [{"x": True, "y": True}]


def test_options_that_do_not_compile_are_a_failed_trial() -> None:
    broken = timing("a", 1.1, 1.2, 1.3)
    broken = ScenarioTiming(
        scenario="a", baseline="no options", modes=(), speedups=broken.speedups, failures={spelled(OPTIONS): "no such option"}
    )
    trial = _judge(OPTIONS, [broken])
    assert not trial.accepted
    assert "no such option" in trial.reason


def test_the_package_s_own_sets_name_real_options() -> None:
    import torch
    import torch._inductor.config as config

    for device in ("cpu", "cuda"):
        for options in load_graph_options(device, torch=torch.__version__):
            for name in options:
                if name not in OWN_OPTIONS:
                    assert name in config._config, f"{name} is no option of this torch"


@pytest.mark.parametrize(("version", "names"), [("2.11.0+cu130", "ab"), ("2.13.0", "ac"), ("2.15.1", "a"), (None, "abc")])
def test_sets_are_for_the_versions_that_they_say(tmp_path: Path, version: str | None, names: str) -> None:
    (tmp_path / "graph.yaml").write_text('cuda: [{a: 1}, {b: 1, torch: "<2.13"}, {torch: ">=2.13,<2.15", c: 1}]')
    assert load_graph_options("cuda", tmp_path, version) == [{name: 1} for name in names]


def test_merging_sets_keeps_the_first_word() -> None:
    assert merged([{"a": 1}, {"a": 2, "b": 3}]) == {"a": 1, "b": 3}
    assert spelled({}) == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: []", "gpu: unknown section; there are cpu and cuda"),
        ("cpu: [1]", r"cpu\.0: must be a set of options"),
        ("cpu: [{a: [1]}]", r"cpu\.0\.a: \[1\] must be a number"),
        ("cpu: [{a: 1}, {a: 1, torch: 2.13}]", r'cpu\.1\.torch: must be a range like ">=2\.13,<2\.15", not 2\.13'),
        ("cpu: [{a: 1, torch: new}]", r"cpu\.0\.torch: must be a range like .*, not 'new'"),
        ('cpu: [{torch: ">=2.13"}]', r"cpu\.0: must have an option beside the versions that it is for"),
    ],
)
def test_a_wrong_file_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "graph.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_graph_options("cpu", tmp_path)
    assert str(tmp_path / "graph.yaml") in str(caught.value)
