"""Does production code pick a bundle up? Looked at in a fresh process, which has nothing of the search stack.

    python -m autokernel.export.prove request.json

reads what to do, and writes the answer beside it. Every scenario is compiled through `autokernel.backend(path)`; on one of
them Inductor's default is compiled as well, by turns and with empty caches each, and both are timed against each other.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autokernel.config import LoadedExperiment
from autokernel.errors import JobCrashed, JobTimeout
from autokernel.export.bundle import Bundle, write_bundle
from autokernel.export.proof import Proof, RowsProof, ScenarioProof, own_rows, rows_among

if TYPE_CHECKING:
    import torch

    from autokernel.evaluate.timing import Comparison
    from autokernel.export.apply import BundleBackend
    from autokernel.profiling.workload import ScenarioProgram

SEARCH_STACK = ("ray", "optuna", "mlflow", "cutlass", "quack")
DEFAULT, BUNDLE = "default", "bundle"
MAX_TURNS = 2  # compilations of each kind: the second only where the first says that the bundle is slow to compile
_NUM_TOKENS = 64  # outputs to compare per scenario, at least, but in no more than so many draws
_MAX_DRAWS = 8
_ROUNDS = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Prove:
    """Job: scenarios in a fresh process, with the bundle or (`bundle=None`) with Inductor's default.

    `rows` has, per scenario, other batches to compile it at (see `RowsProof`); hits there are not among `Proof.hits`.
    `limits` has, per scenario, the largest difference from eager (see `ScenarioProof`). `compare` names the scenario on which
    the default is compiled as well; the bundle may take `max_compile_ratio` times as long before both have another turn.
    `cold` gives the whole process an empty compiler cache; without it, kernels that this machine built already are taken
    from the cache as in any process, except for those of the comparison.
    """

    loaded: LoadedExperiment
    scenarios: tuple[str, ...]
    device: str
    threads: int
    bundle: Bundle | None
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    compare: str | None = None
    max_compile_ratio: float = 1.2
    cold: bool = False
    seed: int = 0
    timeout_s: float = 900

    def __call__(self) -> Proof:
        """Run it.

        Raises:
            JobCrashed: the process ended with an error; its log is in the message.
            JobTimeout: it did not end.
        """
        with tempfile.TemporaryDirectory(prefix="autokernel-prove-") as name:
            folder = Path(name)
            if self.bundle is not None:
                from autokernel.export.cutedsl import with_objects

                bundle, files = with_objects(self.bundle)
                write_bundle(bundle, folder / "bundle", files)
            request = {
                "loaded": self.loaded.model_dump(mode="json"),
                "scenarios": self.scenarios,
                "device": self.device,
                "threads": self.threads,
                "bundle": str(folder / "bundle") if self.bundle is not None else None,
                "rows": dict(self.rows),
                "limits": dict(self.limits),
                "compare": self.compare,
                "max_compile_ratio": self.max_compile_ratio,
                "seed": self.seed,
            }
            (folder / "request.json").write_text(json.dumps(request))
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            env.pop("TORCHINDUCTOR_COMPILE_THREADS", None)  # ours: production compiles with as many as Inductor takes
            # a graph from the cache was built from the bundle as well, but nobody could count what is in it
            env |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
            if self.cold:
                env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
            command = [sys.executable, "-m", "autokernel.export.prove", str(folder / "request.json")]
            try:
                done = subprocess.run(
                    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=self.timeout_s, check=False
                )
            except subprocess.TimeoutExpired:
                raise JobTimeout(f"the fresh process did not end within {self.timeout_s} s") from None
            answer = folder / "answer.json"
            if done.returncode != 0 or not answer.exists():
                tail = done.stdout.decode(errors="replace")[-3000:]
                raise JobCrashed(f"the fresh process ended with code {done.returncode}: {tail}")
            return Proof.from_json(json.loads(answer.read_text()))


def main(request_path: str) -> None:
    """The fresh process."""
    path = Path(request_path)
    proof = _Process(json.loads(path.read_text()), path.parent).prove()
    path.with_name("answer.json").write_text(json.dumps(proof.to_json()))


class _Process:
    """One request at work. The model is loaded once; of each scenario only what is compared stays in memory."""

    def __init__(self, request: Mapping[str, Any], folder: Path) -> None:
        import torch

        import autokernel
        from autokernel.profiling.workload import import_model, load_model
        from autokernel.workers.device_lock import device_lock

        torch.set_num_threads(int(request["threads"]))
        self.request, self.folder = request, folder
        self.device: str = request["device"]
        self.loaded = LoadedExperiment.model_validate(request["loaded"])
        import_model(self.loaded)
        with device_lock(self.device, exclusive=False):  # another process may time
            self.model = load_model(self.loaded, self.device)
        self.backend: BundleBackend | None = autokernel.backend(request["bundle"]) if request["bundle"] else None

    def prove(self) -> Proof:
        from torch._dynamo.utils import counters

        compared: str | None = self.request["compare"]
        compile_s: dict[str, float] = {}
        comparison: Comparison | None = None
        proofs: dict[str, ScenarioProof] = {}
        if compared is not None:
            startup_s = self._start_up()
            proofs[compared], compile_s, comparison = self._compare(compared)
            compile_s = {mode: startup_s + seconds for mode, seconds in compile_s.items()}
        for name in self.request["scenarios"]:
            if name != compared:
                proofs[name], _ = self._scenario(name, self._program(name))
        hits = {key: item.hits for key, item in self.backend.usage().items()} if self.backend is not None else {}
        rows = [self._at(name, batch) for name, batches in self.request["rows"].items() for batch in batches]
        usage = self.backend.usage() if self.backend is not None else {}
        return Proof(
            rows=tuple(rows),
            scenarios=tuple(proofs[name] for name in self.request["scenarios"]),
            num_benchmarks=counters["inductor"]["select_algorithm_autotune"],
            hits=hits,
            reasons={key: "; ".join(item.reasons) for key, item in usage.items() if item.reasons},
            constant_bytes=sum(item.constant_bytes for item in usage.values()),
            modules=tuple(module for module in SEARCH_STACK if module in sys.modules),
            compile_s=compile_s,
            step_us=dict(comparison.medians_us) if comparison is not None else {},
            speedup=comparison.speedups[BUNDLE] if comparison is not None else None,
        )

    def _at(self, name: str, batch: int) -> RowsProof:
        """A scenario at another batch: entries for ranges are used where the plan says so, and nowhere else."""
        assert self.backend is not None
        plan, gemms = self.backend.plan, self.backend.gemms
        before = {key: item.hits for key, item in self.backend.usage().items()}
        gemms.clear()
        proof, _ = self._scenario(name, self._program(name, batch))
        used: list[str] = []
        stock: list[str] = []
        problems = [proof.problem] if proof.problem else []
        for entry in plan.bundle.entries:
            found = rows_among(gemms, entry) if entry.rows is not None and entry.scenario == name else ()
            if not found or own_rows(entry) in found:
                continue  # its products do not grow with the batch
            usage = plan.usage[entry.key]
            hit = usage.hits > before[entry.key]
            (used if hit else stock).append(entry.key)
            if hit != any(plan.serves(entry, m) for m in found):
                instead = "it was used" if hit else f"stock code was used: {'; '.join(usage.reasons) or 'nobody knows why'}"
                problems.append(f"{entry.key} is for {entry.rows} rows, and where there are {found} {instead}")
        return RowsProof(scenario=name, batch=batch, used=tuple(used), stock=tuple(stock), problem="; ".join(problems))

    def _program(self, name: str, batch: int | None = None) -> ScenarioProgram:
        from autokernel.profiling.workload import build_scenario
        from autokernel.workers.device_lock import device_lock

        scenario, section, seed = self.loaded.experiment.scenarios[name], self.loaded.experiment.model, self.request["seed"]
        if batch is not None:
            scenario = scenario.model_copy(update={"batch": batch})
        with device_lock(self.device, exclusive=False):
            return build_scenario(self.model, scenario, name, seed, self.device, section.dtype, loaded=self.loaded)

    def _scenario(self, name: str, program: ScenarioProgram) -> tuple[ScenarioProof, Callable[[], Any]]:
        """Compile a scenario as production does, and compare it with eager; returns its step, too."""
        from autokernel.evaluate.outputs import difference_from, missing_of_tokens
        from autokernel.workers.device_lock import device_lock

        forward, compile_s = self._compile(program, self.backend)
        draws = _draws(program, program.scores or program.module, forward, self.request["seed"] + 1)
        with device_lock(self.device, exclusive=False):
            if program.choose is None:
                difference, problem = difference_from(draws)
                how = f"outputs differ from eager by {difference:.3g} of their norm"
            else:
                difference, problem = missing_of_tokens(draws, program.choose)
                how = f"logits of the chosen tokens are {difference:.3g} from eager's"
        limit = self.request["limits"].get(name, math.inf)
        if not problem and not difference <= limit:
            problem = f"{how}; the error budget allows {limit:.3g}"
        proof = ScenarioProof(scenario=name, compile_s=compile_s, difference=difference, problem=problem)
        return proof, lambda: forward(*program.inputs)

    def _compile(self, program: ScenarioProgram, backend: BundleBackend | None) -> tuple[Callable[..., Any], float]:
        """(compiled forward, seconds that its first step took)."""
        import torch

        from autokernel.evaluate.modes import own_code
        from autokernel.evaluate.tensors import synchronize
        from autokernel.workers.device_lock import device_lock

        compiled = torch.compile(
            own_code(program.module), backend=backend if backend is not None else "inductor", dynamic=False
        )

        def forward(*inputs: Any) -> Any:
            with torch.no_grad():
                return compiled(*inputs)

        program.reset()
        with device_lock(self.device, exclusive=False):
            start = time.perf_counter()
            forward(*program.inputs)
            synchronize(self.device)
            return forward, time.perf_counter() - start

    def _start_up(self) -> float:
        """Seconds that the first compilation of a process takes in any case: imports, looking at the processor."""
        import torch

        from autokernel.evaluate.tensors import synchronize
        from autokernel.workers.device_lock import device_lock

        # a product and a fused kernel: both sides of the compiler
        layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).to(self.device)
        with device_lock(self.device, exclusive=False), torch.no_grad():
            start = time.perf_counter()
            torch.compile(layer)(torch.zeros(2, 8, device=self.device))
            synchronize(self.device)
            return time.perf_counter() - start

    def _compare(self, name: str) -> tuple[ScenarioProof, dict[str, float], Comparison]:
        """The bundle and the default by turns: the least time of each with empty caches; then their steps, interleaved."""
        from autokernel.evaluate.timing import compare
        from autokernel.workers.device_lock import device_lock

        program = self._program(name)
        seconds: dict[str, list[float]] = {DEFAULT: [], BUNDLE: []}
        for _ in range(MAX_TURNS):
            with _empty_cache(self.folder):
                stock, stock_s = self._compile(program, None)
            with _empty_cache(self.folder):
                proof, tuned_step = self._scenario(name, program)
            seconds[DEFAULT].append(stock_s)
            seconds[BUNDLE].append(proof.compile_s)
            if min(seconds[BUNDLE]) <= self.request["max_compile_ratio"] * min(seconds[DEFAULT]):
                break
        calls: dict[str, Callable[[], Any]] = {DEFAULT: lambda: stock(*program.inputs), BUNDLE: tuned_step}
        with device_lock(self.device, exclusive=True):
            comparison = compare(
                _as_served(calls, self.device),
                DEFAULT,
                _ROUNDS,
                device=self.device,
                seed=self.request["seed"],
                min_sample_us=2000,
            )
        return proof, {mode: min(values) for mode, values in seconds.items()}, comparison


@contextlib.contextmanager
def _empty_cache(folder: Path) -> Iterator[None]:
    """A new folder for what Inductor and Triton keep, and nothing of it in memory.

    Inductor has a context manager of its own for this. It also forgets what the processor can do, which costs seconds of
    probing that belong to neither side.
    """
    from torch._inductor import codecache

    caches: Any = (codecache.PyCodeCache, codecache.CppCodeCache, codecache.CppPythonBindingsCodeCache)
    for cache in caches:
        cache.cache_clear()
    place = tempfile.mkdtemp(prefix="cache-", dir=folder)
    changed = {"TORCHINDUCTOR_CACHE_DIR": place, "TRITON_CACHE_DIR": str(Path(place, "triton"))}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _as_served(calls: Mapping[str, Callable[[], Any]], device: str) -> Mapping[str, Callable[[], Any]]:
    """The calls as serving engines make them: on a GPU replays of CUDA graphs, where the model can be captured."""
    if device != "cuda":
        return calls
    from autokernel.evaluate.cuda_graphs import Capturer

    capturer = Capturer()
    try:
        graphs = {mode: capturer.capture(call)[0] for mode, call in calls.items()}
    except RuntimeError:  # something in the model waits for the device
        return calls
    return {mode: graph.replay for mode, graph in graphs.items()}


def _draws(
    program: ScenarioProgram, eager: Callable[..., Any], forward: Callable[..., Any], seed: int
) -> Iterator[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]:
    """Outputs of the compiled code and of eager code on the same inputs, a few times."""
    import torch

    num_draws = max(1, min(_MAX_DRAWS, _NUM_TOKENS // max(1, program.inputs[0].numel())))
    for draw in range(num_draws):
        inputs = program.fresh_inputs(seed + draw)
        program.reset()
        with torch.no_grad():
            expected = [tensor.clone() for tensor in _tensors(eager(*inputs))]
        program.reset()
        yield _tensors(forward(*inputs)), expected


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


if __name__ == "__main__":
    main(sys.argv[1])
