"""All layers of a model, from captures of a few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from autokernel.evaluate.roofline import Ceilings
from autokernel.ops import Site
from autokernel.profiling.capture import CapturedScenario
from autokernel.profiling.extrapolation import depths_of, extrapolated, period_of
from autokernel.profiling.hotspots import rank
from autokernel.records import Problem, TensorSpec


def product(n: int) -> Problem:
    x, w = TensorSpec.contiguous((1, 64), "float32"), TensorSpec.contiguous((64, n), "float32")
    return Problem(op="mm", inputs=(x, w), device="cpu", constants=(1,))


HEAD, INNER, LAST = product(1000), product(256), product(64)


def captured(calls: Mapping[Problem, int], step_us: float, kernel_us: float = 0.0) -> CapturedScenario:
    sites = tuple(Site(problem=problem, name=f"{problem.key} {i}") for problem, count in calls.items() for i in range(count))
    return CapturedScenario(
        scenario="decode",
        step_us=step_us,
        step_spread_us=4,
        kernel_us=kernel_us,
        sites=sites,
        call_us={problem.key: 2.0 for problem in calls},
        graph="",
        compile_s=0,
    )


TWO = captured({INNER: 4, LAST: 1, HEAD: 1}, 130, 100)
FOUR = captured({INNER: 8, LAST: 3, HEAD: 1}, 230, 180)


def test_what_a_layer_adds_is_added_for_every_layer() -> None:
    whole = extrapolated(TWO, FOUR, (2, 4), 32)
    assert whole is not None
    assert whole.num_calls == {INNER.key: 64, LAST.key: 31, HEAD.key: 1}
    assert whole.step_us == 230 + 28 * 50
    assert whole.kernel_us == 180 + 28 * 40
    assert whole.sites == FOUR.sites
    with_memory = [replace(one, peak_bytes=peak) for one, peak in ((TWO, 3000), (FOUR, 5000))]
    memory = extrapolated(*with_memory, (2, 4), 32)
    assert memory is not None
    assert memory.peak_bytes == 5000 + 28 * 1000


def test_hotspots_count_and_cost_all_calls() -> None:
    whole = extrapolated(TWO, FOUR, (2, 4), 32)
    assert whole is not None
    ceilings = Ceilings(device="cpu", threads=1, read_gb_per_s=100, tflops={"float32": 1.0})
    found = {hotspot.problem.key: hotspot for hotspot in rank([whole], ceilings)}
    assert {key: hotspot.num_calls for key, hotspot in found.items()} == whole.num_calls
    assert found[INNER.key].time_us == 64 * 2.0
    assert found[INNER.key].share == pytest.approx(128 / whole.step_us)
    assert found[INNER.key].roofline_us == pytest.approx(64 / 8 * rank([FOUR], ceilings)[0].roofline_us, rel=0.5)
    assert len(found[INNER.key].sites) == 8


@pytest.mark.parametrize(
    ("kinds", "period"),
    [
        ("", None),
        ("a", None),
        ("aa", 1),
        ("ab", None),
        ("abab", 2),
        ("ababa", 2),
        ("aab" * 4 + "a", 3),
        ("aaabaaa", None),
        ("aaab", None),
    ],
)
def test_kinds_that_take_turns(kinds: str, period: int | None) -> None:
    assert period_of(kinds) == period


@pytest.mark.parametrize(
    ("most", "layers", "period", "depths"),
    [
        (4, 32, 1, (2, 4)), (5, 32, 1, (2, 5)), (2, 32, 1, (1, 2)), (10, 34, 6, (4, 10)), (12, 34, 6, (4, 10)),
        (12, 36, 6, (6, 12)), (9, 34, 6, None), (24, 48, 6, (12, 24)), (4, 8, 2, (2, 4)), (4, 9, 2, (1, 3)),
    ],
)  # fmt: skip
def test_depths_differ_from_the_whole_by_whole_turns(
    most: int, layers: int, period: int, depths: tuple[int, int] | None
) -> None:  # fmt: skip
    found = depths_of(most, layers, period)
    assert found == depths
    assert all((layers - depth) % period == 0 for depth in found or ())


def test_what_a_turn_adds_is_added_for_every_turn() -> None:
    """Five layers of one kind, one of the other; at last four of the first."""
    four, ten = captured({INNER: 8, HEAD: 1}, 100), captured({INNER: 18, LAST: 1, HEAD: 1}, 220)
    whole = extrapolated(four, ten, (4, 10), 34, 6)
    assert whole is not None
    assert whole.num_calls == {INNER.key: 58, LAST.key: 5, HEAD.key: 1}
    assert whole.step_us == 220 + 24 * 20


@pytest.mark.parametrize(
    "four",
    [
        captured({INNER: 7, LAST: 3, HEAD: 1}, 230),  # every other layer has one of it, or is it one in three?
        captured({INNER: 8, HEAD: 1}, 230),  # only a shallow model has it
        captured({INNER: 2, LAST: 3, HEAD: 1}, 230),
    ],
)
def test_layers_that_differ_tell_nothing_of_the_others(four: CapturedScenario) -> None:
    assert extrapolated(TWO, four, (2, 4), 32) is None


def test_a_deeper_model_is_never_reckoned_faster() -> None:
    whole = extrapolated(captured({INNER: 4}, 240), captured({INNER: 8}, 230), (2, 4), 32)
    assert whole is not None
    assert whole.step_us == 230
