"""Run one scenario under Inductor's default, as production would: its post-grad graph, its GEMMs, and their times."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.errors import WorkloadError
from autokernel.evaluate.whole_model import JobTurns
from autokernel.ops import OPS, Op, Site, get_op
from autokernel.ops.attention import LIBRARY_CALLS
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, GraphModule

    from autokernel.profiling.workload import ScenarioProgram

log = logging.getLogger(__name__)

_STEP = "autokernel::step"
_WARMUP = 3
_NUM_PROFILED = 8
_MIN_STEPS, _MAX_STEPS = 9, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedScenario:
    """What one scenario spends its time on. Plain data: it can be pickled.

    `call_us` is the time that stock code takes for one call of a problem, by problem key, scaled so that it can be set
    against `step_us`; an opportunity that stands for several kernels takes as long as all of them, and one that has no library
    call at all is not among them. `kernel_us` is the
    device time of all kernels of a step on a GPU; on a CPU, that of the library kernels alone. `num_calls` is there where the
    model has more layers than the graph: the calls of each problem in all of them. `peak_bytes` is what the capture took of a
    GPU's memory at most, the model included; 0 on a CPU.
    """

    scenario: str
    step_us: float  # median
    step_spread_us: float  # interquartile range
    kernel_us: float
    sites: tuple[Site, ...]
    call_us: Mapping[str, float]
    graph: str
    compile_s: float
    num_calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True, order=True)
class Call:
    """A library call that the profiler sees: `aten::mm` and the shapes and strides of its matrices."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...] = ()


@dataclass(slots=True)
class _Captured:
    graph: Graph | None = None
    constants: frozenset[str] = frozenset()
    num_graphs: int = 0


