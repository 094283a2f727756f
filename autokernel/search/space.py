"""What a backend may be configured to: parameters with choices, and constraints between them. Pure Python.

A `Space` is read from `search_spaces/<op>.yaml` (space_file.py). Bound to the names of one problem on one device it
lists, counts, draws and repairs configs; every config that it hands out is legal.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from autokernel.errors import ConfigError
from autokernel.records import ConfigValue, Record
from autokernel.search.expressions import Expression

Config = dict[str, ConfigValue]
Names = Mapping[str, int | str]

_MISMATCH = 4.0  # distance between two unordered values; as far as sixteen times larger or smaller
_MAX_STEPS = 50_000  # of the search for the nearest legal config
_MAX_DRAWS = 64  # uniform draws before a draw is steered through the constraints


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts(Record):
    """What constraints may ask of a device, by these names. A size that is unknown or does not apply is 0."""

    device: str  # "cpu" or "cuda"
    threads: int = 1  # CPU threads the model runs with
    isa: str = ""  # "AVX512", "sm_90"
    device_name: str = ""  # "NVIDIA H200"
    l2_bytes: int = 0
    smem_bytes: int = 0  # shared memory one block may use; GPU only
    num_units: int = 1  # cores or multiprocessors


DEVICE_NAMES: frozenset[str] = frozenset(f.name for f in fields(DeviceFacts))


def names_for(problem_dims: Mapping[str, int], device: DeviceFacts) -> Names:
    """The names of a problem (`Op.dims`) and of a device in one mapping.

    Raises:
        ValueError: the problem uses a name that belongs to the device.
    """
    clash = sorted(DEVICE_NAMES & set(problem_dims))
    if clash:
        raise ValueError(f"dims {clash} are names of the device; an op must call them differently")
    return {**problem_dims, **{name: getattr(device, name) for name in DEVICE_NAMES}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter. `ordered` says that neighbouring choices behave alike (a range), which samplers can use."""

    name: str
    choices: Callable[[Names], tuple[ConfigValue, ...]]
    ordered: bool = False
    when: Expression | None = None  # absent from the config where this is false


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The parameters of a backend on one kind of device, in the order in which they are chosen."""

    parameters: tuple[Parameter, ...]
    constraints: tuple[Expression, ...]
    default: Mapping[str, ConfigValue | Expression]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Everything one backend may do for one op; a section per kind of device."""

    op: str
    backend: str
    where: str  # file and key, for messages
    names: frozenset[str]  # of the problem, that the file declares to use
    sections: Mapping[str, Section]  # by device

    def bind(self, names: Names) -> BoundSpace:
        """The space for one problem on one device; without a section for that device it is empty.

        Raises:
            ConfigError: the op gives fewer names than the file uses.
        """
        missing = sorted((self.names | DEVICE_NAMES) - set(names))
        if missing:
            raise ConfigError(
                f"{self.where}: uses the names {', '.join(missing)}, which {self.op} does not give; "
                f"it gives {', '.join(sorted(set(names) - DEVICE_NAMES))}"
            )
        return BoundSpace(self, names)

    def violations(self, config: Mapping[str, ConfigValue], names: Names) -> list[str]:
        """Why a config is not legal, one sentence per reason; empty if it is."""
        return self.bind(names).violations(config)

    def enumerate(self, names: Names, limit: int | None = None) -> Iterator[Config]:
        """Legal configs in the order of the file, at most `limit`."""
        return self.bind(names).enumerate(limit)

    def count(self, names: Names, limit: int | None = None) -> int:
        """Number of legal configs; counting stops at `limit`."""
        return self.bind(names).count(limit)

    def random(self, rng: random.Random, names: Names) -> Config | None:
        """A legal config at random; None if there is none."""
        return self.bind(names).random(rng)

    def nearest(self, config: Mapping[str, ConfigValue], names: Names) -> Config | None:
        """The legal config closest to the given one, which may come from another shape; None if there is none."""
        return self.bind(names).nearest(config)

    def default(self, names: Names) -> Config | None:
        """The file's default, or the legal config nearest to it; None if there is none."""
        return self.bind(names).default()


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A parameter with its choices for one problem on one device."""

    name: str
    choices: tuple[ConfigValue, ...]
    ordered: bool
    when: Expression | None

    def present(self, values: Mapping[str, ConfigValue]) -> bool:
        """Whether the parameter is part of a config that starts with these values."""
        if self.when is None or self.when.always:
            return True
        return all(name in values for name in self.when.names) and bool(self.when.evaluate(values))


class BoundSpace:
    """A space with all names known. Configs are plain dicts, parameters in the order of the file."""

    def __init__(self, space: Space, names: Names) -> None:
        self.space = space
        self.names = dict(names)
        section = space.sections.get(str(names["device"]))
        self._default: Mapping[str, ConfigValue | Expression] = section.default if section else {}
        self.domains: tuple[Domain, ...] = ()
        self._always: list[Expression] = []  # constraints without parameters
        self._constraints: tuple[Expression, ...] = section.constraints if section else ()
        self.empty = section is None
        if section is None:
            return
        self.domains = tuple(
            Domain(
                name=p.name,
                choices=p.choices(names),
                ordered=p.ordered,
                when=p.when.given(self.names) if p.when is not None else None,
            )
            for p in section.parameters
        )
        position = {domain.name: i for i, domain in enumerate(self.domains)}
        # each constraint is checked as soon as its last parameter is chosen
        self._due: list[list[Expression]] = [[] for _ in self.domains]
        for constraint in section.constraints:
            due = [position[name] for name in constraint.names if name in position]
            bound = constraint.given(self.names)
            if due and not bound.always:
                self._due[max(due)].append(bound)
            elif not due:
                self._always.append(constraint)
        self.empty = not all(constraint.evaluate(self.names) for constraint in self._always)

    def violations(self, config: Mapping[str, ConfigValue]) -> list[str]:
        """Why a config is not legal; empty if it is."""
        if not self.domains:
            return [f"backend {self.space.backend} has no space for {self.space.op} on {self.names['device']}"]
        values: dict[str, ConfigValue] = dict(self.names)
        reasons: list[str] = []
        for domain in self.domains:
            if not domain.present(values):
                if domain.name in config:
                    assert domain.when is not None
                    reasons.append(f"{domain.name} must be left out unless `{domain.when.text}`")
            elif domain.name not in config:
                reasons.append(f"{domain.name} is missing; choices are {_listed(domain.choices)}")
            elif not _among(config[domain.name], domain.choices):
                reasons.append(f"{domain.name}={config[domain.name]!r} is not one of {_listed(domain.choices)}")
            else:
                values[domain.name] = config[domain.name]
        unknown = sorted(set(config) - {domain.name for domain in self.domains})
        if unknown:
            reasons.append(f"no such parameter: {', '.join(unknown)}")
        if reasons:
            return reasons
        for constraint in self._constraints:
            if not self._holds(constraint, values):
                given = ", ".join(f"{name}={values[name]!r}" for name in sorted(constraint.names))
                reasons.append(f"`{constraint.text}` does not hold with {given}")
        return reasons

    def enumerate(self, limit: int | None = None) -> Iterator[Config]:
        """Legal configs in the order of the file, at most `limit`."""
        for i, config in enumerate(self._walk(lambda domain: domain.choices)):
            if limit is not None and i >= limit:
                return
            yield config

    def count(self, limit: int | None = None) -> int:
        """Number of legal configs; counting stops at `limit`."""
        return sum(1 for _ in self.enumerate(limit))

    def random(self, rng: random.Random) -> Config | None:
        """A legal config: uniform where legal configs are not too rare, otherwise steered through the constraints."""
        if self.empty:
            return None
        for _ in range(_MAX_DRAWS):
            values: dict[str, ConfigValue] = dict(self.names)
            config: Config = {}
            for domain in self.domains:
                if domain.present(values):
                    config[domain.name] = values[domain.name] = rng.choice(domain.choices)
            if all(self._holds(constraint, values) for due in self._due for constraint in due):
                return config
        return next(self._walk(lambda domain: rng.sample(domain.choices, len(domain.choices))), None)

    def default(self) -> Config | None:
        """The file's default, or the legal config nearest to it."""
        return self.nearest({})

    def nearest(self, config: Mapping[str, ConfigValue]) -> Config | None:
        """The legal config closest to the given one: branch and bound, nearest choices first.

        Distances are logarithmic for numbers. A parameter that `config` lacks is taken from the default.
        """
        wanted = {name: v.evaluate(self.names) if isinstance(v, Expression) else v for name, v in self._default.items()}
        wanted.update(config)
        best: Config | None = None
        best_cost = math.inf
        steps = 0
        values: dict[str, ConfigValue] = dict(self.names)
        chosen: Config = {}

        def descend(depth: int, cost: float) -> None:
            nonlocal best, best_cost, steps
            if cost >= best_cost or (steps > _MAX_STEPS and best is not None):
                return
            if depth == len(self.domains):
                best, best_cost = dict(chosen), cost
                return
            domain = self.domains[depth]
            if not domain.present(values):
                if self._due_hold(depth, values):
                    descend(depth + 1, cost)
                return
            target = wanted.get(domain.name, domain.choices[0])
            for choice in sorted(domain.choices, key=lambda c: _distance(c, target)):
                steps += 1
                chosen[domain.name] = values[domain.name] = choice
                if self._due_hold(depth, values):
                    descend(depth + 1, cost + _distance(choice, target))
                del chosen[domain.name], values[domain.name]

        if not self.empty:
            descend(0, 0.0)
        return best

    def _walk(self, order: Callable[[Domain], Sequence[ConfigValue]]) -> Iterator[Config]:
        """Every legal config once, depth first; branches end where a constraint fails."""
        if self.empty:
            return
        values: dict[str, ConfigValue] = dict(self.names)
        chosen: Config = {}
        last = len(self.domains) - 1
        left: list[Iterator[ConfigValue | None]] = []  # choices not yet made, by depth; None: the parameter is absent
        entered = True
        while left or entered:
            depth = len(left) - 1
            if entered:
                depth += 1
                domain = self.domains[depth]
                left.append(iter(order(domain) if domain.present(values) else (None,)))
                entered = False
            domain = self.domains[depth]
            chosen.pop(domain.name, None)
            values.pop(domain.name, None)
            for choice in left[depth]:
                if choice is not None:
                    chosen[domain.name] = values[domain.name] = choice
                if not self._due_hold(depth, values):
                    continue
                if depth == last:
                    yield dict(chosen)
                    continue
                entered = True
                break
            else:
                chosen.pop(domain.name, None)
                values.pop(domain.name, None)
                left.pop()

    def _due_hold(self, depth: int, values: Mapping[str, ConfigValue]) -> bool:
        for constraint in self._due[depth]:  # noqa: SIM110 (a hundred thousand times, without a generator)
            if not self._holds(constraint, values):
                return False
        return True

    @staticmethod
    def _holds(constraint: Expression, values: Mapping[str, ConfigValue]) -> bool:
        # a constraint says nothing about a config that lacks one of its parameters
        return not values.keys() >= constraint.names or bool(constraint.evaluate(values))


def _among(value: ConfigValue, choices: Sequence[ConfigValue]) -> bool:
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)


def _distance(a: ConfigValue, b: ConfigValue) -> float:
    if a == b and isinstance(a, bool) == isinstance(b, bool):
        return 0.0
    for value in (a, b):
        if isinstance(value, (bool, str)) or value < 0:
            return _MISMATCH
    return abs(math.log2(float(a) + 1) - math.log2(float(b) + 1))


def _listed(choices: Sequence[ConfigValue]) -> str:
    shown = ", ".join(repr(choice) for choice in choices[:12])
    return f"[{shown}{', ...' if len(choices) > 12 else ''}]"
