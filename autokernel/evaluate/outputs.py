"""Outputs of a whole model against those of the stock model and of one in higher precision, by the error budget.

The budget is the kernels': the contender's error may be twice that of stock PyTorch in the model's own dtype, over all draws
of a scenario's inputs together. Tokens and divergence, for language models, follow the same rule (a divergence grows with
the square of the error). Where a scenario returns tokens, they are judged by the logits that stock and reference have for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.evaluate.budget import EAGER_FACTOR, shortfall
from autokernel.records import Check, Record, Verdict

if TYPE_CHECKING:
    import torch

Run = Callable[..., Any]
Outputs = tuple[Sequence["torch.Tensor"], Sequence["torch.Tensor"]]
_KL_FLOOR = 1e-7
_PIECE = 1 << 27  # elements of an output that are compared at a time: some ten copies of them, in float64


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioCheck(Record):
    """Is one scenario still the same with a bundle? Checks that stand alone, and counts of tokens for the one that does not."""

    checks: tuple[Check, ...]
    num_tokens: int = 0
    num_differ: int = 0  # the contender's most likely token is not (one of) stock's
    num_stock_differ: int = 0  # stock's is not the reference's


@dataclass(frozen=True, slots=True, kw_only=True)
class Trio:
    """One scenario run in three ways on the same inputs: as tuned, stock, and in higher precision.

    With `choose` the contender returns tokens, behind their logits or alone, and stock and reference the logits that they are
    chosen from; `choose` is how stock would.
    """

    name: str
    contender: Run
    stock: Run
    reference: Run
    draws: Sequence[tuple[torch.Tensor, ...]]
    is_language: bool = False
    choose: Callable[[torch.Tensor], Any] | None = None
    raised: torch.dtype | None = None  # of the reference's floating-point inputs; None: as they are
    max_abs_error: float | None = None  # how far the contender may be from stock itself


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
    difference: float = 0.0  # the contender's largest, from stock
    misplaced: int = 0  # NaN and infinities that are not where stock has them; integers that differ
    missing: float = 0.0  # what the chosen tokens' logits lack to the largest


def compare_outputs(trios: Sequence[Trio], min_top1_agreement: float) -> Verdict:
    """All checks of a model's scenarios.

    Args:
        trios: one per scenario; the callables take a draw's tensors and return a tensor or a tuple of them.
        min_top1_agreement: language models: least part of positions whose most likely token is stock's.
    """
    return verdict_of([check_trio(trio) for trio in trios], min_top1_agreement)


def check_trio(trio: Trio) -> ScenarioCheck:
    """One scenario's own checks."""
    import torch

    tokens = _Tokens()
    with torch.no_grad():
        checks = tuple(_check_scenario(trio, tokens))
    return ScenarioCheck(checks=checks, num_tokens=tokens.num, num_differ=tokens.differ, num_stock_differ=tokens.stock_differ)


def verdict_of(scenarios: Sequence[ScenarioCheck], min_top1_agreement: float) -> Verdict:
    """All checks together. Tokens are counted over all scenarios, since each has few."""
    checks = [check for scenario in scenarios for check in scenario.checks]
    num = sum(scenario.num_tokens for scenario in scenarios)
    if num:
        differ, stock_differ = (sum(getattr(s, name) for s in scenarios) for name in ("num_differ", "num_stock_differ"))
        # Both may differ from the exact model's token: stock at its own rate, the contender at twice that.
        limit = max(1 - min_top1_agreement, (1 + EAGER_FACTOR) * stock_differ / num)
        note = f"{differ} of {num} positions; stock differs from higher precision at {stock_differ}"
        rate = differ / num
        checks.append(Check(name="top-1 disagreement", value=rate, limit=limit, passed=rate <= limit, note=note))
    return Verdict(checks=tuple(checks))


def difference_from(draws: Iterable[Outputs]) -> tuple[float, str]:
    """(actual outputs, eager's) of each draw -> (norm of the difference over eager's norm, what is wrong besides)."""
    import torch

    square = scale = 0.0
    for actual, expected in draws:
        if [(a.shape, a.dtype) for a in actual] != [(e.shape, e.dtype) for e in expected]:
            return math.inf, "outputs have other shapes or dtypes than eager's"
        for mine, theirs in zip(actual, expected, strict=True):
            if not theirs.dtype.is_floating_point:
                if not torch.equal(mine, theirs):
                    return math.inf, "integer outputs differ from eager's"
                continue
            if not torch.equal(torch.isfinite(mine), torch.isfinite(theirs)):
                return math.inf, "NaN or infinities are not where eager has them"
            finite = torch.isfinite(theirs)
            kept = torch.where(finite, theirs, 0).float()
            square += float((torch.where(finite, mine, 0).float() - kept).norm()) ** 2
            scale += float(kept.norm()) ** 2
    return math.sqrt(square / scale) if scale else math.sqrt(square), ""


