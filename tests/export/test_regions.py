"""Entries for fusions in compiled graphs: rewritings on the CPU, Triton kernels in the code for a GPU that is not there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from export.pretended_h200 import generated_code, plan_with
from gated_layers import bundle_of
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import autokernel
from autokernel.export.bundle import Entry
from autokernel.export.dependent_launch import dependent_launches
from autokernel.export.plan import Plan
from autokernel.export.regions import RegionPass, UnfitError, replace_region
from autokernel.ops import Region
from autokernel.ops.matching import op_name
from autokernel.records import ConfigValue, Problem, TensorSpec

B, H, G, S, D = 2, 4, 2, 33, 16
SCALE = 0.25


def attention(device: str = "cpu", dtype: str = "float32", mask: bool = True) -> Problem:
    """One position of q, as a projection leaves it, over a cache; the mask is for each sequence."""
    q = TensorSpec(shape=(B, H, 1, D), dtype=dtype, stride=(H * D, D, H * D, 1))
    cache = TensorSpec.contiguous((B, G, S, D), dtype)
    masks = (TensorSpec.contiguous((B, 1, 1, S), "bool"),) if mask else ()
    return Problem(op="attention", inputs=(q, cache, cache, *masks), device=device, scalars=(("scale", SCALE),))


def repeated(x: torch.Tensor) -> torch.Tensor:
    """repeat_kv of transformers"""
    return x.unsqueeze(2).expand(B, G, H // G, S, D).reshape(B, H, S, D)


class TwoLayers(nn.Module):
    """Two layers that attend to caches of their own behind one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.ModuleList(nn.Linear(H * D, H * D, bias=False) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, caches: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(S) <= at[:, None])[:, None, None]
        for layer, (keys, values) in zip(self.query, caches, strict=True):
            q = layer(x).view(B, 1, H, D).transpose(1, 2)
            found = scaled_dot_product_attention(q, repeated(keys), repeated(values), attn_mask=mask, scale=SCALE)
            x = x + found.transpose(1, 2).reshape(B, 1, H * D)
        return x


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(B, 1, H * D), torch.randn(2, 2, B, G, S, D), torch.tensor([5, 30])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


class Seen(Exception):
    """In place of compiling the graph: it is known."""


def applied(*entries: Entry) -> tuple[torch.fx.GraphModule, Plan]:
    """The graph of the model as the pass leaves it, with what it computes found right; and what became of the entries."""
    model, given, graphs = TwoLayers(), inputs(), []
    plan = Plan(bundle_of(*entries))

    def keep(graph: torch.fx.Graph) -> None:
        RegionPass(plan)(graph)
        graph.lint()
        graphs.append(torch.fx.GraphModule(torch.nn.Module(), graph))
        raise Seen

    def backend(gm: Any, examples: list[torch.Tensor]) -> Any:
        found.append(examples)
        return compile_fx(gm, examples, config_patches={"post_grad_custom_post_pass": keep})

    found: list[list[torch.Tensor]] = []
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(model, backend=backend, fullgraph=True)(*given)
    (out,) = graphs[0](*found[0])
    torch.testing.assert_close(out, model(*given), rtol=1e-4, atol=1e-5)
    return graphs[0], plan


def count(module: torch.fx.GraphModule, name: str) -> int:
    return sum(op_name(node) == name for node in module.graph.nodes)


LIBRARY = "aten._scaled_dot_product_flash_attention_for_cpu"


def test_a_bundle_has_every_region_with_an_entry_compiled_its_way() -> None:
    model, given = TwoLayers(), inputs()
    entry = Entry(problem=attention(), backend="inductor", config={"implementation": "matmul"})
    bundled = autokernel.backend(bundle_of(entry))
    out, (code,) = torch._inductor.utils.run_and_get_code(torch.compile(model, backend=bundled, fullgraph=True), *given)
    torch.testing.assert_close(out, model(*given), rtol=1e-4, atol=1e-5)
    (usage,) = bundled.usage().values()
    assert (usage.hits, usage.reasons) == (2, [])
    assert ".default(" not in code, "no library call is left"


