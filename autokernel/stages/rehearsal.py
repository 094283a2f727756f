"""Rehearsals of stock modes, the baselines of validation: compiled ahead, beside stages that leave cores idle.

What max-autotune takes is the compiling of hundreds of kernels, and the timing of each. Beside the search, which needs all
cores and the device for its own, that would starve it; beside profiling it delays all that comes; and three models at a time
that compile in validation leave most cores idle. So it runs beside plans, graph options and ablation, and holds up none.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace

from autokernel.config import LoadedExperiment
from autokernel.errors import WorkloadError
from autokernel.evaluate.modes import Contender, build_program, compile_errors, failure_of, load_scenario, prepare
from autokernel.evaluate.turns import wake
from autokernel.evaluate.whole_model import JobTurns, ModelJob, model_job
from autokernel.stages.beside import BesideJob
from autokernel.stages.context import RunContext
from autokernel.stages.whole_model import footprint_of, lookalike_size, size_of, with_layers

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800
_TUNED = "max-autotune"
_COMPILED = "default", _TUNED
_WHOLE_SHARE = 0.4  # of the room on the device: larger models are rehearsed with few layers
_NICE = 5  # stages' own jobs come first on the cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearse(ModelJob):
    """Job: have Inductor compile stock modes of one scenario, for the sake of its caches on disk.

    `whole`: of a model as deep as the experiment's, whose layers share the weights of a few: what is compiled for it is found
    when the real one is. Else of one with few layers: they are alike, and so are their kernels, down to their names, so that
    max-autotune finds most of its choices. They are made as always, alone on the device.
    """

    loaded: LoadedExperiment  # with few layers
    whole: LoadedExperiment | None
    scenario: str
    modes: tuple[str, ...]
    device: str
    threads: int
    seed: int

    def __call__(self) -> None:
        if self.ends_process:
            os.nice(_NICE)
        with model_job(self.device, self.threads) as turns:
            self._compile(turns)

    def _compile(self, turns: JobTurns) -> None:
        from autokernel.profiling.lookalike import lookalike
        from autokernel.profiling.workload import import_model

        if self.whole is None:
            _, program = load_scenario(self.loaded, self.scenario, turns, self.seed)
        else:
            import_model(self.loaded)
            wake(self.device)
            try:
                with turns.alone():
                    model = lookalike(self.whole, self.loaded, self.device)
                    program = build_program(self.whole, model, self.scenario, self.device, self.seed)
            except WorkloadError as error:
                log.info("%s is rehearsed with few layers: %s", self.scenario, error)
                replace(self, whole=None, modes=(_TUNED,))._compile(turns)
                return
        for mode in self.modes:
            try:
                with turns.building():
                    prepare(Contender(name=mode), program, turns)
            except compile_errors() as error:  # validation will say so
                log.warning("%s: %s does not run in its rehearsal: %s", self.scenario, mode, failure_of(error))


def rehearse_beside(context: RunContext) -> None:
    """Have every scenario's stock modes rehearsed beside the stages from now on; at the first call alone.

    Scenarios that a resumed run has timed need none. None at all if validation does not compare with max-autotune on a GPU, or
    the model cannot be had with few layers.
    """
    experiment = context.experiment
    loaded = with_layers(context.loaded, experiment.validation.ablation_layers)
    baselines = experiment.validation.baselines
    if context.rehearsing or context.device != "cuda" or _TUNED not in baselines or loaded is context.loaded:
        return
    context.rehearsing = True
    timed = {one.scenario for one in context.state.timed} if context.state is not None else set()
    whole, part = footprint_of(context), footprint_of(context, experiment.validation.ablation_layers)
    most = whole.device * experiment.cluster.model_memory * _WHOLE_SHARE
    for name in experiment.scenarios:
        if name in timed:
            continue
        size = lookalike_size(whole, part, name)
        fits = size is not None and size <= most
        few = Rehearse(
            loaded=loaded,
            whole=None,
            scenario=name,
            modes=(_TUNED,),
            device=context.device,
            threads=context.threads,
            seed=context.seed,
        )
        label = f"rehearsal {name}"
        job = BesideJob(label=label, job=few, size=size_of(part, name, None), timeout_s=_TIMEOUT_S)
        if size is not None and fits:
            deep = replace(few, whole=context.loaded, modes=tuple(mode for mode in _COMPILED if mode in baselines))
            job = BesideJob(label=label, job=deep, size=size, timeout_s=_TIMEOUT_S, smaller=job)
        context.beside.waiting.append(job)
