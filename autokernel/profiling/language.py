"""What a language model does in one step: read a prompt, or produce one token with a static KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autokernel.errors import WorkloadError
from autokernel.profiling.precision import is_quantized
from autokernel.profiling.windows import full_window

_CACHE_ROOM = 16  # tokens behind the context
_MAX_PROMPTS = 8  # distinct contexts in a cache; the rows of a larger batch repeat them
_EXACT_ROWS = 8  # rows of a step in higher precision at a time
_WINDOW = "StaticSlidingWindowLayer"
_KINDS = ("StaticLayer", _WINDOW, "FullWindow")  # of cache layers that a step can be repeated on


class Prefill(nn.Module):
    """Token ids of `[batch, length]` to logits of `[batch, length, vocabulary]`; keeps no cache.

    With `last_only` the logits are those of the last position, `[batch, 1, vocabulary]`, as a server computes them.
    """

    def __init__(self, model: nn.Module, *, last_only: bool = False) -> None:
        super().__init__()
        self.model = model
        self._keep = _keep_last(model) if last_only else {}
        if last_only and not self._keep:
            raise WorkloadError(f"prefill: {type(model).__name__} computes logits of all positions; use `logits: all`")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False, **self._keep)[0]  # type: ignore[no-any-return]


Choose = Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Tokens `[batch, 1]` of logits `[batch, 1, vocabulary]`: greedy sampling."""
    return logits.argmax(-1)


def top(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """The largest logits of `[batch, 1, vocabulary]` and their tokens, `[batch, 1, count]` each, the largest first."""
    return tuple(logits.topk(count))


class Decode(nn.Module):
    """One token per sequence behind `context` others: ids and positions of `[batch, 1]` to logits of `[batch, 1, vocabulary]`,
    or to what `choose` takes of them.

    transformers' static cache counts its own length up with each call. The step starts by setting the counters, which are
    tensors, from the positions: every call is the same step, replays of a CUDA graph included, and overwrites the one slot
    that the call before wrote. So it is where a sliding window is full (`windows.full_window`).
    """

    def __init__(self, model: nn.Module, prompt: torch.Tensor, *, choose: Choose | None = None) -> None:
        """Fill the cache by reading the prompt; a batch of more than 8 has the keys and values of the first 8 prompts in turn.

        So they are what this model computes, distinct in memory, and 128 x 2,048 tokens take no longer than 8 x 2,048.

        Args:
            model: a causal language model of transformers.
            prompt: `[batch, context]` token ids.
            choose: what a step returns instead of its logits: `likeliest`, or `top` with a count.

        Raises:
            WorkloadError: a layer's state is not a plain window of keys and values.
        """
        super().__init__()
        self.model, self.choose = model, choose
        batch, self.context = prompt.shape
        self.num_slots = -(-(self.context + 1 + _CACHE_ROOM) // 16) * 16
        self.cache = self._new_cache()
        self._check_layers()
        read = self.cache if batch <= _MAX_PROMPTS else self._new_cache()
        with torch.no_grad():
            model(input_ids=prompt[:_MAX_PROMPTS], past_key_values=read, use_cache=True, **_keep_last(model))
            if read is not self.cache:
                _spread(read, self.cache, batch)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        logits = self.logits(tokens, positions)
        return logits if self.choose is None else self.choose(logits)

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Of the next token, `[batch, 1, vocabulary]`."""
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

    def exact(self, tokens: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same step on the same cache, both raised to `dtype`: logits to judge others by.

        A few rows at a time: the whole cache in twice its size, beside itself, is more than a GPU has.
        """
        parts = []
        with torch.no_grad(), raised(self.model, dtype):
            for start in range(0, len(tokens), _EXACT_ROWS):
                rows = slice(start, start + _EXACT_ROWS)
                step = _on_cache(self, rows, dtype)
                parts.append(step.logits(tokens[rows], positions[rows]))
        return torch.cat(parts)

    def _new_cache(self) -> Any:
        from transformers import StaticCache

        config: Any = self.model.config
        cache = StaticCache(config=config, max_cache_len=self.num_slots)
        in_chunks = getattr(config.get_text_config(), "attention_chunk_size", None) is not None
        for number, layer in enumerate(cache.layers):
            if type(layer).__name__ == _WINDOW and layer.max_cache_len <= self.context and not in_chunks:
                cache.layers[number] = full_window(layer.max_cache_len)
        return cache

    def _check_layers(self) -> None:
        for number, layer in enumerate(self.cache.layers):
            kind = type(layer).__name__
            if kind not in _KINDS:
                raise WorkloadError(
                    f"decode: layer {number} keeps its state in a {kind}, which a step cannot be repeated on; "
                    "decode scenarios take models whose layers all have attention with plain keys and values"
                )
            if self.context + 1 > layer.max_cache_len and kind == _WINDOW:  # of attention in chunks, whose masks count places
                raise WorkloadError(
                    f"decode: context {self.context} does not fit into the chunk of layer {number}, which has "
                    f"{layer.max_cache_len} tokens: the oldest would be dropped at each step; use a context of at most "
                    f"{layer.max_cache_len - 1}"
                )


@contextmanager
def raised(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the model computes in a higher precision, from the very same weights.

    Each module's own parameters and buffers are raised for the time of its call, so that no second copy of the model is
    needed. For eager calls only: modules that use the weights of others, without calling them, keep their precision, and so
    do quantized ones.
    """
    kept: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}

    def before(module: nn.Module, _: Any) -> None:
        kept[module] = (dict(module._parameters), dict(module._buffers))
        for name, weight in kept[module][0].items():
            if weight is not None and weight.is_floating_point():
                module._parameters[name] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        for name, buffer in kept[module][1].items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)

    def after(module: nn.Module, *_: Any) -> None:
        parameters, buffers = kept.pop(module)
        module._parameters.update(parameters)
        module._buffers.update(buffers)

    owners = [m for m in model.modules() if (m._parameters or m._buffers) and not is_quantized(m)]
    handles = [handle for m in owners for handle in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(kept):  # a call that raised
            after(module)


def _keep_last(model: nn.Module) -> dict[str, int]:
    """Arguments that make a model compute the logits of the last position only."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _spread(source: Any, target: Any, batch: int) -> None:
    """Fill a cache for `batch` rows with those of a smaller one, in turn."""
    for small, large in zip(source.layers, target.layers, strict=True):
        # an empty row says shape, dtype and device; expanded, since only its sizes are looked at
        large.lazy_initialization(*(state[:1, :, :0].expand(batch, -1, -1, -1) for state in (small.keys, small.values)))
        for state, full in ((small.keys, large.keys), (small.values, large.values)):
            for start in range(0, batch, len(state)):
                full[start : start + len(state)].copy_(state[: batch - start])
        large.cumulative_length.copy_(small.cumulative_length)
        if hasattr(small, "cumulative_length_int"):
            large.cumulative_length_int = small.cumulative_length_int


def _on_cache(step: Decode, rows: slice, dtype: torch.dtype) -> Decode:
    """A step on a copy of some rows of another's cache, in another dtype."""
    part = Decode.__new__(Decode)
    nn.Module.__init__(part)
    part.model, part.context, part.num_slots = step.model, step.context, step.num_slots
    part.cache = part._new_cache()
    for own, layer in zip(part.cache.layers, step.cache.layers, strict=True):
        keys, values = layer.keys[rows].to(dtype), layer.values[rows].to(dtype)
        own.lazy_initialization(keys, values)
        own.keys.copy_(keys)
        own.values.copy_(values)
    return part
