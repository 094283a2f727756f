"""Does a bundle still hold here? Every entry: is it hit, is it right, is it still faster than stock?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from autokernel.backends.aten import stock_config
from autokernel.config import ClusterSection, LoadedExperiment
from autokernel.environment import current_environment, physical_cores
from autokernel.errors import WorkerError
from autokernel.evaluate.confirm import Confirmation, ConfirmCandidates, measured_row
from autokernel.evaluate.end_to_end import BUNDLE, STOCK_MODES, TimeScenario, against_stock, result_with
from autokernel.events import MeasuredRow, ScenarioResult
from autokernel.export.bundle import RANGE, Bundle, Entry, read_bundle
from autokernel.export.matching import gemm_of, with_rows
from autokernel.export.plan import mismatch
from autokernel.records import Candidate, Record, Speedup
from autokernel.workers.pool import Pool

log = logging.getLogger(__name__)

_TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryCheck(Record):
    """One entry, checked again. `promised` is the speed-up the bundle says, `speedup` what it is here and now."""

    key: str
    scenario: str
    hits: int
    reason: str  # why it was not hit; empty if it was
    speedup: Speedup | None
    promised: float
    holds: bool
    message: str
    rows: tuple[MeasuredRow, ...] = ()  # of an entry for a range of rows: its ends, measured again


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport(Record):
    """A bundle on this machine. `environment_reason` says why nothing of it applies, if so."""

    environment_reason: str | None
    entries: tuple[EntryCheck, ...]
    scenarios: tuple[ScenarioResult, ...]
    passed: bool


def verify(bundle: Path, loaded: LoadedExperiment, *, rounds: int = 21, pool: Pool | None = None) -> VerifyReport:
    """Compile the model with a bundle, count which entries are hit, check each again and time it against stock.

    Args:
        bundle: its folder, `.zip` or `bundle.json`.
        loaded: the experiment that says which model and scenarios.
        rounds: paired rounds of every comparison.
        pool: where to run; default: one child process on this machine.

    Raises:
        BundleError: the bundle cannot be read.
        WorkerError: the model itself does not run.
    """
    content = read_bundle(bundle)
    device, threads = content.environment.device, loaded.experiment.threads or physical_cores()
    reason = mismatch(content.environment, current_environment(device, threads)) if _there(device) else f"no {device} device"
    if reason is not None:  # stock code would be compared with itself, if it ran at all
        checks = tuple(_check(entry, 0, reason, None) for entry in content.entries)
        return VerifyReport(environment_reason=reason, entries=checks, scenarios=(), passed=False)
    own = pool is None
    running = pool if pool is not None else _local_pool(content)
    try:
        return _verify(content, str(bundle), loaded, rounds, running)
    finally:
        if own:
            running.close()


def _local_pool(bundle: Bundle) -> Pool:
    from autokernel.workers.limits import worker_env
    from autokernel.workers.pool import open_pool

    device = bundle.environment.device
    threads = bundle.environment.num_units if device == "cpu" else physical_cores()
    return open_pool(
        ClusterSection(address="inline"), device=device, num_workers=1, env=worker_env(threads), preload=("torch",)
    )


def _verify(bundle: Bundle, where: str, loaded: LoadedExperiment, rounds: int, pool: Pool) -> VerifyReport:
    threads = loaded.experiment.threads or physical_cores()
    device = bundle.environment.device
    timing_jobs = {
        name: pool.submit(
            TimeScenario(
                loaded=loaded,
                scenario=name,
                device=device,
                threads=threads,
                contenders=against_stock(bundle, where=where),
                baselines=STOCK_MODES,
                rounds=rounds,
            ),
            _TIMEOUT_S,
        )
        for name in loaded.experiment.scenarios
    }
    entry_jobs = {entry.key: pool.submit(_confirmation(entry, rounds, threads), _TIMEOUT_S) for entry in bundle.entries}
    end_jobs = {
        entry.key: {m: pool.submit(_confirmation(at_rows(entry, m), rounds, threads), _TIMEOUT_S) for m in other_ends(entry)}
        for entry in bundle.entries
    }
    timings = [future.result() for future in timing_jobs.values()]
    hits: dict[str, int] = {}
    for timing in timings:
        for key, count in timing.hits.get(BUNDLE, {}).items():
            hits[key] = hits.get(key, 0) + count
    said = {key: why for timing in timings for key, why in timing.reasons.items()}
    checks = tuple(
        _with_ends(_check(entry, hits.get(entry.key, 0), said.get(entry.key), entry_jobs[entry.key]), end_jobs[entry.key])
        for entry in bundle.entries
    )
    scenarios = tuple(result_with(bundle, timing) for timing in timings if BUNDLE not in timing.failures)
    failed = [timing for timing in timings if BUNDLE in timing.failures]
    for timing in failed:
        log.warning("%s does not run with the bundle: %s", timing.scenario, timing.failures[BUNDLE])
    passed = not failed and all(c.holds for c in checks) and all(s.passed for s in scenarios)
    return VerifyReport(environment_reason=None, entries=checks, scenarios=scenarios, passed=passed)


def _there(device: str) -> bool:
    import torch

    return device == "cpu" or torch.cuda.is_available()


def _confirmation(entry: Entry, rounds: int, threads: int) -> Callable[[], Confirmation]:
    stock = stock_config(entry.problem.op)
    return ConfirmCandidates(
        problem=entry.problem,
        finalists=(Candidate(problem=entry.problem, backend=entry.backend, config=entry.config),),
        baselines=(Candidate(problem=entry.problem, backend="aten", config=stock),),
        rounds=rounds,
        threads=threads,
        max_copies=8,
    )


def other_ends(entry: Entry) -> tuple[int, ...]:
    """The first and the last number of rows that an entry is for, but those of its problem."""
    own = gemm_of(entry.problem)
    if entry.rows is None or own is None or entry.problem.op not in ("mm", "addmm", "merged_mm"):
        return ()
    return tuple(m for m in dict.fromkeys(entry.rows) if m != own.m)


def at_rows(entry: Entry, m: int) -> Entry:
    """The entry as one for just so many rows."""
    config = {name: value for name, value in entry.config.items() if name not in RANGE}
    return replace(entry, problem=with_rows(entry.problem, m), config=config)


def _with_ends(check: EntryCheck, ends: Mapping[int, Future[Confirmation]]) -> EntryCheck:
    """With the ends of its range: it holds only if they do, too."""
    rows = tuple(_end(m, future) for m, future in ends.items())
    said = [f"at {row.m} rows: {row.message or 'slower than stock'}" for row in rows if not row.holds]
    if rows and not said:
        said = [f"no slower at {' and '.join(str(row.m) for row in rows)} rows"]
    message = "; ".join(filter(None, [check.message, *said]))
    return replace(check, rows=rows, holds=check.holds and all(row.holds for row in rows), message=message)


def _end(m: int, future: Future[Confirmation]) -> MeasuredRow:
    try:
        return measured_row(m, future.result())
    except WorkerError as error:
        return MeasuredRow(m=m, message=f"could not be checked: {error}")


def _check(entry: Entry, hits: int, reason: str | None, future: Future[Confirmation] | None) -> EntryCheck:
    speedup, message = None, ""
    if future is not None:
        try:
            confirmation = future.result()
        except WorkerError as error:
            message = f"could not be checked: {error}"
        else:
            if confirmation.finalists:
                speedup = confirmation.finalists[0].speedup
            elif confirmation.failures:
                message = f"{confirmation.failures[0].status}: {confirmation.failures[0].message}"
    why = "" if hits else reason or "the compiled model has nothing like it"
    if speedup is not None and not message:
        message = "still faster than stock" if speedup.low > 1 else "no longer clearly faster than stock"
    return EntryCheck(
        key=entry.key,
        scenario=entry.scenario,
        hits=hits,
        reason=why,
        speedup=speedup,
        promised=entry.speedup.ratio if entry.speedup is not None else 1.0,
        holds=hits > 0 and speedup is not None and speedup.low > 1,
        message=message or why,
    )
