"""Captured scenarios to ranked hotspots. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from autokernel.evaluate.roofline import Ceilings
from autokernel.ops import OPS, Op, Site, get_op
from autokernel.ops.base import LaunchingOp, compute_dtype
from autokernel.profiling.capture import MATRICES, CapturedScenario
from autokernel.records import Hotspot, Problem, digest_of

# What a kernel takes beyond its roofline, at least: its launch within a CUDA graph, or its call and its threads' meeting. What
# Inductor's own kernels take is not known by their nodes; a fusion's time is measured when stock code for it is.
_KERNEL_US = {"cuda": 2.5, "cpu": 5.0}

# What a kernel of Inductor's cannot be one with: inputs of the graph, and what library calls leave.
_STORED = frozenset({"input", *(call.replace("aten::", "aten.") for call in MATRICES)})

_DIGEST = 10  # hex digits: to tell the calls of one graph apart


def rank(captured: Sequence[CapturedScenario], ceilings: Ceilings, ops: Sequence[Op] = OPS) -> tuple[Hotspot, ...]:
    """The problems of all scenarios, by what could be gained: the largest first.

    Sites of one scenario with the same problem are one hotspot; the same problem in two scenarios is two. Every scenario
    weighs the same, whatever its step takes. A group of products that could be merged costs what its parts cost together,
    and the parts are hotspots as well: their weights overlap, so weights only add up within one op precedence level. Whoever
    spends a budget by weight has to count a part and its group once.

    Args:
        captured: one per scenario.
        ceilings: what this machine can do.
        ops: those that were looked for.
    """
    by_name = {op.name: op for op in ops}
    hotspots: list[Hotspot] = []
    for scenario in captured:
        groups = _by_problem(scenario)
        counts = {key: scenario.num_calls.get(key, len(sites)) for key, sites in groups.items()}
        limits = _Limits(groups, counts, ceilings, by_name)
        nodes = {key: frozenset(name for site in sites for name in site.nodes) for key, sites in groups.items()}
        hotspots += [_hotspot(scenario, key, sites, counts[key], limits, nodes, len(captured)) for key, sites in groups.items()]
    return tuple(sorted(hotspots, key=lambda h: (-h.attainable_gain, -h.weight, h.scenario, h.problem.key)))


class _Limits:
    """The least time of a call inside one scenario's step.

    A step reads all its weights before it comes back to the same one. A model that is small enough finds them in a cache
    again, and is held against that cache's speed instead of the memory's.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[Site]], counts: Mapping[str, int], ceilings: Ceilings, ops: Mapping[str, Op]
    ) -> None:
        problems = {key: sites[0].problem for key, sites in groups.items()}
        # once per problem: of a generated fusion the program is read, which takes a millisecond, and there are a thousand sites
        self._num_bytes = {key: ops[problem.op].num_bytes(problem) for key, problem in problems.items()}
        working_set = sum(self._num_bytes[key] * counts[key] for key in groups if problems[key].op != "merged_mm")
        self._bytes_per_us = ceilings.read_ceiling(working_set) * 1e3
        self._ceilings = ceilings
        self._ops = ops

    def least_us(self, key: str, problem: Problem) -> float:
        op = self._ops[problem.op]
        flops_per_us = self._ceilings.peak_tflops(compute_dtype(op, problem)) * 1e6
        return max(self._num_bytes[key] / self._bytes_per_us, op.flops(problem) / flops_per_us)

    def launch_us(self, problem: Problem, sites: Sequence[Site]) -> float:
        """What a call's own kernel in front of its library calls takes, on average over the sites; 0 where there is none.

        Where Inductor computes x, one kernel does both, and is launched for x in any case.
        """
        op = self._ops[problem.op]
        if not isinstance(op, LaunchingOp):
            return 0.0
        alone = sum(not _STORED.isdisjoint(site.producers[:1]) for site in sites) / len(sites)
        launched = op.launched(problem)
        least_us = get_op(launched.op).num_bytes(launched) / self._bytes_per_us
        return alone * (least_us + _KERNEL_US[problem.device])


def _by_problem(scenario: CapturedScenario) -> dict[str, list[Site]]:
    groups: dict[str, list[Site]] = {}
    for site in scenario.sites:
        groups.setdefault(site.problem.key, []).append(site)
    return groups


def _hotspot(
    scenario: CapturedScenario,
    key: str,
    sites: list[Site],
    num_calls: int,
    limits: _Limits,
    nodes: Mapping[str, frozenset[str]],
    num_scenarios: int,
) -> Hotspot:
    problem = sites[0].problem
    least_us = limits.least_us(key, problem)
    estimated = key not in scenario.call_us
    rivals = tuple(other for other, names in nodes.items() if other != key and not names.isdisjoint(nodes[key]))
    call_us = least_us + _KERNEL_US[problem.device] if estimated else scenario.call_us[key]
    time_us = (call_us + limits.launch_us(problem, sites)) * num_calls
    share = time_us / scenario.step_us
    return Hotspot(
        problem=problem,
        scenario=scenario.scenario,
        num_calls=num_calls,
        time_us=time_us,
        share=share,
        weight=share / num_scenarios,
        roofline_us=least_us * num_calls,
        sites=tuple(site.name for site in sites),
        producers=_distinct(site.producers for site in sites),
        consumers=_distinct(site.consumers for site in sites),
        estimated=estimated,
        rivals=rivals,
        rival_calls=tuple(_num_shared(sites, nodes[other]) * num_calls // len(sites) for other in rivals),
        nodes=tuple(digest_of(sorted(site.nodes), _DIGEST) for site in sites if site.nodes),
    )


def _num_shared(sites: Sequence[Site], names: frozenset[str]) -> int:
    return sum(not names.isdisjoint(site.nodes) for site in sites)


def _distinct(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in groups for name in names))
