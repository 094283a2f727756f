"""One GEMM of a model, timed in every way against each other: cuBLAS, max-autotune's pick, and a bundle. For gpu_run.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.config import DecodeScenario, LoadedExperiment, ModelSection, PrefillScenario
from autokernel.evaluate.modes import BUNDLE, Contender, Prepared, prepare
from autokernel.export.bundle import Bundle
from autokernel.records import Problem, TensorSpec

if TYPE_CHECKING:
    import torch

    from autokernel.evaluate.whole_model import JobTurns
    from autokernel.profiling.workload import ScenarioProgram

CUBLAS, PICK, STOCK = "cuBLAS", "max-autotune", "stock"
PICKS = "max-autotune apart"  # of the products that the model has, where they are several
_MAX_COPIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmCase:
    """x [m, k] times weights that share it; `ns` has one N per weight."""

    name: str
    m: int
    ns: tuple[int, ...]
    k: int
    dtype: str = "bfloat16"
    device: str = "cuda"

    def problem(self) -> Problem:
        """As the model has it: separate products of one input, or a single one."""
        x = TensorSpec.contiguous((self.m, self.k), self.dtype)
        weights = tuple(TensorSpec(shape=(self.k, n), dtype=self.dtype, stride=(1, self.k)) for n in self.ns)
        op = "mm" if len(weights) == 1 else "merged_mm"
        constants = tuple(range(1, 1 + len(weights)))
        return Problem(op=op, inputs=(x, *weights), device=self.device, constants=constants)

    def one(self) -> GemmCase:
        """The same work as a single product: what cuBLAS and max-autotune are at their best with."""
        return GemmCase(name=self.name, m=self.m, ns=(sum(self.ns),), k=self.k, dtype=self.dtype, device=self.device)


def cases_of(loaded: LoadedExperiment, device: str) -> list[GemmCase]:
    """The five GEMMs of a Llama-like model in every number of rows that the experiment's scenarios have."""
    config = _model_config(loaded, loaded.experiment.model)
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    key_value = config.get("num_key_value_heads", heads) * width
    rows, last_rows = set(), set()  # of the layers, and of the LM head
    for scenario in loaded.experiment.scenarios.values():
        if isinstance(scenario, DecodeScenario):
            rows.add(scenario.batch)
            last_rows.add(scenario.batch)
        elif isinstance(scenario, PrefillScenario):
            rows.add(scenario.batch * scenario.length)
            last_rows.add(scenario.batch * (1 if scenario.logits == "last" else scenario.length))
    shapes: dict[str, tuple[tuple[int, ...], int, set[int]]] = {
        "qkv": ((heads * width, key_value, key_value), hidden, rows),
        "o": ((hidden,), heads * width, rows),
        "gate-up": ((inner, inner), hidden, rows),
        "down": ((hidden,), inner, rows),
        "LM head": ((config["vocab_size"],), hidden, last_rows),
    }
    dtype = loaded.experiment.model.dtype
    return [
        GemmCase(name=name, m=m, ns=ns, k=k, dtype=dtype, device=device)
        for name, (ns, k, ms) in shapes.items()
        for m in sorted(ms)
    ]