def missing_of_tokens(draws: Iterable[Outputs], choose: Callable[[torch.Tensor], Any]) -> tuple[float, str]:
    """(what was chosen, eager's logits) of each draw -> (how far it is from eager's, what is wrong besides).

    That is what the tokens' logits lack to the largest, and what those returned with them are from eager's.

    Args:
        draws: tokens, behind their logits or alone; the logits.
        choose: how eager takes them from logits.
    """
    worst = 0.0
    for actual, (logits,) in draws:
        if _mismatch(actual, _tensors(choose(logits))):
            return math.inf, "outputs have other shapes or dtypes than eager's"
        *values, chosen = actual
        found = shortfall(chosen, logits)
        if found.misplaced:
            return math.inf, "tokens are none of the vocabulary, or not where eager's logits are finite"
        worst = max(worst, found.max)
        for value in values:
            own, errors = logits.gather(-1, chosen), _Errors()
            _measure(errors, value, own, own)
            if errors.misplaced:
                return math.inf, "NaN or infinities are not where eager has them"
            worst = max(worst, errors.max)
    return worst, ""


def _check_scenario(trio: Trio, tokens: _Tokens) -> Iterator[Check]:
    errors: list[_Errors] = []
    kl, kl_stock, num = 0.0, 0.0, 0
    for inputs in trio.draws:
        # Before the contender runs: it must not be able to reach what it is judged by.
        exact = _tensors(trio.reference(*(_raise(x, trio.raised) for x in inputs)))
        own = [tensor.clone() for tensor in _tensors(trio.stock(*inputs))]
        given = [tensor.clone() for tensor in inputs]
        outputs = _tensors(trio.contender(*inputs))
        problem = _mismatch(outputs, own if trio.choose is None else _tensors(trio.choose(own[0]))) or _changed(inputs, given)
        if problem:
            yield Check(name=f"{trio.name}: outputs", value=1, limit=0, passed=False, note=problem)
            return
        errors = errors or [_Errors() for _ in outputs]
        if trio.choose is not None:
            _measure_tokens(errors, tokens, outputs, own[0], exact[0])
            continue
        for total, *tensors in zip(errors, outputs, own, exact, strict=True):
            for out, stock, reference in _pieces(*tensors):
                _measure(total, out, stock, reference)
        if trio.is_language:
            for out, stock, reference in _pieces(outputs[0], own[0], exact[0]):
                _count_tokens(tokens, out, stock, reference)
                part = out.numel() / outputs[0].numel()
                mine, theirs = _divergences(reference, out, stock)
                kl, kl_stock = kl + part * mine, kl_stock + part * theirs
            num += 1
    if trio.choose is not None:
        yield from _token_budgets(trio.name, errors)
        return
    for number, total in enumerate(errors):
        name = trio.name if len(errors) == 1 else f"{trio.name}[{number}]"
        yield from _budget(name, total)
        if trio.max_abs_error is not None:
            passed = total.difference <= trio.max_abs_error
            note = "the experiment's max_abs_error"
            yield Check(name=f"{name}: from eager", value=total.difference, limit=trio.max_abs_error, passed=passed, note=note)
    if num:
        limit = EAGER_FACTOR**2 * kl_stock / num + _KL_FLOOR
        note = f"mean over positions, in nats; stock's own is {kl_stock / num:.3g}"
        yield Check(name=f"{trio.name}: KL divergence", value=kl / num, limit=limit, passed=kl / num <= limit, note=note)


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Large tensors of equal shape in pieces of all but their last dimension; small ones as they are."""
    import torch

    size = tensors[0].numel()
    if size <= _PIECE:
        yield tensors
        return
    width = tensors[0].shape[-1]
    yield from zip(*(torch.split(tensor.reshape(-1, width), max(1, _PIECE // width)) for tensor in tensors), strict=True)


def _budget(name: str, errors: _Errors) -> Iterator[Check]:
    """The checks of one output, with the limits of `evaluate.budget`."""
    yield Check(
        name=f"{name}: misplaced",
        value=errors.misplaced,
        limit=0,
        passed=errors.misplaced == 0,
        note="integers that differ, NaN and infinities that are not where stock has them",
    )
    limit = _limit(errors)
    note = f"stock's own {errors.stock_max:.3g}"
    yield Check(name=f"{name}: max error", value=errors.max, limit=limit, passed=errors.max <= limit, note=note)
    scale = math.sqrt(errors.reference_square) or 1.0
    norm, stock = math.sqrt(errors.square) / scale, math.sqrt(errors.stock_square) / scale
    limit = EAGER_FACTOR * stock + errors.unit / 4
    note = f"relative to the norm of the outputs; stock's own {stock:.3g}"
    yield Check(name=f"{name}: norm of error", value=norm, limit=limit, passed=norm <= limit, note=note)


def _limit(errors: _Errors) -> float:
    """How large an element's error may be: twice stock's largest, and half a unit in the last place of the largest element."""
    return EAGER_FACTOR * errors.stock_max + errors.unit * errors.largest


def _token_budgets(name: str, errors: Sequence[_Errors]) -> Iterator[Check]:
    """As of indices that a kernel chooses: the exact logit is below the largest by at most twice the budget of a logit.

    The logits that are returned with them, those that the contender has, keep to that budget itself.
    """
    logits, *values = errors
    limit = _limit(logits)
    value = math.inf if logits.misplaced else logits.missing
    note = f"what the tokens' logits lack to the largest; stock's logits err by up to {logits.stock_max:.3g}"
    yield Check(name=f"{name}: chosen logits", value=value, limit=2 * limit, passed=value <= 2 * limit, note=note)
    for own in values:
        value = math.inf if own.misplaced else own.max
        note = f"what the returned logits are from those of their tokens; stock's err by up to {logits.stock_max:.3g}"
        yield Check(name=f"{name}: returned logits", value=value, limit=limit, passed=value <= limit, note=note)


def _measure_tokens(
    totals: Sequence[_Errors], tokens: _Tokens, outputs: Sequence[torch.Tensor], stock: torch.Tensor, reference: torch.Tensor
) -> None:  # fmt: skip
    """Add one draw's tokens and stock's errors of their logits; and those of the logits that come with the tokens."""
    *values, chosen = outputs
    logits, *of_values = totals
    _measure(logits, stock, stock, reference)
    found = shortfall(chosen, reference)
    logits.missing, logits.misplaced = max(logits.missing, found.max), logits.misplaced + found.misplaced
    if found.misplaced:
        return
    picked = chosen.reshape(*stock.shape[:-1], -1)
    _count_picked(tokens, picked[..., :1], stock, reference)
    for total, value in zip(of_values, values, strict=True):
        _measure(total, value.reshape(picked.shape), stock.gather(-1, picked), reference.gather(-1, picked))


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
    total.difference = max(total.difference, (error - stock_error).abs().max().item())
    total.max = max(total.max, error.abs().max().item())
    total.stock_max = max(total.stock_max, stock_error.abs().max().item())
    total.square += error.square().sum().item()
    total.stock_square += stock_error.square().sum().item()
    total.largest = max(total.largest, exact.abs().max().item())
    total.reference_square += exact.square().sum().item()
    total.unit = torch.finfo(stock.dtype).eps / 2


def _count_tokens(tokens: _Tokens, out: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor) -> None:
    _count_picked(tokens, out.argmax(dim=-1, keepdim=True), stock, reference)


def _count_picked(tokens: _Tokens, picked: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor) -> None:
    """As `_count_tokens`; `picked` are the contender's, with a last dimension of one."""
    best = stock.max(dim=-1, keepdim=True).values
    tokens.num += picked.numel()
    # In a 16-bit dtype several tokens may share the largest logit: any of them is stock's.
    tokens.differ += int((stock.gather(-1, picked) < best).sum())
    exact = reference.argmax(dim=-1, keepdim=True)
    tokens.stock_differ += int((stock.gather(-1, exact) < best).sum())


def _divergences(reference: torch.Tensor, out: torch.Tensor, stock: torch.Tensor) -> tuple[float, float]:
    """Mean KL divergence of the contender's next-token distributions, and of stock's, from the exact ones, in nats.

    What is never the next token counts nothing: logits of -inf, which pad a vocabulary. Nor does a position where stock or the
    exact model has no distribution. Where the contender alone has none, its divergence is infinite.
    """
    import torch

    exact = reference.double().log_softmax(-1)
    chance = exact.exp()

    def of(logits: torch.Tensor) -> torch.Tensor:
        return torch.where(chance == 0, 0, chance * (exact - logits.double().log_softmax(-1))).sum(-1)

    own = of(stock)
    counted = torch.isfinite(own)
    if not counted.any():
        return 0.0, 0.0
    mine = of(out)[counted].mean().item()
    return math.inf if math.isnan(mine) else max(0.0, mine), max(0.0, own[counted].mean().item())


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


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal, NaN to NaN."""
    return bool(((first == second) | ((first != first) & (second != second))).all())  # noqa: PLR0124


def _changed(inputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> str:
    changed = [i for i, (now, before) in enumerate(zip(inputs, given, strict=True)) if not _same(now, before)]
    return f"inputs {changed} were changed" if changed else ""
