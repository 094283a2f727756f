"""Searches autokernel's skinny GEMM kernel against cuBLAS on one GPU: what its best configs reach.

    python benchmarks/skinny_mm.py --out $OUT/skinny.json --seconds 400 [--only o-m16 ...] [--workers 16] [--dry]

For each of qkv, o, gate-up, down and the LM head of Llama-3.1-8B, and M of 1, 16, 64, 128, in bf16: worker processes compile
configs ahead, in a random order that is always the same, then neighbours of the best; this process checks each against fp64
(twice cuBLAS's own error is allowed) and times it: replays of a CUDA graph of many calls that rotate over weights of more
than 160 MB. The best eight and cuBLAS are timed again, interleaved. All rows are written after each GEMM.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import os
import random
import statistics
import time
from collections import deque
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skinny_kernels import GEMMS, Gemm, Key, build, candidates, key_of, neighbours, quiet, space_of

_FLOOR_BYTES_PER_US = 4.26e6  # read bandwidth of an H200, measured
_AHEAD = 48  # compilations queued or running
_EXPLORE = 0.6  # share of a GEMM's time for random configs; the rest is for neighbours of the best
_FINALISTS, _ROUNDS = 8, 21


@dataclass(slots=True)
class Row:
    """One config of one GEMM."""

    config: dict[str, Any]
    status: str
    us: float | None = None
    careful_us: float | None = None
    message: str = ""

    @property
    def best_us(self) -> float:
        """The more careful of the times."""
        return self.careful_us or self.us or math.inf


@dataclass(slots=True)
class Work:
    """One GEMM's configs: those to come, those being compiled or compiled, and those measured."""

    gemm: Gemm
    bound: Any
    queue: deque[dict[str, Any]] = field(default_factory=deque)
    pending: dict[concurrent.futures.Future[tuple[str, str]], dict[str, Any]] = field(default_factory=dict)
    seen: set[Key] = field(default_factory=set)
    rows: list[Row] = field(default_factory=list)
    cublas_us: float = math.nan

    def best(self, count: int) -> list[Row]:
        """The fastest right ones."""
        good = [row for row in self.rows if row.status == "OK"]
        # a card that is hot by the time of the careful measurement is slower: quick times do not compare with careful ones
        return sorted(good, key=lambda row: (row.careful_us is None, row.best_us))[:count]