def _model_config(loaded: LoadedExperiment, model: ModelSection) -> dict[str, Any]:
    if isinstance(model.config, dict):
        return model.config
    source = model.config if model.config is not None else model.checkpoint
    if source is None:
        raise SystemExit("the experiment's model has no config of transformers: there is no telling its GEMMs by name")
    path = loaded.resolve(source)
    found: dict[str, Any] = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureGemm:
    """Job: one case in all ways. The roofline's ceilings are GB/s read and TFLOP/s of the case's dtype."""

    case: GemmCase
    bundle: Bundle | None
    threads: int
    ceilings: tuple[float, float] | None = None
    rounds: int = 31
    seed: int = 0

    def __call__(self) -> dict[str, Any]:
        from autokernel.evaluate.whole_model import model_job

        with model_job(self.case.device, self.threads) as turns:
            return self._measure(turns)

    def _measure(self, turns: JobTurns) -> dict[str, Any]:
        from step_kernels import kernels_of

        from autokernel.backends import Built
        from autokernel.evaluate.probes import num_copies_for
        from autokernel.evaluate.timing import compare, make_step

        case, device = self.case, self.case.device
        with turns.alone():
            num_copies = num_copies_for(case.problem(), limit=_MAX_COPIES)
            apart, together = _programs(case, num_copies, self.seed)
        picked: list[str] = []
        ways = {CUBLAS: (Contender(name="default"), together), PICK: (Contender(name="max-autotune"), together)}
        if self.bundle is not None:
            ways[BUNDLE] = (Contender(name=BUNDLE, bundle=self.bundle), apart)
        if len(case.ns) > 1:
            ways[STOCK] = (Contender(name="default"), apart)
            ways[PICKS] = (Contender(name="max-autotune"), apart)
        prepared: dict[str, Prepared] = {}
        with turns.building():
            for name, (contender, program) in ways.items():
                with _picks(picked if name == PICK else []):
                    prepared[name] = prepare(contender, program, turns)
        with turns.alone():
            errors = _errors(case, {name: (prepared[name].call(), ways[name][1]) for name in ways})
            on_gpu = device == "cuda"
            kernels = {n: list(dict.fromkeys(k["name"] for k in kernels_of(prepared[n].call))) if on_gpu else [] for n in ways}
            steps = {}
            for name, (_, program) in ways.items():
                built = Built(run=_without_gradients(prepared[name].forward), num_copies=num_copies)
                steps[name] = make_step(built, program.inputs, device=device)
        calls = {name: step.num_calls for name, step in steps.items()}
        comparisons = {}
        for baseline in (way for way in (CUBLAS, PICK, PICKS) if way in steps):
            with turns.alone():
                comparisons[baseline] = compare(
                    {name: step.run for name, step in steps.items()},
                    baseline,
                    self.rounds,
                    device=device,
                    seed=self.seed,
                    calls_per_sample=calls,
                )
        return {
            "gemm": case.name,
            "m": case.m,
            "ns": list(case.ns),
            "k": case.k,
            "copies": num_copies,
            "us": dict(comparisons[CUBLAS].medians_us),
            "over_cublas": {n: s.to_json() for n, s in comparisons[CUBLAS].speedups.items()},
            "over_max_autotune": {n: s.to_json() for n, s in comparisons[PICK].speedups.items()},
            # the same comparison where the model has one product
            "over_max_autotune_apart": {n: s.to_json() for n, s in comparisons.get(PICKS, comparisons[PICK]).speedups.items()},
            "conditions": dict(comparisons[CUBLAS].conditions),
            "drift": comparisons[CUBLAS].drift,
            "roofline_us": self._roofline_us(),
            "max_autotune_pick": picked[0] if picked else "",
            "entries": self._used(prepared[BUNDLE].hits) if BUNDLE in prepared else [],
            "errors": errors,
            "kernels": kernels,
            "compile_s": {name: round(item.compile_s, 2) for name, item in prepared.items()},
        }

    def _used(self, hits: Mapping[str, int]) -> list[str]:
        """The bundle's entries that were built."""
        entries = self.bundle.entries if self.bundle is not None else ()
        return [
            " ".join([entry.problem.op, entry.backend, *(f"{k}={v}" for k, v in sorted(entry.config.items()))])
            for entry in entries
            if hits.get(entry.key)
        ]

    def _roofline_us(self) -> float | None:
        if self.ceilings is None:
            return None
        from autokernel.ops import get_op

        problem = self.case.one().problem()
        op = get_op(problem.op)
        read_gb_per_s, tflops = self.ceilings
        return max(op.num_bytes(problem) / (read_gb_per_s * 1e3), op.flops(problem) / (tflops * 1e6))


def _programs(case: GemmCase, num_copies: int, seed: int) -> tuple[ScenarioProgram, ScenarioProgram]:
    """(as the model has it, as one product), with weights and inputs of the same values."""
    import torch

    from autokernel.evaluate.probes import derived_seed, make_constants, make_variables

    problem = case.problem()
    constants = make_constants(problem, seed, num_copies)
    inputs = tuple(x for copy in range(num_copies) for x in make_variables(problem, derived_seed(seed, "inputs", copy)))
    apart = _program(problem, constants, inputs)
    if len(case.ns) == 1:
        return apart, apart
    joined = [[torch.cat([weight.t() for weight in weights]).t()] for weights in constants]
    return apart, _program(case.one().problem(), joined, inputs)


def _program(problem: Problem, constants: list[list[torch.Tensor]], inputs: tuple[torch.Tensor, ...]) -> ScenarioProgram:
    from autokernel.backends.compiled import Copies
    from autokernel.profiling.workload import ScenarioProgram

    module = Copies(problem, constants).eval()
    return ScenarioProgram(name=problem.key, module=module, inputs=inputs, make_inputs=lambda _: inputs, restore=lambda: None)


def _without_gradients(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        import torch

        with torch.no_grad():
            return forward(*inputs)

    return run


class _picks:  # noqa: N801  used like a function
    """Writes down the names of the kernels that Inductor's autotuning chooses while the block runs."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __enter__(self) -> None:
        from torch._inductor import select_algorithm

        def save(timings: dict[Any, float], *_: Any, **__: Any) -> None:
            if timings:
                best = min(timings, key=lambda choice: timings[choice])
                self._names.append(f"{best.name} {getattr(best, 'description', '')}".strip())

        select_algorithm.clear_feedback_savers()
        select_algorithm.add_feedback_saver(save)

    def __exit__(self, *_: Any) -> None:
        from torch._inductor import select_algorithm

        select_algorithm.clear_feedback_savers()


def _errors(case: GemmCase, results: dict[str, tuple[Sequence[torch.Tensor], ScenarioProgram]]) -> dict[str, float]:
    """Relative norm of the error of each way's first copy, against float32.

    Raises:
        RuntimeError: one is more than twice as wrong as cuBLAS (the error budget), or not finite.
    """
    import torch

    errors = {}
    for name, (outputs, program) in results.items():
        weights = [parameter for key, parameter in program.module.named_parameters() if key.startswith("c0_")]
        x = program.inputs[0].float()
        square = scale = 0.0
        for out, weight in zip(outputs[: len(weights)], weights, strict=True):
            for rows, mine in zip(x.split(1024), out.split(1024), strict=True):
                exact = rows @ weight.float().t()
                square += float((mine.float() - exact).norm()) ** 2
                scale += float(exact.norm()) ** 2
        errors[name] = math.sqrt(square / scale)
    limit = 2 * errors[CUBLAS] + torch.finfo(getattr(torch, case.dtype)).eps / 8
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    if wrong:
        raise RuntimeError(f"{case.name} M={case.m}: errors {wrong} are above the budget of {limit:.2e}")
    return errors
