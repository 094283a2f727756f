"""A model in another dtype, its quantized layers as they are: their numbers mean nothing without the scales they came with."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def is_quantized(module: nn.Module) -> bool:
    """Whether a module itself, not one inside of it, holds 8-bit numbers: floating-point ones, or signed integers."""
    own = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return any(str(tensor.dtype).startswith(("torch.float8", "torch.int8")) for tensor in own)


def convert(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What `model.to(dtype)` does, in place, but quantized modules keep all of their parameters and buffers.

    Args:
        model: is changed.
        dtype: of the floating-point parameters and buffers of every other module.
    """
    for module in model.modules():
        if not is_quantized(module):
            module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)  # type: ignore[no-untyped-call]
    return model
