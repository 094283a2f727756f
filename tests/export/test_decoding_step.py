"""What Inductor writes of a whole decoding step of a Llama, for an H200 that is not there: which kernels are launched."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from export.pretended_h200 import code_of, plan_with
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from autokernel.export.apply import inductor_options
from autokernel.export.bundle import Entry
from autokernel.ops.attention import Attention
from autokernel.ops.rotary_qk import RotaryQk
from autokernel.profiling.language import Decode
from autokernel.records import ConfigValue, Problem, TensorSpec

LAYERS = 3
CUDA = torch.device("cuda:0")
CONFIGS: dict[str, dict[str, ConfigValue]] = {
    "attention": {
        "kernel": "decode_attention", "BLOCK_S": 16, "num_splits": 2, "skip": False, "num_warps": 4, "num_stages": 2,
    },
    "rotary_qk": {"kernel": "rotary", "block_rows": 4, "num_warps": 1},
}  # fmt: skip
PLAIN = {"joint_graph_constant_folding": False}  # it would compute on the device
aten = torch.ops.aten


class Traced(Exception):
    """The graph is there; in place of running it."""


@dataclass(frozen=True)
class Step:
    """A step's graph in ATen's operators, as it is on a GPU, what its inputs are, and what ops find in it, by their names."""

    module: GraphModule
    inputs: list[TensorSpec]
    problems: dict[str, Problem]


@pytest.fixture(scope="module")
def step() -> Step:
    pytest.importorskip("triton", reason="Triton is not installed")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    module = Decode(model, torch.zeros(1, 32, dtype=torch.long))
    found: list[tuple[GraphModule, list[Any]]] = []

    def trace(gm: GraphModule, inputs: list[Any]) -> Any:
        found.append((make_fx(gm, pre_dispatch=True)(*inputs), inputs))
        raise Traced

    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="Traced"):
        torch.compile(module, backend=trace, fullgraph=True, dynamic=False)(torch.zeros(1, 1).long(), torch.full((1, 1), 32))
    ((traced, inputs),) = found
    for node in list(traced.graph.nodes):
        node.args = tree_map_only(torch.device, lambda _: CUDA, node.args)
        node.kwargs = tree_map_only(torch.device, lambda _: CUDA, node.kwargs)
        if node.target is aten.scaled_dot_product_attention.default:
            with traced.graph.inserting_before(node):
                node.replace_all_uses_with(as_cudnn(traced.graph, *node.args, **node.kwargs))
            traced.graph.erase_node(node)
    traced.recompile()
    specs, regions = [spec_of(x) for x in inputs], []

    def keep(graph: Graph) -> None:
        regions.extend(region for op in (Attention(), RotaryQk()) for region in op.match(graph, frozenset(), "cuda"))

    code_of(traced, specs, {**PLAIN, "post_grad_custom_post_pass": keep})
    assert len({region.problem for region in regions}) == 2, "layers are alike"
    return Step(traced, specs, {region.problem.op: region.problem for region in regions})


def spec_of(x: torch.Tensor) -> TensorSpec:
    return TensorSpec(shape=tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."), stride=x.stride())


def as_cudnn(graph: Graph, q: Any, k: Any, v: Any, mask: Any, *rest: Any, scale: float | None = None, **_: Any) -> Any:
    """What ATen makes of an attention with a mask of booleans there."""
    options = {"dtype": torch.bfloat16, "device": CUDA}
    seen, unseen = (graph.call_function(aten.full.default, ([], value), options) for value in (0.0, -65504.0))
    bias = graph.call_function(aten.where.self, (mask, seen, unseen))
    whole = [*q.meta["val"].shape[:3], k.meta["val"].shape[2]]
    bias = graph.call_function(aten.expand.default, (bias, whole))
    arguments = (q, k, v, bias, False, 0.0, False, False)
    call = graph.call_function(aten._scaled_dot_product_cudnn_attention.default, arguments, {"scale": scale})
    return graph.call_function(operator.getitem, (call, 0))


def kernels_with(step: Step, ops: tuple[str, ...], options: dict[str, ConfigValue] | None = None) -> list[str]:
    """The kernels that are launched, in order, with entries for what these ops find."""
    plan = plan_with(Entry(problem=step.problems[op], backend="triton", config=CONFIGS[op]) for op in ops)
    code = code_of(step.module, step.inputs, {**PLAIN, **inductor_options(plan, options or {}, frozen=False, merges=True)})
    assert [(usage.hits, usage.reasons) for usage in plan.usage.values()] == [(LAYERS, [])] * len(ops)
    names = re.findall(r"^ +(\w+)\.run\(|(extern_kernels\.\w+)\(", code[code.index("def call(") :], re.MULTILINE)
    return [ours or other for ours, other in names]


def in_front_of_attention(kernels: list[str]) -> list[list[str]]:
    """Of each layer, what is launched between its norm and its attention, but for products."""
    ends = [i for i, name in enumerate(kernels) if name.startswith("decode_attention")]
    starts = [max(i for i, name in enumerate(kernels[:end]) if name.startswith("triton_per")) for end in ends]
    parts = (kernels[start + 1 : end] for start, end in zip(starts, ends, strict=True))
    return [[name for name in part if not name.startswith("extern_kernels")] for part in parts]


def test_the_mask_is_computed_once_for_all_layers(step: Step) -> None:
    kernels = kernels_with(step, ("attention", "rotary_qk"))
    assert sum(name.startswith("decode_attention") for name in kernels) == LAYERS
    assert sum(bool(re.search(r"_(le|ge)_", name)) for name in kernels) == 1


def test_rotary_embedding_and_both_writes_into_the_cache_are_one_kernel_where_inductor_may_combine_them(
    step: Step,
) -> None:
    """The kernel for rotary embedding stands in its way: three launches, which the run's ablation finds slower."""
    options: dict[str, ConfigValue] = {"combo_kernels": True}
    apart, joined = (
        in_front_of_attention(kernels_with(step, ops, options)) for ops in (("attention", "rotary_qk"), ("attention",))
    )
    # the first layer has the tables and the mask in front of it
    assert [len(layer) for layer in apart[1:]] == [3] * (LAYERS - 1)
    assert [len(layer) for layer in joined[1:]] == [1] * (LAYERS - 1)
