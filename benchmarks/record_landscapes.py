"""Records landscapes: every legal config of a GEMM measured once on this GPU, statuses included.

    python benchmarks/record_landscapes.py --out OUT --seconds 500 [--only NAME ...] [--again | --extend] [--wide] [--dry]
    python benchmarks/record_landscapes.py --out OUT --seconds 500 --backend cutedsl [...]
    python benchmarks/record_landscapes.py --unpack OUT/landscapes.zip

Worker processes compile ahead; one process checks and times each kernel: cold L2, CUDA graphs of many calls, events.
The best 20 and cuBLAS are measured again, interleaved. GEMMs that benchmarks/landscapes/ has already are skipped, and
OUT/landscapes.zip is written anew after each GEMM, so that nothing finished is lost. A GEMM that gets too little time
has a random part of its space, and says so (`complete`, `measured` of `legal`). Needs a GPU of sm_90, but not `--dry`.

With `--backend cutedsl` it is the kernels of the extra of that name: one compiled kernel serves many configs and all sizes.
Their rows go beside those of Inductor's templates, which were measured on another day: compare within one backend only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import cute_kernels  # noqa: E402
from compile_farm import Farm, Task  # noqa: E402
from gemm_kernels import MAX_SHARED, NUM_SMS, Gemm, llama_gemm  # noqa: E402
from landscape_file import FOLDER, Landscape, Row, comparable, load, pack, save, slug, unpack  # noqa: E402

_CAREFUL, _ROUNDS = 20, 15
_PROTOCOL = (
    "bf16, cold L2 by rotation over copies of inputs and outputs, CUDA graph of many calls, events; "
    "us: median of 3 replays of one graph (2.5 ms), candidates in random order; "
    f"careful_us: best {_CAREFUL} and cuBLAS, median of {_ROUNDS} replays each, interleaved in random order"
)
_NOTES = (
    "inductor rows: torch's templates rendered and compiled as Inductor does, without its wrapper; "
    "decompose_k: torch.bmm with fp32 output and a Triton sum"
)
_CUTE_NOTES = "objects of the package's own compiler, called as in production but for outputs that rotate; parts: a Triton sum"

# a list is recorded from its first to its last, so that the first ones cover all kinds
GEMMS = (
    Gemm(name="llama8b-o-m16", op="mm", m=16, n=4096, k=4096),
    Gemm(name="llama8b-qkv-m64", op="mm", m=64, n=6144, k=4096),
    Gemm(name="llama8b-gateup-m1", op="mm", m=1, n=28672, k=4096),
    Gemm(name="llama8b-down-m128", op="mm", m=128, n=4096, k=14336),
    Gemm(name="llama8b-o-m2048", op="mm", m=2048, n=4096, k=4096),
    Gemm(name="bmm-qk-b32", op="bmm", m=512, n=512, k=128, batch=32),
    Gemm(name="kheavy-256", op="mm", m=256, n=256, k=65536),
    Gemm(name="qwen7b-qkv-bias-m128", op="addmm", m=128, n=4608, k=3584),
    Gemm(name="llama8b-down-m16", op="mm", m=16, n=4096, k=14336),
    Gemm(name="llama8b-gateup-m128", op="mm", m=128, n=28672, k=4096),
    Gemm(name="llama8b-down-m2048", op="mm", m=2048, n=4096, k=14336),
    Gemm(name="qwen7b-down-m32", op="mm", m=32, n=3584, k=18944),
    Gemm(name="square-1024", op="mm", m=1024, n=1024, k=1024),
    Gemm(name="llama8b-lmhead-m16", op="mm", m=16, n=128256, k=4096),
    Gemm(name="llama8b-gateup-m2048", op="mm", m=2048, n=28672, k=4096),
    Gemm(name="bmm-pv-b256", op="bmm", m=64, n=128, k=2048, batch=256, k_major=False),
    Gemm(name="llama8b-qkv-m1", op="mm", m=1, n=6144, k=4096),
    Gemm(name="llama8b-o-m128", op="mm", m=128, n=4096, k=4096),
    Gemm(name="qwen7b-gateup-m2048", op="mm", m=2048, n=37888, k=3584),
    Gemm(name="llama8b-gateup-m8192", op="mm", m=8192, n=28672, k=4096),
)

# CuTe DSL kernels are for what is compute-bound, and worth a look for few rows
CUTE_GEMMS = tuple(
    llama_gemm(name, m)
    for m in (2048, 8192, 64, 128, 16)
    for name in ("o", "gateup", "down", "qkv", "lmhead")
    if name != "lmhead" or m < 2048
)


def legal_configs(gemm: Gemm, wide: bool = False) -> list[dict[str, Any]]:
    """Distinct kernels in a random order that is always the same: Inductor's part of the package's own search space.

    Args:
        gemm: what is computed.
        wide: instead those that the templates could do but the package's space leaves out.
    """
    from autokernel.search.space import DeviceFacts, names_for
    from autokernel.search.space_file import load_space

    facts = DeviceFacts(device="cuda", isa="sm_90", num_units=NUM_SMS, smem_bytes=MAX_SHARED, l2_bytes=60 << 20)
    space = load_space(gemm.op, ROOT / "search_spaces")["inductor"].bind(names_for(gemm.dims, facts))
    configs = list(space.enumerate()) if not wide else [c for c in _wide_configs(gemm) if space.violations(c)]
    if gemm.m == 1:  # torch 2.11 takes a single row for a transposed matrix, and describes it to TMA as such
        configs = [config for config in configs if config["template"] != "mm_persistent_tma"]
    # groups of more rows of tiles than there are make the same kernel
    distinct = {}
    for config in configs:
        group = min(config.get("GROUP_M", 0), math.ceil(gemm.m / config.get("BLOCK_M", gemm.m)))
        distinct.setdefault(json.dumps({**config, "GROUP_M": group}, sort_keys=True), config)
    configs = list(distinct.values())
    random.Random(gemm.name).shuffle(configs)
    # the few that no worker compiles come first, so that a part of a space has them
    return sorted(configs, key=lambda config: config["template"] != "decompose_k")


def _wide_configs(gemm: Gemm) -> Iterator[dict[str, Any]]:
    """Everything that fits in shared memory and registers, however unlikely."""
    tiles = itertools.product(*[(16, 32, 64, 128, 256)] * 3, (1, 2, 3, 4, 5, 6, 8), (1, 2, 4, 8, 16), (1, 4, 8, 16))
    for block_m, block_n, block_k, stages, warps, group in tiles:
        fits = stages * (block_m + block_n) * block_k * 2 <= MAX_SHARED and 4 <= block_m * block_n / (32 * warps) <= 256
        if fits and block_m < 2 * max(gemm.m, 16) and (group == 8 or gemm.m > block_m):
            for template in ("bmm",) if gemm.op == "bmm" else ("mm", "mm_persistent_tma"):
                yield {
                    "template": template, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
                    "num_stages": stages, "num_warps": warps, "GROUP_M": group,
                }  # fmt: skip


def _module_name(gemm: Gemm, config: dict[str, Any]) -> str:
    """The same name for the same kernel in every process and sitting."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    return f"{gemm.name.replace('-', '_')}_{digest}"


