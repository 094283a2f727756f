"""Ways to run a model: eager, compiled by stock Inductor, compiled with a bundle. Each is prepared for one scenario."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.config import LoadedExperiment
from autokernel.evaluate.turns import wake
from autokernel.evaluate.whole_model import JobTurns, cuda_graphs_or_error, stock_backend, unknown_options
from autokernel.export.bundle import OWN_OPTIONS, Bundle

if TYPE_CHECKING:
    import torch

    from autokernel.profiling.workload import ScenarioProgram

STOCK_MODES = ("eager", "default", "max-autotune")
BUNDLE = "bundle"
CAPTURES_ITSELF = ("reduce-overhead",)
_CAPTURED_RUNS = 2  # more than the first: one that warms up and records, one that replays
_COMPILER_MODES = {
    "default": "default",
    "max-autotune": "max-autotune-no-cudagraphs",  # a CUDA graph is captured by hand, as for the others
    "reduce-overhead": "reduce-overhead",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to run the model: a stock mode by name, or a bundle under a name of its own, and where it lies if it does."""

    name: str
    bundle: Bundle | None = None
    where: str | None = None


def against_stock(bundle: Bundle, modes: tuple[str, ...] = STOCK_MODES, where: str | None = None) -> tuple[Contender, ...]:
    """Stock modes, and the bundle under the name `BUNDLE`; with `where` it lies its own compiled kernels are used."""
    return (*(Contender(name=mode) for mode in modes), Contender(name=BUNDLE, bundle=bundle, where=where))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A contender that has been compiled and run once."""

    call: Callable[[], Any]
    forward: Callable[..., Any]
    compile_s: float  # 0 where Inductor found it compiled: by a rehearsal, or by an earlier run
    hits: Mapping[str, int]
    reasons: Mapping[str, str]
    num_benchmarks: int
    products: tuple[str, ...]  # of the graph that was compiled with a bundle
    compiled: list[Any]  # on a GPU: what a CUDA graph of a call reads constants from


def compile_errors() -> tuple[type[BaseException], ...]:
    """What a mode that does not compile or run raises: the model's fault or the compiler's, never ours."""
    import torch

    return (
        RuntimeError,  # and with it OutOfMemoryError, and what cannot be captured in a CUDA graph
        AssertionError,
        TypeError,
        NotImplementedError,
        torch._dynamo.exc.TorchDynamoException,
    )


def failure_of(error: BaseException) -> str:
    """One line that says what kept a contender from running."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("backend=") and lines[0].endswith("raised:"):  # Dynamo's, what happened follows
        lines = lines[1:]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def build_program(loaded: LoadedExperiment, model: torch.nn.Module, scenario: str, device: str, seed: int) -> ScenarioProgram:
    """A program of its own, with a static cache of its own where it has one."""
    from autokernel.profiling.workload import build_scenario

    return build_scenario(
        model, loaded.experiment.scenarios[scenario], scenario, seed, device, loaded.experiment.model.dtype, loaded=loaded
    )


def load_scenario(
    loaded: LoadedExperiment, scenario: str, turns: JobTurns, seed: int
) -> tuple[torch.nn.Module, ScenarioProgram]:
    """The model and a program for one scenario, made alone on the device; code is imported and a context made before that."""
    from autokernel.profiling.workload import import_model, load_model

    import_model(loaded)
    wake(turns.device)
    with turns.alone():
        model = load_model(loaded, turns.device)
        return model, build_program(loaded, model, scenario, turns.device, seed)


def prepare(contender: Contender, program: ScenarioProgram, turns: JobTurns | None = None) -> Prepared:
    """Compile a contender for a program and run it twice; one that captures its own CUDA graphs until it replays them.

    Args:
        contender: what to compile.
        program: for what; its state is reset before each run.
        turns: the job's device lock. On a GPU compiled code then runs alone; on a CPU this makes no difference.

    Raises:
        any of `compile_errors()`: it does not compile or run.
    """
    import torch

    from autokernel.export.apply import BundleBackend

    on_gpu = turns is not None and turns.device == "cuda"
    forward: Callable[..., Any] = own_code(program.module, contender.name)
    backend: BundleBackend | None = None
    compiled: list[Any] = []
    if contender.bundle is not None:
        parts = [contender.bundle.graph_options, *(part.options for part in contender.bundle.scenario_options)]
        missing = unknown_options([name for options in parts for name in options if name not in OWN_OPTIONS])
        if missing:
            raise NotImplementedError(f"torch {torch.__version__} has no option {', '.join(missing)}")
        backend = BundleBackend(contender.bundle, where=contender.where)
        used = turns.first_run_alone(backend, compiled) if on_gpu and turns is not None else backend
        forward = torch.compile(forward, backend=used, fullgraph=True, dynamic=False)
    elif contender.name in ("default", "max-autotune") and on_gpu and turns is not None:
        used = turns.first_run_alone(stock_backend(_COMPILER_MODES[contender.name]), compiled)
        forward = torch.compile(forward, backend=used, fullgraph=True, dynamic=False)
    elif contender.name in CAPTURES_ITSELF and not any(x.is_cuda for x in program.inputs):
        raise NotImplementedError(f"{contender.name} is Inductor's default with CUDA graphs, and there are none on a CPU")
    elif contender.name in _COMPILER_MODES:
        forward = torch.compile(forward, mode=_COMPILER_MODES[contender.name], fullgraph=True, dynamic=False)
    elif contender.name != "eager":
        raise ValueError(f"unknown mode {contender.name!r}; stock modes: {', '.join(STOCK_MODES)}, reduce-overhead")
    inputs = program.inputs
    benchmarks_before, found_before = _num_benchmarks(), _num_found()

    def call() -> Any:
        with torch.no_grad():
            return forward(*inputs)

    own_graphs = contender.name in CAPTURES_ITSELF
    with cuda_graphs_or_error() if own_graphs else contextlib.nullcontext():
        program.reset()
        start = time.perf_counter()
        call()
        compile_s = time.perf_counter() - start
        with turns.alone() if on_gpu and turns is not None else contextlib.nullcontext():
            for _ in range(_CAPTURED_RUNS if own_graphs else 1):
                program.reset()
                call()
    usage = backend.usage() if backend is not None else {}
    return Prepared(
        call=call,
        forward=forward,
        compile_s=compile_s if _num_found() == found_before else 0.0,
        hits={key: item.hits for key, item in usage.items()},
        reasons={key: "; ".join(item.reasons) for key, item in usage.items() if item.reasons},
        num_benchmarks=_num_benchmarks() - benchmarks_before,
        products=backend.graphs[0] if backend is not None and len(backend.graphs) == 1 else (),
        compiled=compiled,
    )


def _num_benchmarks() -> int:
    """Of this process so far: choices of GEMMs, and kernels that coordinate descent looked at."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["select_algorithm_autotune"] + counters["inductor"]["coordesc_tuning_bench"])


def _num_found() -> int:
    """Graphs of this process so far that were found compiled on disk."""
    from torch._dynamo.utils import counters

    return int(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])


def own_code(module: torch.nn.Module, label: str = "") -> Callable[..., Any]:
    """A function that calls the module and has a code object of its own.

    Dynamo keeps compiled code per code object and walks through all of it at each call: contenders that shared one would
    pay for those compiled before them.
    """

    def call(*inputs: Any, **named: Any) -> Any:
        return module(*inputs, **named)

    # a new line table is enough to make the copy a different object, equal in everything else
    code = call.__code__.replace(co_name=f"call_{id(module)}_{label}")
    return types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)
