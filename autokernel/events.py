"""What a run tells its recorders, in order: the journal writes these lines, MLflow and the progress display mirror them.

An event is a record with a `type`; `event_to_json` and `event_from_json` are the journal's format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from autokernel.environment import Environment
from autokernel.records import Candidate, ConfigValue, Evaluation, Hotspot, Record, Speedup, Verdict, Winner


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Record):
    """The first line of a journal, and again each time the run is resumed."""

    run_id: str
    name: str
    experiment: str  # the YAML as read
    experiment_digest: str  # of the parsed experiment: what resuming compares
    environment: Environment
    seed: int
    version: str  # autokernel's
    git_commit: str = ""
    resumed: bool = False
    overrides: tuple[str, ...] = ()  # `a.b=value` on top of the YAML, without passwords
    files: Mapping[str, str] | None = None  # `fingerprint.file_digests`: which file changed; None: not recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted(Record):
    """Stages: profile, search, confirm, graph, validate, export, prove; in some runs rows and plan, too."""

    stage: str
    total: int = 0  # steps, if known
    budget_s: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress(Record):
    """A step inside a stage, for the display; not kept in the journal."""

    stage: str
    done: int
    total: int
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished(Record):
    stage: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled(Record):
    """Hotspots, ranked by attainable gain, with the ceilings their rooflines come from.

    `layers`: where a part of the model was captured, the number of its layers; times, calls and memory are reckoned for all of
    them. `peak_bytes`: what capturing each scenario took of a GPU's memory.
    """

    hotspots: tuple[Hotspot, ...]
    scenario_us: Mapping[str, float]  # one step of each scenario under Inductor's default
    read_gb_per_s: float
    peak_tflops: Mapping[str, float]  # by dtype
    ceilings: Mapping[str, Any] = field(default_factory=dict)  # `evaluate.roofline.Ceilings` as JSON
    layers: int | None = None
    peak_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlanned(Record):
    """How many trials each hotspot may use, by problem key."""

    trials: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Record):
    """One finished trial. `origin` says who proposed it: "stock", "history", "nvmatmul", "max-autotune", or the sampler."""

    evaluation: Evaluation
    origin: str
    number: int  # counts over the whole run


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed(Record):
    """A finalist against the strongest stock choice, paired and interleaved.

    `over_max_autotune` is its speed-up over what max-autotune runs for the problem, in the same rounds; `max_autotune` says
    what that is, or why it did not take part. Empty where it was not asked, and in older journals.
    """

    problem_key: str
    candidate: Candidate
    baseline: Candidate
    speedup: Speedup
    accepted: bool
    reason: str
    winner: Winner | None = None
    conditions: Mapping[str, float] = field(default_factory=dict)  # clock, power, temperature and load, before_ and after_
    over_max_autotune: Speedup | None = None
    max_autotune: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRow(Record):
    """A winner at m rows instead of those that it was tuned for: its speed-up over the strongest stock choice there.

    None where it was not compared, and `message` says why: it did not pass its checks, or nothing can be claimed.
    """

    m: int
    speedup: Speedup | None = None
    message: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is right there, and no slower than stock within its interval."""
        return self.speedup is not None and self.speedup.high >= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMeasured(Record):
    """A winner was measured at another number of rows; a resumed run does not do it again."""

    candidate: Candidate  # the winner
    row: MeasuredRow


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsHeld(Record):
    """For which rows a winner is used: the widest run of measured ones around its own in which it holds.

    `wanted` and `held` are the first and the last; `measured` are all that were, but its own.
    """

    candidate: Candidate
    wanted: tuple[int, int]
    held: tuple[int, int]
    measured: tuple[MeasuredRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTrial(Record):
    """Entries of one scenario that go together, with their configs: what they should save, and how they did.

    `speedup` is over the plan that was the best before, in the whole model; None for that plan itself. The last accepted plan
    of a scenario is the one that is exported. `configs` has, by problem key, the id of the runner-up that takes the winner's
    place in it. `origin` says who proposed it: "sum", for what should save most, or "optuna"; empty in older journals.
    """

    scenario: str
    keys: tuple[str, ...]  # of the problems
    saved_us: float  # per step, if savings add up
    speedup: Speedup | None
    accepted: bool
    reason: str = ""
    configs: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTrial(Record):
    """One set of graph-level options, judged end to end: speed-up over the bundle without options, per scenario.

    `accepted`: for every graph; `accepted_for`: for those of some scenarios, whose `products` tell them from others.
    """

    options: Mapping[str, ConfigValue]
    speedups: Mapping[str, Speedup]
    score: float  # geometric mean of the ratios
    accepted: bool
    reason: str = ""
    accepted_for: tuple[str, ...] = ()
    products: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContendersTimed(Record):
    """Plans or graph options of a scenario were timed against each other in the model; a resumed run does not do it again.

    What they are worth is decided when all are there, and told by `PlanTrial` and `GraphTrial`.
    """

    scenario: str
    asked: str  # digest of the contenders
    timing: Mapping[str, Any] = field(default_factory=dict)  # `evaluate.end_to_end.ScenarioTiming` as JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeTiming(Record):
    """One scenario in one mode: eager, default, max-autotune or bundle. `compile_s` is 0 where Inductor found it compiled."""

    mode: str
    median_us: float
    spread_us: float
    compile_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioResult(Record):
    """End-to-end times of one scenario, interleaved in one process; the speed-up is over the best stock mode."""

    scenario: str
    modes: tuple[ModeTiming, ...]
    best_stock: str
    speedup: Speedup
    passed: bool

    @property
    def behind_eager(self) -> bool:
        """Whether it passed only because eager PyTorch, which beats all that is compiled, is not what it replaces."""
        return self.passed and self.best_stock == "eager" and self.speedup.high < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablated(Record):
    """Every entry was left out once, on a part of the model; a resumed run does not do it again."""

    applied_digest: str  # of what the bundle with all of them changes
    dropped: Mapping[str, str] = field(default_factory=dict)  # problem key -> why: those that the model is faster without


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioTimed(Record):
    """A scenario was timed with a bundle, all modes against each other; a resumed run does not do it again.

    `result` is None if the model does not run with the bundle; `timing` is `evaluate.end_to_end.ScenarioTiming` as JSON.
    """

    scenario: str
    applied_digest: str  # of what the bundle changes
    result: ScenarioResult | None
    timing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult(Record):
    """The model's metric with stock code and with the bundle; `worse_by` is relative, with its interval's bad end."""

    metric: str
    stock: float
    bundle: float
    worse_by: float
    worse_by_high: float
    limit: float
    passed: bool
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelValidated(Record):
    """The whole model with the bundle: equivalence, metric, times; `dropped` are entries the gates removed.

    A resumed run does not validate again what has the same `applied_digest`, without what was dropped.
    """

    verdict: Verdict
    evals: tuple[EvalResult, ...]
    scenarios: tuple[ScenarioResult, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)  # problem key -> why
    applied_digest: str = ""  # of what the bundle changes; empty in journals of versions that did not say

    @property
    def passed(self) -> bool:
        """All gates: what does not pass them all is exported only if it changes nothing."""
        return self.verdict.passed and all(e.passed for e in self.evals) and all(s.passed for s in self.scenarios)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported(Record):
    """The bundle was written. `stock` bundles change nothing."""

    folder: str
    archive: str
    digest: str
    num_entries: int
    stock: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved(Record):
    """A fresh process loaded the bundle through torch.compile.

    Times are of the scenario that gained most: `compile_s` with empty caches, `scenario_us` of a step by mode. `constant_bytes`
    is what the entries' copies of weights take in that process, for all of `scenarios` together.
    """

    passed: bool
    num_hits: int
    num_entries: int
    num_benchmarks: int
    compile_s: float
    stock_compile_s: float
    message: str = ""
    scenario_us: Mapping[str, float] = field(default_factory=dict)
    scenarios: tuple[str, ...] = ()  # that it compiled: all that have entries
    constant_bytes: int = 0
    rows: tuple[str, ...] = ()  # what it saw of entries for a range of rows, at other batches than their scenario's


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Record):
    """The last line. `outcome`: "won", "stock" (nothing beat stock: a normal outcome), "failed" or "interrupted"."""

    outcome: str
    message: str
    seconds: float


