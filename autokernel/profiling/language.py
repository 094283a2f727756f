"""What a language model does in one step: read a prompt, or produce one token with a static KV cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from autokernel.errors import WorkloadError

_CACHE_ROOM = 16  # tokens behind the context


class Prefill(nn.Module):
    """Token ids of `[batch, length]` to logits of `[batch, length, vocabulary]`; keeps no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False)[0]  # type: ignore[no-any-return]


class Decode(nn.Module):
    """One token per sequence behind `context` others: ids and positions of `[batch, 1]` to logits of `[batch, 1, vocabulary]`.

    transformers' static cache counts its own length up with each call. The step starts by setting the counters, so that
    every call is the same step: it overwrites the one slot that the call before wrote.
    """

    def __init__(self, model: nn.Module, prompt: torch.Tensor) -> None:
        """Fill the cache.

        Args:
            model: a causal language model of transformers.
            prompt: `[batch, context]` token ids.

        Raises:
            WorkloadError: a layer's state is not a plain window of keys and values.
        """
        from transformers import StaticCache

        super().__init__()
        self.model = model
        self.context = prompt.shape[1]
        config: Any = model.config
        num_slots = -(-(self.context + 1 + _CACHE_ROOM) // 16) * 16
        self.cache = StaticCache(config=config, max_cache_len=num_slots)
        self._check_layers()
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=self.cache, use_cache=True, **keep)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(positions[0, 0])
            if hasattr(layer, "cumulative_length_int"):  # layers with a sliding window count in Python, too
                layer.cumulative_length_int = self.context
        outputs = self.model(input_ids=tokens, position_ids=positions, past_key_values=self.cache, use_cache=True)
        return outputs[0]  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Forget the slots behind the context."""
        with torch.no_grad():
            for layer in self.cache.layers:
                layer.keys[:, :, self.context :].zero_()
                layer.values[:, :, self.context :].zero_()
                layer.cumulative_length.fill_(self.context)

    def _check_layers(self) -> None:
        for number, layer in enumerate(self.cache.layers):
            kind = type(layer).__name__
            if type(layer).__name__ not in ("StaticLayer", "StaticSlidingWindowLayer"):
                raise WorkloadError(
                    f"decode: layer {number} keeps its state in a {kind}, which a step cannot be repeated on; "
                    "decode scenarios take models whose layers all have attention with plain keys and values"
                )
            if self.context + 1 > layer.max_cache_len:
                raise WorkloadError(
                    f"decode: context {self.context} does not fit into the sliding window of layer {number}, which has "
                    f"{layer.max_cache_len} tokens: the oldest would be dropped at each step; use a context of at most "
                    f"{layer.max_cache_len - 1}"
                )