@pytest.mark.parametrize(("backend", "name", "library_calls"), [("aten", "grouped", 2), ("inductor", "reduction", 0)])
def test_what_takes_a_regions_place_has_its_layout_and_leaves_nothing_behind(
    backend: str, name: str, library_calls: int
) -> None:
    module, plan = applied(Entry(problem=attention(), backend=backend, config={"implementation": name}))
    (usage,) = plan.usage.values()
    assert (usage.hits, usage.reasons) == (2, [])
    assert count(module, LIBRARY) == library_calls
    repeats = [node for node in module.graph.nodes if op_name(node) == "aten.expand" and node.meta["val"].dim() == 5]
    assert len(repeats) == (0 if name == "grouped" else 4), "one for keys and one for values of each layer, if any"


@pytest.mark.parametrize(
    ("backend", "config", "reason"),
    [
        ("aten", {"implementation": "fast"}, "attention has no implementation 'fast'; there are stock, matmul"),
        ("triton", {"kernel": "fast"}, "attention has no Triton kernel 'fast'; there are decode_attention"),
    ],
)
def test_stock_code_stays_where_an_entry_names_what_does_not_exist(
    backend: str, config: dict[str, ConfigValue], reason: str
) -> None:
    module, plan = applied(Entry(problem=attention(), backend=backend, config=config))
    (usage,) = plan.usage.values()
    assert usage.hits == 0
    assert [text[: len(reason)] for text in usage.reasons] == [reason]
    assert count(module, LIBRARY) == 2


def test_another_problem_gets_stock_code_without_a_word() -> None:
    module, plan = applied(Entry(problem=attention(mask=False), backend="aten", config={"implementation": "grouped"}))
    (usage,) = plan.usage.values()
    assert (usage.hits, usage.reasons) == (0, [])
    assert count(module, LIBRARY) == 2


def test_a_region_whose_input_comes_too_late_stays() -> None:
    graph = torch.fx.Graph()
    x, aten = graph.placeholder("x"), torch.ops.aten
    first = graph.call_function(aten.relu.default, (x,))
    late = graph.call_function(aten.exp.default, (first,))
    graph.output((first, late))
    with FakeTensorMode():
        for node in (x, first, late):
            node.meta["val"] = torch.empty(2, 3)
    region = Region(problem=attention(), inputs=(x, late), outputs=(first,), inner=frozenset({first}), name_of=first)
    entry = Entry(problem=attention(), backend="aten", config={"implementation": "grouped"})
    with pytest.raises(UnfitError, match="exp_default is computed behind relu_default, which would need it"):
        replace_region(graph, region, entry)
    assert [op.name for op in graph.nodes] == ["x", "relu_default", "exp_default", "output"]


# ---- kernels of ours, on a GPU that is not there

DECODE: dict[str, ConfigValue] = {
    "kernel": "decode_attention", "BLOCK_S": 16, "num_splits": 3, "skip": False, "num_warps": 4, "num_stages": 2,
}  # fmt: skip


