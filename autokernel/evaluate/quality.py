"""Is the whole model still the same model? Its outputs by the error budget, and its own metric.

The budget is the kernels': the contender's error against the model in higher precision may be twice that of stock PyTorch
in the model's own dtype, over all draws of a scenario's inputs together. Tokens and divergence, for language models, follow
the same rule (a divergence grows with the square of the error).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.config import CallScenario, LoadedExperiment
from autokernel.evaluate.budget import EAGER_FACTOR
from autokernel.evaluate.statistics import paired_relative_difference
from autokernel.events import EvalResult
from autokernel.records import Check, Verdict

if TYPE_CHECKING:
    import torch

    from autokernel.export.bundle import Bundle
    from autokernel.profiling.metric import Metric
    from autokernel.profiling.workload import ScenarioProgram

Run = Callable[..., Any]
_NUM_POSITIONS = 256  # tokens to compare per scenario, at least, but in no more than so many draws
_MAX_DRAWS = 32
_NUM_DRAWS = 3
_KL_FLOOR = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Trio:
    """One scenario run in three ways on the same inputs: as tuned, stock, and in higher precision."""

    name: str
    contender: Run
    stock: Run
    reference: Run
    draws: Sequence[tuple[torch.Tensor, ...]]
    is_language: bool = False
    raised: torch.dtype | None = None  # of the reference's floating-point inputs; None: as they are


@dataclass(slots=True)
class _Tokens:
    """Counts over all language scenarios."""

    num: int = 0
    differ: int = 0  # contender's most likely token is not (one of) stock's
    stock_differ: int = 0  # stock's is not the reference's


@dataclass(slots=True)
class _Errors:
    """Of one output, over all draws together: of the contender, of stock, and the reference's own size."""

    max: float = 0.0
    stock_max: float = 0.0
    square: float = 0.0
    stock_square: float = 0.0
    largest: float = 0.0
    reference_square: float = 0.0
    unit: float = 0.0  # half of the dtype's epsilon
    misplaced: int = 0  # NaN and infinities that are not where stock has them; integers that differ


