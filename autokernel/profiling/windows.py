"""The cache of a layer that sees a window of the last tokens alone, behind a context that fills it."""

from __future__ import annotations

import functools
from typing import Any

import torch


def full_window(size: int) -> Any:
    """A layer of transformers' static cache for a step that is repeated: the new token takes the place of the oldest one.

    The oldest one lies first, as reading a prompt leaves it; where keys lie makes no difference to attention, which sees all
    of them. transformers' own layer moves all others instead: another step each time, which reads and writes the whole window.

    Args:
        size: of the window, in tokens; the context has as many at least.
    """
    return _layer_class()(max_cache_len=size, sliding_window=size)


@functools.cache
def _layer_class() -> type[Any]:
    """Made when it is asked for: importing transformers takes seconds."""
    from transformers.cache_utils import StaticSlidingWindowLayer

    class FullWindow(StaticSlidingWindowLayer):  # type: ignore[misc]
        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if self.cumulative_length_int < self.max_cache_len:  # the prompt is read
                return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
            oldest = torch.zeros(1, dtype=torch.long, device=self.keys.device)
            self.keys.index_copy_(2, oldest, key_states)
            self.values.index_copy_(2, oldest, value_states)
            return self.keys, self.values

    return FullWindow