def library_twice(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
    """Two layers as they are on a GPU; the second one's q is what the first one found."""
    never = torch.full((), float("-inf"), dtype=x.dtype, device=x.device)
    for _ in range(2):
        bias = torch.where(mask, 0.0, never)
        bias = nn.functional.pad(bias, (0, 40 - S)).narrow(-1, 0, S).expand(B, H, 1, S)
        q = x.transpose(1, 2)
        call: Callable[..., Any] = torch.ops.aten._scaled_dot_product_efficient_attention
        x = call(q, repeated(keys), repeated(values), bias, False, 0.0, False, scale=SCALE)[0].transpose(1, 2) * 2
    return (x,)


def code_with(config: dict[str, ConfigValue], function: Callable[..., Any] = library_twice) -> tuple[str, Plan]:
    entry = Entry(problem=attention("cuda", "bfloat16"), backend="triton", config=config)
    plan = plan_with((entry,))
    cache = TensorSpec.contiguous((B, G, S, D), "bfloat16")
    specs = [TensorSpec.contiguous((B, 1, H, D), "bfloat16"), cache, cache, TensorSpec.contiguous((B, 1, 1, S), "bool")]
    # folding would compute the constant on the device
    options = {"post_grad_custom_post_pass": RegionPass(plan), "joint_graph_constant_folding": False}
    return generated_code(function, specs, options), plan


def test_a_kernel_of_ours_reads_the_cache_itself_and_shares_one_buffer_of_counters() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code, plan = code_with(DECODE)
    (usage,) = plan.usage.values()
    assert (usage.hits, usage.reasons) == (2, [])
    assert ".default(" not in code, "no library call is left"
    code = re.sub(r"reinterpret_tensor\((\w+), \([^)]*\), \([^)]*\), \d+\)", r"\1", code)
    calls = [line.split(", ") for line in re.findall(r"decode_attention_kernel_0\.run\((.*)", code)]
    assert len(calls) == 2
    (q, k, v, mask, _, _, _, counters, *_), (q2, k2, v2, mask2, _, _, _, counters2, *_) = calls
    assert (k, v, mask, counters) == (k2, v2, mask2, counters2)
    assert [k, v, mask] == ["arg1_1", "arg2_1", "arg3_1"], "neither repeated nor made to numbers"
    assert "'mask': '*i1'" in code
    assert q != q2
    assert len(re.findall(r"= empty_strided_cuda\(\(4, \), \(1, \), torch.int32\)", code)) == 1


def test_what_several_calls_are_given_is_computed_once() -> None:
    """A view of what nothing has stored yet: Inductor would copy it for each call."""
    pytest.importorskip("triton", reason="Triton is not installed")

    def masked_once(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        (made,) = library_twice(x, keys, values, hidden.logical_not().squeeze(1).unsqueeze(1))
        return (made,)

    code, _ = code_with(DECODE, masked_once)
    calls = [line.split(", ") for line in re.findall(r"decode_attention_kernel_0\.run\((.*)", code)]
    masks = {re.sub(r"reinterpret_tensor\((\w+).*", r"\1", call[3]) for call in calls}
    assert len(calls) == 2
    assert len(masks) == 1
    assert len(re.findall(r"^ +triton_\w*logical_not\w*\.run\(", code, re.M)) == 1


@pytest.mark.parametrize("pdl", [False, True])
def test_where_kernels_do_not_wait_for_others_to_end_the_cache_is_asked_for_first(pdl: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    with dependent_launches(pdl, []):
        code, _ = code_with(DECODE)
    text = code.replace("\\'", "'")
    assert f"'AHEAD': {int(pdl)}" in text
    assert f"'AHEAD': {int(not pdl)}" not in text
    assert text.count("tl.extra.cuda.gdc_launch_dependents()") == int(pdl), "once, in the text of the one kernel"


def test_one_split_has_no_counters() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code, _ = code_with({**DECODE, "num_splits": 1})
    assert "torch.int32" not in code
    assert code.count("decode_attention_kernel_0.run(") == 2


def test_what_the_kernel_does_not_take_is_said() -> None:
    code, plan = code_with({**DECODE, "num_splits": 7})
    (usage,) = plan.usage.values()
    assert usage.hits == 0
    assert "3 blocks of 16 are too few for 7 splits" in usage.reasons[0]
    assert code.count("_scaled_dot_product_efficient_attention.default(") == 2


def test_an_entry_serves_the_same_sizes_in_other_strides_unless_they_have_their_own() -> None:
    own = attention()
    q, keys, *rest = own.inputs
    across = TensorSpec(shape=keys.shape, dtype=keys.dtype, stride=(S * G * D, D, G * D, 1))  # [B, S, G, D] in memory
    other = Entry(problem=replace(own, inputs=(q, across, *rest)), backend="inductor", config={"implementation": "reduction"})
    module, plan = applied(other)
    assert [usage.hits for usage in plan.usage.values()] == [2]
    assert count(module, LIBRARY) == 0
    exact = Entry(problem=own, backend="aten", config={"implementation": "grouped"})
    module, plan = applied(other, exact)
    assert {key: usage.hits for key, usage in plan.usage.items()} == {other.key: 0, exact.key: 2}
    longer = TensorSpec.contiguous((B, G, S + 1, D), "float32")
    module, plan = applied(replace(exact, problem=replace(own, inputs=(q, longer, longer, rest[1]))))
    assert [usage.hits for usage in plan.usage.values()] == [0], "other sizes are another problem"
