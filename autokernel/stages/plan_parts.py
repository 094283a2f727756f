"""Which winners are parts of a scenario's plans: those that exclude others, and those that have runners-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autokernel.ops import FUSIONS
from autokernel.records import Winner
from autokernel.search.plans import Part
from autokernel.stages.confirm import copied_bytes


def parts_of(scenario: str, winners: Sequence[Winner]) -> list[Part]:
    """The scenario's winners that exclude others or are excluded, and those with runners-up; empty where there are none.

    GEMMs that share an input are no rivals here: whether they are merged is decided by their own times (`confirm.compatible`).
    What is merged saves nothing by itself.
    """
    own = {winner.hotspot.problem.key: winner for winner in winners if winner.hotspot.scenario == scenario}
    taken = {key: _taken(winner, own) for key, winner in own.items()}
    rivals = {
        key: frozenset(
            other
            for other in winner.hotspot.rivals
            if other in own
            and (_is_fusion(winner) or _is_fusion(own[other]))
            and other not in taken[key]
            and key not in taken[other]
        )
        for key, winner in own.items()
    }
    runners_up = {key: _runners_up(winner, own) for key, winner in own.items()}
    if not any(rivals.values()) and not any(runners_up.values()):
        return []
    lost = {taker for takers in taken.values() for taker in takers}
    return [
        Part(
            key=key,
            saved_us=saved_us(winner) * _share_apart(winner, own),
            rivals=rivals[key],
            stock_us=winner.baseline_us * winner.hotspot.num_calls,
            # what Inductor can see into does not leave its neighbours the same
            nodes=frozenset(winner.hotspot.nodes if _is_fusion(winner) else ()),
            taken=taken[key],
            own_us=winner.winner_us * winner.hotspot.num_calls * _share_apart(winner, own),
            runners_up=runners_up[key],
        )
        for key, winner in own.items()
        if rivals[key] or taken[key] or key in lost or any(key in others for others in rivals.values()) or runners_up[key]
    ]


def _runners_up(winner: Winner, own: Mapping[str, Winner]) -> dict[str, float]:
    """What a step saves with each runner-up, by its candidate's id; without those that copy more weights than the winner.

    Whether copies fit is decided behind the plan, and must not drop what the plan chose.
    """
    calls = winner.hotspot.num_calls * _share_apart(winner, own)
    others = [winner.instead(one.evaluation.candidate.id) for one in winner.runners_up] if calls else []
    limit_bytes = copied_bytes(winner) if others else 0
    return {
        other.evaluation.candidate.id: (other.baseline_us - other.winner_us) * calls
        for other in others
        if copied_bytes(other) <= limit_bytes
    }


def in_precedence(winners: Sequence[Winner]) -> list[Winner]:
    """Winners in the order in which they get nodes: those that take some of another's calls before the other."""
    own: dict[str, dict[str, Winner]] = {}
    for winner in winners:
        own.setdefault(winner.hotspot.scenario, {})[winner.hotspot.problem.key] = winner
    placed: dict[tuple[str, str], Winner] = {}

    def place(winner: Winner, above: frozenset[str]) -> None:
        key, scenario = winner.hotspot.problem.key, winner.hotspot.scenario
        for taker in _taken(winner, own[scenario]):
            if taker not in above:
                place(own[scenario][taker], above | {key})
        placed.setdefault((scenario, key), winner)

    for winner in winners:
        place(winner, frozenset())
    return list(placed.values())


def _taken(winner: Winner, own: Mapping[str, Winner]) -> dict[str, float]:
    """The fraction of a fusion's calls that others of the scenario take which want nodes of all their own calls there.

    The fusion keeps the rest. Those with the very same nodes are rivals.
    """
    found = {}
    key, calls = winner.hotspot.problem.key, winner.hotspot.num_calls
    for other, shared in zip(winner.hotspot.rivals, winner.hotspot.rival_calls, strict=False):
        if other not in own or not (_is_fusion(winner) and _is_fusion(own[other])) or not 0 < shared < calls:
            continue
        taker = own[other].hotspot
        of_taker = dict(zip(taker.rivals, taker.rival_calls, strict=False)).get(key, 0)
        if of_taker >= taker.num_calls and not set(taker.nodes) & set(winner.hotspot.nodes):
            found[other] = shared / calls
    return found


def _is_fusion(winner: Winner) -> bool:
    return winner.hotspot.problem.op in FUSIONS


def _share_apart(winner: Winner, own: Mapping[str, Winner]) -> float:
    """The part of a GEMM's calls that no merged winner takes."""
    merged = [
        calls
        for key, calls in zip(winner.hotspot.rivals, winner.hotspot.rival_calls, strict=False)
        if key in own and own[key].hotspot.problem.op == "merged_mm"
    ]
    taken = 0 if winner.hotspot.problem.op == "merged_mm" or _is_fusion(winner) else max(merged, default=0)
    return 1 - taken / winner.hotspot.num_calls


def saved_us(winner: Winner) -> float:
    return (winner.baseline_us - winner.winner_us) * winner.hotspot.num_calls
