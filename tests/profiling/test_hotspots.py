"""Ranking by hand-made numbers."""

from __future__ import annotations

import dataclasses

import pytest

from autokernel.evaluate.roofline import Ceilings
from autokernel.ops import Site, get_op
from autokernel.profiling.capture import CapturedScenario
from autokernel.profiling.hotspots import rank
from autokernel.records import Problem, TensorSpec

CEILINGS = Ceilings(read_gb_per_s=1.0, tflops={"float32": 1.0})  # 1000 bytes, or 1e6 operations, a microsecond


def mm(m: int, k: int, n: int) -> Problem:
    specs = (TensorSpec.contiguous((m, k), "float32"), TensorSpec.contiguous((k, n), "float32"))
    return Problem(op="mm", inputs=specs, device="cpu", constants=(1,))


def scenario(name: str, step_us: float, *calls: tuple[Problem, int, float]) -> CapturedScenario:
    """calls: (problem, how often, microseconds each)."""
    sites = [
        Site(problem=p, name=f"{p.op}{i}", producers=("a", "b"), consumers=(f"c{i}",))
        for p, count, _ in calls
        for i in range(count)
    ]
    return CapturedScenario(
        scenario=name,
        step_us=step_us,
        step_spread_us=0,
        kernel_us=0,
        sites=tuple(sites),
        call_us={p.key: us for p, _, us in calls},
        graph="",
        compile_s=0,
    )


def test_equal_problems_of_a_scenario_are_one_hotspot() -> None:
    problem = mm(1, 100, 100)  # 40,000 bytes of weight, 400 in, 400 out
    (hotspot,) = rank([scenario("s", 1000, (problem, 3, 100))], CEILINGS)
    assert (hotspot.num_calls, hotspot.time_us) == (3, 300)
    assert hotspot.share == pytest.approx(0.3)
    assert hotspot.weight == pytest.approx(0.3)
    assert hotspot.roofline_us == pytest.approx(3 * 40.8)
    assert hotspot.sites == ("mm0", "mm1", "mm2")
    assert (hotspot.producers, hotspot.consumers) == (("a", "b"), ("c0", "c1", "c2"))


def test_every_scenario_weighs_the_same() -> None:
    problem = mm(1, 100, 100)
    hotspots = rank([scenario("slow", 10_000, (problem, 1, 5000)), scenario("fast", 100, (problem, 1, 50))], CEILINGS)
    assert {h.scenario: h.weight for h in hotspots} == {"slow": 0.25, "fast": 0.25}


def test_the_order_is_what_could_be_gained_not_what_takes_long() -> None:
    large, small = mm(1, 500, 100), mm(1, 10, 10)  # 202 us and 0.5 us at least
    hotspots = rank([scenario("s", 1000, (large, 1, 220), (small, 1, 100))], CEILINGS)
    assert [h.problem for h in hotspots] == [small, large]
    assert hotspots[0].attainable_gain > hotspots[1].attainable_gain


def test_operations_bound_what_bytes_do_not() -> None:
    problem = mm(1000, 1000, 1000)
    (hotspot,) = rank([scenario("s", 1e6, (problem, 1, 1e5))], Ceilings(read_gb_per_s=1e6, tflops={"float32": 1.0}))
    assert hotspot.roofline_us == pytest.approx(2000)


def test_a_model_that_fits_a_cache_is_held_against_the_cache() -> None:
    ceilings = Ceilings(read_gb_per_s=1.0, tflops={"float32": 1.0}, cache_gb_per_s=10.0, cache_bytes=1 << 20)
    small = rank([scenario("s", 1000, (mm(1, 100, 100), 2, 100))], ceilings)
    large = rank([scenario("s", 1000, (mm(1, 2000, 1000), 2, 100))], ceilings)
    assert small[0].roofline_us == pytest.approx(2 * 4.08)
    assert large[0].roofline_us == pytest.approx(2 * 8012)


def test_what_has_no_library_call_is_estimated_from_its_roofline() -> None:
    fused = Problem(
        op="attention", inputs=(TensorSpec.contiguous((1, 2, 8, 16), "float32"),) * 3, device="cpu", scalars=(("scale", 1.0),)
    )
    unseen = dataclasses.replace(scenario("a", 1000, (fused, 2, 1.0)), call_us={})
    (hotspot,) = rank([unseen], CEILINGS)
    assert hotspot.estimated
    assert hotspot.time_us == pytest.approx(hotspot.roofline_us + 2 * 5.0)
    assert hotspot.attainable_gain > 0


