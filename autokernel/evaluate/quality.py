"""Is the whole model still the same model? Its outputs on every scenario (see `outputs`), and its own metric."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from autokernel.config import CallScenario, LoadedExperiment
from autokernel.errors import WorkerError
from autokernel.evaluate.modes import (
    BUNDLE,
    Contender,
    build_program,
    compile_errors,
    failure_of,
    load_scenario,
    own_code,
    prepare,
)
from autokernel.evaluate.outputs import Run, ScenarioCheck, Trio, check_trio, compare_outputs, verdict_of
from autokernel.evaluate.statistics import paired_relative_difference
from autokernel.evaluate.whole_model import JobTurns
from autokernel.events import EvalResult
from autokernel.profiling.precision import convert
from autokernel.records import Verdict

if TYPE_CHECKING:
    import torch

    from autokernel.export.bundle import Bundle
    from autokernel.profiling.metric import Metric
    from autokernel.profiling.workload import ScenarioProgram

_NUM_POSITIONS = 256  # tokens to compare per scenario, at least, but in no more than so many draws
_MAX_DRAWS = 32
_NUM_DRAWS = 3


def compare_metric(
    metric: Metric, stock_forward: Run, contender_forward: Run, limit: float | None = None, *, seed: int = 0
) -> EvalResult:
    """The metric with stock code and with the contender, on the same samples.

    Args:
        metric: what to measure.
        stock_forward: the model as it is.
        contender_forward: the model as tuned.
        limit: largest relative worsening, at the bad end of the 95 % interval; default: the metric's own.
        seed: of the bootstrap.
    """
    stock, other = metric(stock_forward), metric(contender_forward)
    limit = metric.limit if limit is None else limit
    worse, high = _worsening(metric, stock, other, seed)
    return EvalResult(
        metric=metric.name,
        stock=metric.summary(stock),
        bundle=metric.summary(other),
        worse_by=worse,
        worse_by_high=high,
        limit=limit,
        passed=high <= limit,
        num_samples=len(stock),
    )


def check_model(loaded: LoadedExperiment, bundle: Bundle, device: str, seed: int) -> tuple[Verdict, tuple[EvalResult, ...]]:
    """A bundle against the stock model: every scenario of the experiment, then its metric.

    Raises:
        WorkerError: the model does not compile or run with the bundle.
    """
    import torch

    from autokernel.profiling.workload import load_model

    torch.compiler.reset()
    model = load_model(loaded, device)
    higher = torch.float64 if loaded.experiment.model.dtype == "float32" else torch.float32
    reference = convert(copy.deepcopy(model), higher)
    trios = [_trio(loaded, bundle, name, model, reference, higher, device, seed) for name in loaded.experiment.scenarios]
    verdict = compare_outputs(trios, loaded.experiment.validation.min_top1_agreement)
    del trios, reference
    if loaded.experiment.validation.eval is None:
        return verdict, ()
    return verdict, (_eval(loaded, bundle, model, device, seed),)


def check_scenario(loaded: LoadedExperiment, bundle: Bundle, name: str, turns: JobTurns, seed: int) -> ScenarioCheck:
    """A bundle on one scenario, in a job of its own. For a GPU, on which two copies of the model may not fit.

    Raises:
        WorkerError: the model does not compile or run with the bundle.
    """
    model, program = load_scenario(loaded, name, turns, seed)
    with _blamed_on_bundle(f"scenario {name}"), turns.building():
        prepared = prepare(Contender(name=BUNDLE, bundle=bundle), program, turns)
    with turns.alone():
        return check_program(loaded, name, program, model, _blaming(f"scenario {name}", prepared.forward), seed)


def check_program(
    loaded: LoadedExperiment, name: str, program: ScenarioProgram, model: torch.nn.Module, forward: Run, seed: int
) -> ScenarioCheck:
    """A scenario whose compiled code is there already, on the program it was compiled for.

    Contender, stock and reference take turns with the program's state. A language model computes its own reference, a
    module at a time in higher precision and, when it decodes, from the same KV cache; other models are copied.
    """
    import torch

    scenario = loaded.experiment.scenarios[name]
    higher = torch.float64 if loaded.experiment.model.dtype == "float32" else torch.float32
    is_language = not isinstance(scenario, CallScenario)
    own_reference = (
        _in_higher_precision(program, model, higher) if is_language else convert(copy.deepcopy(program.module), higher)
    )
    trio = Trio(
        name=name,
        contender=_resetting(program, forward),
        stock=_resetting(program, program.scores or program.module),
        reference=_resetting(program, own_reference),
        draws=_draws(program, is_language, seed),
        is_language=is_language,
        choose=program.choose,
        raised=higher,
        max_abs_error=loaded.experiment.validation.max_abs_error,
    )
    return check_trio(trio)


def _in_higher_precision(program: ScenarioProgram, model: torch.nn.Module, dtype: torch.dtype) -> Run:
    from autokernel.profiling.language import Decode, raised

    module = program.module

    def run(*inputs: torch.Tensor) -> Any:
        if isinstance(module, Decode):
            tokens, positions = inputs
            return module.exact(tokens, positions, dtype)
        with raised(model, dtype):
            return module(*inputs)

    return run


def _draws(program: ScenarioProgram, is_language: bool, seed: int) -> list[tuple[torch.Tensor, ...]]:
    num = min(_MAX_DRAWS, max(_NUM_DRAWS, _NUM_POSITIONS // program.inputs[0].numel())) if is_language else _NUM_DRAWS
    return [program.fresh_inputs(seed + 1 + draw) for draw in range(num)]


def _trio(
    loaded: LoadedExperiment,
    bundle: Bundle,
    name: str,
    model: torch.nn.Module,
    reference: torch.nn.Module,
    higher: torch.dtype,
    device: str,
    seed: int,
) -> Trio:
    scenario = loaded.experiment.scenarios[name]
    # One program each: a KV cache is state.
    tuned, stock, raised = (build_program(loaded, m, name, device, seed) for m in (model, model, reference))
    with _blamed_on_bundle(f"scenario {name}"):
        prepared = prepare(Contender(name=BUNDLE, bundle=bundle), tuned)
    is_language = not isinstance(scenario, CallScenario)
    return Trio(
        name=name,
        contender=_resetting(tuned, _blaming(f"scenario {name}", prepared.forward)),
        stock=_resetting(stock, stock.scores or stock.module),
        reference=_resetting(raised, raised.scores or raised.module),
        draws=_draws(tuned, is_language, seed),
        is_language=is_language,
        choose=tuned.choose,
        raised=higher,
        max_abs_error=loaded.experiment.validation.max_abs_error,
    )


@contextlib.contextmanager
def _blamed_on_bundle(what: str) -> Iterator[None]:
    """What a compiler or its code raises, of any class, as the error that says: this bundle does not work in this model."""
    try:
        yield
    except compile_errors() as error:
        raise WorkerError(f"{what} does not run with the bundle: {failure_of(error)}") from None


def _blaming(what: str, forward: Run) -> Run:
    """The same function; graphs are compiled when they are first called for, too."""

    def run(*inputs: Any, **named: Any) -> Any:
        with _blamed_on_bundle(what):
            return forward(*inputs, **named)

    return run


def _resetting(program: ScenarioProgram, forward: Run) -> Run:
    def run(*inputs: torch.Tensor) -> Any:
        program.reset()
        return forward(*inputs)

    return run


def check_metric(loaded: LoadedExperiment, bundle: Bundle, turns: JobTurns, seed: int) -> EvalResult:
    """The experiment's metric with a bundle, in a job of its own.

    Raises:
        ConfigError: the experiment has none.
        WorkerError: the model does not compile or run with the bundle.
    """
    from autokernel.profiling.workload import import_model, load_model

    import_model(loaded)
    with turns.alone():
        return _eval(loaded, bundle, load_model(loaded, turns.device), turns.device, seed)


def _eval(loaded: LoadedExperiment, bundle: Bundle, model: torch.nn.Module, device: str, seed: int) -> EvalResult:
    import torch

    from autokernel.export.apply import BundleBackend
    from autokernel.profiling.language import Prefill
    from autokernel.profiling.metric import load_metric

    metric = load_metric(loaded, model, device)
    module = Prefill(model).eval() if metric.batch else model
    compiled = torch.compile(own_code(module), backend=BundleBackend(bundle), dynamic=False)
    # a bundle serves no gradients: a metric that does not switch them off would compare stock code with itself
    with torch.no_grad():
        return compare_metric(metric, module, _blaming("the metric", compiled), seed=seed)


def _worsening(metric: Metric, stock: list[float], other: list[float], seed: int) -> tuple[float, float]:
    """Relative worsening and the bad end of its interval.

    Infinite where the contender's metric is not finite; also where stock's is 0, of its mean or of that of many resamples, and
    the contender's is another.
    """
    if len(other) != len(stock) or not all(map(math.isfinite, other)):
        return math.inf, math.inf
    if metric.logarithmic:
        # The ratio of two perplexities is the exponential of the mean difference of losses.
        ratios = [1 + b - a for a, b in zip(stock, other, strict=True)]
        mean, low, high = (math.expm1(x) for x in paired_relative_difference([1.0] * len(stock), ratios, seed=seed))
    elif np.mean(stock) == 0:
        mean, low, high = _difference_from_zero(stock, other, seed)
    else:
        mean, low, high = paired_relative_difference(stock, other, seed=seed)
    worse, end = (-mean, -low) if metric.higher_is_better else (mean, high)
    return worse, math.inf if math.isnan(end) else end


def _difference_from_zero(stock: list[float], other: list[float], seed: int) -> tuple[float, float, float]:
    """As `paired_relative_difference` of a stock mean of 0: each end is infinite on its side, or 0 where nothing differs."""
    differences = [b - a for a, b in zip(stock, other, strict=True)]
    largest = max(map(abs, differences))
    if largest == 0:
        return 0.0, 0.0, 0.0
    shares = [1 + difference / largest for difference in differences]
    mean, low, high = paired_relative_difference([1.0] * len(shares), shares, seed=seed)
    return _without_bound(mean), _without_bound(low), _without_bound(high)


def _without_bound(difference: float) -> float:
    return math.copysign(math.inf, difference) if difference else 0.0


__all__ = [
    "ScenarioCheck",
    "Trio",
    "check_metric",
    "check_model",
    "check_program",
    "check_scenario",
    "compare_metric",
    "compare_outputs",
    "verdict_of",
]