def capture(
    program: ScenarioProgram, device: str, ops: Sequence[Op] = OPS, budget_s: float = 2.0, turns: JobTurns | None = None
) -> CapturedScenario:
    """Compile a scenario with Inductor's defaults and measure it.

    On a GPU a step is timed as the replay of a CUDA graph, and a library call by its kernels' own time, as the profiler
    sees them in steps that are launched one by one.

    Args:
        program: is compiled in full, as one graph.
        device: "cpu" or "cuda".
        ops: what to look for in the graph.
        budget_s: about how long the timing of steps may take.
        turns: the job's device lock, of which measuring takes turns; None: nobody else is on the device.

    Raises:
        WorkloadError: the scenario does not compile as one graph.
    """
    import torch

    captured = _Captured()
    turns = turns if turns is not None else JobTurns(device)
    compiled = _compile(program, captured, turns)

    def step() -> None:
        with torch.no_grad():
            compiled(*program.inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    program.reset()
    start = time.perf_counter()
    try:
        with turns.building():
            step()
    except torch._dynamo.exc.TorchDynamoException as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise WorkloadError(f"scenario {program.name}: torch.compile cannot make one graph of it: {first}") from error
    compile_s = time.perf_counter() - start
    if captured.graph is None or captured.num_graphs != 1:
        raise WorkloadError(f"scenario {program.name}: compiled to {captured.num_graphs} graphs; it must be exactly one")
    sites = tuple(
        dataclasses.replace(site, name=_without_wrapper(site.name))
        for op in ops
        for site in op.find(captured.graph, captured.constants, device)
        if op.dims(site.problem).get("k") != 1  # an outer product, as of rotary embeddings: nothing is summed
    )
    with turns.alone():
        if device == "cuda":
            step_us, spread_us = _time_replays(lambda: compiled(*program.inputs), budget_s)
        else:
            step_us, spread_us = _time_steps(step, budget_s)
        profiler = _profile(step, device)
    shares, kernel_share = _shares(profiler, device, step_us)
    call_us = _attribute({site.problem.key: site.problem for site in sites}, shares, step_us, program.name)
    return CapturedScenario(
        scenario=program.name,
        step_us=step_us,
        step_spread_us=spread_us,
        kernel_us=kernel_share * step_us,
        sites=sites,
        call_us=call_us,
        graph=str(captured.graph),
        compile_s=compile_s,
    )


def _compile(program: ScenarioProgram, captured: _Captured, turns: JobTurns) -> Callable[..., Any]:
    """Inductor's default, with a pass that keeps the post-grad graph; GEMMs of uneven sizes as they are, as in a bundle."""
    import torch
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass

    constant_ids = {id(tensor) for tensor in (*program.module.parameters(), *program.module.buffers())}
    fixed: list[bool] = []

    class Keep(CustomGraphPass):  # type: ignore[misc]
        def __call__(self, graph: Graph) -> None:
            captured.num_graphs += 1
            captured.graph = _copy(graph)
            captured.constants = _constants(graph, fixed, program.name)

        def uuid(self) -> None:
            """None: never take the graph from the cache, or the pass would not run."""

    def backend(module: GraphModule, inputs: list[torch.Tensor]) -> Any:
        fixed.extend(id(tensor) in constant_ids for tensor in inputs)
        patches = {"post_grad_custom_post_pass": Keep(), "shape_padding": False}
        return compile_fx(module, inputs, config_patches=patches)

    from autokernel.evaluate.modes import own_code

    used = turns.first_run_alone(backend, []) if turns.device == "cuda" else backend
    return torch.compile(own_code(program.module), backend=used, fullgraph=True, dynamic=False)  # type: ignore[no-any-return]


def _copy(graph: Graph) -> Graph:
    import torch.fx

    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _constants(graph: Graph, fixed: Sequence[bool], scenario: str) -> frozenset[str]:
    """Names of the placeholders that are parameters or buffers, and that the graph does not write to."""
    from autokernel.ops.matching import op_name

    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(fixed):
        raise WorkloadError(f"scenario {scenario}: the graph has {len(placeholders)} inputs, the compiled code {len(fixed)}")
    written = {node.args[0] for node in graph.nodes if op_name(node).endswith("_") and node.args}
    pairs = zip(placeholders, fixed, strict=True)
    return frozenset(node.name for node, is_fixed in pairs if is_fixed and node not in written)


def _without_wrapper(name: str) -> str:
    """Module paths as the model has them: the scenario's module holds it as `model`."""
    return " + ".join(part.removeprefix("model.") for part in name.split(" + "))


def _time_steps(step: Callable[[], None], budget_s: float) -> tuple[float, float]:
    """Median and interquartile range of one step, in microseconds."""
    for _ in range(_WARMUP):
        step()
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < _MIN_STEPS or (time.perf_counter() < deadline and len(samples) < _MAX_STEPS):
        start = time.perf_counter_ns()
        step()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    low, median, high = statistics.quantiles(samples, n=4)
    return median, high - low


def _time_replays(call: Callable[[], Any], budget_s: float) -> tuple[float, float]:
    """The same on a GPU, of one step as a CUDA graph."""
    import torch

    from autokernel.evaluate.cuda_graphs import Capturer
    from autokernel.evaluate.timing import timer

    with torch.no_grad():
        graph, outputs = Capturer().capture(call)
    timed = timer("cuda", graph.replay)
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < _MIN_STEPS or (time.perf_counter() < deadline and len(samples) < _MAX_STEPS):
        samples.append(timed())
    del graph, outputs
    low, median, high = statistics.quantiles(samples, n=4)
    return median, high - low


def _profile(step: Callable[[], None], device: str) -> Any:
    """A profiler that saw a few steps. What it saw is worked out when it is asked: seconds that need no device."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(_NUM_PROFILED):
            with record_function(_STEP):
                step()
    return profiler


def _shares(profiler: Any, device: str, step_us: float) -> tuple[dict[Call, float], float]:
    """Each library call's share of a step (one call of it), and that of all kernels
    (on a CPU, of all library calls).

    Both parts and whole are the lower quartile of the profiled steps: a step that was preempted is long as a whole, and in
    few of its parts. Taken together, the parts are never more than the whole. On a GPU the parts are times of kernels, and
    the whole is `step_us`: launched one by one, kernels wait for the host.
    """
    # On a GPU, spans of the same names show up again as the device's own events.
    everything = profiler.events() or []
    events = [event for event in everything if not str(event.device_type).endswith("CUDA")]
    on_device = [event for event in everything if str(event.device_type).endswith("CUDA") and not _is_span(event)]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.name == _STEP)
    per_call: dict[Call, list[float]] = {}
    wholes: list[float] = []
    kernels: list[float] = []
    num_calls: Counter[Call] = Counter()
    for start, end in spans:
        inside = [e for e in events if start <= e.time_range.start and e.time_range.end <= end and e.name in MATRICES]
        found = [(_call_of(event), _event_us(event, device)) for event in inside]
        for call, us in found:
            per_call.setdefault(call, []).append(us)
        num_calls = Counter(call for call, _ in found)
        wholes.append(step_us if device == "cuda" else end - start)
        kernels.append(sum(e.time_range.elapsed_us() for e in on_device if start <= e.time_range.start < end))
    times = {call: _lower_quartile(samples) for call, samples in per_call.items()}
    in_library = sum(times[call] * count for call, count in num_calls.items())
    whole = max(_lower_quartile(wholes), in_library)
    kernel_us = _lower_quartile(kernels) if device == "cuda" else in_library
    return {call: us / whole for call, us in times.items()}, min(1.0, kernel_us / whole)


def _is_span(event: Any) -> bool:
    """Whether a device's event is no kernel, but the shadow of a span on the host."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name == _STEP


def _lower_quartile(samples: Sequence[float]) -> float:
    return statistics.quantiles(samples, n=4, method="inclusive")[0] if len(samples) > 1 else samples[0]


# Where the two matrices are among the inputs of a call.
MATRICES: Mapping[str, tuple[int, int]] = {
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::_scaled_mm": (0, 1),
    "aten::_int_mm": (0, 1),
    **{call.replace("aten.", "aten::"): (0, 1) for call in LIBRARY_CALLS},
}


def _call_of(event: Any) -> Call:
    first, second = MATRICES[event.name]
    shapes = event.input_shapes
    strides = getattr(event, "structured_input_strides", None) or ()  # torch 2.13 has them
    known = len(strides) > second
    return _call(event.name, [(shapes[i], strides[i] if known else ()) for i in (first, second)])


def _call(name: str, matrices: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Call:
    """Strides of dimensions of size one say nothing, and are told differently: they count as 0."""
    strides = [
        tuple(s if n != 1 else 0 for n, s in zip(shape, stride, strict=True)) for shape, stride in matrices if len(stride)
    ]
    return Call(name, tuple(tuple(shape) for shape, _ in matrices), tuple(strides))


def _event_us(event: Any, device: str) -> float:
    return float(event.device_time_total if device == "cuda" else event.cpu_time_total)


def _attribute(
    problems: Mapping[str, Problem], shares: Mapping[Call, float], step_us: float, scenario: str
) -> dict[str, float]:
    """Time of one call per problem key: the sum over the library calls that its reference makes."""
    by_shape: dict[tuple[str, tuple[tuple[int, ...], ...]], list[float]] = {}
    for call, share in shares.items():
        by_shape.setdefault((call.name, call.shapes), []).append(share)
    result: dict[str, float] = {}
    for key, problem in problems.items():
        total = 0.0
        calls = calls_of(problem)
        if not calls:
            continue
        for call in calls:
            share = shares.get(call, -1.0)
            if share < 0:  # Inductor may hand over equal memory with other strides, or the profiler knows none
                share = statistics.mean(by_shape.get((call.name, call.shapes)) or _of_other_heads(call, by_shape))
            if share == 0.0:
                log.warning("%s: no kernel of %s was seen in the profile of %s", scenario, call, key)
            total += share
        result[key] = total * step_us
    return result


def _of_other_heads(call: Call, by_shape: Mapping[tuple[str, tuple[tuple[int, ...], ...]], Sequence[float]]) -> Sequence[float]:
    """Calls of attention with the same q and as many keys: whether shared heads were repeated before makes no other call."""
    attention = call.name.replace("::", ".") in LIBRARY_CALLS
    left, right = (shape[:1] + shape[2:] for shape in call.shapes)
    return [
        share
        for (name, shapes), found in by_shape.items()
        if attention and name == call.name and (shapes[0][:1] + shapes[0][2:], shapes[1][:1] + shapes[1][2:]) == (left, right)
        for share in found
    ] or [0.0]


def calls_of(problem: Problem) -> list[Call]:
    """The GEMM calls that a problem's reference makes, without running them."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[Call] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func.overloadpacket).replace("aten.", "aten::")
            if name in MATRICES:
                matrices = [args[i] for i in MATRICES[name]]
                calls.append(_call(name, [(x.shape, x.stride()) for x in matrices]))
            return func(*args, **(kwargs or {}))

    # fake tensors of the problem's own device: of a GPU's products more is asked than of a CPU's
    with torch.no_grad(), FakeTensorMode(), Watch():  # type: ignore[no-untyped-call]
        inputs = [
            torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device=problem.device)
            for spec in problem.inputs
        ]
        get_op(problem.op).reference(problem, *inputs)
    return calls