class Counting:
    """`mm`, which notes what it is asked."""

    name = "mm"

    def __init__(self) -> None:
        self.asked: list[Problem] = []

    def num_bytes(self, problem: Problem) -> int:
        self.asked.append(problem)
        return get_op("mm").num_bytes(problem)

    def flops(self, problem: Problem) -> int:
        return get_op("mm").flops(problem)


def test_a_problem_is_looked_at_once_however_often_the_model_has_it() -> None:
    """What a generated fusion reads and writes is worked out from its program: a thousand sites would take half a minute."""
    problems = mm(1, 100, 100), mm(1, 200, 100)
    op = Counting()
    rank([scenario("s", 1000, *((problem, 100, 1) for problem in problems))], CEILINGS, [op])  # type: ignore[list-item]
    assert sorted(op.asked, key=str) == sorted(problems, key=str)


def test_problems_of_the_same_nodes_are_rivals_and_say_so() -> None:
    nodes = {mm(1, 100, 100): ("a", "b"), mm(1, 200, 100): ("b", "a"), mm(1, 300, 100): ("b",), mm(1, 400, 100): ("c",)}
    captured = scenario("s", 1000, *((problem, 1, 1) for problem in nodes))
    sites = tuple(dataclasses.replace(site, nodes=nodes[site.problem]) for site in captured.sites)
    found = {hotspot.problem: hotspot for hotspot in rank([dataclasses.replace(captured, sites=sites)], CEILINGS)}
    same, other, part, apart = (found[problem] for problem in nodes)
    assert same.nodes == other.nodes != part.nodes != ()
    assert set(same.rivals) == {other.problem.key, part.problem.key}
    assert apart.rivals == ()
    assert rank([captured], CEILINGS)[0].nodes == (), "not known"


def test_how_many_calls_a_rival_takes_nodes_of() -> None:
    """o's product looks like q's, and nothing is merged with it; a model of fewer layers stands for all 12 calls."""
    products = mm(1, 100, 100), mm(1, 300, 100)
    captured = scenario("s", 1000, *((problem, 1, 1) for problem in (products[0],) * 4 + (products[1],) * 2))
    names = iter((("q0",), ("o0",), ("q1",), ("o1",), ("q0", "k0"), ("q1", "k1")))
    sites = tuple(dataclasses.replace(site, nodes=next(names)) for site in captured.sites)
    fewer = dataclasses.replace(captured, sites=sites, num_calls={products[0].key: 12, products[1].key: 6})
    found = {hotspot.problem: hotspot for hotspot in rank([fewer], CEILINGS)}
    assert (found[products[0]].rivals, found[products[0]].rival_calls) == ((products[1].key,), (6,))
    assert (found[products[1]].rivals, found[products[1]].rival_calls) == ((products[0].key,), (6,))


def test_a_norm_is_a_launch_where_nobody_computes_x_beside_it() -> None:
    """Behind a sum Inductor makes one kernel of both, and is spared nothing: a region costs what its products do."""
    specs = [TensorSpec.contiguous(shape, "bfloat16") for shape in ((4, 100), (100,), (100, 1000))]
    scalars = (("bias", False), ("eps", 1e-5))
    normed = Problem(op="rms_norm_linear", inputs=tuple(specs), device="cuda", constants=(1, 2), scalars=scalars)
    captured = scenario("s", 1000, (normed, 4, 250.0))
    found = {}
    makers_of = {"sums": ("aten.add",), "inputs": ("input",), "products": ("aten.mm",), "both": ("aten.addmm", "aten.add")}
    for name, of_some in makers_of.items():
        makers = of_some * (4 // len(of_some))
        sites = tuple(dataclasses.replace(site, producers=(maker,)) for site, maker in zip(captured.sites, makers, strict=True))
        (found[name],) = rank([dataclasses.replace(captured, sites=sites)], CEILINGS)
    norm_us = 2.5 + 2 * (400 + 100 + 400) / 1000  # rows read and written, the weight read
    assert found["sums"].time_us == pytest.approx(1000)
    assert found["inputs"].time_us == found["products"].time_us == pytest.approx(1000 + 4 * norm_us)
    assert found["both"].time_us == pytest.approx(1000 + 2 * norm_us)
    assert found["sums"].attainable_gain < found["both"].attainable_gain < found["inputs"].attainable_gain
    assert len({hotspot.roofline_us for hotspot in found.values()}) == 1
