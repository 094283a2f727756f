"""The records that flow from the profiler to production: frozen, keyword-only, and free of torch.

    Problem -> Hotspot -> Candidate -> Evaluation -> Winner -> Bundle

dtypes are torch's names without the `torch.` ("bfloat16"), shapes and strides are tuples of elements, times are
microseconds. Every record turns into plain JSON by `to_json` and back by `from_json`.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import itertools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

ConfigValue = int | float | str | bool

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8,
}  # fmt: skip


class Status(enum.StrEnum):
    """How the evaluation of a candidate ended. Only `LOST` is ever tried again."""

    OK = "OK"
    INVALID = "INVALID"  # a constraint or the backend refused the config before building
    BUILD_ERROR = "BUILD_ERROR"
    RUN_ERROR = "RUN_ERROR"
    WRONG = "WRONG"  # a check failed, numeric or physical
    TIMEOUT = "TIMEOUT"
    CRASHED = "CRASHED"
    LOST = "LOST"  # the worker or its node went away


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces; what hashes and keys are made of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any, length: int = 16) -> str:
    """Hex digest of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


class Record:
    """JSON in and out for the dataclasses below."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only; non-finite floats become the strings "inf", "-inf" and "nan"."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`.

        Raises:
            ValueError: a field is unknown or missing.
        """
        hints = _hints(cls)
        unknown = set(data) - set(hints)
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}; it has {sorted(hints)}")
        try:
            return cls(**{name: _typed(hints[name], value) for name, value in data.items()})
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from None


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _typed(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [a for a in args if a is not type(None)]
        return _typed(options[0], value) if len(options) == 1 else value
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_typed(args[0], v) for v in value)
        return tuple(_typed(a, v) for a, v in zip(args, value, strict=True))
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if hint is float and value is not None:
        return float(value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _typed(args[1], item) for key, item in value.items()} if len(args) == 2 else dict(value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec(Record):
    """Shape, dtype and stride of one tensor; no data."""

    shape: tuple[int, ...]
    dtype: str
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.stride):
            raise ValueError(f"shape {self.shape} and stride {self.stride} differ in rank")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}")

    @classmethod
    def contiguous(cls, shape: tuple[int, ...], dtype: str) -> Self:
        """Row-major."""
        stride: list[int] = []
        step = 1
        for size in reversed(shape):
            stride.append(step)
            step *= max(size, 1)
        return cls(shape=shape, dtype=dtype, stride=tuple(reversed(stride)))

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the distinct elements: broadcast dimensions (stride 0) count once."""
        distinct = math.prod(n for n, s in zip(self.shape, self.stride, strict=True) if s != 0 or n == 1)
        return distinct * DTYPE_BYTES[self.dtype]

    @property
    def row_step(self) -> int | None:
        """Elements from each row to the next, rows being along the last dimension; None if they are not evenly apart."""
        rows = [(n, s) for n, s in zip(self.shape[:-1], self.stride[:-1], strict=True) if n != 1]
        if any(outer != n * inner for (_, outer), (n, inner) in itertools.pairwise(rows)):
            return None
        return rows[-1][1] if rows else self.shape[-1]

    @property
    def reach(self) -> int:
        """How many elements behind the first one in memory the last one lies."""
        return sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def __str__(self) -> str:
        text = f"{self.dtype}[{'x'.join(map(str, self.shape))}]"
        if self != TensorSpec.contiguous(self.shape, self.dtype):
            text += f"@{','.join(map(str, self.stride))}"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem(Record):
    """One thing to make faster: an op on tensors of given shapes, dtypes and strides.

    `constants` are the positions of inputs that do not change between calls (weights), which a backend may repack
    once. `epilogue` names the pointwise ops that follow with no other user ("silu", "add"), which a backend may
    fuse. The `key` is stable across processes and versions and is what entries are looked up by.
    """

    op: str
    inputs: tuple[TensorSpec, ...]
    device: str  # "cpu" or "cuda"
    constants: tuple[int, ...] = ()
    scalars: tuple[tuple[str, ConfigValue], ...] = ()
    epilogue: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(not 0 <= i < len(self.inputs) for i in self.constants):
            raise ValueError(f"constants {self.constants} must be positions among {len(self.inputs)} inputs")

    @property
    def key(self) -> str:
        inputs = ", ".join(f"{'const ' if i in self.constants else ''}{spec}" for i, spec in enumerate(self.inputs))
        scalars = "".join(f", {name}={value}" for name, value in self.scalars)
        epilogue = "".join(f" + {name}" for name in self.epilogue)
        return f"{self.device}: {self.op}({inputs}{scalars}){epilogue}"

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Hotspot(Record):
    """A problem with what it costs in one step of one scenario.

    `share` is its part of the scenario's step, `weight` its part of all scenarios together (their sum is at most 1).
    `roofline_us` is the least time that this machine's measured ceilings allow for all its calls. `estimated` times were not
    measured in the step: the compiler's own kernels do not say which nodes they are. `rivals` are keys of other problems of the
    scenario whose entries would take some of the same nodes: only one of them can have a node; `rival_calls` says for each how
    many calls of this problem it could take nodes of. `nodes` has a digest of each call's nodes: calls of two problems that
    have one in common would take the very same nodes. Empty: not known.
    """

    problem: Problem
    scenario: str
    num_calls: int
    time_us: float
    share: float
    weight: float
    roofline_us: float
    sites: tuple[str, ...] = ()
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    estimated: bool = False
    rivals: tuple[str, ...] = ()
    rival_calls: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()

    @property
    def attainable_gain(self) -> float:
        """Fraction of the whole run that would be saved at the roofline (Amdahl): what the budget follows."""
        return self.weight * max(0.0, 1 - self.roofline_us / self.time_us) if self.time_us > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Record):
    """One way to solve a problem: a backend and its config."""

    problem: Problem
    backend: str
    config: Mapping[str, ConfigValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", types.MappingProxyType(dict(self.config)))

    @property
    def id(self) -> str:
        """Hash of problem, backend and config: equal candidates are evaluated once."""
        return digest_of([self.problem.key, self.backend, dict(self.config)])

    @property
    def label(self) -> str:
        """Short and readable: `inductor template=cpp_gemm thread_factors=1,2,1`."""
        return " ".join([self.backend, *(f"{k}={v}" for k, v in sorted(self.config.items()))])

    def __reduce__(self) -> tuple[Any, ...]:
        return _candidate, (self.problem, self.backend, dict(self.config))

    def __hash__(self) -> int:
        return hash(self.id)


def _candidate(problem: Problem, backend: str, config: dict[str, ConfigValue]) -> Candidate:
    return Candidate(problem=problem, backend=backend, config=config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check(Record):
    """One thing that was verified: it holds when `value <= limit`."""

    name: str
    value: float
    limit: float
    passed: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Record):
    """All checks of one candidate, or of one model."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement(Record):
    """Time of one call: median and interquartile spread in microseconds, and how it was taken."""

    median_us: float
    spread_us: float
    num_samples: int
    regime: str  # e.g. "cpu, 2 threads, cold L2, 8 calls a sample"

    def __post_init__(self) -> None:
        if not (self.median_us > 0 and math.isfinite(self.median_us) and self.spread_us >= 0 and self.num_samples > 0):
            raise ValueError(f"not a measurement: {self.median_us} us, spread {self.spread_us}, {self.num_samples} samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Record):
    """What became of a candidate. A measurement is there if and only if the status is OK."""

    candidate: Candidate
    status: Status
    verdict: Verdict | None = None
    measurement: Measurement | None = None
    message: str = ""  # one sentence: why it is not OK
    log_tail: str = ""
    environment: str = ""  # digest of the environment it ran in
    build_s: float = 0.0
    total_s: float = 0.0
    device_s: float = 0.0  # how long it held the device: checks and timing
    deterministic: bool = True

    def __post_init__(self) -> None:
        if (self.status is Status.OK) != (self.measurement is not None):
            raise ValueError(f"status {self.status} {'needs' if self.status is Status.OK else 'forbids'} a measurement")
        if self.status is Status.OK and (self.verdict is None or not self.verdict.passed):
            raise ValueError("status OK needs a verdict that passed")
        if self.status is not Status.OK and not self.message:
            raise ValueError(f"status {self.status} needs a message that says why")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup(Record):
    """Median of paired time ratios (baseline over contender) with a bootstrap confidence interval."""

    ratio: float
    low: float
    high: float
    num_rounds: int
    num_discarded: int = 0  # rounds in which the baseline itself drifted
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not self.low <= self.ratio <= self.high:
            raise ValueError(f"ratio {self.ratio} lies outside its interval [{self.low}, {self.high}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp(Record):
    """A finalist that is clear of the minimum gain as well, and little slower than the winner of the same race.

    `speedup` is over the same baseline as the winner's.
    """

    evaluation: Evaluation
    speedup: Speedup

    def __post_init__(self) -> None:
        if self.evaluation.measurement is None:
            raise ValueError(f"a runner-up has a measurement, which {self.evaluation.candidate.label} lacks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner(Record):
    """A candidate whose confirmed speed-up over the strongest stock choice is clear of the minimum gain.

    `runners_up`, the fastest first: what may be the faster one beside the kernels of a model.
    """

    hotspot: Hotspot
    evaluation: Evaluation
    baseline: Candidate
    baseline_us: float
    winner_us: float
    speedup: Speedup
    runners_up: tuple[RunnerUp, ...] = ()

    def instead(self, candidate: str) -> Winner:
        """What the winner is with a runner-up in its place.

        Args:
            candidate: the runner-up's id.

        Raises:
            ValueError: there is no such runner-up.
        """
        for one in self.runners_up:
            if one.evaluation.candidate.id == candidate and one.evaluation.measurement is not None:
                us = one.evaluation.measurement.median_us
                return dataclasses.replace(self, evaluation=one.evaluation, winner_us=us, speedup=one.speedup, runners_up=())
        raise ValueError(f"candidate {candidate} is no runner-up for {self.hotspot.problem.key}")