class Compilers:
    """Worker processes that fill Triton's cache; one that crashes takes its config along, not the run."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = self._open()

    def _open(self) -> concurrent.futures.ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(self._workers, mp_context=context, initializer=quiet)

    def feed(self, work: Work, ahead: int) -> None:
        """Start compilations of a GEMM until so many are under way or done and not yet measured."""
        while work.queue and len(work.pending) < ahead:
            config = work.queue.popleft()
            key = key_of(config)
            if key in work.seen:
                continue
            work.seen.add(key)
            try:
                future = self._pool.submit(build, work.gemm, key)
            except BrokenProcessPool:
                self._pool = self._open()
                future = self._pool.submit(build, work.gemm, key)
            work.pending[future] = config

    def close(self) -> None:
        """Start nothing more; what is being compiled ends by itself, in seconds."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Search:
    """Takes one GEMM after the other within a time box."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.seconds
        self.compilers = Compilers(options.workers)
        self.rng = random.Random(0)

    def run(self) -> list[Work]:
        """Search all GEMMs that are wanted."""
        wanted = [gemm for gemm in GEMMS if not self.options.only or gemm.label in self.options.only]
        done: list[Work] = []
        following = self._work(wanted[0])
        try:
            for i, gemm in enumerate(wanted):
                left = self.deadline - time.monotonic()
                if left < 5:
                    print(f"no time left for {', '.join(g.label for g in wanted[i:])}", flush=True)
                    break
                work, following = following, self._work(wanted[i + 1]) if i + 1 < len(wanted) else following
                self._search(work, following, time.monotonic() + left / (len(wanted) - i))
                assert work.gemm is gemm
                done.append(work)
                report(work)
                write(done, Path(self.options.out))
        finally:
            self.compilers.close()
        return done

    def _work(self, gemm: Gemm) -> Work:
        work = Work(gemm, space_of(gemm))
        work.queue.extend(candidates(gemm, work.bound)[: self.options.limit])
        self.compilers.feed(work, _AHEAD)
        return work

    def _search(self, work: Work, following: Work, until: float) -> None:
        """Measure configs of one GEMM until its time is over; the next one's are compiled when workers run out of these."""
        import skinny_device

        begun = time.monotonic()
        device = skinny_device.Device(work.gemm) if not self.options.dry else None
        if device is not None:
            work.cublas_us = device.quick(device.cublas())
        reserve = 0.6 if device is not None else 0.0
        explored = False
        while time.monotonic() < until - reserve:
            if not explored and time.monotonic() - begun > _EXPLORE * (until - begun):
                explored = True
                work.queue.clear()
                for future in [future for future in work.pending if future.cancel()]:
                    work.seen.discard(key_of(work.pending.pop(future)))
            if explored and len(work.pending) < self.options.workers // 2 + 1:
                self._refine(work)
            self.compilers.feed(work, _AHEAD)
            if not work.queue:
                self.compilers.feed(following, _AHEAD // 2)
            if not work.pending:
                break
            ready, _ = concurrent.futures.wait(work.pending, 0.2, concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                work.rows.append(measured(device, future, work.pending.pop(future)))
                if time.monotonic() > until - reserve:
                    break
        for future in work.pending:
            future.cancel()
        if device is not None:
            self._confirm(work, device)
            device.close()

    def _refine(self, work: Work) -> None:
        """Queue neighbours of the best so far."""
        rows = work.best(6)
        moves = [iter(neighbours(row.config, work.bound, self.rng)) for row in rows]
        for _ in range(6):
            for move in moves:
                config = next((c for c in move if key_of(c) not in work.seen), None)
                if config is not None:
                    work.queue.append(config)

    def _confirm(self, work: Work, device: Any) -> None:
        """Time the best and cuBLAS again, interleaved in random order."""
        rows = work.best(_FINALISTS)
        timed = [(row, device.capture(device.kernel(key_of(row.config)), row.us)) for row in rows]
        stock = device.capture(device.cublas(), work.cublas_us)
        samples: dict[int, list[float]] = {i: [] for i in range(len(rows) + 1)}
        for _ in range(_ROUNDS):
            order = list(samples)
            self.rng.shuffle(order)
            for i in order:
                samples[i].append(device.replay(timed[i][1] if i < len(rows) else stock))
        for i, row in enumerate(rows):
            row.careful_us = statistics.median(samples[i])
        work.cublas_us = statistics.median(samples[len(rows)])


def measured(device: Any, future: concurrent.futures.Future[tuple[str, str]], config: dict[str, Any]) -> Row:
    """The row of a config whose compilation has ended."""
    try:
        status, message = future.result()
    except BrokenProcessPool as error:
        return Row(config, "BUILD_ERROR", message=f"a compiler crashed: {error}")
    if status != "OK" or device is None:
        return Row(config, status, message=message)
    from skinny_device import LAUNCH_ERRORS

    try:
        return Row(config, "OK", us=device.check_and_time(key_of(config)))
    except ValueError as error:
        return Row(config, "WRONG", message=str(error))
    except LAUNCH_ERRORS as error:
        if "illegal" in str(error) or "CUDA error" in str(error):
            print(f"the device is lost with {config}: {error}", flush=True)
            raise
        return Row(config, "LAUNCH_ERROR", message=f"{type(error).__name__}: {error}"[:200])


def report(work: Work) -> None:
    """One line for the GEMM, and its five best configs."""
    gemm, best = work.gemm, work.best(5)
    counts = {status: sum(row.status == status for row in work.rows) for status in sorted({r.status for r in work.rows})}
    floor = gemm.num_bytes / _FLOOR_BYTES_PER_US
    if best:
        us = best[0].best_us
        head = f"{us:8.2f} us, {work.cublas_us / us:.3f}x; of the floor {floor / us:.2f}, cuBLAS {floor / work.cublas_us:.2f}"
    else:
        head = "nothing measured"
    print(f"{gemm.label:13} cuBLAS {work.cublas_us:8.2f} us, best {head}; {counts}", flush=True)
    for row in best:
        named = " ".join(f"{name}={value}" for name, value in row.config.items() if name != "kernel")
        print(f"    {row.best_us:8.2f}  {named}", flush=True)
    for message in sorted({row.message.splitlines()[0] for row in work.rows if row.status not in ("OK", "") and row.message})[
        :3
    ]:
        print(f"    ! {message[:160]}", flush=True)


def write(done: list[Work], path: Path) -> None:
    """Everything measured so far, as one JSON file that is replaced at once."""
    tables = []
    for work in done:
        names = [domain.name for domain in work.bound.domains]
        rows = [[*(row.config.get(n) for n in names), row.status, row.us, row.careful_us] for row in work.rows]
        tables.append(
            {"name": work.gemm.label, "m": work.gemm.m, "n": work.gemm.n, "k": work.gemm.k, "cublas_us": work.cublas_us,
             "columns": [*names, "status", "us", "careful_us"], "rows": rows}
        )  # fmt: skip
    text = json.dumps({"date": datetime.datetime.now(datetime.UTC).isoformat(), "tables": tables})
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def summary(done: list[Work]) -> None:
    """Geometric means of the speed-ups over cuBLAS by number of rows."""
    for rows in (1, 16, 64, 128):
        ratios = [w.cublas_us / w.best(1)[0].best_us for w in done if w.gemm.m == rows and w.best(1) and w.cublas_us > 0]
        if ratios:
            print(f"M = {rows:3}: geometric mean {statistics.geometric_mean(ratios):.3f} over {len(ratios)} GEMMs", flush=True)


def markdown(path: Path) -> str:
    """A results file as a table: cuBLAS, the best careful time, their ratio, and the fraction of the roofline."""
    gemms: dict[str, dict[int, str]] = {}
    ratios: dict[int, list[float]] = {}
    for table in json.loads(path.read_text(encoding="utf-8"))["tables"]:
        careful = table["columns"].index("careful_us")
        m, n, k, stock = table["m"], table["n"], table["k"], table["cublas_us"]
        best = min((row[careful] for row in table["rows"] if row[careful]), default=math.inf)
        ratios.setdefault(m, []).append(stock / best)
        floor = 2 * (n * k + m * k + m * n) / _FLOOR_BYTES_PER_US
        name = f"{table['name'].rpartition('-')[0]}: {n}×{k}"
        gemms.setdefault(name, {})[m] = f"{stock:.1f} → {best:.1f}, {stock / best:.2f}× ({floor / best:.2f})"
    rows = sorted(ratios)
    lines = ["| µs | " + " | ".join(f"M = {m}" for m in rows) + " |", "|" + "---|" * (len(rows) + 1)]
    lines += [f"| {name} | " + " | ".join(cells.get(m, "") for m in rows) + " |" for name, cells in gemms.items()]
    means = (f"{statistics.geometric_mean(ratios[m]):.2f}×" for m in rows)
    return "\n".join([*lines, f"| geometric mean | {' | '.join(means)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--print", type=Path, metavar="FILE", help="only print the table of earlier results")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--only", nargs="*", default=[], help="such as o-m16")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=int, default=100_000, help="at most so many random configs of each GEMM")
    parser.add_argument("--dry", action="store_true", help="compile only: needs no GPU")
    options = parser.parse_args()
    if options.print is not None:
        print(markdown(options.print))
        return
    if options.out is None:
        parser.error("--out says where to write the results")
    summary(Search(options).run())


if __name__ == "__main__":
    main()
