"""Attention written out, and by each of the library's kernels.

Which kernel `scaled_dot_product_attention` takes is decided by rules that know neither the sizes nor the machine: on a CPU its
bf16 kernel is several times slower than two products in fp32, and on a GPU a mask rules out the fast ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from autokernel.ops.attention import repeat_heads
from autokernel.records import Problem

if TYPE_CHECKING:
    import torch


def matmul(problem: Problem, *inputs: torch.Tensor, wide: bool) -> tuple[torch.Tensor, ...]:
    """Two batched products with a softmax between, which is computed in fp32. `wide`: the products as well.

    Heads that share keys are rows of one product: nothing is repeated.
    """
    import torch

    q, k, v, *mask = inputs
    batch, heads, rows, _ = q.shape
    groups = k.shape[1]
    product = torch.float32 if wide else q.dtype
    left = q.to(product).reshape(batch, groups, heads // groups * rows, q.shape[3])
    scores = torch.matmul(left, k.to(product).transpose(-1, -2)).float().reshape(batch, heads, rows, k.shape[2])
    weights = _softmax(problem, scores, mask[0] if mask else None).to(product)
    out = torch.matmul(weights.reshape(batch, groups, heads // groups * rows, k.shape[2]), v.to(product))
    return (out.reshape(batch, heads, rows, v.shape[3]).to(q.dtype),)


def reduction(problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Both products as sums in fp32, which Inductor fuses with the rest; for few rows of q."""
    q, k, v, *mask = inputs
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = (q.float().unsqueeze(-2) * k.float().unsqueeze(-3)).sum(-1)
    weights = _softmax(problem, scores, mask[0] if mask else None)
    return ((weights.unsqueeze(-1) * v.float().unsqueeze(-3)).sum(-2).to(q.dtype),)


def library_fp32(problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The library's kernel for fp32."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, *mask = inputs
    scalars = dict(problem.scalars)
    bias = mask[0] if mask else None
    if bias is not None and bias.dtype.is_floating_point:
        bias = bias.float()
    k, v = (repeat_heads(x.float(), q.shape[1]) for x in (k, v))
    causal, scale = bool(scalars.get("causal", False)), float(scalars["scale"])
    return (scaled_dot_product_attention(q.float(), k, v, attn_mask=bias, is_causal=causal, scale=scale).to(q.dtype),)


def grouped(problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The library's choice, with the heads that share keys as rows of one head: keys and values are read once, not copied."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, *mask = inputs
    batch, heads, rows, dim = q.shape
    groups, length = k.shape[1:3]
    stacked = q.reshape(batch, groups, heads // groups * rows, dim)
    bias = mask[0] if mask else None
    if dict(problem.scalars).get("causal"):
        seen = torch.ones(1, 1, rows, length, dtype=torch.bool, device=q.device).tril()
        bias = seen if bias is None else bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, -torch.inf)
    if bias is not None:
        bias = bias.to(q.dtype) if bias.dtype.is_floating_point else bias
        if bias.shape[1] > 1 or bias.shape[2] > 1:
            wide = bias.expand(bias.shape[0], heads, rows, bias.shape[3])
            bias = wide.reshape(bias.shape[0], groups, heads // groups * rows, bias.shape[3])
        bias = bias.expand(*bias.shape[:3], length)
    scale = float(dict(problem.scalars)["scale"])
    out = scaled_dot_product_attention(stacked, k, v, attn_mask=bias, scale=scale)
    return (out.reshape(batch, heads, rows, v.shape[3]),)


def flash(problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """FlashAttention 2, on a GPU. It takes no mask, and heads that share keys as they are."""
    import torch

    q, k, v = inputs
    scalars = dict(problem.scalars)
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, is_causal=bool(scalars.get("causal", False)), scale=float(scalars["scale"])
    )
    return (found[0],)


def efficient(problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The memory-efficient kernel, on a GPU, which takes fp32 as well. Without a mask; shared heads are repeated."""
    import torch

    q, k, v = inputs
    scalars = dict(problem.scalars)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, False, is_causal=bool(scalars.get("causal", False)), scale=float(scalars["scale"])
    )
    return (found[0],)


def cudnn(problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """cuDNN's kernel, on a GPU. The mask is added; -inf makes rows that see nothing NaN there, so it gets the lowest number."""
    import torch

    q, k, v, *mask = inputs
    scalars = dict(problem.scalars)
    bias, seen = None, None
    if mask:
        lowest = torch.finfo(q.dtype).min
        seen = mask[0] if not mask[0].dtype.is_floating_point else mask[0] != -torch.inf
        zero = torch.zeros((), dtype=q.dtype, device=q.device)
        numbers = zero if mask[0].dtype == torch.bool else mask[0].to(q.dtype)
        bias = torch.where(seen, numbers, lowest).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, bias, False, is_causal=bool(scalars.get("causal", False)), scale=float(scalars["scale"])
    )
    return (found[0] if seen is None else torch.where(seen.any(-1, keepdim=True), found[0], 0.0),)


def _softmax(problem: Problem, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Along the last dimension, in fp32, masked; a row that sees nothing is zero."""
    import torch

    scalars = dict(problem.scalars)
    scores = scores * float(scalars["scale"])
    if scalars.get("causal"):
        rows = torch.arange(scores.shape[-2], device=scores.device)[:, None]
        seen = torch.arange(scores.shape[-1], device=scores.device)[None] <= rows
        scores = torch.where(seen, scores, -torch.inf)
    if mask is None:
        return torch.softmax(scores, -1)
    # added, never chosen: an infinite score that is not seen is NaN in the library's kernels, which add as well
    scores = scores + (mask.float() if mask.dtype.is_floating_point else torch.where(mask, 0.0, -torch.inf))
    return torch.ops.aten._safe_softmax(scores, -1)  # type: ignore[no-any-return]


ATTENTION: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "matmul": partial(matmul, wide=False),
    "matmul_fp32": partial(matmul, wide=True),
    "reduction": reduction,
    "grouped": grouped,
    "library_fp32": library_fp32,
    "flash": flash,
    "efficient": efficient,
    "cudnn": cudnn,
}
