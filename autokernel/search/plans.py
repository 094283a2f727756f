"""Plans: which entries go together where fusions exclude each other. Pure.

A part is an entry with what it saves per step; two parts are rivals if they would take the same nodes of a graph. Where one
takes nodes of some of the other's calls they are none: the other keeps the rest. A plan is a set of parts without rivals to
which no other part can be added: leaving one out that nothing excludes is for ablation to tell. Each of its parts has the
config that won alone, or that of a runner-up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

WITHIN_MODEL = 0.05  # of a kernel's time: by how much it may be off from what it takes alone, as far as configs differ in that
_MAX_STEPS = 200_000  # of the search; a graph's rivals come in small groups, which need a few hundred


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """An entry that may be in a plan. `saved_us` is what a step of its scenario takes less with it, by its own timing.

    `taken` says of other parts which fraction of its calls they take, if they are in a plan with it. `stock_us` is what stock
    code takes for all its calls. `nodes` stands for the nodes of the graph that each call takes: calls of two parts that have
    one in common take the very same ones. Empty: not known. `runners_up` are its other configs by name, with what each saves
    in place of `saved_us`, and `own_us` is what all its calls take with the one that won.
    """

    key: str
    saved_us: float
    rivals: frozenset[str]  # keys of parts that it excludes
    stock_us: float = math.inf
    nodes: frozenset[str] = frozenset()
    taken: Mapping[str, float] = field(default_factory=dict)
    own_us: float = 0.0
    runners_up: Mapping[str, float] = field(default_factory=dict)

    def left(self, keys: Collection[str]) -> float:
        """The fraction of its calls that it keeps beside the parts of these keys."""
        return max(0.0, 1 - sum(share for key, share in self.taken.items() if key in keys))

    def left_us(self, keys: Collection[str], config: str | None = None) -> float:
        """What it saves beside the parts of these keys, with the config of a runner-up or with its own."""
        return (self.saved_us if config is None else self.runners_up[config]) * self.left(keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Parts that go together, by key, in the order of what they save.

    `configs` has (key, config) for those of them that are there with the config of a runner-up, in the order of keys. `origin`
    says who proposed it.
    """

    keys: tuple[str, ...]
    saved_us: float
    configs: tuple[tuple[str, str], ...] = ()
    origin: str = field(default="sum", compare=False)


def best_plans(parts: Sequence[Part], limit: int) -> list[Plan]:
    """The plans that save most if savings add up, best first, with the configs that won alone.

    Args:
        parts: of one scenario; a rival that is not among them does not count.
        limit: how many plans at most.
    """
    known = {part.key for part in parts}
    rivals = {part.key: rivals_of(part.key, parts) & known for part in parts}
    saved = {part.key: part.saved_us for part in parts}
    best: list[tuple[float, tuple[str, ...]]] = [(0.0, ())]
    for group in _groups(parts, rivals):  # they do not exclude each other: the best of all are sums of the best of each
        found = _plans_of_group(group, rivals, limit)
        sums = ((a + b, (*keys, *more)) for a, keys in best for b, more in found)
        best = heapq.nlargest(limit, sums)
    plans = [tuple(sorted(keys, key=lambda key: (-saved[key], key))) for _, keys in best]
    return sorted((Plan(keys=keys, saved_us=_saved(keys, parts)) for keys in plans), key=lambda p: (-p.saved_us, p.keys))


def _groups(parts: Sequence[Part], rivals: Mapping[str, frozenset[str]]) -> list[list[Part]]:
    """Parts that exclude each other or take each other's calls, directly or through others."""
    left = {part.key: part for part in parts}
    sharing = {part.key: [p.key for p in parts if p.key in part.taken or part.key in p.taken] for part in parts}
    groups: list[list[Part]] = []
    while left:
        group, edge = [], [next(iter(left))]
        while edge:
            part = left.pop(edge.pop(), None)
            if part is not None:
                group.append(part)
                edge += [*rivals[part.key], *sharing[part.key]]
        groups.append(group)
    return groups


