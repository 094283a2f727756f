"""How stages run jobs on the whole model: as many at once as fit into the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from autokernel.config import LoadedExperiment
from autokernel.profiling.footprint import Footprint, MeasureFootprint
from autokernel.stages.context import RunContext

T = TypeVar("T")

_FOOTPRINT_TIMEOUT_S = 300
_SMALL_BYTES = 4 << 30


def run_on_model(
    context: RunContext,
    stage: str,
    jobs: Sequence[tuple[str, str, Callable[[], T]]],
    timeout_s: float,
    *,
    layers: int | None = None,
    stock: bool = False,
) -> list[T]:
    """Run jobs of (label, scenario, job), each of which loads the model; values in order.

    Args:
        context: the run.
        stage: for the display.
        jobs: what to run; the scenario says how much memory it takes, and "" that it is little.
        timeout_s: of each.
        layers: of the model that the jobs load, if it has fewer than the experiment's.
        stock: the jobs use no bundle, which could hold weights a second time.

    Raises:
        WorkerError: as `RunContext.run_all`.
    """
    plain = [(label, job) for label, _, job in jobs]
    if context.device != "cuda":
        return context.run_all(stage, plain, timeout_s)
    found = footprint_of(context, layers)
    # what cannot be told runs alone
    less = found.copies if stock else 0
    sizes = [found.scenarios.get(name, found.device + less) - less if name else _SMALL_BYTES for _, name, _ in jobs]
    return context.run_all(stage, plain, timeout_s, sizes, int(found.device * context.experiment.cluster.model_memory))


def footprint_of(context: RunContext, layers: int | None = None) -> Footprint:
    """What jobs on the model take, or on one with fewer layers; measured once per run."""
    if layers not in context.footprints:
        job = MeasureFootprint(loaded=with_layers(context.loaded, layers))
        context.footprints[layers] = context.pool.submit(job, _FOOTPRINT_TIMEOUT_S).result()
    found = context.footprints[layers]
    assert isinstance(found, Footprint)
    return found


def with_layers(loaded: LoadedExperiment, num_layers: int | None) -> LoadedExperiment:
    """The same with fewer layers in its model; itself where the model is none of transformers, or None is asked for."""
    model = loaded.experiment.model
    if num_layers is None or model.factory is not None:
        return loaded
    overrides = {**model.config_overrides, "num_hidden_layers": num_layers}
    smaller = loaded.experiment.model_copy(update={"model": model.model_copy(update={"config_overrides": overrides})})
    return loaded.model_copy(update={"experiment": smaller})
