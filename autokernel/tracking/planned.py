"""Confirmations as the plans left them: which kernels are used follows from both. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from autokernel.events import Confirmed, PlanTrial
from autokernel.records import Winner


def as_planned(confirmed: Collection[Confirmed], trials: Iterable[PlanTrial]) -> list[Confirmed]:
    """Confirmations with those accepted that the chosen plans have: a runner-up takes the place of what won alone."""
    chosen = {trial.scenario: trial for trial in trials if trial.accepted}  # the last one of each
    configs = {key: config for trial in chosen.values() for key, config in trial.configs.items()}
    winners = {event.problem_key: event.winner for event in confirmed if event.winner is not None}
    return [_as_planned(event, winners.get(event.problem_key), configs.get(event.problem_key, "")) for event in confirmed]


def _as_planned(event: Confirmed, winner: Winner | None, config: str) -> Confirmed:
    if winner is None or not config:
        return event
    if event.candidate.id == config:
        reason = "a runner-up by itself: with it the model is faster than with the winner"
        return replace(event, accepted=True, winner=winner.instead(config), reason=reason)
    if event.accepted:
        return replace(event, accepted=False, winner=None, reason="it won by itself: with a runner-up the model is faster")
    return event