def _plans_of_group(
    parts: Sequence[Part], rivals: Mapping[str, frozenset[str]], limit: int
) -> list[tuple[float, tuple[str, ...]]]:
    """The best (saving, keys) of one group, by branch and bound."""
    order = sorted(parts, key=lambda part: (-part.saved_us, part.key))
    rest = [0.0] * (len(order) + 1)  # the most that the parts from here on could save
    for i in reversed(range(len(order))):
        rest[i] = rest[i + 1] + max(0.0, order[i].saved_us)
    found: list[tuple[float, tuple[str, ...]]] = []  # a heap, the worst first
    steps = 0

    def visit(i: int, taken: tuple[str, ...]) -> None:
        nonlocal steps
        steps += 1
        saved = _saved(taken, order)
        if steps > _MAX_STEPS or (len(found) == limit and saved + rest[i] <= found[0][0]):
            return
        if i == len(order):
            if all(part.key in taken or rivals[part.key] & set(taken) for part in order):
                heapq.heappush(found, (saved, taken))
                if len(found) > limit:
                    heapq.heappop(found)
            return
        part = order[i]
        if not rivals[part.key] & set(taken):
            visit(i + 1, (*taken, part.key))
        if rivals[part.key]:  # nothing is gained by leaving out what excludes nothing
            visit(i + 1, taken)

    visit(0, ())
    return found


def _saved(keys: Collection[str], parts: Iterable[Part], configs: Mapping[str, str] | None = None) -> float:
    """What the parts of these keys save together."""
    return sum(part.left_us(keys, (configs or {}).get(part.key)) for part in parts if part.key in keys)


def rivals_of(key: str, parts: Sequence[Part]) -> frozenset[str]:
    """Keys of what a part excludes, or is excluded by."""
    own = next(part.rivals for part in parts if part.key == key)
    return own | {part.key for part in parts if key in part.rivals}


def differing_us(a: Plan, b: Plan, parts: Sequence[Part]) -> float:
    """In how much of a step two plans differ: what is between them may be as much, whatever their parts save alone.

    What stock code takes per step for the calls that only one of them replaces, and what kernels with different configs may be
    off by. Where both replace the very same nodes, their neighbours are the same, and the kernels' own times tell the plans
    apart. What they do to their neighbours elsewhere is of the order of this time.
    """
    only_a = [part for part in parts if part.key in a.keys and part.key not in b.keys]
    only_b = [part for part in parts if part.key in b.keys and part.key not in a.keys]
    total = 0.0
    for own, others in ((only_a, only_b), (only_b, only_a)):
        taken = {call for part in others for call in part.nodes}
        for part in own:
            apart = len(part.nodes - taken) / len(part.nodes) if part.nodes else 1.0
            total += part.stock_us * apart if apart else 0.0
    configs = dict(a.configs), dict(b.configs)
    for part in parts:
        if part.key in a.keys and part.key in b.keys and configs[0].get(part.key) != configs[1].get(part.key):
            total += WITHIN_MODEL * part.own_us * min(part.left(a.keys), part.left(b.keys))
    return total


def at_stake_us(plans: Sequence[Plan], parts: Sequence[Part]) -> float:
    """How much of a step the choice of a plan is about.

    The most that any of these plans differs from the first in, and what the runners-up of that one's parts may be off by.
    """
    best = plans[0]
    apart = max((differing_us(best, plan, parts) for plan in plans), default=0.0)
    others = [with_config(best, part.key, config, parts) for part in parts for config in [*part.runners_up][:1]]
    return apart + sum(differing_us(best, plan, parts) for plan in others)


def completed(keys: Sequence[str], parts: Sequence[Part], configs: Mapping[str, str] | None = None) -> Plan:
    """A plan from some keys: rivals of earlier ones are left out, and what nothing excludes is added, most saved first.

    Args:
        keys: of parts, those that come first before those behind them.
        parts: all of the scenario.
        configs: of runners-up, by the key of their part; what is left out needs none.
    """
    taken: list[str] = []
    order = {key: position for position, key in enumerate(keys)}
    for part in sorted(parts, key=lambda part: (order.get(part.key, len(order)), -part.saved_us, part.key)):
        if not rivals_of(part.key, parts) & set(taken):
            taken.append(part.key)
    saved: Mapping[str, float] = {part.key: part.saved_us for part in parts}
    ranked = sorted(taken, key=lambda key: (-saved[key], key))
    used = {key: (configs or {})[key] for key in sorted(ranked) if key in (configs or {})}
    return Plan(keys=tuple(ranked), saved_us=_saved(ranked, parts, used), configs=tuple(used.items()))


def with_config(plan: Plan, key: str, config: str, parts: Sequence[Part]) -> Plan:
    """The plan with the config of a runner-up for one of its parts; itself where the part is not in it."""
    return completed(plan.keys, parts, {**dict(plan.configs), key: config}) if key in plan.keys else plan
