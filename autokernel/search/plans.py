"""Plans: which entries go together where fusions exclude each other. Pure.

A part is an entry with what it saves per step; two parts are rivals if they would take the same nodes of a graph. Where one
takes nodes of some of the other's calls they are none: the other keeps the rest. A plan is a set of parts without rivals to
which no other part can be added: leaving one out that nothing excludes is for ablation to tell.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_MAX_STEPS = 200_000  # of the search; a graph's rivals come in small groups, which need a few hundred


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """An entry that may be in a plan. `saved_us` is what a step of its scenario takes less with it, by its own timing.

    `taken` says of other parts which fraction of its calls they take, if they are in a plan with it. `stock_us` is what stock
    code takes for all its calls. `nodes` stands for the nodes of the graph that each call takes: calls of two parts that have
    one in common take the very same ones. Empty: not known.
    """

    key: str
    saved_us: float
    rivals: frozenset[str]  # keys of parts that it excludes
    stock_us: float = math.inf
    nodes: frozenset[str] = frozenset()
    taken: Mapping[str, float] = field(default_factory=dict)

    def left_us(self, keys: Collection[str]) -> float:
        """What it saves beside the parts of these keys."""
        return self.saved_us * max(0.0, 1 - sum(share for key, share in self.taken.items() if key in keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Parts that go together, by key, in the order of what they save."""

    keys: tuple[str, ...]
    saved_us: float


def best_plans(parts: Sequence[Part], limit: int) -> list[Plan]:
    """The plans that save most if savings add up, best first.

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


def _saved(keys: Collection[str], parts: Iterable[Part]) -> float:
    """What the parts of these keys save together."""
    return sum(part.left_us(keys) for part in parts if part.key in keys)


def rivals_of(key: str, parts: Sequence[Part]) -> frozenset[str]:
    """Keys of what a part excludes, or is excluded by."""
    own = next(part.rivals for part in parts if part.key == key)
    return own | {part.key for part in parts if key in part.rivals}


def differing_us(a: Plan, b: Plan, parts: Sequence[Part]) -> float:
    """What stock code takes per step for the calls that only one of two plans replaces.

    Where both replace the very same nodes, their neighbours are the same, and the kernels' own times tell the plans apart. What
    they do to their neighbours elsewhere is of the order of this time.
    """
    only_a = [part for part in parts if part.key in a.keys and part.key not in b.keys]
    only_b = [part for part in parts if part.key in b.keys and part.key not in a.keys]
    total = 0.0
    for own, others in ((only_a, only_b), (only_b, only_a)):
        taken = {call for part in others for call in part.nodes}
        for part in own:
            apart = len(part.nodes - taken) / len(part.nodes) if part.nodes else 1.0
            total += part.stock_us * apart if apart else 0.0
    return total


def completed(keys: Sequence[str], parts: Sequence[Part]) -> Plan:
    """A plan from some keys: rivals of earlier ones are left out, and what nothing excludes is added, most saved first."""
    taken: list[str] = []
    order = {key: position for position, key in enumerate(keys)}
    for part in sorted(parts, key=lambda part: (order.get(part.key, len(order)), -part.saved_us, part.key)):
        if not rivals_of(part.key, parts) & set(taken):
            taken.append(part.key)
    saved: Mapping[str, float] = {part.key: part.saved_us for part in parts}
    ranked = sorted(taken, key=lambda key: (-saved[key], key))
    return Plan(keys=tuple(ranked), saved_us=_saved(ranked, parts))
