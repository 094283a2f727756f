"""Products of one row as reductions: which are taken, what they compute, and what Inductor makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from export.pretended_h200 import H200, generated_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autokernel.errors import BundleError
from autokernel.export.apply import inductor_options
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.one_row import OneRowPass, ReductionPass
from autokernel.export.plan import Plan, minor
from autokernel.records import ConfigValue, Problem, TensorSpec

F = torch.nn.functional
N, K = 48, 64


def plan_of(*entries: Entry, value: str = "reduction", why_not: str | None = None) -> Plan:
    bundle = Bundle(name="t", created="", version="", environment=H200, entries=entries, graph_options={"one_row": value})
    return Plan(bundle, why_not)


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def weight(k: int, n: int) -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))


def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w.t())


def biased(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(b, x, w.t())


def scaled(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(b, x, w.t(), beta=0.5)


def row_major(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w.reshape(K, N))


def traced(
    function: Callable[..., Any],
    *,
    rows: int = 1,
    bias: tuple[int, ...] = (N,),
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> torch.fx.GraphModule:
    """A graph as Inductor has it, with tensors that claim to be on that device."""
    with FakeTensorMode():
        return make_fx(function)(*(torch.empty(size, dtype=dtype, device=device) for size in ((rows, K), (N, K), bias)))


def names(module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("function", "bias"), [(linear, (N,)), (biased, (N,)), (biased, (1, N))], ids=["mm", "bias", "matrix"])
def test_the_result_is_summed_in_float32_and_rounded_once(
    function: Callable[..., Any], bias: tuple[int, ...], dtype: torch.dtype
) -> None:
    module = traced(function, bias=bias, dtype=dtype)
    (stock,) = [node.meta["val"] for node in module.graph.nodes if "mm" in str(node.target)]
    OneRowPass(plan_of(), "reduction")(module.graph)
    module.graph.lint()
    module.recompile()
    assert not any("mm" in name for name in names(module))
    (output,) = next(iter(module.graph.find_nodes(op="output"))).all_input_nodes
    made = output.meta["val"]
    assert (made.shape, made.stride(), made.dtype, made.device) == (stock.shape, stock.stride(), dtype, stock.device)
    torch.manual_seed(0)
    operands = [torch.randn(size).to(dtype) for size in ((1, K), (N, K), bias)]
    exact = function(*(value.double() for value in operands))
    torch.testing.assert_close(module(*operands).double(), exact.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_what_is_no_product_of_one_row_is_left_alone() -> None:
    left = [
        traced(linear, rows=2),
        traced(biased, rows=2),
        traced(linear, dtype=torch.float64),
        traced(linear, device="cpu"),
        traced(scaled),
        traced(biased, bias=(1,)),
        traced(row_major),
    ]
    for module in left:
        before = names(module)
        OneRowPass(plan_of(value="all"), "all")(module.graph)
        assert names(module) == before
    module = traced(linear)
    OneRowPass(plan_of(why_not="another machine"), "all")(module.graph)
    assert "aten.mm.default" in names(module)


def test_sizes_that_are_not_known_are_left_alone() -> None:
    def any_depth(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear(x, w, w)

    real = torch.empty(K)
    with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False) as mode:
        depth = mode.from_tensor(real).shape[0]
        module = make_fx(any_depth)(*(torch.empty(n, depth, device="cuda") for n in (1, N)))
    (product,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert not isinstance(product.args[0].meta["val"].shape[1], int)
    OneRowPass(plan_of(), "reduction")(module.graph)
    assert "aten.mm.default" in names(module)


def test_other_values_are_refused() -> None:
    with pytest.raises(BundleError, match=r"one_row: True is unknown; write 'reduction' or 'all'"):
        inductor_options(plan_of(), {"one_row": True}, frozen=False)


def test_cached_code_is_of_the_same_plan_and_value() -> None:
    plans = plan_of(), plan_of(value="all")
    assert len({OneRowPass(plan, value).uuid() for plan in plans for value in ("reduction", "all")}) == 4
    keys = [str(inductor_options(plan, {"one_row": v}, frozen=False)["post_grad_custom_post_pass"].uuid())
            for plan, v in ((plans[0], "reduction"), (plans[0], "all"), (plans[1], "all"))]  # fmt: skip
    assert len(set(keys)) == 3


def test_on_a_cpu_the_option_says_nothing() -> None:
    environment = type(H200)(device="cpu", device_name="c", isa="avx2", num_units=2, torch=torch.__version__)
    bundle = Bundle(name="t", created="", version="", environment=environment, graph_options={"one_row": "all"})
    made = inductor_options(Plan(bundle), bundle.graph_options, frozen=False)
    assert "post_grad_custom_post_pass" not in made
    assert "one_row" not in made


def gated_mlp(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    hidden = F.silu(torch.mm(x, gate.t())) * torch.mm(x, up.t())
    return residual + torch.mm(hidden, down.t())


WIDTH, HIDDEN = 4096, 14336
MLP = [spec(1, WIDTH), spec(HIDDEN, WIDTH), spec(HIDDEN, WIDTH), spec(WIDTH, HIDDEN), spec(1, WIDTH)]
DOWN = Problem(op="mm", inputs=(spec(1, HIDDEN), weight(HIDDEN, WIDTH)), device="cuda", constants=(1,))
BOTH = Problem(
    op="merged_mm", inputs=(spec(1, WIDTH), weight(WIDTH, HIDDEN), weight(WIDTH, HIDDEN)), device="cuda", constants=(1, 2)
)
TILE: dict[str, ConfigValue] = {
    "template": "mm", "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_stages": 3, "num_warps": 4, "GROUP_M": 4,
}  # fmt: skip
SKINNY: dict[str, ConfigValue] = {"kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}

needs_codegen = pytest.mark.skipif(minor(torch.__version__) != "2.13", reason="the pretended device is made for torch 2.13")


def kernels(plan: Plan, value: str) -> tuple[str, list[str]]:
    """What Inductor writes for the MLP, and the kernels in it."""
    pytest.importorskip("triton", reason="Inductor's kernels for GPUs are Triton's")
    code = generated_code(gated_mlp, MLP, inductor_options(plan, {"one_row": value}, frozen=False, merges=True))
    return code, re.findall(r"^def triton_.*?^''', device_str", code, re.MULTILINE | re.DOTALL)


@needs_codegen
@pytest.mark.parametrize("value", ["reduction", "all"])
def test_products_are_fused_with_what_is_beside_and_behind_them(value: str) -> None:
    code, (first, second) = kernels(plan_of(value=value), value)
    assert "extern_kernels." not in code
    # gate, up, SiLU and their product: two sums along a contiguous K, in float32, and nothing but the result is stored
    assert (first.count("tl.sum("), first.count("libdevice.exp("), first.count("tl.store(")) == (2, 1, 1)
    assert len(re.findall(r"\(r0_1 \+ 4096\*x0\), .*\)\.to\(tl\.float32\)", first)) == 2
    assert len(re.findall(r"_tmp\d+ = tl\.full\(\[XBLOCK, R0_BLOCK\], 0, tl\.float32\)", first)) == 2
    assert code.count("reduction_hint=ReductionHint.INNER") == 2
    # of which Inductor has one config, and so nothing to time
    assert code.count("'dynamic_scale_rblock': False") == 2
    assert "'add_persistent_rblock'" not in code
    # down and the residual; what feeds it is read, not computed again in each program
    assert (second.count("tl.sum("), second.count("libdevice.exp("), second.count("tl.store(")) == (1, 0, 1)
    assert "r0_1 + 14336*x0)" in second


@needs_codegen
@pytest.mark.parametrize(
    ("problem", "backend", "config", "left"),
    [
        (DOWN, "inductor", TILE, "def triton_tem_"),
        (DOWN, "triton", SKINNY, "skinny_mm_kernel_0.run("),
        (BOTH, "aten", {"prepack": False, "merge": "concat"}, "extern_kernels.mm("),
        (BOTH, "inductor", {**TILE, "merge": "concat"}, "def triton_tem_"),
    ],
    ids=["template", "own kernel", "merged for cuBLAS", "merged template"],
)
def test_an_entry_keeps_its_product_unless_all_are_meant(
    problem: Problem, backend: str, config: dict[str, ConfigValue], left: str
) -> None:
    entry = Entry(problem=problem, backend=backend, config=config)
    plan = plan_of(entry)
    code, found = kernels(plan, "reduction")
    assert code.count(left) == 1
    assert plan.usage[entry.key].hits == 1
    assert "".join(found).count("tl.sum(") == (2 if problem is DOWN else 1)
    plan = plan_of(entry, value="all")
    code, found = kernels(plan, "all")
    assert left not in code
    assert plan.usage[entry.key].hits == 0
    assert (len(found), code.count("tl.sum(")) == (2, 3)


REDUCTION: dict[str, ConfigValue] = {"template": "reduction"}


def small(op: str, *inputs: TensorSpec) -> Problem:
    return Problem(op=op, inputs=inputs, device="cuda", constants=(len(inputs) - 1,))


@pytest.mark.parametrize(
    ("function", "problem"),
    [(linear, small("mm", spec(1, K), weight(K, N))), (biased, small("addmm", spec(N), spec(1, K), weight(K, N)))],
    ids=["mm", "addmm"],
)
def test_an_entry_makes_its_own_product_a_reduction(function: Callable[..., Any], problem: Problem) -> None:
    entry = Entry(problem=problem, backend="inductor", config=REDUCTION)
    plan = Plan(Bundle(name="t", created="", version="", environment=H200, entries=(entry,)))
    module = traced(function)
    ReductionPass(plan)(module.graph)
    assert not any("mm" in name for name in names(module))
    assert (plan.usage[entry.key].hits, plan.usage[entry.key].reasons) == (1, [])
    for other in (traced(function, rows=2), traced(function, device="cpu")):
        ReductionPass(plan)(other.graph)
        assert any("mm" in name for name in names(other))
    assert plan.usage[entry.key].hits == 1


def test_an_entry_says_why_its_product_stays() -> None:
    entry = Entry(problem=small("mm", spec(1, K), weight(K, N)), backend="inductor", config=REDUCTION)
    plan = Plan(Bundle(name="t", created="", version="", environment=H200, entries=(entry,)))
    module = traced(row_major)
    ReductionPass(plan)(module.graph)
    assert "aten.mm.default" in names(module)
    assert plan.usage[entry.key].hits == 0
    assert "laid out in another way" in plan.usage[entry.key].reasons[0]


@needs_codegen
def test_one_entry_leaves_the_other_products_to_cublas() -> None:
    pytest.importorskip("triton", reason="Inductor's kernels for GPUs are Triton's")
    entry = Entry(problem=DOWN, backend="inductor", config=REDUCTION)
    plan = Plan(Bundle(name="t", created="", version="", environment=H200, entries=(entry,)))
    code = generated_code(gated_mlp, MLP, inductor_options(plan, {}, frozen=False, merges=True))
    assert code.count("extern_kernels.mm(") == 2
    assert code.count("tl.sum(") == 1
    assert "r0_1 + 14336*x0)" in code
    assert "'dynamic_scale_rblock': False" in code, "nothing is left to be timed"
    assert plan.usage[entry.key].hits == 1


@pytest.mark.parametrize(("device", "said"), [("cuda", False), ("cpu", None)])
def test_uneven_sizes_are_not_padded_by_what_a_benchmark_says(device: str, said: bool | None) -> None:
    bundle = replace(plan_of().bundle, environment=replace(H200, device=device))
    assert inductor_options(Plan(bundle, None), {}, frozen=False).get("shape_padding") is said
