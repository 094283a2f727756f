"""Rehearsals of max-autotune, a baseline of validation: its choices are made ahead, beside stages that leave cores idle.

What it takes is the compiling of hundreds of kernels. Beside the search, which needs all cores for its own, it would starve it;
beside profiling it delays all that comes; and three models at a time that compile in validation leave most cores idle.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from autokernel.config import LoadedExperiment
from autokernel.evaluate.modes import Contender, compile_errors, failure_of, load_scenario, prepare
from autokernel.evaluate.whole_model import JobTurns, ModelJob, model_job
from autokernel.export.bundle import Bundle
from autokernel.stages.context import RunContext
from autokernel.stages.whole_model import run_on_model, with_layers

T = TypeVar("T")

log = logging.getLogger(__name__)

_REHEARSED = "max-autotune"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearse(ModelJob):
    """Job: have Inductor autotune one scenario on a few layers, for the sake of its caches on disk.

    Layers are alike, and so are their kernels, down to their names: when the whole model is compiled with max-autotune for
    validation, most of its choices are found in Inductor's own caches. They were made as always, alone on the device.
    """

    loaded: LoadedExperiment
    scenario: str
    device: str
    threads: int
    seed: int

    def __call__(self) -> None:
        with model_job(self.device, self.threads) as turns:
            self._compile(turns)

    def _compile(self, turns: JobTurns) -> None:
        _, program = load_scenario(self.loaded, self.scenario, turns, self.seed)
        try:
            with turns.building():
                prepare(Contender(name=_REHEARSED), program, turns)
        except compile_errors() as error:  # validation will say so
            log.warning("%s: %s does not run on a few layers: %s", self.scenario, _REHEARSED, failure_of(error))


def run_beside_rehearsals(
    context: RunContext,
    stage: str,
    jobs: Sequence[tuple[str, str, Callable[[], T]]],
    timeout_s: float,
    *,
    layers: int | None,
    bundle: Bundle,
    arrived: Callable[[T], None] | None = None,
) -> list[T]:
    """`run_on_model`, with the stage's share of rehearsals beside the jobs."""
    return run_on_model(
        context,
        stage,
        jobs,
        timeout_s,
        layers=layers,
        bundle=bundle,
        beside=rehearsals(context, stage),
        beside_layers=context.experiment.validation.ablation_layers,
        arrived=arrived,
    )


def rehearsals(context: RunContext, stage: str) -> list[tuple[str, str, Callable[[], Any]]]:
    """A stage's share of them, as `run_on_model` takes what runs beside its jobs; none if the stage has had it.

    Plans, graph options and ablation share the scenarios evenly; where one of them has nothing to run, the next ones have
    more. Scenarios that a resumed run has timed need none. None at all if validation does not compare with max-autotune on
    a GPU, or the model cannot be had with few layers.
    """
    experiment = context.experiment
    loaded = with_layers(context.loaded, experiment.validation.ablation_layers)
    if context.device != "cuda" or _REHEARSED not in experiment.validation.baselines or loaded is context.loaded:
        return []
    runs = {"plan": experiment.plan.enabled, "graph": experiment.graph.enabled, "validate": experiment.validation.ablation}
    stages = [name for name, enabled in runs.items() if enabled]
    timed = {one.scenario for one in context.state.timed} if context.state is not None else set()
    waiting = [name for name in experiment.scenarios if name not in context.rehearsed and name not in timed]
    if stage not in stages or stage in context.rehearsed.values():
        return []
    share = waiting[: math.ceil(len(waiting) / (len(stages) - stages.index(stage)))]
    context.rehearsed |= dict.fromkeys(share, stage)
    return [
        (
            f"rehearsal {name}",
            name,
            Rehearse(loaded=loaded, scenario=name, device=context.device, threads=context.threads, seed=context.seed),
        )
        for name in share
    ]
