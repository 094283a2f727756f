"""The record that the default search sets on recorded landscapes, for weights that its model has not seen."""

from __future__ import annotations

import statistics

import landscape_file
import pytest
import search_efficiency
from landscape_file import Landscape
from replay import Replay
from search_efficiency import Case, tuner

from autokernel.search.cost_model import CostModel, load_model

_JUDGED = ((4096, 14336), (3584, 18944), (1024, 1024))  # n and k of the weights that are held out


def _held_out(landscape: Landscape) -> bool:
    return (landscape.problem["n"], landscape.problem["k"]) in _JUDGED


@pytest.fixture(scope="module")
def landscapes() -> list[Landscape]:
    return landscape_file.load_all()


@pytest.fixture(scope="module")
def model(landscapes: list[Landscape]) -> CostModel:
    train = pytest.importorskip("train_cost_model").train
    model: CostModel = train([landscape for landscape in landscapes if not _held_out(landscape)])
    return model


def test_at_least_twelve_complete_landscapes(landscapes: list[Landscape]) -> None:
    whole = [one for one in landscapes if any(row.backend == "inductor" for row in one.rows)]
    assert len(whole) >= 12
    for one in whole:
        assert one.header["measured"] >= 0.9 * one.header["legal"]
        assert any(row.backend == "aten" for row in one.rows)
    assert {one.problem["op"] for one in whole} == {"mm", "addmm", "bmm"}


def test_96_percent_within_8_and_99_percent_within_24(landscapes: list[Landscape], model: CostModel) -> None:
    needed_96, needed_99 = [], []
    for one in landscapes:
        if not _held_out(one) or not any(row.backend == "inductor" for row in one.rows):
            continue
        case = Case(replay=Replay(one, ("inductor",)), training=[], models=[model], limit=48)
        times = tuner(case, 0, sampler="auto")
        needed_96.append(case.replay.needed(times, 0.96))
        needed_99.append(case.replay.needed(times, 0.99))
    assert len(needed_96) >= 4
    assert statistics.median(needed_96) <= 8
    assert statistics.median(needed_99) <= 24


def test_the_shipped_model_was_trained_from_these_landscapes(landscapes: list[Landscape]) -> None:
    shipped = load_model()
    assert shipped is not None
    assert set(shipped.origin["landscapes"]) <= {one.name for one in landscapes}
    assert "inductor" in shipped.cost


def test_strategies_answer_on_a_real_landscape(landscapes: list[Landscape]) -> None:
    one = next(one for one in landscapes if one.name == "llama8b-o-m16")
    others = search_efficiency.others(one, landscapes)
    case = Case(replay=Replay(one, ("inductor",)), training=others, models=[], limit=12)
    for name in ("random", "portfolio", "tpe", "cmaes"):
        if name == "cmaes":
            pytest.importorskip("cmaes")
        times = search_efficiency.STRATEGIES[name](case, 1)
        assert 0 < len(times) <= 12  # a portfolio may fall together on the nearest configs here
