"""Part of stage 5: which entries help inside the model. An opaque kernel can cost its neighbours their fusion."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from autokernel.errors import WorkerError
from autokernel.evaluate.end_to_end import Contender, ScenarioTiming, TimeScenario
from autokernel.events import Ablated
from autokernel.export.bundle import Bundle, Entry
from autokernel.stages.context import RunContext
from autokernel.stages.never_slower import without
from autokernel.stages.rehearsal import rehearse_beside
from autokernel.stages.whole_model import run_on_model, with_layers

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800
_WHOLE = "all entries"
_ENTRIES_PER_JOB = 2


def without_useless(context: RunContext, bundle: Bundle, gone: dict[str, str]) -> Bundle:
    """The bundle without entries that its own scenario is clearly faster without; why goes into `gone`.

    Every entry is left out once, and the model compared with the one that has them all, interleaved. A model of few layers
    shows it as well as the whole one, since every layer is the same, and compiles in seconds. Nothing is accepted here: what
    is left still has to prove itself on the whole model.
    """
    validation = context.experiment.validation
    digest, known = bundle.applied_digest, context.state.ablated if context.state is not None else None
    if known is not None and known.applied_digest == digest:
        gone |= known.dropped
        return without(bundle, gone)
    own = {name: [e for e in bundle.entries if e.scenario == name] for name in context.experiment.scenarios}
    jobs = [
        (
            f"ablation: {name}",
            name,
            TimeScenario(
                loaded=with_layers(context.loaded, validation.ablation_layers),
                scenario=name,
                device=context.device,
                threads=context.threads,
                contenders=_contenders(bundle, part),
                baselines=(_WHOLE,),
                rounds=max(11, validation.end_to_end_rounds // 2),
                seed=context.seed + 5,
                in_turn=context.device == "cuda",
            ),
        )
        for name, entries in own.items()
        for part in _parts(context, entries)
    ]
    if not jobs:
        return bundle
    rehearse_beside(context)
    try:
        timings = run_on_model(context, "validate", jobs, _TIMEOUT_S, layers=validation.ablation_layers, bundle=bundle)
    except WorkerError as error:
        log.warning("no entry was left out by ablation, for the model does not run: %s", error)
        return bundle
    useless = {key: why for timing in timings for key, why in _useless(timing, own[timing.scenario]).items()}
    context.emit(Ablated(applied_digest=digest, dropped=useless))
    gone |= useless
    return without(bundle, gone)


def _parts(context: RunContext, entries: Sequence[Entry]) -> list[Sequence[Entry]]:
    """What jobs share the entries of a scenario: on a GPU several compile at once, each with a baseline of its own."""
    size = _ENTRIES_PER_JOB if context.device == "cuda" else max(1, len(entries))
    return [entries[i : i + size] for i in range(0, len(entries), size)]


def _contenders(bundle: Bundle, entries: Sequence[Entry]) -> tuple[Contender, ...]:
    parts = [replace(bundle, entries=tuple(other for other in bundle.entries if other is not entry)) for entry in entries]
    without = [Contender(name=entry.key, bundle=part) for entry, part in zip(entries, parts, strict=True)]
    return (Contender(name=_WHOLE, bundle=bundle), *without)


def _useless(timing: ScenarioTiming, entries: Sequence[Entry]) -> dict[str, str]:
    found = {}
    for entry in entries:
        speedup = timing.speedups.get(entry.key)
        if speedup is not None and speedup.low > 1:
            found[entry.key] = f"{timing.scenario} is {speedup.ratio:.3f} times as fast without it (at least {speedup.low:.3f})"
            log.info("dropped %s: %s", entry.key, found[entry.key])
    return found
