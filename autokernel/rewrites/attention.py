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


def flash(problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """FlashAttention 2, on a GPU. It takes no mask, and heads that share keys as they are."""
    import torch

    q, k, v = inputs
    scalars = dict(problem.scalars)
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, bool(scalars.get("causal", False)), False, scale=float(scalars["scale"])
    )
    return (found[0],)


def cudnn(problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """cuDNN's kernel, on a GPU. The mask is added: booleans become 0 and -inf."""
    import torch

    q, k, v, *mask = inputs
    scalars = dict(problem.scalars)
    bias = _added(mask[0], q) if mask else None
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    causal = bool(scalars.get("causal", False))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, bias, False, 0.0, causal, False, scale=float(scalars["scale"])
    )
    return (found[0],)


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


def _added(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    import torch

    if mask.dtype.is_floating_point:
        return mask.to(q.dtype)
    return torch.where(mask, torch.zeros((), dtype=q.dtype, device=q.device), -torch.inf)


ATTENTION: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "matmul": partial(matmul, wide=False),
    "matmul_fp32": partial(matmul, wide=True),
    "reduction": reduction,
    "library_fp32": library_fp32,
    "flash": flash,
    "cudnn": cudnn,
}
