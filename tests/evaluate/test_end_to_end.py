"""Scenarios timed in several modes; what decides whether a bundle passes; the device in turns."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.environment import current_environment
from autokernel.errors import WorkerError
from autokernel.evaluate import modes
from autokernel.evaluate.end_to_end import BUNDLE, Contender, ScenarioTiming, TimeScenario, scenario_result
from autokernel.evaluate.whole_model import JobTurns, _benchmarks_take_turns, _tuning_takes_turns, cuda_graphs_or_error
from autokernel.events import ModeTiming
from autokernel.export.bundle import Bundle
from autokernel.profiling import workload
from autokernel.records import Speedup
from autokernel.workers.device_lock import device_lock

pytestmark = pytest.mark.clock

TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedExperiment:
    scenarios = {"decode": {"kind": "decode", "batch": 2, "context": 16}}
    data = {"name": "x", "model": {"config": TINY}, "device": "cpu", "scenarios": scenarios}
    (tmp_path / "x.yaml").write_text(json.dumps(data))
    return load_experiment(tmp_path / "x.yaml")


def bundle(**options: str | bool) -> Bundle:
    environment = current_environment("cpu", 1)
    return Bundle(name="t", created="", version="", environment=environment, entries=(), graph_options=options)


def job(loaded: LoadedExperiment, *contenders: Contender, baselines: tuple[str, ...] = ("eager",)) -> TimeScenario:
    return TimeScenario(
        loaded=loaded, scenario="decode", device="cpu", threads=1, contenders=contenders, baselines=baselines, rounds=5
    )


def test_modes_are_compared_and_failures_say_why(loaded: LoadedExperiment) -> None:
    wrong = Contender(name="wrong", bundle=bundle(no_such_option=True))
    timing = job(loaded, Contender(name="eager"), wrong, Contender(name=BUNDLE, bundle=bundle(epilogue_fusion=False)))()
    assert timing.baseline == "eager"
    assert {mode.mode for mode in timing.modes} == {"eager", BUNDLE}
    assert set(timing.speedups) == {BUNDLE}
    assert "has no option no_such_option" in timing.failures["wrong"]
    assert timing.check is None
    assert timing.spread > 0, "the baseline was timed against itself"
    assert ScenarioTiming.from_json(json.loads(json.dumps(timing.to_json()))) == timing


def test_a_mode_of_cuda_graphs_is_left_out_on_a_cpu_and_says_why(loaded: LoadedExperiment) -> None:
    contenders = (Contender(name="reduce-overhead"), Contender(name="eager"), Contender(name=BUNDLE, bundle=bundle()))
    timing = job(loaded, *contenders, baselines=("reduce-overhead", "eager"))()
    assert timing.baseline == "eager"
    assert {mode.mode for mode in timing.modes} == {"eager", BUNDLE}
    assert "Inductor's default with CUDA graphs, and there are none on a CPU" in timing.failures["reduce-overhead"]


def test_a_graph_that_is_not_captured_is_an_error_while_that_is_asked_for() -> None:
    from torch._inductor.cudagraph_utils import log_cudagraph_skip_and_bump_counter as skip

    with cuda_graphs_or_error(), pytest.raises(RuntimeError, match="skipping cudagraphs due to mutated inputs"):
        skip("skipping cudagraphs due to mutated inputs (1 instances)")
    skip("skipping cudagraphs due to mutated inputs (1 instances)")


@pytest.mark.parametrize("answer", ["works", "falls back"])
def test_what_captures_its_own_graphs_runs_until_it_replays_them(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With inputs that claim to be on a GPU; in place of Inductor a backend that finds out in its second run."""
    import torch
    from torch._inductor.cudagraph_utils import log_cudagraph_skip_and_bump_counter as skip

    runs: list[str] = []

    def compiled(forward: Any, **options: Any) -> Any:
        assert options == {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}

        def run(*inputs: Any) -> Any:
            runs.append("run")
            if answer == "falls back" and len(runs) == 2:
                skip("skipping cudagraphs due to mutated inputs (1 instances)")
            return forward(*inputs)

        return run

    class There(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(torch, "compile", compiled)
    x = torch.randn(2, 3).as_subclass(There)
    program: Any = SimpleNamespace(module=torch.nn.Identity(), inputs=(x,), reset=lambda: runs.append("reset"))
    if answer == "works":
        prepared = modes.prepare(Contender(name="reduce-overhead"), program)
        assert runs == ["reset", "run"] * 3, "one to warm up, one to record, one to replay"
        assert torch.equal(prepared.call(), x)
    else:
        with pytest.raises(RuntimeError, match="mutated inputs"):
            modes.prepare(Contender(name="reduce-overhead"), program)


def test_without_a_baseline_there_is_no_result(loaded: LoadedExperiment) -> None:
    wrong = Contender(name="wrong", bundle=bundle(no_such_option=True))
    with pytest.raises(WorkerError, match=r"none of \('wrong',\) runs: .*has no option"):
        job(loaded, wrong, Contender(name="eager"), baselines=("wrong",))()


def timing_of(best: str, low: float, high: float, default: float, own: float) -> ScenarioTiming:
    medians = {"eager": 90.0, "default": default, BUNDLE: own}
    modes = tuple(ModeTiming(mode=mode, median_us=us, spread_us=1) for mode, us in medians.items())
    speedup = Speedup(ratio=(low + high) / 2, low=low, high=high, num_rounds=9)
    return ScenarioTiming(scenario="s", baseline=best, modes=modes, speedups={BUNDLE: speedup})


@pytest.mark.parametrize(
    ("timing", "passed"),
    [
        (timing_of("default", 1.01, 1.05, 100, 97), True),
        (timing_of("default", 0.98, 1.01, 100, 100), True),
        (timing_of("default", 0.95, 0.99, 100, 103), False),
        (timing_of("eager", 0.90, 0.95, 100, 97), True),
        (timing_of("eager", 0.80, 0.85, 100, 106), False),
    ],
)
def test_a_bundle_passes_unless_it_is_clearly_slower(timing: ScenarioTiming, passed: bool) -> None:
    assert scenario_result(timing).passed is passed
    assert scenario_result(timing, stock=True).passed


@pytest.mark.parametrize(("spread", "passed"), [(0.0, False), (0.019, False), (0.021, True)])
def test_no_closer_than_the_baseline_to_itself_counts_as_slower(spread: float, passed: bool) -> None:
    timing = dataclasses.replace(timing_of("default", 0.97, 0.99, 100, 102), spread=spread)
    assert scenario_result(timing).passed is passed


def test_a_busy_machine_is_no_excuse_for_a_slow_bundle() -> None:
    timing = dataclasses.replace(timing_of("default", 0.8, 0.9, 100, 118), spread=4.2)
    assert not scenario_result(timing).passed


def test_a_job_may_take_its_turn_again_and_others_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    turns = JobTurns("cpu")
    got = threading.Event()

    def other() -> None:
        with device_lock("cpu", exclusive=True):
            got.set()

    with turns.alone():
        with turns.alone():
            thread = threading.Thread(target=other)
            thread.start()
        assert not got.wait(0.2)
    assert got.wait(5)
    thread.join()


def test_a_patient_job_lets_others_in_where_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    turns = JobTurns("cpu")

    def is_free() -> bool:
        got = threading.Event()

        def take() -> None:
            with device_lock("cpu", exclusive=True):
                got.set()

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(0.3)
        return got.is_set()

    with turns.alone(), turns.aside():
        assert not is_free(), "whoever is not patient keeps the device"
    with turns.alone(patient=True):
        with turns.aside():
            assert is_free()
            with turns.alone():
                assert not is_free()
        assert not is_free()
    with turns.aside():
        assert is_free()


def test_autotuning_lets_others_in_between_benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.codecache import PersistentCache
    from torch._inductor.runtime.benchmarking import benchmarker
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(PersistentCache, "get_local_cache", lambda self: {})
    monkeypatch.setattr(PersistentCache, "update_local_cache", lambda self, cache: None)
    turns = JobTurns("cpu")

    def is_free(name: str, timeout_s: float = 0.2) -> bool:
        got = threading.Event()

        def take() -> None:
            with device_lock(name, exclusive=True):
                got.set()

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(timeout_s)
        return got.is_set()

    monkeypatch.setattr(CachingAutotuner, "_precompile_config", lambda self, config: turns._holder)
    lookup, compile_config = PersistentCache.lookup, CachingAutotuner._precompile_config
    cache, tuner = PersistentCache.__new__(PersistentCache), CachingAutotuner.__new__(CachingAutotuner)

    class Choice:
        def hash_key(self) -> str:
            return "x"

    choice = Choice()

    def benchmark(choices: list[Choice]) -> dict[Choice, float]:
        assert turns._holder == threading.get_ident()
        assert not is_free("cpu")
        assert not is_free("cpu-tuning"), "one job tunes at a time"
        came: list[bool] = []
        waiting = threading.Thread(target=lambda: came.append(is_free("cpu", 5)))
        waiting.start()
        time.sleep(0.3)
        assert not came
        assert benchmarker.benchmark_gpu(lambda: waiting.join(5) or list(came)) == [True], "who waits comes before a benchmark"
        assert turns._holder == threading.get_ident()
        return dict.fromkeys(choices, 1.0)

    monkeypatch.setattr(type(benchmarker), "benchmark_gpu", lambda self, call: call())
    with _benchmarks_take_turns(turns), _tuning_takes_turns(turns):
        assert cache.lookup([choice], "mm", "in", benchmark) == {choice: 1.0}
        assert turns._holder is None
        assert cache.lookup([choice], "mm", "in", None) == {}
        with turns.alone(patient=True):
            assert tuner._precompile_config(None) is None, "coordinate descent compiles while others have the device"
            assert turns._holder == threading.get_ident()
    assert PersistentCache.lookup is lookup
    assert CachingAutotuner._precompile_config is compile_config


def test_compiled_code_runs_alone_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    turns, kept, free = JobTurns("cpu"), [], []

    def lock_is_free() -> int:
        def take() -> None:
            with device_lock("cpu", exclusive=True):
                free.append(True)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(0.2)
        return len(free)

    backend = turns.first_run_alone(lambda module, inputs: lock_is_free, kept)
    run = backend(None, [])
    assert kept == [lock_is_free]
    assert run() == 0
    assert run() > 0


def test_nobody_waits_for_the_device_while_code_is_imported(
    loaded: LoadedExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    turns, seen = JobTurns("cuda"), []

    def note(name: str) -> Callable[..., Any]:
        return lambda *_, **__: seen.append((name, turns._holder is not None))

    monkeypatch.setattr(turns, "_finish", lambda: None)  # there is no device
    monkeypatch.setattr(modes, "wake", note("wake"))
    monkeypatch.setattr(modes, "build_program", note("build"))
    for name in ("import_model", "load_model"):
        monkeypatch.setattr(workload, name, note(name))
    modes.load_scenario(loaded, "decode", turns, 0)
    assert seen == [("import_model", False), ("wake", False), ("load_model", True), ("build", True)]
    assert turns._holder is None


def test_the_code_of_a_model_is_imported_without_building_it(loaded: LoadedExperiment) -> None:
    code = f"""
import sys
from pathlib import Path
from autokernel.config import load_experiment
from autokernel.profiling.workload import import_model
import_model(load_experiment(Path({str(loaded.path)!r})))
assert "transformers.models.llama.modeling_llama" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
