"""How long a call takes: cold caches, the regime of production, medians; and contenders against each other, interleaved.

On a CPU a sample is one `Built.run` over all copies, by the wall clock. On a GPU it is the replay of a CUDA graph that holds
several of them, by events. The copies of the inputs are what keeps L2 cold.

A screen has two fidelities: who is clearly slower than the best known is told so by a few samples.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from autokernel.backends import Built
from autokernel.evaluate.call_graphs import graph_of
from autokernel.evaluate.nvml import gpu_state
from autokernel.evaluate.statistics import drifted, median_and_spread, paired_speedup, running_median
from autokernel.evaluate.tensors import synchronize
from autokernel.records import Measurement, Record, Speedup

if TYPE_CHECKING:
    import torch

_GRAPH_REPLAY_US = 1000.0  # a replay lasts at least this long, so that its own launch does not count
_MAX_GRAPH_CALLS = 64
_WARMUP_ROUNDS = 3
_HOPELESS = 1.15  # times the best known: slower than this, a first look is all that a candidate gets
# A sample's start is recorded behind this much idling on the device, so that its work is queued by then: the launch of a
# graph (about 10 us) would count otherwise. 60,000 cycles are some 30 us.
_HEAD_START_CYCLES = 60_000
Regime = Literal["graph", "eager"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much time a screen may take; `look_samples` are for those that a first look finds hopeless."""

    warmup_s: float
    budget_s: float
    min_samples: int
    max_samples: int
    look_samples: int