def compare_outputs(trios: Sequence[Trio], min_top1_agreement: float) -> Verdict:
    """All checks of a model's scenarios.

    Args:
        trios: one per scenario; the callables take a draw's tensors and return a tensor or a tuple of them.
        min_top1_agreement: language models: least part of positions whose most likely token is stock's.
    """
    import torch

    checks: list[Check] = []
    tokens = _Tokens()
    with torch.no_grad():
        for trio in trios:
            checks += _check_scenario(trio, tokens)
    if tokens.num:
        stock_rate = tokens.stock_differ / tokens.num
        # Both may differ from the exact model's token: stock at its own rate, the contender at twice that.
        limit = max(1 - min_top1_agreement, (1 + EAGER_FACTOR) * stock_rate)
        rate = tokens.differ / tokens.num
        note = f"{tokens.differ} of {tokens.num} positions; stock differs from higher precision at {tokens.stock_differ}"
        checks.append(Check(name="top-1 disagreement", value=rate, limit=limit, passed=rate <= limit, note=note))
    return Verdict(checks=tuple(checks))


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
    """A bundle against the stock model: every scenario of the experiment, then its metric."""
    import torch

    from autokernel.profiling.workload import load_model

    torch.compiler.reset()
    model = load_model(loaded, device)
    higher = torch.float64 if loaded.experiment.model.dtype == "float32" else torch.float32
    reference = copy.deepcopy(model).to(higher)
    trios = [_trio(loaded, bundle, name, model, reference, higher, device, seed) for name in loaded.experiment.scenarios]
    verdict = compare_outputs(trios, loaded.experiment.validation.min_top1_agreement)
    del trios, reference
    if loaded.experiment.validation.eval is None:
        return verdict, ()
    return verdict, (_eval(loaded, bundle, model, device, seed),)


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
    from autokernel.evaluate.end_to_end import BUNDLE, Contender, build_program, prepare

    scenario = loaded.experiment.scenarios[name]
    # One program each: a KV cache is state.
    tuned, stock, raised = (build_program(loaded, m, name, device, seed) for m in (model, model, reference))
    prepared = prepare(Contender(name=BUNDLE, bundle=bundle), tuned)
    is_language = not isinstance(scenario, CallScenario)
    num_draws = min(_MAX_DRAWS, max(_NUM_DRAWS, _NUM_POSITIONS // tuned.inputs[0].numel())) if is_language else _NUM_DRAWS
    return Trio(
        name=name,
        contender=_resetting(tuned, prepared.forward),
        stock=_resetting(stock, stock.module),
        reference=_resetting(raised, raised.module),
        draws=[tuned.fresh_inputs(seed + 1 + draw) for draw in range(num_draws)],
        is_language=is_language,
        raised=higher,
    )


def _resetting(program: ScenarioProgram, forward: Run) -> Run:
    def run(*inputs: torch.Tensor) -> Any:
        program.reset()
        return forward(*inputs)

    return run


def _eval(loaded: LoadedExperiment, bundle: Bundle, model: torch.nn.Module, device: str, seed: int) -> EvalResult:
    import torch

    from autokernel.evaluate.end_to_end import own_code
    from autokernel.export.apply import BundleBackend
    from autokernel.profiling.language import Prefill
    from autokernel.profiling.metric import load_metric

    metric = load_metric(loaded, model, device)
    module = Prefill(model).eval() if metric.batch else model
    compiled = torch.compile(own_code(module), backend=BundleBackend(bundle), dynamic=False)
    return compare_metric(metric, module, compiled, seed=seed)


def _check_scenario(trio: Trio, tokens: _Tokens) -> Iterator[Check]:
    errors: list[_Errors] = []
    kl, kl_stock, num = 0.0, 0.0, 0
    for inputs in trio.draws:
        # Before the contender runs: it must not be able to reach what it is judged by.
        exact = _tensors(trio.reference(*(_raise(x, trio.raised) for x in inputs)))
        own = [tensor.clone() for tensor in _tensors(trio.stock(*inputs))]
        given = [tensor.clone() for tensor in inputs]
        outputs = _tensors(trio.contender(*inputs))
        problem = _mismatch(outputs, own) or _changed(inputs, given)
        if problem:
            yield Check(name=f"{trio.name}: outputs", value=1, limit=0, passed=False, note=problem)
            return
        errors = errors or [_Errors() for _ in own]
        for total, out, stock, reference in zip(errors, outputs, own, exact, strict=True):
            _measure(total, out, stock, reference)
        if trio.is_language:
            _count_tokens(tokens, outputs[0], own[0], exact[0])
            kl += _divergence(exact[0], outputs[0])
            kl_stock += _divergence(exact[0], own[0])
            num += 1
    for number, total in enumerate(errors):
        yield from _budget(trio.name if len(errors) == 1 else f"{trio.name}[{number}]", total)
    if num:
        limit = EAGER_FACTOR**2 * kl_stock / num + _KL_FLOOR
        note = f"mean over positions, in nats; stock's own is {kl_stock / num:.3g}"
        yield Check(name=f"{trio.name}: KL divergence", value=kl / num, limit=limit, passed=kl / num <= limit, note=note)


def _budget(name: str, errors: _Errors) -> Iterator[Check]:
    """The checks of one output, with the limits of `evaluate.budget`."""
    yield Check(
        name=f"{name}: misplaced",
        value=errors.misplaced,
        limit=0,
        passed=errors.misplaced == 0,
        note="integers that differ, NaN and infinities that are not where stock has them",
    )
    limit = EAGER_FACTOR * errors.stock_max + errors.unit * errors.largest
    note = f"stock's own {errors.stock_max:.3g}"
    yield Check(name=f"{name}: max error", value=errors.max, limit=limit, passed=errors.max <= limit, note=note)
    scale = math.sqrt(errors.reference_square) or 1.0
    norm, stock = math.sqrt(errors.square) / scale, math.sqrt(errors.stock_square) / scale
    limit = EAGER_FACTOR * stock + errors.unit / 4
    note = f"relative to the norm of the outputs; stock's own {stock:.3g}"
    yield Check(name=f"{name}: norm of error", value=norm, limit=limit, passed=norm <= limit, note=note)


def _measure(total: _Errors, out: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor) -> None:
    """Add one draw's errors of one output."""
    import torch

    if not stock.dtype.is_floating_point:
        total.misplaced += int((out != stock).sum())
        return
    finite = torch.isfinite(stock)
    total.misplaced += int(((torch.isfinite(out) != finite) | (~finite & ~torch.isclose(out, stock, equal_nan=True))).sum())
    counted = finite & torch.isfinite(reference) & torch.isfinite(out)
    exact = torch.where(counted, reference, 0).double()
    error = torch.where(counted, out, 0).double() - exact
    stock_error = torch.where(counted, stock, 0).double() - exact
    total.max = max(total.max, error.abs().max().item())
    total.stock_max = max(total.stock_max, stock_error.abs().max().item())
    total.square += error.square().sum().item()
    total.stock_square += stock_error.square().sum().item()
    total.largest = max(total.largest, exact.abs().max().item())
    total.reference_square += exact.square().sum().item()
    total.unit = torch.finfo(stock.dtype).eps / 2


def _count_tokens(tokens: _Tokens, out: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor) -> None:
    picked = out.argmax(dim=-1, keepdim=True)
    best = stock.max(dim=-1, keepdim=True).values
    tokens.num += picked.numel()
    # In a 16-bit dtype several tokens may share the largest logit: any of them is stock's.
    tokens.differ += int((stock.gather(-1, picked) < best).sum())
    exact = reference.argmax(dim=-1, keepdim=True)
    tokens.stock_differ += int((stock.gather(-1, exact) < best).sum())


def _divergence(reference: torch.Tensor, out: torch.Tensor) -> float:
    """Mean KL divergence of the next-token distributions, in nats."""
    import torch

    exact, other = reference.double().log_softmax(-1), out.double().log_softmax(-1)
    return max(0.0, torch.nn.functional.kl_div(other, exact, log_target=True, reduction="none").sum(-1).mean().item())


def _tensors(value: Any) -> list[torch.Tensor]:
    import torch

    return [value] if isinstance(value, torch.Tensor) else list(value)


def _raise(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.dtype.is_floating_point else tensor


def _mismatch(outputs: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> str:
    """What differs before any value is looked at; empty if nothing."""
    if len(outputs) != len(own):
        return f"{len(outputs)} outputs, stock has {len(own)}"
    for i, (out, stock) in enumerate(zip(outputs, own, strict=True)):
        mine, theirs = (tuple(out.shape), out.dtype, out.device), (tuple(stock.shape), stock.dtype, stock.device)
        if mine != theirs:
            return f"output {i} is {mine}, stock's is {theirs}"
    return ""


def _changed(inputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> str:
    import torch

    changed = [i for i, (now, before) in enumerate(zip(inputs, given, strict=True)) if not torch.equal(now, before)]
    return f"inputs {changed} were changed" if changed else ""


def _worsening(metric: Metric, stock: list[float], other: list[float], seed: int) -> tuple[float, float]:
    """Relative worsening and the bad end of its interval; infinite where the contender's metric is not finite."""
    if len(other) != len(stock) or not all(map(math.isfinite, other)):
        return math.inf, math.inf
    if metric.logarithmic:
        # The ratio of two perplexities is the exponential of the mean difference of losses.
        ratios = [1 + b - a for a, b in zip(stock, other, strict=True)]
        mean, low, high = (math.expm1(x) for x in paired_relative_difference([1.0] * len(stock), ratios, seed=seed))
    else:
        mean, low, high = paired_relative_difference(stock, other, seed=seed)
    return (-mean, -low) if metric.higher_is_better else (mean, high)
