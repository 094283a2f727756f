"""Scaled dot-product attention, as a library call or written out; keys and values are repeated where heads share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from autokernel.ops.attention_written import Style, written_attention
from autokernel.ops.base import Region, Site, sites_of
from autokernel.ops.matching import is_reshape, op_name, settled, tensor_spec
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, Node

# What `scaled_dot_product_attention` becomes in a graph, and from where on an added number means "not seen": cuDNN gets the
# lowest number of float16 where the others get -inf.
_CALLS: Mapping[str, float] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": -math.inf,
    "aten._scaled_dot_product_flash_attention": -math.inf,
    "aten._scaled_dot_product_efficient_attention": -math.inf,
    "aten._scaled_dot_product_cudnn_attention": -65504.0,
}
LIBRARY_CALLS: tuple[str, ...] = tuple(_CALLS)
# Arguments that change no result that is used: of results for a backward pass, and for debugging.
_WITHOUT_EFFECT = ("compute_log_sumexp", "return_debug_mask")
_COPIES = ("aten.clone", "prims.convert_element_type", "aten._to_copy")


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
    booleans that say what is seen. Scalars: `scale`; `causal` where position i of q sees positions up to i alone; `written`
    where the graph has two products and a softmax in place of a library call: "math" or "eager", which round differently
    (`attention_written.py`). One output of `[B, H, Q, E]`, laid out as `[B, Q, H, E]` by the library's calls. A row that sees
    nothing is zero.
    """

    name = "attention"

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Op.reference`."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v, *mask = inputs
        scalars = dict(problem.scalars)
        bias = mask[0] if mask else None
        if bias is not None:  # as models do: with a mask the library repeats shared heads, or they have to be repeated for it
            k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
            taken = (torch.bool, torch.float32, q.dtype)  # as they are: rounded before, it would be another call
            bias = bias if bias.dtype in taken else bias.to(q.dtype)
        if "written" in scalars:
            return (REFERENCES[str(scalars["written"])](q, k, v, bias, float(scalars["scale"])),)
        causal, scale, shared = bool(scalars.get("causal", False)), float(scalars["scale"]), k.shape[1] != q.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=shared)
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
        regions = [_region(node, device) for node in graph.nodes if op_name(node) in _CALLS]
        regions += [_written_region(node, device) for node in graph.nodes if op_name(node) == "aten.bmm"]
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


def num_keys_seen_by_all(problem: Problem) -> int:
    """How many keys, from the first on, every row of q is sure to see: of draws of inputs, whose masks never hide the first."""
    alone = mask_position(problem) is not None or dict(problem.scalars).get("causal")
    return 1 if alone else sizes_of(problem).kv_len


def _by_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """As the library computes it by products, whichever kernel it has for the operands."""
    import torch

    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.where(bias, 0.0, torch.scalar_tensor(-math.inf, dtype=q.dtype, device=q.device))
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, bias, scale=scale)[0]
    return out


def _by_eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """As models write it."""
    import torch

    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.where(bias, 0.0, torch.scalar_tensor(-math.inf, dtype=q.dtype, device=q.device))
    scores = scores if bias is None else scores + bias
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)


# of attention that is written out, by style
REFERENCES: Mapping[str, Callable[..., torch.Tensor]] = {"math": _by_math, "eager": _by_eager}


def repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, G, S, D] -> [B, H, S, D]: each head H / G times, one after the other."""
    batch, groups, length, dim = x.shape
    if groups == num_heads:
        return x
    return x.unsqueeze(2).expand(batch, groups, num_heads // groups, length, dim).reshape(batch, num_heads, length, dim)


def _region(node: Node, device: str) -> Region | None:
    """The region of a library call; None where it drops at random, has other results in use, or sizes are not known."""
    given = _arguments(node)
    out = next((user for user in node.users if user.args[1] == 0), None)
    if given is None or out is None or any(user is not out and user.users for user in node.users):
        return None
    return _region_of(given, device, node, out, (node, *node.users), _CALLS[op_name(node)])


def _written_region(node: Node, device: str) -> Region | None:
    """The region of attention that ends in this batched product; None where it does not, or as for library calls."""
    found = written_attention(node)
    if found is None:
        return None
    q, k, v, mask = found.query, found.key, found.value, found.mask
    given = _Arguments(query=q, key=k, value=v, mask=mask, causal=False, scale=found.scale, written=found.style)
    return _region_of(given, device, node, found.out, found.nodes, -math.inf)


def _region_of(given: _Arguments, device: str, node: Node, out: Node, nodes: tuple[Node, ...], never: float) -> Region | None:
    q, k, v, mask = given.query, given.key, given.value, given.mask
    k, repeated_k = _before_repetition(k)
    v, repeated_v = _before_repetition(v)
    if k.meta["val"].shape[1] != v.meta["val"].shape[1]:
        k, v, repeated_k, repeated_v = given.key, given.value, (), ()
    operands = [q, k, v]
    spread: tuple[Node, ...] = ()
    if mask is not None:
        source, spread = _before_spreading(mask, never)
        operands.append(source)
    specs = [tensor_spec(operand) for operand in operands]
    known = [settled(spec) for spec in specs if spec is not None]
    if len(known) != len(specs) or not _fit(known) or tensor_spec(out) is None:
        return None
    scale = given.scale if given.scale is not None else 1 / math.sqrt(known[0].shape[-1])
    scalars: list[tuple[str, float | bool | str]] = [("causal", True)] if given.causal else []
    scalars += [("scale", float(scale)), *([("written", given.written)] if given.written else [])]
    problem = Problem(op=Attention.name, inputs=tuple(known), device=device, scalars=tuple(scalars))
    inner = _serving_only({*repeated_k, *repeated_v, *spread, *nodes}, out)
    return Region(problem=problem, inputs=tuple(operands), outputs=(out,), inner=inner, name_of=node)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arguments:
    """Of a library call, or of what is written out. `scale` is None where it is the usual one."""

    query: Node
    key: Node
    value: Node
    mask: Node | None
    causal: bool
    scale: float | None
    written: Style | None = None


def _arguments(node: Node) -> _Arguments | None:
    """What a library call is given, by the names of its schema; None where it does more than attention without dropout."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given: dict[str, Any] = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= {**dict(zip((argument.name for argument in schema), node.args, strict=False)), **node.kwargs}
    found = _Arguments(
        query=given.pop("query"),
        key=given.pop("key"),
        value=given.pop("value"),
        mask=given.pop("attn_mask", given.pop("attn_bias", None)),
        causal=bool(given.pop("is_causal", False)),
        scale=given.pop("scale", None),
    )
    tensors = (found.query, found.key, found.value, *(() if found.mask is None else (found.mask,)))
    others = [value for name, value in given.items() if name not in _WITHOUT_EFFECT]  # dropout, scales of 8 bits
    return None if any(others) or not all(_is_node(tensor) for tensor in tensors) else found


def _fit(specs: list[TensorSpec]) -> bool:
    """Whether q, k, v and a mask are the operands of one attention."""
    if any(len(spec.shape) != 4 for spec in specs):
        return False
    q, k, v, *masks = (spec.shape for spec in specs)
    whole = (*q[:3], k[2])
    return (
        q[0] == k[0] == v[0]
        and q[3] == k[3]
        and k[1:3] == v[1:3]
        and q[1] % max(1, k[1]) == 0
        and all(size in (1, full) for mask in masks for size, full in zip(mask, whole, strict=True))
    )


def _serving_only(nodes: set[Node], out: Node) -> frozenset[Node]:
    """Those of the nodes whose values serve the output alone, directly or not; the output itself."""
    inner = set(nodes)
    while True:
        shared = {node for node in inner - {out} if not set(node.users) <= inner}
        if not shared:
            return frozenset(inner)
        inner -= shared


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


def _before_spreading(mask: Node, never: float) -> tuple[Node, tuple[Node, ...]]:
    """What a mask was before the library made it fit its kernel, and the nodes between.

    Booleans become 0 and -inf (a number of at most `never`); rows are padded to a multiple of 8 elements and cut again, and
    stretched to `[B, H, Q, S]`. The same numbers, or the booleans that they say.
    """
    node: Node | None = mask
    passed: list[Node] = []
    source, between = mask, 0
    exact = True  # a conversion may round numbers, but not 0 and -inf
    while node is not None:
        value = node.meta["val"]
        exact = exact and value.dtype == mask.meta["val"].dtype
        if exact and value.dim() == 4:
            source, between = node, len(passed)
        passed.append(node)
        seen = _what_is_seen(node, never)
        if seen is not None and seen.meta["val"].dim() == 4:
            return seen, tuple(passed)
        node = _same_numbers(node)
    return source, tuple(passed[:between])


def _same_numbers(node: Node) -> Node | None:
    """What a node only copies, converts, stretches, or cuts to what it was before it was padded."""
    if op_name(node) == "aten.expand" or op_name(node) in _COPIES:
        return node.all_input_nodes[0]
    if op_name(node) != "aten.slice":
        return None
    padded = node.all_input_nodes[0]
    if op_name(padded) != "aten.constant_pad_nd" or any(node.args[2:3]):
        return None
    before, amounts = padded.all_input_nodes[0], list(padded.args[1])  # type: ignore[arg-type]
    behind_alone = not any(amounts[::2]) and all(amount >= 0 for amount in amounts)  # type: ignore[operator]
    return before if behind_alone and node.meta["val"].shape == before.meta["val"].shape else None


def _what_is_seen(node: Node, never: float) -> Node | None:
    """The booleans behind 0 where they are true and -inf (`never` or less) where they are not."""
    if op_name(node) != "aten.where":
        return None
    condition, yes, no = node.args
    if not _is_node(condition):
        return None
    if _filled(yes) == 0 and _is_never(no, never):
        return condition
    negated = op_name(condition) in ("aten.logical_not", "aten.bitwise_not")
    return condition.all_input_nodes[0] if negated and _is_never(yes, never) and _filled(no) == 0 else None


def _is_never(value: object, never: float) -> bool:
    number = _filled(value)
    return number is not None and number <= never


def _filled(value: object) -> float | None:
    """The number that all elements are, None if they differ or nobody knows."""
    if isinstance(value, (int, float)):
        return float(value)
    if not _is_node(value) or op_name(value) not in ("aten.full", "aten.scalar_tensor"):
        return None
    number = value.args[1 if op_name(value) == "aten.full" else 0]
    return float(number) if isinstance(number, (int, float)) else None


def _is_node(value: object) -> TypeGuard[Node]:
    from torch.fx import Node

    return isinstance(value, Node)