EFFORTS: Mapping[str, Effort] = {
    "cpu": Effort(warmup_s=0.03, budget_s=0.2, min_samples=7, max_samples=500, look_samples=7),
    # a replay takes a millisecond or more, and all workers wait for one device
    "cuda": Effort(warmup_s=0.006, budget_s=0.03, min_samples=7, max_samples=31, look_samples=3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Record):
    """Contenders timed against each other in one process.

    `drift` is how far the baseline's running median wandered over its median; `conditions` are clocks, power, temperature
    and load before and after, as far as this machine tells them. `rounds_us` are everyone's times of the rounds that count,
    for other pairs than those with the baseline.
    """

    baseline: str
    medians_us: Mapping[str, float]
    spreads_us: Mapping[str, float]
    num_rounds: int
    num_discarded: int
    drift: float
    speedups: Mapping[str, Speedup] = field(default_factory=dict)
    conditions: Mapping[str, float] = field(default_factory=dict)
    rounds_us: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def faster(self, one: str, other: str) -> Speedup:
        """How many times as fast one contender is as another, by the same rounds.

        Raises:
            KeyError: one of them did not take part.
        """
        return paired_speedup(self.rounds_us[other], self.rounds_us[one], seed=0, num_discarded=self.num_discarded)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """Inverse of `to_json`."""
        fields = dict(data)
        fields["rounds_us"] = {name: tuple(values) for name, values in fields.get("rounds_us", {}).items()}
        fields["speedups"] = {name: Speedup.from_json(value) for name, value in fields.get("speedups", {}).items()}
        return cls(**fields)


def measure(
    built: Built,
    inputs: Sequence[torch.Tensor],
    *,
    device: str,
    threads: int | None = None,
    cold: bool = True,
    regime: Regime = "graph",
    audit: Callable[[Callable[[], tuple[Any, ...]]], None] | None = None,
    seed: int = 0,
    best_us: float | None = None,
) -> Measurement:
    """Time of one call on one copy.

    Args:
        built: what to time.
        inputs: the non-constant inputs of all copies, in order.
        device: "cpu" or "cuda".
        threads: CPU threads; default: what torch is set to.
        cold: whether the copies exceed twice L2 (see `probes.is_cold`), for the record.
        regime: "graph" or "eager"; on a CPU there is only eager.
        audit: called once, at a random point, with the call as it is timed; its time does not count.
        seed: of that point.
        best_us: the best time known for the problem; what is clearly slower gets the effort's `look_samples` only.
    """
    limits = EFFORTS[device]
    if device == "cpu":
        pin_threads(threads)
    with quiet(collect=device == "cpu"):
        step = make_step(built, inputs, device=device, regime=regime)
        timed = timer(device, step.run, head_start=regime == "graph")
        one_us = _warm_up(timed, limits)
        # The audit comes at a random point of the first half, wherever the time runs out.
        hopeless = best_us is not None and one_us > _HOPELESS * best_us * step.num_calls
        least, most = (limits.look_samples,) * 2 if hopeless else (limits.min_samples, limits.max_samples)
        planned = min(most, max(least, int(limits.budget_s * 1e6 / one_us)))
        audit_at = random.Random(seed).randrange(max(1, planned // 2))
        samples: list[float] = []
        spent_us = 0.0
        while len(samples) < least or (spent_us < limits.budget_s * 1e6 and len(samples) < most):
            if audit is not None and len(samples) == audit_at:
                audit(step.verified)
                audit = None
                timed()  # what the audit left in the caches
            samples.append(timed())
            spent_us += samples[-1]
        if audit is not None:
            audit(step.verified)
    per_call = [sample / step.num_calls for sample in samples]
    median, spread = median_and_spread(per_call)
    return Measurement(
        median_us=max(median, 1e-4),
        spread_us=spread,
        num_samples=len(samples),
        regime=describe_regime(device, regime, cold, step.num_calls),
    )


def compare(
    contenders: Mapping[str, Callable[[], object]],
    baseline: str,
    rounds: int,
    *,
    device: str = "cpu",
    seed: int = 0,
    calls_per_sample: Mapping[str, int] | int = 1,
    min_sample_us: float = 200.0,
    replays: bool = False,
) -> Comparison:
    """Time contenders interleaved, each once per round in random order, and judge them by the paired ratios.

    A round in which the baseline itself drifted (see `statistics.drifted`) is discarded for everyone.

    Args:
        contenders: functions without arguments; each call is one sample, repeated where it is shorter than `min_sample_us`.
        baseline: the key of the contender that the others are compared with.
        rounds: paired rounds, after a few uncounted ones.
        device: "cpu" or "cuda"; on a GPU time is by events, each sample after a full synchronisation.
        seed: of the order and the bootstrap.
        calls_per_sample: how many calls of the kernel one function call holds; what times are divided by.
        min_sample_us: shorter functions are called several times per sample.
        replays: the functions replay CUDA graphs (see `timer`).

    Raises:
        ValueError: the baseline is not among the contenders, or there are no rounds.
    """
    if baseline not in contenders or rounds < 1:
        raise ValueError(f"baseline {baseline!r} must be one of {sorted(contenders)}, and rounds ({rounds}) at least 1")
    names = list(contenders)
    order = random.Random(seed)
    before = conditions(device)
    with quiet(collect=device == "cpu"):
        repeats = {}
        timers = {}
        for name, function in contenders.items():
            once = timer(device, function)
            once()
            shortest = min(once() for _ in range(_WARMUP_ROUNDS))
            repeats[name] = max(1, math.ceil(min_sample_us / max(shortest, 0.1)))
            timers[name] = timer(device, function, repeats[name], head_start=replays)
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(-_WARMUP_ROUNDS, rounds):
            order.shuffle(names)
            for name in names:
                sample = timers[name]()
                if number >= 0:
                    times[name].append(sample)
    for name, values in times.items():
        calls = calls_per_sample if isinstance(calls_per_sample, int) else calls_per_sample[name]
        times[name] = [value / (repeats[name] * calls) for value in values]
    return _judge(times, baseline, seed, {**_prefixed("before", before), **_prefixed("after", conditions(device))})


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A candidate as it is timed: `run` once, which holds `num_calls` calls (copies times repeats).

    `verified` is the same, but wipes a graph's static outputs before, and returns the outputs of all copies.
    """

    run: Callable[[], object]
    verified: Callable[[], tuple[Any, ...]]
    num_calls: int


def make_step(built: Built, inputs: Sequence[torch.Tensor], *, device: str, regime: Regime = "graph") -> Step:
    """The step that is timed: `Built.run` itself, or on a GPU a graph of enough of them for a replay of a millisecond."""

    def call() -> tuple[Any, ...]:
        return built.run(*inputs)

    if device != "cuda" or regime == "eager":
        return Step(run=call, verified=call, num_calls=built.num_copies)
    single, _ = graph_of(call, 1)
    replay_us = min(timer("cuda", single.replay, head_start=True)() for _ in range(3))
    repeats = max(1, min(_MAX_GRAPH_CALLS, math.ceil(_GRAPH_REPLAY_US / max(replay_us, 1.0))))
    del single
    graph, outputs = graph_of(call, repeats, warm_ups=0)

    def verified() -> tuple[Any, ...]:
        for out in outputs:
            out.fill_(math.nan if out.dtype.is_floating_point else 85)
        graph.replay()
        synchronize("cuda")
        return tuple(outputs)

    return Step(run=graph.replay, verified=verified, num_calls=repeats * built.num_copies)


def describe_regime(device: str, regime: Regime, cold: bool, num_calls: int) -> str:
    """How a time was taken, for the record: "cpu, 2 threads, cold L2, 8 calls a sample"."""
    import torch

    where = f"cpu, {torch.get_num_threads()} threads" if device == "cpu" else f"cuda {regime}"
    return f"{where}, {'cold' if cold else 'warm'} L2, {num_calls} calls a sample"


def timer(device: str, function: Callable[[], object], repeats: int = 1, *, head_start: bool = False) -> Callable[[], float]:
    """A function that runs `function` `repeats` times and returns the time of all of them in microseconds.

    Args:
        device: "cpu" or "cuda".
        function: what is timed.
        repeats: how often.
        head_start: on a GPU, keep the device idle until the work is queued. For replays of graphs, not for what launches
            kernel by kernel: there, launching is part of the time.
    """
    if device != "cuda":

        def by_clock() -> float:
            start = time.perf_counter_ns()
            for _ in range(repeats):
                function()
            return (time.perf_counter_ns() - start) / 1000

        return by_clock

    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def by_events() -> float:
        torch.cuda.synchronize()
        if head_start:
            torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1000

    return by_events


def pin_threads(threads: int | None) -> None:
    """Make torch use exactly this many CPU threads. `OMP_WAIT_POLICY=passive` must be set before torch is imported."""
    import torch

    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextmanager
def quiet(*, collect: bool = True) -> Iterator[None]:
    """No gradients, and no garbage collection in the middle of a sample; one before it, unless that takes too long."""
    import torch

    was_enabled = gc.isenabled()
    if collect:
        gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_enabled:
            gc.enable()


def conditions(device: str) -> dict[str, float]:
    """What the machine says about its state now: load, and a GPU's clocks (MHz), power (W), temperature (C), throttling."""
    state: dict[str, float] = {}
    if hasattr(os, "getloadavg"):
        state["load"] = os.getloadavg()[0]
    if device == "cuda":
        import torch

        return {**state, **gpu_state(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))}
    try:
        with open(f"/sys/devices/system/cpu/cpu{min(os.sched_getaffinity(0))}/cpufreq/scaling_cur_freq", encoding="ascii") as f:
            state["clock_mhz"] = int(f.read()) / 1000
    except (OSError, ValueError, AttributeError):  # guests and other systems do not say
        pass
    return state


def _warm_up(timed: Callable[[], float], limits: Effort) -> float:
    """Run until the warm-up's time is over, twice at least; returns the fastest in microseconds."""
    best, spent = math.inf, 0.0
    count = 0
    while count < 2 or spent < limits.warmup_s * 1e6:
        sample = timed()
        best, spent, count = min(best, sample), spent + sample, count + 1
    return max(best, 0.1)


def _judge(times: Mapping[str, Sequence[float]], baseline: str, seed: int, state: Mapping[str, float]) -> Comparison:
    discarded = drifted(times[baseline])
    kept = {name: [t for t, drop in zip(values, discarded, strict=True) if not drop] for name, values in times.items()}
    num_discarded = int(discarded.sum())
    statistics = {name: median_and_spread(values) for name, values in kept.items()}
    wandering = running_median(times[baseline])
    return Comparison(
        baseline=baseline,
        medians_us={name: median for name, (median, _) in statistics.items()},
        spreads_us={name: spread for name, (_, spread) in statistics.items()},
        num_rounds=len(discarded),
        num_discarded=num_discarded,
        drift=float((wandering.max() - wandering.min()) / statistics[baseline][0]),
        speedups={
            name: paired_speedup(kept[baseline], values, seed=seed + i, num_discarded=num_discarded)
            for i, (name, values) in enumerate(kept.items())
            if name != baseline
        },
        conditions=state,
        rounds_us={name: tuple(values) for name, values in kept.items()},
    )


def _prefixed(prefix: str, state: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in state.items()}
