"""Searches replayed on recorded landscapes: the package's own Tuner asks, the recorded times answer."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(Path(__file__).resolve().parent), str(ROOT)) if path not in sys.path]

from landscape_file import Config, Landscape, Row  # noqa: E402

from autokernel.ops import get_op  # noqa: E402
from autokernel.records import Candidate, Check, Evaluation, Measurement, Problem, Status, TensorSpec, Verdict  # noqa: E402
from autokernel.search.proposals import Proposer  # noqa: E402
from autokernel.search.space import BoundSpace, DeviceFacts, Domain, Names, Space, names_for  # noqa: E402
from autokernel.search.space_file import load_space  # noqa: E402

_PASSED = Verdict(checks=(Check(name="recorded", value=0.0, limit=1.0, passed=True),))
H200 = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232448, l2_bytes=60 << 20)


def problem_of(landscape: Landscape) -> Problem:
    """The problem that the landscape is of, as the profiler would describe it."""
    said = landscape.problem
    m, n, k, dtype = said["m"], said["n"], said["k"], said["dtype"]
    lead = (said["batch"],) if said["op"] == "bmm" else ()
    left = TensorSpec.contiguous((*lead, m, k), dtype)
    inner = (1, k) if said["b"] == "k-major" else (n, 1)
    right = TensorSpec(shape=(*lead, k, n), dtype=dtype, stride=((k * n,) if lead else ()) + inner)
    bias = (TensorSpec.contiguous((n,), dtype),) if said["op"] == "addmm" else ()
    inputs = (*bias, left, right)
    return Problem(op=said["op"], device="cuda", inputs=inputs, constants=() if lead else (len(inputs) - 1,))


def names_of(landscape: Landscape) -> Names:
    """The names that constraints and cost models read."""
    problem = problem_of(landscape)
    return names_for(get_op(problem.op).dims(problem), H200)


class RecordedSpace(BoundSpace):
    """A backend's space in which exactly the recorded configs are legal."""

    def __init__(self, space: Space, names: Names, rows: Sequence[Row]) -> None:
        super().__init__(space, names)
        self.empty = not rows
        self._configs = [dict(row.config) for row in rows]
        self.domains = tuple(_widened(domain, self._configs) for domain in self.domains)
        self._keys = {_key(config) for config in self._configs}
        self._values = [[_number(config.get(domain.name)) for domain in self.domains] for config in self._configs]
        self._matrix = np.array(self._values, dtype=np.float64)

    def violations(self, config: Mapping[str, Any]) -> list[str]:
        """Whether it is among the recorded."""
        return [] if _key(config) in self._keys else ["not recorded"]

    def enumerate(self, limit: int | None = None) -> Iterator[Config]:
        """The recorded configs, in the order of the file."""
        yield from (dict(config) for config in self._configs[:limit])

    def random(self, rng: random.Random) -> Config | None:
        """Any of them."""
        return dict(rng.choice(self._configs)) if self._configs else None

    def nearest(self, config: Mapping[str, Any]) -> Config | None:
        """The one closest to a config; parameters that it lacks are those of the default."""
        if not self._configs:
            return None
        wanted = {**{name: value for name, value in self._default.items() if isinstance(value, (int, str))}, **config}
        if config.get("template", "decompose_k") != "decompose_k":
            wanted.pop("k_split", None)
        target = np.array([_number(wanted.get(domain.name)) for domain in self.domains])
        return dict(self._configs[int(np.abs(self._matrix - target).sum(axis=1).argmin())])


class RecordedSpaceFile:
    """Stands in for a `Space`: binding it to any names gives the recorded configs."""

    def __init__(self, bound: RecordedSpace) -> None:
        self._bound = bound

    def bind(self, _names: Names) -> RecordedSpace:
        """The recorded configs."""
        return self._bound

    def default(self, _names: Names) -> Config | None:
        """The recorded config nearest to the file's default."""
        return self._bound.nearest({})


class Replay:
    """One landscape, ready to answer."""

    def __init__(self, landscape: Landscape, backends: Sequence[str] = ("inductor", "triton")) -> None:
        self.landscape = landscape
        self.problem = problem_of(landscape)
        self.names = names_of(landscape)
        rows = landscape.of(backends)
        self.times: dict[tuple[str, str], float | None] = {(row.backend, _key(row.config)): row.best_us for row in rows}
        self.best_us = min(us for us in self.times.values() if us is not None)
        spaces = load_space(self.problem.op, ROOT / "search_spaces")
        self.spaces: dict[str, Any] = {}
        for backend in backends:
            of_backend = [row for row in rows if row.backend == backend]
            if of_backend and backend in spaces:
                self.spaces[backend] = RecordedSpaceFile(RecordedSpace(spaces[backend], self.names, of_backend))

    def us(self, backend: str, config: Mapping[str, Any]) -> float | None:
        """Microseconds, or None for a config that failed."""
        return self.times[backend, _key(config)]

    def evaluation(self, candidate: Candidate) -> Evaluation:
        """What the pipeline would have recorded."""
        us = self.us(candidate.backend, candidate.config)
        if us is None:
            return Evaluation(candidate=candidate, status=Status.BUILD_ERROR, message="recorded as failed")
        measured = Measurement(median_us=us, spread_us=0.0, num_samples=3, regime="recorded")
        return Evaluation(candidate=candidate, status=Status.OK, verdict=_PASSED, measurement=measured)

    def drive(self, tuner: Proposer, limit: int, in_flight: int = 1) -> list[float | None]:
        """Ask and tell until `limit` candidates were evaluated; their times in the order in which they were asked for."""
        times: list[float | None] = []
        waiting: list[Any] = []
        while len(times) < limit:
            waiting += tuner.ask(min(in_flight - len(waiting), limit - len(times)))
            if not waiting:
                break
            proposal = waiting.pop(0)
            evaluation = self.evaluation(proposal.candidate)
            tuner.tell(proposal.number, evaluation)
            times.append(evaluation.measurement.median_us if evaluation.measurement is not None else None)
        return times

    def needed(self, times: Sequence[float | None], fraction: float) -> float:
        """How many evaluations it took to reach this fraction of the best speed; infinite if they did not suffice."""
        for i, us in enumerate(times):
            if us is not None and self.best_us / us >= fraction:
                return i + 1
        return math.inf

    def reached(self, times: Sequence[float | None], count: int) -> float:
        """The fraction of the best speed after so many evaluations."""
        found = [us for us in times[:count] if us is not None]
        return self.best_us / min(found) if found else 0.0


def _widened(domain: Domain, configs: Sequence[Config]) -> Domain:
    """With the recorded values too, if the space has lost them since."""
    found = dict.fromkeys(config[domain.name] for config in configs if domain.name in config)
    lost = [value for value in found if value not in domain.choices]
    choices = (*domain.choices, *lost)
    return replace(domain, choices=tuple(sorted(choices)) if domain.ordered else choices)  # type: ignore[type-var]


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)


def _number(value: Any) -> float:
    if value is None:
        return -8.0
    if isinstance(value, str):
        return 16.0 * (sum(value.encode()) % 97)  # another text is farther than any number
    return math.log2(value) if value > 0 else -1.0
