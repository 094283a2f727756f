"""The experiment's own quality metric, as samples that can be compared in pairs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autokernel.config import EvalSection, LoadedExperiment, PrefillScenario
from autokernel.errors import ConfigError, WorkloadError
from autokernel.profiling.corpus import load_corpus
from autokernel.profiling.functions import call_function, load_function

if TYPE_CHECKING:
    import torch
    from torch import nn

Forward = Callable[..., Any]
_TOKENS_PER_CALL = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Calling it with a forward function measures one sample per window of text (or whatever a custom metric counts).

    For the language metrics, forward takes token ids of `[batch, length]`, always of that shape, and returns logits.
    For others it is the model's own. `logarithmic` samples are compared, and reported, through their exponential.
    """

    name: str
    samples: Callable[[Forward], list[float]]
    logarithmic: bool = False
    higher_is_better: bool = False
    limit: float = math.inf
    batch: int = 0  # 0: not a language metric
    length: int = 0

    def __call__(self, forward: Forward) -> list[float]:
        """Measure.

        Raises:
            WorkloadError: it returned no samples.
        """
        samples = [float(sample) for sample in self.samples(forward)]
        if not samples:
            raise WorkloadError(f"validation.eval.metric: {self.name} returned no samples; it must return at least one number")
        return samples

    def summary(self, samples: list[float]) -> float:
        """The metric of all samples together."""
        mean = sum(samples) / len(samples)
        return math.exp(mean) if self.logarithmic else mean


def load_metric(loaded: LoadedExperiment, model: nn.Module, device: str) -> Metric:
    """The metric that the experiment names.

    Args:
        loaded: has a section `validation.eval`.
        model: says how text becomes tokens.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: there is no such section, the data cannot be read, or the function cannot be imported.
        WorkloadError: the text is too short.
    """
    section = loaded.experiment.validation.eval
    if section is None:
        raise ConfigError(f"{loaded.path}: validation.eval is not given")
    if ":" in section.metric:
        function = load_function(loaded, section.metric, "validation.eval.metric")
        arguments = dict(section.arguments)
        if "device" in inspect.signature(function).parameters:
            arguments.setdefault("device", device)
        return Metric(
            name=section.metric,
            samples=lambda forward: _list(
                call_function(function, section.metric, "validation.eval.metric", forward, **arguments), section.metric
            ),
            higher_is_better=section.higher_is_better,
            limit=section.limit,
        )
    return _language_metric(loaded, section, model, device)


def _language_metric(loaded: LoadedExperiment, section: EvalSection, model: nn.Module, device: str) -> Metric:
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ConfigError(f"validation.eval.metric: {section.metric} is for language models of transformers")
    corpus = load_corpus(loaded, config)
    batch = _batch(loaded, section.length)
    num_windows = len(corpus.tokens) // section.length // batch * batch
    if num_windows == 0:
        raise WorkloadError(
            f"validation.eval: {len(corpus.tokens)} tokens of text are less than {batch} windows of {section.length}; "
            "raise max_bytes, give more text, or lower length"
        )
    windows = corpus.tokens[: num_windows * section.length].view(-1, batch, section.length)
    in_bits = section.metric == "bits_per_byte"
    factor = 1 / math.log(2) / corpus.bytes_per_token if in_bits else 1.0
    return Metric(
        name=section.metric,
        samples=lambda forward: [factor * loss for ids in windows for loss in _losses(forward, ids.to(device))],
        logarithmic=not in_bits,
        limit=section.limit,
        batch=batch,
        length=section.length,
    )


def _batch(loaded: LoadedExperiment, length: int) -> int:
    """Windows per call: so many that a call multiplies the shapes of a prefill scenario, whose kernels are then judged."""
    for scenario in loaded.experiment.scenarios.values():
        if isinstance(scenario, PrefillScenario) and scenario.batch * scenario.length % length == 0:
            return scenario.batch * scenario.length // length
    return max(1, _TOKENS_PER_CALL // length)


def _losses(forward: Forward, ids: torch.Tensor) -> list[float]:
    """Mean cross entropy of each window, in nats per predicted token."""
    import torch

    with torch.no_grad():
        logits = forward(ids)[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(dim=1).tolist()  # type: ignore[no-any-return]


def _list(result: Any, name: str) -> list[float]:
    if not isinstance(result, (list, tuple)) or not all(isinstance(x, (int, float)) for x in result):
        raise WorkloadError(f"validation.eval.metric: {name} must return a list of numbers, not {type(result).__name__}")
    return list(result)