Event = (
    RunStarted | StageStarted | StageProgress | StageFinished | Profiled | SearchPlanned | Evaluated | Confirmed
    | RowMeasured | RowsHeld
    | ContendersTimed | PlanTrial | GraphTrial | Ablated | ScenarioTimed | ModelValidated | Exported | Proved | RunFinished
)  # fmt: skip

EVENT_TYPES: Mapping[str, type[Record]] = {cls.__name__: cls for cls in Event.__args__}


class Recorder(Protocol):
    """Whoever wants to know what happens in a run."""

    def record(self, event: Event) -> None:
        """Take one event. Called from one thread, in order."""
        ...

    def close(self) -> None:
        """Flush; nothing comes after."""
        ...


def event_to_json(event: Event) -> dict[str, Any]:
    return {"type": type(event).__name__, **event.to_json()}


def event_from_json(data: Mapping[str, Any]) -> Event:
    """Inverse of `event_to_json`.

    Raises:
        ValueError: unknown type or fields.
    """
    fields = dict(data)
    name = fields.pop("type", None)
    if name not in EVENT_TYPES:
        raise ValueError(f"unknown event type {name!r}; known: {', '.join(EVENT_TYPES)}")
    return EVENT_TYPES[name].from_json(fields)  # type: ignore[return-value]
