"""Scaled dot-product attention: the library's call, and the repetition of keys and values where heads share them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from autokernel.ops.base import Region, Site, sites_of
from autokernel.ops.matching import is_reshape, op_name, settled, tensor_spec
from autokernel.records import DTYPE_BYTES, Problem

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node

# What `scaled_dot_product_attention` becomes in a graph, and which positional arguments follow q, k and v.
_CALLS: Mapping[str, tuple[str, ...]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": ("dropout_p", "is_causal"),
    "aten._scaled_dot_product_flash_attention": ("dropout_p", "is_causal", "return_debug_mask"),
    "aten._scaled_dot_product_efficient_attention": ("attn_bias", "compute_log_sumexp", "dropout_p", "is_causal"),
    "aten._scaled_dot_product_cudnn_attention": (
        "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask",
    ),
}  # fmt: skip
LIBRARY_CALLS: tuple[str, ...] = tuple(_CALLS)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSizes:
    """`[batch, heads, q_len, head_dim]` by `[batch, kv_heads, kv_len, head_dim]`; values are `v_dim` wide."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int


class Attention:
    """softmax(q k' * scale + mask) v.

    Inputs: q of `[B, H, Q, D]`, k of `[B, G, S, D]`, v of `[B, G, S, E]`, where H is a multiple of G (each head of k and v
    serves H / G heads of q), and a mask, if there is one, that broadcasts to `[B, H, Q, S]`: numbers that are added, or
    booleans that say what is seen. Scalars: `scale`, and `causal` where position i of q sees positions up to i alone. One
    output of `[B, H, Q, E]`, laid out as `[B, Q, H, E]`. A row that sees nothing is zero.
    """

    name = "attention"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v, *mask = inputs
        scalars = dict(problem.scalars)
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        bias = mask[0] if mask else None
        if bias is not None and bias.dtype.is_floating_point:
            bias = bias.to(q.dtype)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bool(scalars.get("causal", False)), scale=float(scalars["scale"])
        )
        return (out.transpose(1, 2).contiguous().transpose(1, 2),)

    def dims(self, problem: Problem) -> Mapping[str, int]:
        """The fields of `AttentionSizes`; `group` (heads of q for one of k), `dtype_bytes`, `has_mask`, `causal`."""
        sizes = sizes_of(problem)
        return {
            **{name: getattr(sizes, name) for name in sizes.__dataclass_fields__},
            "group": sizes.heads // sizes.kv_heads,
            "dtype_bytes": DTYPE_BYTES[problem.inputs[0].dtype],
            "has_mask": int(mask_position(problem) is not None),
            "causal": int(bool(dict(problem.scalars).get("causal", False))),
        }

    def flops(self, problem: Problem) -> int:
        """Of the two products; half of it where positions see only what is before them."""
        sizes = sizes_of(problem)
        pairs = sizes.batch * sizes.heads * sizes.q_len * sizes.kv_len
        whole = 2 * pairs * (sizes.head_dim + sizes.v_dim)
        return whole // 2 if dict(problem.scalars).get("causal") else whole

    def num_bytes(self, problem: Problem) -> int:
        """Every input read once (keys and values once for all heads that share them), the result written once."""
        sizes = sizes_of(problem)
        written = sizes.batch * sizes.heads * sizes.q_len * sizes.v_dim * DTYPE_BYTES[problem.inputs[0].dtype]
        return written + sum(spec.num_bytes for spec in problem.inputs)

    def find(self, graph: Graph, constants: frozenset[str], device: str) -> list[Site]:
        """See `Op.find`."""
        return sites_of(self.match(graph, constants, device), constants)

    def match(self, graph: Graph, constants: frozenset[str], device: str) -> list[Region]:
        """See `FusionOp.match`."""
        regions = (_region(node, device) for node in graph.nodes if op_name(node) in _CALLS)
        return [region for region in regions if region is not None]


def sizes_of(problem: Problem) -> AttentionSizes:
    """The sizes of a problem."""
    q, k, v = (spec.shape for spec in problem.inputs[:3])
    return AttentionSizes(
        batch=q[0], heads=q[1], kv_heads=k[1], q_len=q[2], kv_len=k[2], head_dim=q[3], v_dim=v[3]
    )  # fmt: skip


def mask_position(problem: Problem) -> int | None:
    """Which input is the mask, None if there is none (or the problem is no attention)."""
    return 3 if problem.op == Attention.name and len(problem.inputs) > 3 else None


def repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, G, S, D] -> [B, H, S, D]: each head H / G times, one after the other."""
    batch, groups, length, dim = x.shape
    if groups == num_heads:
        return x
    return x[:, :, None].expand(batch, groups, num_heads // groups, length, dim).reshape(batch, num_heads, length, dim)


def _region(node: Node, device: str) -> Region | None:
    """The region of a library call; None where it drops at random, has other results in use, or sizes are not known."""
    arguments = _arguments(node)
    out = next((user for user in node.users if user.args[1] == 0), None)
    if out is None or any(user is not out and user.users for user in node.users):
        return None
    q, k, v, mask = arguments["query"], arguments["key"], arguments["value"], arguments["mask"]
    if arguments["dropout_p"] or not all(_is_node(operand) for operand in (q, k, v)):
        return None
    k, repeated_k = _before_repetition(k)
    v, repeated_v = _before_repetition(v)
    if k.meta["val"].shape[1] != v.meta["val"].shape[1]:
        k, v, repeated_k, repeated_v = arguments["key"], arguments["value"], (), ()
    operands = [q, k, v, *([_what_is_seen(mask)] if mask is not None else [])]
    specs = [tensor_spec(operand) for operand in operands]
    known = [settled(spec) for spec in specs if spec is not None]
    if len(known) != len(specs) or any(len(spec.shape) != 4 for spec in known) or tensor_spec(out) is None:
        return None
    scale = arguments["scale"] if arguments["scale"] is not None else 1 / math.sqrt(known[0].shape[-1])
    causal: tuple[tuple[str, bool], ...] = (("causal", True),) if arguments["is_causal"] else ()
    problem = Problem(op=Attention.name, inputs=tuple(known), device=device, scalars=(*causal, ("scale", float(scale))))
    inner = [found for found in (*repeated_k, *repeated_v) if set(found.users) <= {*repeated_k, *repeated_v, node}]
    return Region(
        problem=problem, inputs=tuple(operands), outputs=(out,), inner=frozenset({node, out, *inner}), name_of=node
    )  # fmt: skip


def _arguments(node: Node) -> dict[str, Any]:
    names = ("query", "key", "value", *_CALLS[op_name(node)])
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {
        "query": given["query"],
        "key": given["key"],
        "value": given["value"],
        "mask": given.get("attn_mask", given.get("attn_bias")),
        "dropout_p": given.get("dropout_p", 0.0),
        "is_causal": given.get("is_causal", False),
        "scale": given.get("scale"),
    }


def _before_repetition(x: Node) -> tuple[Node, tuple[Node, ...]]:
    """What is behind `repeat_heads`, and the nodes between; the node itself where it repeats nothing.

    That is unsqueeze, expand, (clone,) reshape: `[B, G, S, D]`, `[B, G, 1, S, D]`, `[B, G, R, S, D]`, `[B, G * R, S, D]`.
    """
    chain = [x]
    while is_reshape(chain[-1]) or op_name(chain[-1]) in ("aten.clone", "aten.expand"):
        before = chain[-1].all_input_nodes[0]
        if op_name(chain[-1]) == "aten.expand":
            wide, narrow = chain[-1].meta["val"].shape, before.meta["val"].shape
            source = before.all_input_nodes[0] if op_name(before) == "aten.unsqueeze" else None
            if source is None or len(wide) != 5 or len(narrow) != 5 or narrow[2] != 1:
                return x, ()
            batch, groups, repeats, length, dim = wide
            same = tuple(source.meta["val"].shape) == (batch, groups, length, dim)
            whole = tuple(x.meta["val"].shape) == (batch, groups * repeats, length, dim)
            return (source, (*chain, before)) if same and whole else (x, ())
        chain.append(before)
    return x, ()


def _what_is_seen(mask: Node) -> Node:
    """The booleans behind a mask of 0 and -inf that a library call was given in their place."""
    if op_name(mask) != "aten.where":
        return mask
    seen, zero, never = mask.args
    return seen if _is_filled(zero, 0.0) and _is_filled(never, -math.inf) else mask  # type: ignore[return-value]


def _is_filled(node: Any, value: float) -> bool:
    return _is_node(node) and op_name(node) == "aten.full" and bool(node.args[1] == value)


def _is_node(value: object) -> TypeGuard[Node]:
    from torch.fx import Node

    return isinstance(value, Node)