def _is_kernel(config: dict[str, Any]) -> bool:
    """Whether a worker has to compile it."""
    return config.get("template") != "decompose_k"


class Recorder:
    """Takes one GEMM after the other within a time box."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.seconds
        self.work = Path(options.scratch)
        self.done_folder = self.work / "landscapes"
        self.sources = self.work / "sources"
        for folder in (self.done_folder, self.sources, Path(options.out)):
            folder.mkdir(parents=True, exist_ok=True)
        os.environ["TRITON_CACHE_DIR"] = str(self.work / "triton")
        self.partial = self.work / "partial.json"
        self.busy_us = 0.0
        self.farm: Farm | None = None
        self.device: dict[str, Any] = {"hardware": "dry run", "versions": {}}
        self.scratch: Any = None
        self._told: set[str] = set()
        self.cute = options.backend == cute_kernels.BACKEND

    def run(self) -> None:
        """Record all GEMMs that are wanted and not there yet."""
        begun = time.monotonic()
        gemms = self._wanted()
        configs = {
            gemm.name: cute_kernels.legal_configs(gemm) if self.cute else legal_configs(gemm, self.options.wide)
            for gemm in gemms
        }
        legal = {name: len(found) for name, found in configs.items()}
        configs = {name: found[: self.options.limit] for name, found in configs.items()}
        print(f"{len(gemms)} GEMMs: {', '.join(f'{name} {count}' for name, count in legal.items())}", flush=True)
        with cute_kernels.context_with_compilers() if self.cute else contextlib.nullcontext() as context:
            self.farm = Farm(self.options.workers, self.sources, context=context)
        if not self.options.dry:
            import gemm_device

            self.scratch = gemm_device.open_device()
            self.device = gemm_device.describe_device()
        for gemm in gemms:
            known = {json.dumps(row.config, sort_keys=True) for row in self._partial_rows(gemm)}
            compiled = [c for c in configs[gemm.name] if _is_kernel(c) and json.dumps(c, sort_keys=True) not in known]
            self.farm.submit(
                Task(
                    gemm=gemm,
                    config=config,
                    name=_module_name(gemm, config),
                    spec=cute_kernels.spec_of(gemm, config) if self.cute else None,
                )
                for config in compiled
            )
        try:
            for i, gemm in enumerate(gemms):
                left = self.deadline - time.monotonic()
                if left < 8:
                    print(f"no time left for {', '.join(g.name for g in gemms[i:])}", flush=True)
                    break
                self._record(gemm, configs[gemm.name], legal[gemm.name], left / (len(gemms) - i))
        finally:
            self.farm.close()
        wall = time.monotonic() - begun
        print(f"{wall:.0f} s, device busy {self.busy_us / 1e6:.0f} s ({self.busy_us / 1e6 / max(wall, 1e-9):.0%})", flush=True)

    def _wanted(self) -> list[Gemm]:
        have = {
            path.name.removesuffix(".json.gz")
            for folder in (FOLDER, self.done_folder)
            for path in folder.rglob("*.json.gz")
            if not self.cute or load(path).of([cute_kernels.BACKEND])
        }
        only = self.options.only
        known = CUTE_GEMMS if self.cute else GEMMS
        gemms = [replace(gemm, name=f"{gemm.name}-wide") for gemm in known] if self.options.wide else list(known)
        return [
            g
            for g in gemms
            if (g.name in only if only else True) and (self.options.again or self.options.extend or g.name not in have)
        ]

    def _record(self, gemm: Gemm, configs: list[dict[str, Any]], legal: int, seconds: float) -> None:
        begun = time.monotonic()
        careful_s = 4.0 if seconds > 12 else 0.3 * seconds
        rows = self._partial_rows(gemm)
        bench = self._open(gemm)
        self._screen(gemm, configs, rows, bench, begun + seconds - careful_s)
        assert self.farm is not None
        self.farm.drop(gemm.name)
        rows = list(self._careful(gemm, rows, bench, time.monotonic() + careful_s))
        wanted = {json.dumps(config, sort_keys=True) for config in configs}
        measured = sum(row.backend == self.options.backend and json.dumps(row.config, sort_keys=True) in wanted for row in rows)
        said = {
            **self.device, "date": datetime.date.today().isoformat(), "protocol": _PROTOCOL, "legal": legal,
            "measured": measured, "complete": measured == legal, "copies": bench.copies if bench else 0, "notes": _NOTES,
            "sensors": self._sensors(),
        }  # fmt: skip
        if self.cute:  # beside what is said of the rows that a file has already
            stock = next((row for row in rows if row.backend == "aten"), None)
            said |= {"notes": _CUTE_NOTES, "cublas_us": stock.best_us if stock else None}
            said = {"hardware": self.device["hardware"], cute_kernels.BACKEND: said}
        landscape = Landscape(
            name=gemm.name,
            header=said,
            problem={"op": gemm.op, "batch": gemm.batch, "m": gemm.m, "n": gemm.n, "k": gemm.k, "dtype": "bfloat16",
                     "bias": gemm.op == "addmm", "b": "k-major" if gemm.k_major else "n-major"},
            rows=rows,
        )  # fmt: skip
        save(landscape, self.done_folder)
        pack(self.done_folder, Path(self.options.out) / "landscapes.zip")
        self.partial.unlink(missing_ok=True)
        self._say(landscape, time.monotonic() - begun)
        if bench is not None:
            self.busy_us += bench.busy_us
            self._close(bench)

    def _screen(self, gemm: Gemm, configs: list[dict[str, Any]], rows: list[Row], bench: Any, until: float) -> None:
        """One row for every config whose turn comes before the time is up."""
        assert self.farm is not None
        known = {json.dumps(row.config, sort_keys=True) for row in rows}
        if not any(row.backend == "aten" for row in rows):
            rows.append(self._measured(Row(backend="aten", config={"prepack": False}, status="OK"), "", rows, bench))
        for config in configs:
            if not _is_kernel(config) and json.dumps(config, sort_keys=True) not in known:
                rows.append(self._measured(Row(backend="inductor", config=config, status="OK"), "", rows, bench))
        left = sum(_is_kernel(c) and json.dumps(c, sort_keys=True) not in known for c in configs)
        while left and time.monotonic() < until:
            built = self.farm.take(gemm.name, min(5.0, max(0.0, until - time.monotonic())))
            if built is None:
                continue
            left -= 1
            if json.dumps(built.task.config, sort_keys=True) in known:
                continue
            row = Row(backend=self.options.backend, config=built.task.config, status=built.status)
            self._tell_once(built.status, built.message)
            rows.append(row if built.status != "OK" else self._measured(row, built.task.name, rows, bench))

    def _tell_once(self, status: str, message: str) -> None:
        """One line for each new kind of failure, so that a log says what went wrong."""
        kind = f"{status}: " + "".join(" " if c.isdigit() else c for c in message[:60])
        if message and kind not in self._told and len(self._told) < 20:
            self._told.add(kind)
            print(f"  {status}: {message[:200]}", flush=True)

    def _launch(self, row: Row, name: str, bench: Any) -> Any:
        if row.backend == "aten":
            return bench.stock_launch()
        if row.backend == cute_kernels.BACKEND:
            return bench.cute_launch(row.config)
        if not _is_kernel(row.config):
            return bench.decompose_launch(row.config["k_split"])
        return bench.kernel_launch(row.config, name)

    def _measured(self, row: Row, name: str, rows: list[Row], bench: Any) -> Row:
        if bench is None:
            return replace(row, us=round(5 + 20 * random.Random(str(row.config)).random(), 3))
        try:
            row = replace(row, us=bench.quick(self._launch(row, name, bench)))
            bench.unload()
        except Exception as error:  # noqa: BLE001 -- the boundary of candidates' code: whatever it raises is its status
            kind = type(error).__name__
            status = {"WrongResultError": "WRONG", "OutOfResources": "BUILD_ERROR"}.get(kind, "RUN_ERROR")
            row = replace(row, status=status, us=None)
            self._tell_once(status, f"{kind}: {error}")
            if status == "RUN_ERROR":
                print(f"{row.backend} {row.config}: {kind}: {str(error)[:200]}", flush=True)
                self._restart_if_dead(bench, [*rows, row])
        return row

    def _restart_if_dead(self, bench: Any, rows: list[Row]) -> None:
        """A kernel that went wrong may have ended the CUDA context: go on in a new process, without that config."""
        import torch

        try:
            torch.cuda.synchronize()
            bench.stock_launch()(0)
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the device must be opened anew: {str(error)[:100]}", flush=True)
            kept = [[row.backend, row.config, row.status, row.us] for row in rows]
            self.partial.write_text(json.dumps({"name": bench.gemm.name, "rows": kept}))
            seconds = max(1, int(self.deadline - time.monotonic()))
            arguments = [a for a in self.options.argv if not a.startswith("--seconds")]
            if "--seconds" in self.options.argv:
                del arguments[self.options.argv.index("--seconds")]
            os.execv(sys.executable, [sys.executable, __file__, *arguments, f"--seconds={seconds}"])

    def _partial_rows(self, gemm: Gemm) -> list[Row]:
        """Rows that need not be measured again: of this sitting, or of earlier ones."""
        if self.partial.exists():
            said = json.loads(self.partial.read_text())
            if said["name"] == gemm.name:
                return [Row(backend=b, config=config, status=status, us=us) for b, config, status, us in said["rows"]]
        recorded = FOLDER / slug(str(self.device["hardware"])) / f"{gemm.name}.json.gz"
        if self.options.extend and recorded.is_file():
            rows = load(recorded).rows
            return [row for row in rows if (row.backend == cute_kernels.BACKEND if self.cute else row.backend != "aten")]
        return []

    def _careful(self, gemm: Gemm, rows: list[Row], bench: Any, until: float) -> list[Row]:
        """The best rows once more, replays of all taking turns."""
        done = [row for row in rows if row.us is not None and row.backend != "aten"]
        chosen = sorted(done, key=lambda row: row.us or math.inf)[:_CAREFUL] + [row for row in rows if row.backend == "aten"]
        if bench is None:
            return [replace(row, careful_us=row.us) if row in chosen else row for row in rows]
        graphs = {}
        for i, row in enumerate(chosen):
            try:
                graphs[i] = bench.capture(self._launch(row, _module_name(gemm, row.config), bench), row.us or 1.0)
            except Exception as error:  # noqa: BLE001 -- as above; the row keeps its quick time
                print(f"careful: {row.config}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        times = {id(chosen[i]): us for i, us in bench.interleaved(graphs, _ROUNDS, until).items()}
        graphs.clear()
        bench.unload()
        return [replace(row, careful_us=times[id(row)]) if id(row) in times else row for row in rows]

    def _open(self, gemm: Gemm) -> Any:
        if self.options.dry:
            return None
        import gemm_device

        return gemm_device.Bench(gemm, self.sources, self.scratch)

    def _close(self, bench: Any) -> None:
        import gc

        import torch

        vars(bench).clear()
        gc.collect()
        torch.cuda.empty_cache()

    def _sensors(self) -> str:
        if self.options.dry:
            return ""
        import gemm_device

        return gemm_device.sensors()

    def _say(self, landscape: Landscape, seconds: float) -> None:
        best = min((row for row in comparable(landscape.rows) if row.best_us is not None and row.backend != "aten"),
                   key=lambda row: row.best_us or math.inf, default=None)  # fmt: skip
        stock = next((row.best_us for row in landscape.rows if row.backend == "aten"), None)
        statuses = {s: sum(row.status == s for row in landscape.rows) for s in sorted({row.status for row in landscape.rows})}
        found = f"best {best.best_us:.2f} us {json.dumps(best.config)}" if best is not None else "nothing worked"
        said = landscape.header.get(cute_kernels.BACKEND, landscape.header)
        print(f"{landscape.name}: {said['measured']}/{said['legal']} in {seconds:.0f} s {statuses}; "
              f"cuBLAS {stock or math.nan:.2f} us, {found}", flush=True)  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".", help="folder for landscapes.zip")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--backend", choices=("inductor", cute_kernels.BACKEND), default="inductor")
    parser.add_argument("--only", nargs="*", help="names of GEMMs")
    parser.add_argument("--again", action="store_true", help="also those that are recorded already")
    parser.add_argument("--extend", action="store_true", help="add what recorded landscapes lack of today's space")
    parser.add_argument("--limit", type=int, default=100_000, help="configs of a GEMM at most, a random part")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--scratch", default=str(Path(tempfile.gettempdir()) / "autokernel-landscapes"))
    parser.add_argument("--wide", action="store_true", help="configs outside the package's spaces, as NAME-wide")
    parser.add_argument("--dry", action="store_true", help="compile, but make up the times: needs no GPU")
    parser.add_argument("--unpack", type=Path, help="put the landscapes of an archive into benchmarks/landscapes/")
    options = parser.parse_args()
    options.argv = sys.argv[1:]
    if options.wide and options.backend == cute_kernels.BACKEND:
        parser.error("--wide is for Inductor's templates: leave it out with --backend cutedsl")
    if options.unpack is not None:
        for path in unpack(options.unpack, FOLDER):
            landscape = load(path)
            print(f"{path.relative_to(ROOT)}: {len(landscape.rows)} rows")
        return
    Recorder(options).run()


if __name__ == "__main__":
    main()
