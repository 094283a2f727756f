"""Forecasts of synthetic series, scored quantile by quantile: a metric for models that forecast time series."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch


def quantile_losses(
    forward: Callable[..., Any],
    quantiles: Sequence[float],
    *,
    batch: int = 1,
    length: int = 512,
    horizon: int = 64,
    series: int = 16,
    context: str = "context",
    forecast: str = "quantile_preds",
    arguments: dict[str, Any] | None = None,
    device: str = "cpu",
) -> list[float]:
    """The weighted quantile loss of each quantile over all series.

    Args:
        forward: the model; returns something whose attribute `forecast` is `[batch, quantiles, at least horizon]`.
        quantiles: levels that the model forecasts, in (0, 1).
        batch: series per call. With `length` as in the experiment's scenarios, or stock code is what is judged.
        length: known values per series.
        horizon: values to be forecast.
        series: how many there are; a multiple of `batch`.
        context: the argument that takes the known values, `[batch, length]`.
        forecast: the attribute that holds the forecast.
        arguments: of the model, besides.
        device: "cpu" or "cuda".
    """
    if series % batch:
        raise ValueError(f"series must be a multiple of batch, not {series} of {batch}")
    levels = torch.tensor(quantiles, dtype=torch.float64).view(1, -1, 1)
    known, future = _series(series, length, horizon)
    losses, scale = torch.zeros(len(quantiles), dtype=torch.float64), 0.0
    for start in range(0, series, batch):
        with torch.no_grad():
            result = forward(**{context: known[start : start + batch].to(device), **(arguments or {})})
        predicted = getattr(result, forecast)[:, :, :horizon].double().cpu()
        target = future[start : start + batch].double().unsqueeze(1)
        error = target - predicted
        losses += torch.maximum(levels * error, (levels - 1) * error).sum(dim=(0, 2))
        scale += target.abs().sum().item()
    return (2 * losses / scale).tolist()  # type: ignore[no-any-return]


def _series(number: int, length: int, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Known and future values of series with a trend, two seasons and noise, some of the known ones missing."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(length + horizon, dtype=torch.float32)
    numbers = torch.rand(number, 6, 1, generator=generator)
    slope, period, phase, amplitude, second, noise = numbers.unbind(1)
    values = (slope - 0.5) * time / length
    values = values + (0.5 + amplitude) * torch.sin(2 * math.pi * (time / (12 + 36 * period) + phase))
    values = values + 0.5 * second * torch.sin(2 * math.pi * time / 7)
    values = values + 0.3 * noise * torch.randn(number, length + horizon, generator=generator)
    known = values[:, :length].clone()
    known[torch.rand(known.shape, generator=generator) < 0.05] = float("nan")
    return known, values[:, length:].clone()
