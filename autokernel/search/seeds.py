"""Who proposes first. A seeder is a plain function from a context to seeds, best first."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autokernel.records import Candidate, Evaluation, Problem, Status
from autokernel.search.inductor_lists import REDUCTION, inductor_configs
from autokernel.search.space import Names, Space

logger = logging.getLogger(__name__)

MAX_HISTORY = 8  # seeds from earlier evaluations
_MAX_DISTANCE = 6.0  # |log2| summed over the sizes: farther shapes say nothing about this one


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """A candidate to try before the sampler is asked, and who proposed it."""

    candidate: Candidate
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedContext:
    """What seeders know: the problem, its spaces and names, and what was evaluated before, in this run or earlier ones."""

    problem: Problem
    spaces: Mapping[str, Space]
    names: Names
    history: Sequence[Evaluation] = field(default_factory=tuple)


Seeder = Callable[[SeedContext], list[Seed]]


def stock_seeds(context: SeedContext) -> list[Seed]:
    """The default config of each backend, in the order of the backends; then what Inductor itself would try on a GPU.

    Of a product of one row its max-autotune makes a reduction, without a look at anything else: that comes right after stock.
    """
    seeds: list[Seed] = []
    for backend, space in context.spaces.items():
        if backend == "inductor" and _sums_one_row(context.problem) and not space.violations(REDUCTION, context.names):
            candidate = Candidate(problem=context.problem, backend=backend, config=REDUCTION)
            # of no rule that a cost model ranks better than
            seeds.append(Seed(candidate=candidate, origin="max-autotune"))
        config = space.default(context.names)
        if config is not None:
            # only ATen is what runs without us: the speed-up of a trial is over the origin "stock"
            origin = "stock" if backend == "aten" else "default"
            seeds.append(Seed(candidate=Candidate(problem=context.problem, backend=backend, config=config), origin=origin))
    if context.problem.device == "cuda" and "inductor" in context.spaces:
        for config in inductor_configs(context.spaces["inductor"].bind(context.names)):
            candidate = Candidate(problem=context.problem, backend="inductor", config=config)
            seeds.append(Seed(candidate=candidate, origin="inductor"))
    return seeds


def _sums_one_row(problem: Problem) -> bool:
    """Whether a product on a GPU has one row, and a K that is contiguous in its right matrix."""
    return problem.device == "cuda" and problem.op in ("mm", "addmm") and problem.inputs[-1].stride[0] == 1


def history_seeds(context: SeedContext) -> list[Seed]:
    """Earlier successes: those for this very problem first, fastest first; then each neighbour's fastest, nearest first.

    A neighbour is the same op on the same device, with the same dtypes and epilogue; its config is moved to the nearest
    legal one here.
    """
    here = _sizes(context.problem)
    best: dict[str, list[Evaluation]] = {}
    for evaluation in context.history:
        if evaluation.status is Status.OK and _kin(evaluation.candidate.problem, context.problem):
            best.setdefault(evaluation.candidate.problem.key, []).append(evaluation)
    own = sorted(best.pop(context.problem.key, []), key=_median)
    neighbours: list[tuple[float, float, Evaluation]] = []
    for evaluations in best.values():
        distance = _log_distance(here, _sizes(evaluations[0].candidate.problem))
        if distance <= _MAX_DISTANCE:
            # the fastest of each backend: which backend wins changes with the shape
            fastest: dict[str, Evaluation] = {}
            for evaluation in sorted(evaluations, key=_median):
                fastest.setdefault(evaluation.candidate.backend, evaluation)
            neighbours += [(distance, _median(e), e) for e in fastest.values()]
    neighbours.sort(key=lambda item: item[:2])
    ranked = [*own[: MAX_HISTORY // 2], *(evaluation for _, _, evaluation in neighbours)]
    return _mapped(context, (evaluation.candidate for evaluation in ranked), MAX_HISTORY)


def _mapped(context: SeedContext, candidates: Iterable[Candidate], limit: int) -> list[Seed]:
    seeds: dict[str, Seed] = {}
    for candidate in candidates:
        space = context.spaces.get(candidate.backend)
        config = space.nearest(candidate.config, context.names) if space is not None else None
        if config is not None and len(seeds) < limit:
            mapped = Candidate(problem=context.problem, backend=candidate.backend, config=config)
            seeds.setdefault(mapped.id, Seed(candidate=mapped, origin="history"))
    return list(seeds.values())


def _kin(a: Problem, b: Problem) -> bool:
    def family(problem: Problem) -> tuple[object, ...]:
        dtypes = tuple((spec.dtype, len(spec.shape)) for spec in problem.inputs)
        return problem.op, problem.device, dtypes, problem.epilogue, problem.constants

    return family(a) == family(b)


def _sizes(problem: Problem) -> list[int]:
    return [size for spec in problem.inputs for size in spec.shape]


def _log_distance(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(abs(math.log2(max(x, 1)) - math.log2(max(y, 1))) for x, y in zip(a, b, strict=True))


def _median(evaluation: Evaluation) -> float:
    assert evaluation.measurement is not None
    return evaluation.measurement.median_us


def seeds_from(seeders: Iterable[str], context: SeedContext) -> list[Seed]:
    """Seeds of the named seeders ("stock", "history", "nvmatmul"), in their order, each candidate once."""
    from autokernel.search.nvmatmul import nvmatmul_seeds

    known: Mapping[str, Seeder] = {"stock": stock_seeds, "history": history_seeds, "nvmatmul": nvmatmul_seeds}
    seeds: dict[str, Seed] = {}
    for name in seeders:
        found = known[name](context)
        logger.debug("%s proposes %d seeds for %s", name, len(found), context.problem)
        for seed in found:
            seeds.setdefault(seed.candidate.id, seed)
    return list(seeds.values())
