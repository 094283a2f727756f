"""How stages run jobs on the whole model: as many at once as fit into the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from autokernel.config import LoadedExperiment
from autokernel.export.bundle import Bundle
from autokernel.profiling.footprint import Footprint, MeasureFootprints, by_peaks
from autokernel.records import DTYPE_BYTES
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
    bundle: Bundle | None = None,
    arrived: Callable[[T], None] | None = None,
) -> list[T]:
    """Run jobs of (label, scenario, job), each of which loads the model; values in order.

    Args:
        context: the run.
        stage: for the display.
        jobs: what to run; the scenario says how much memory it takes, and "" that it is little.
        timeout_s: of each.
        layers: of the model that the jobs load, if it has fewer than the experiment's.
        bundle: that they use; what weights it holds a second time needs room, too. None: they use none.
        arrived: is told of each value as soon as it is there.

    Raises:
        WorkerError: as `RunContext.run_all`.
    """
    plain: list[tuple[str, Callable[[], T]]] = [(label, job) for label, _, job in jobs]
    if context.device != "cuda":
        return context.run_all(stage, plain, timeout_s, arrived=arrived)
    context.pool.renew()  # what earlier jobs left on the GPU is in nobody's count
    found = footprint_of(context, layers)
    # what cannot be told runs alone
    sizes = [size_of(found, name, bundle) if name else _SMALL_BYTES for _, name, _ in jobs]
    room = int(found.device * context.experiment.cluster.model_memory)
    try:
        return context.run_all(stage, plain, timeout_s, sizes, room, arrived)
    finally:
        context.pool.renew()


def size_of(found: Footprint, scenario: str, bundle: Bundle | None) -> int:
    """Bytes of a job on one scenario: weights that the bundle's entries put side by side are there twice."""
    if scenario not in found.scenarios:
        return found.device
    copies = 0
    own = [part.options for part in bundle.scenario_options if part.scenario == scenario] if bundle is not None else []
    if bundle is not None and "all" in [options.get("freezing") for options in (bundle.graph_options, *own)]:
        copies = found.copies
    elif bundle is not None:
        merged = [e.problem for e in bundle.entries if e.scenario == scenario and e.problem.op == "merged_mm"]
        specs = [problem.inputs[i] for problem in merged for i in problem.constants]
        copies = found.layers * sum(math.prod(spec.shape) * DTYPE_BYTES[spec.dtype] for spec in specs)
    return found.scenarios[scenario] - found.copies + min(copies, found.copies)


def lookalike_size(whole: Footprint, part: Footprint, scenario: str) -> int | None:
    """Bytes of a job on a model as deep as the whole one with the weights of the part; None: it cannot be told."""
    if scenario not in whole.scenarios or not whole.weights or not part.weights:
        return None
    return size_of(whole, scenario, None) - whole.weights + part.weights


def measure_ahead(context: RunContext) -> None:
    """On a GPU: have what jobs on the model take measured, all sizes by one job, while the driver gets ready for them."""
    if context.device == "cuda" and not context.footprints and context.measuring is None:
        models = tuple(with_layers(context.loaded, layers) for layers in _layers_of(context))
        context.measuring = context.pool.submit(MeasureFootprints(models=models), _FOOTPRINT_TIMEOUT_S)


def footprint_of(context: RunContext, layers: int | None = None) -> Footprint:
    """What jobs on the model take, or on one with as many layers as some stage asks for; measured once per run.

    Where it cannot be told from the model's config, what the whole model takes stands for it, from its profile on.
    """
    measure_ahead(context)
    measuring, context.measuring = context.measuring, None
    if measuring is not None:
        context.footprints |= zip(_layers_of(context), measuring.result(), strict=True)
    found = context.footprints[layers]
    return found if found.scenarios else by_peaks(context.peak_bytes, found.device)


def _layers_of(context: RunContext) -> tuple[int | None, ...]:
    """Numbers of layers of the models that jobs load; None: all."""
    experiment = context.experiment
    parts = experiment.profile.layers, experiment.plan.layers, experiment.graph.layers, experiment.validation.ablation_layers
    return tuple(dict.fromkeys((None, *parts)))


def with_layers(loaded: LoadedExperiment, num_layers: int | None) -> LoadedExperiment:
    """The same with fewer layers in its model; itself where nothing says what counts them, or None is asked for."""
    model = loaded.experiment.model
    smaller = model.with_depth(num_layers) if num_layers is not None else model
    if smaller is model:
        return loaded
    return loaded.model_copy(update={"experiment": loaded.experiment.model_copy(update={"model": smaller})})
