"""What each kernel of a step takes, and what graph options give it: a scenario with a bundle, in CUDA graphs, on this GPU.

    python benchmarks/step_kernels.py experiments/llama.yaml RUN/bundle --scenario decode-b1 --layers 4 \\
        --options '{}' '{"combo_kernels": true}' '{"pdl": "all"}'

Each set of options is compiled with the bundle's entries in place of its own options, and `stock` is Inductor's default; the
graphs are compared in paired rounds. BUNDLE may be `none` where all are stock. Then the profiler looks at one replay of each:
every kernel's time, the gap to the one in front of it (less than nothing where they overlap), and the kernels' sums by name.
`--layers` makes the model shorter than the experiment says. Needs an idle NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autokernel.config import load_experiment
from autokernel.evaluate.cuda_graphs import Capturer
from autokernel.evaluate.modes import Contender, build_program, prepare
from autokernel.evaluate.timing import compare
from autokernel.export.bundle import Bundle, read_bundle
from autokernel.profiling.workload import import_model, load_model

STOCK = "stock"


@dataclass(frozen=True)
class Step:
    """A captured step; what it was compiled with stays alive with it."""

    label: str
    graph: torch.cuda.CUDAGraph
    kept: tuple[Any, ...]
    hits: int


def captured(arguments: argparse.Namespace) -> list[Step]:
    """The scenario's step with each set of options."""
    shorter = f"model.config_overrides.num_hidden_layers={arguments.layers}"
    loaded = load_experiment(arguments.experiment, (shorter,) if arguments.layers else ())
    import_model(loaded)
    model = load_model(loaded, "cuda")
    bundle = read_bundle(arguments.bundle) if str(arguments.bundle) != "none" else None
    capturer, steps = Capturer(), []
    for text in arguments.options:
        program = build_program(loaded, model, arguments.scenario, "cuda", 0)
        torch._dynamo.reset()
        prepared = prepare(_contender(bundle, text), program)
        program.reset()
        graph, outputs = capturer.capture(prepared.call)
        steps.append(Step(text, graph, (prepared, program, outputs), sum(prepared.hits.values())))
        sys.stdout.write(f"{text}: compiled in {prepared.compile_s:.1f} s, {steps[-1].hits} calls by the bundle's kernels\n")
    return steps


def _contender(bundle: Bundle | None, text: str) -> Contender:
    if text == STOCK:
        return Contender(name="default")
    if bundle is None:
        raise SystemExit(f"--options {text}: a bundle is needed, or the word {STOCK}")
    return Contender(name="bundle", bundle=replace(bundle, graph_options=json.loads(text), scenario_options=()))


def by_name(kernels: Sequence[Mapping[str, Any]]) -> list[tuple[float, int, str]]:
    """Microseconds in all, calls and name of each kernel, the longest first."""
    found: dict[str, list[float]] = {}
    for kernel in kernels:
        found.setdefault(kernel["name"], []).append(kernel["us"])
    return sorted(((sum(times), len(times), name) for name, times in found.items()), reverse=True)


def kernels_of(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Kernels of one call, in order: name, us, and the gap in us to the one in front."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found: list[dict[str, Any]] = []
    end = None
    on_device = (e for e in profile.events() or () if str(e.device_type).endswith("CUDA"))
    for event in sorted(on_device, key=lambda e: e.time_range.start):
        span = event.time_range
        found.append({"name": event.name, "us": span.end - span.start, "gap_us": 0.0 if end is None else span.start - end})
        end = span.end
    return found


def main() -> None:
    """Parse, capture, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("bundle", type=Path, help="a bundle's folder, .zip or bundle.json; none: stock")
    parser.add_argument("--scenario", required=True)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the experiment has")
    parser.add_argument("--options", nargs="+", default=["{}"], help=f"JSON objects of graph options, or {STOCK}")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    steps = captured(arguments)
    first = steps[0].label
    found = compare({step.label: step.graph.replay for step in steps}, first, arguments.rounds, device="cuda", replays=True)
    result = []
    for step in steps:
        us, kernels, speedup = found.medians_us[step.label], kernels_of(step.graph.replay), found.speedups.get(step.label)
        said = f", {speedup.ratio:.4f} [{speedup.low:.4f}, {speedup.high:.4f}] over {first}" if speedup is not None else ""
        sys.stdout.write(f"\n{step.label}: {us:.2f} us{said}\n")
        for kernel in kernels:
            sys.stdout.write(f"{kernel['us']:9.2f} us, gap {kernel['gap_us']:6.2f}  {kernel['name'][:110]}\n")
        for total, calls, name in by_name(kernels):
            sys.stdout.write(f"{total:9.2f} us in {calls:4} calls  {name[:110]}\n")
        ratio = speedup.to_json() if speedup is not None else None
        options = json.loads(step.label) if step.label != STOCK else STOCK
        result.append({"options": options, "us": us, "speedup": ratio, "hits": step.hits, "kernels": kernels})
    if arguments.out is not None:
        protocol = f"{arguments.scenario}, {arguments.layers or 'all'} layers, medians of {arguments.rounds} paired rounds"
        device = torch.cuda.get_device_name()
        arguments.out.write_text(json.dumps({"protocol": protocol, "device": device, "steps": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
