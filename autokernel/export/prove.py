"""Does production code pick a bundle up? Run in processes of their own, with compiler caches of their own.

    python -m autokernel.export.prove request.json

reads what to do, and writes the answer beside it. It imports the model's code, torch, and `autokernel.export`: the search
stack must not be there, and `modules` in the answer says whether it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autokernel.config import LoadedExperiment
from autokernel.errors import JobCrashed, JobTimeout
from autokernel.export.bundle import Bundle, read_bundle, write_bundle
from autokernel.records import Record

SEARCH_STACK = ("ray", "optuna", "mlflow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof(Record):
    """What one fresh process saw. `compile_s` is with empty caches; `step_us` the median of the compiled scenario."""

    mode: str
    scenario: str
    compile_s: float
    step_us: float
    num_benchmarks: int
    hits: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()  # parts of the search stack that were imported: must be none
    max_abs_difference: float = 0.0  # of the outputs, from eager


@dataclass(frozen=True, slots=True, kw_only=True)
class Prove:
    """Job: one scenario in a fresh process, with the bundle or (`bundle=None`) with Inductor's default."""

    loaded: LoadedExperiment
    scenario: str
    device: str
    threads: int
    bundle: Bundle | None
    seed: int = 0
    timeout_s: float = 600

    def __call__(self) -> Proof:
        """Run it.

        Raises:
            JobCrashed: the process ended with an error; its log is in the message.
            JobTimeout: it did not end.
        """
        with tempfile.TemporaryDirectory(prefix="autokernel-prove-") as name:
            folder = Path(name)
            if self.bundle is not None:
                write_bundle(self.bundle, folder / "bundle")
            request = {
                "loaded": self.loaded.model_dump(mode="json"),
                "scenario": self.scenario,
                "device": self.device,
                "threads": self.threads,
                "bundle": str(folder / "bundle") if self.bundle is not None else None,
                "seed": self.seed,
            }
            (folder / "request.json").write_text(json.dumps(request))
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
            env.pop("TORCHINDUCTOR_COMPILE_THREADS", None)  # ours: production compiles with as many as Inductor takes
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
    request = json.loads(Path(request_path).read_text())
    proof = _prove(request)
    Path(request_path).with_name("answer.json").write_text(json.dumps(proof.to_json()))


def _prove(request: Mapping[str, Any]) -> Proof:
    import torch
    from torch._dynamo.utils import counters

    import autokernel
    from autokernel.profiling.workload import build_scenario, load_model
    from autokernel.workers.device_lock import device_lock

    torch.set_num_threads(int(request["threads"]))
    loaded = LoadedExperiment.model_validate(request["loaded"])
    device, name = request["device"], request["scenario"]
    model = load_model(loaded, device)
    scenario = loaded.experiment.scenarios[name]
    program = build_scenario(model, scenario, name, request["seed"], device, loaded.experiment.model.dtype, loaded=loaded)
    backend = autokernel.backend(read_bundle(request["bundle"])) if request["bundle"] else None
    compiled = torch.compile(program.module, backend=backend if backend is not None else "inductor", dynamic=False)
    with torch.inference_mode(False), torch.no_grad():
        program.reset()
        expected = program.module(*program.inputs)
        with device_lock(device, exclusive=False):
            program.reset()
            start = time.perf_counter()
            actual = compiled(*program.inputs)
            _synchronize(device)
            compile_s = time.perf_counter() - start
        with device_lock(device, exclusive=True):
            step_us = _time(lambda: compiled(*program.inputs), device)
    usage = backend.usage() if backend is not None else {}
    difference = max(
        (a.double() - b.double()).abs().max().item() for a, b in zip(_tensors(actual), _tensors(expected), strict=True)
    )
    return Proof(
        mode="bundle" if backend is not None else "default",
        scenario=name,
        compile_s=compile_s,
        step_us=step_us,
        num_benchmarks=counters["inductor"]["select_algorithm_autotune"],
        hits={key: item.hits for key, item in usage.items()},
        reasons={key: "; ".join(item.reasons) for key, item in usage.items() if item.reasons},
        modules=tuple(module for module in SEARCH_STACK if module in sys.modules),
        max_abs_difference=difference,
    )


def _tensors(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _time(call: Any, device: str, rounds: int = 31) -> float:
    samples = []
    for _ in range(rounds):
        _synchronize(device)
        start = time.perf_counter_ns()
        call()
        _synchronize(device)
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return sorted(samples)[len(samples) // 2]


if __name__ == "__main__":
    main(sys.argv[1])
