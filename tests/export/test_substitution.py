"""GEMMs with an entry of backend "triton" get a lowering that puts our kernel into Inductor's code; no GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from autokernel.environment import Environment, current_environment
from autokernel.export import substitution
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.matching import Gemm
from autokernel.export.plan import Plan
from autokernel.export.substitution import SubstitutionPass, find_entry, lower_skinny_mm
from autokernel.records import ConfigValue, Problem, TensorSpec

M, N, K = 16, 512, 256
SPLIT: dict[str, ConfigValue] = {
    "kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "split_k": 2,
}  # fmt: skip


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


WEIGHT = TensorSpec(shape=(K, N), dtype="bfloat16", stride=(1, K))
MM = Problem(op="mm", inputs=(spec(M, K), WEIGHT), device="cuda", constants=(1,))
ADDMM = Problem(op="addmm", inputs=(spec(N), spec(M, K), WEIGHT), device="cuda", constants=(0, 2))


def plan_of(*problems: Problem, config: dict[str, ConfigValue], why_not: str | None = None) -> Plan:
    entries = tuple(Entry(problem=problem, backend="triton", config=config) for problem in problems)
    environment: Environment = current_environment("cpu")
    return Plan(Bundle(name="b", created="", version="", environment=environment, entries=entries), why_not)


def two_products(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ w.t()) + torch.addmm(b, x, v.t())


def traced(function: Any = two_products, m: int = M, dtype: torch.dtype = torch.bfloat16) -> torch.fx.GraphModule:
    """A graph as Inductor has it, with tensors that claim to be on a GPU."""
    with FakeTensorMode():
        sizes = ((m, K), (N, K), (N, K), (N,))
        return make_fx(function)(*(torch.empty(size, dtype=dtype, device="cuda") for size in sizes))


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes if node.op == "call_function"]


def hits(plan: Plan) -> list[int]:
    return [usage.hits for usage in plan.usage.values()]


def reasons(plan: Plan) -> str:
    return "; ".join(reason for usage in plan.usage.values() for reason in usage.reasons)


def test_products_with_an_entry_are_replaced_and_share_one_buffer_of_counters() -> None:
    plan, module = plan_of(MM, ADDMM, config=SPLIT), traced()
    SubstitutionPass(plan)(module.graph)
    module.graph.lint()
    names = targets(module.graph)
    assert names.count("lower_skinny_mm") == 2
    assert names.count("full.default") == 1
    assert not {"mm.default", "addmm.default"} & set(names)
    assert hits(plan) == [1, 1]


def test_without_shared_tiles_there_are_no_counters() -> None:
    plan, module = plan_of(MM, config={**SPLIT, "split_k": 1}), traced()
    SubstitutionPass(plan)(module.graph)
    assert "full.default" not in targets(module.graph)
    assert hits(plan) == [1]


def test_what_has_no_entry_or_no_bundle_here_keeps_stock_code() -> None:
    for plan in (plan_of(config=SPLIT), plan_of(MM, config=SPLIT, why_not="another machine")):
        module = traced()
        SubstitutionPass(plan)(module.graph)
        assert "lower_skinny_mm" not in targets(module.graph)
    plan, module = plan_of(MM, config=SPLIT), traced(m=17)  # a neighbouring shape was not measured
    SubstitutionPass(plan)(module.graph)
    assert hits(plan) == [0]


@pytest.mark.parametrize(
    ("config", "function", "reason"),
    [
        ({**SPLIT, "GROUP_M": 1}, two_products, "group_m"),
        ({**SPLIT, "BLOCK_K": 192}, two_products, "must divide K"),
        (SPLIT, lambda x, w, v, b: x @ w.reshape(K, N), "transpose of a contiguous"),
        (SPLIT, lambda x, w, v, b: torch.as_strided(x, (M, K), (1, M)) @ w.t(), "x must be contiguous"),
    ],
)
def test_the_reason_for_stock_code_is_heard(config: dict[str, ConfigValue], function: Any, reason: str) -> None:
    plan, module = plan_of(MM, config=config), traced(function)
    SubstitutionPass(plan)(module.graph)
    assert reason in reasons(plan)
    assert hits(plan) == [0]


@pytest.mark.parametrize("shape", [(1,), (1, N), (M, 1)], ids=str)
def test_what_is_added_must_be_a_bias_or_a_whole_matrix(shape: tuple[int, ...]) -> None:
    """Inductor makes an addmm of `x @ w + c` for a c of one element, too: a kernel would read N of it."""
    plan = plan_of(ADDMM, MM, config=SPLIT)
    with FakeTensorMode():
        sizes = ((M, K), (N, K), shape)
        tensors = [torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes]
        module = make_fx(lambda x, w, c: torch.addmm(c, x, w.t()))(*tensors)
    SubstitutionPass(plan)(module.graph)
    assert "lower_skinny_mm" not in targets(module.graph)
    assert hits(plan) == [0, 0]


def test_each_device_has_counters_of_its_own() -> None:
    plan = plan_of(MM, config=SPLIT)
    with FakeTensorMode():
        tensors = [torch.empty(s, dtype=torch.bfloat16, device=f"cuda:{i}") for i in range(2) for s in ((M, K), (N, K))]
        module = make_fx(lambda x, w, y, v: (x @ w.t(), y @ v.t()))(*tensors)
    SubstitutionPass(plan)(module.graph)
    given = [node.args[-1].meta["val"].device.index for node in module.graph.nodes if "skinny" in str(node.name)]
    assert given == [0, 1]


def test_a_range_of_rows_serves_what_lies_in_it() -> None:
    plan = plan_of(MM, config={**SPLIT, "m_min": 9, "m_max": 16})
    gemm = Gemm("bfloat16", 1, 9, (N,), K, False)
    assert find_entry(plan, gemm) is not None
    assert find_entry(plan, replace(gemm, m=8)) is None
    assert find_entry(plan, replace(gemm, k=K * 2)) is None
    assert find_entry(plan, replace(gemm, bias=True)) is None


class Stop(Exception):
    """In place of compiling Inductor's code: the text was all that was wanted."""


class Target:
    """What torch asks of a GPU's driver when it looks for the tensors that a kernel writes."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inductor's code for graphs compiled meanwhile, which is not run; GEMMs on the CPU count as on a GPU."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    texts: list[str] = []

    def keep(self: GraphLowering, *_: Any) -> None:
        code, _ = self.codegen()
        texts.append(code if isinstance(code, str) else code.value)
        raise Stop

    def gemm_of_node(node: torch.fx.Node) -> Gemm | None:
        if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return None
        *added, x, w = (argument.meta["val"] for argument in node.args)  # type: ignore[union-attr]
        return Gemm("bfloat16", 1, x.shape[0], (w.shape[1],), x.shape[1], any(value.dim() == 1 for value in added))

    monkeypatch.setattr(substitution, "gemm_of_node", gemm_of_node)
    monkeypatch.setattr(GraphLowering, "compile_to_module", keep)
    monkeypatch.setattr(torch.utils._triton, "has_triton_tensor_descriptor_host_tma", lambda: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", Target())
    torch._dynamo.reset()
    yield texts
    torch._dynamo.reset()


def with_residual(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(b.expand(M, N).relu(), x, w.t())


def compiled(plan: Plan, texts: list[str], function: Any = two_products) -> str:
    options = {"post_grad_custom_post_pass": SubstitutionPass(plan), "fx_graph_cache": False}
    x, w, v = (torch.randn(size, dtype=torch.bfloat16) for size in ((M, K), (N, K), (N, K)))
    with torch.no_grad(), pytest.raises(Exception, match="Stop"):
        torch.compile(function, options=options)(x, w, v, torch.randn(N, dtype=torch.bfloat16))
    return texts[0]


@pytest.mark.parametrize("changes", [{}, {"tma": True}, {"split_k": 1, "waves": 2}], ids=str)
def test_inductor_calls_the_kernel_and_keeps_what_it_writes(changes: dict[str, ConfigValue], generated: list[str]) -> None:
    on_cpu = [replace(problem, device="cpu") for problem in (MM, ADDMM)]
    code = compiled(plan_of(*on_cpu, config={**SPLIT, **changes}), generated)
    calls = [
        line.split("(", 1)[1].split(", ") for line in code.splitlines() if re.match(r"\s+skinny_mm_kernel_\d+\.run\(", line)
    ]
    assert len(calls) == 2
    (_, w, _, y, _, counters), (_, v, bias, z, _, same) = (call[:6] for call in calls)
    assert len({w, v}) == len({y, z}) == 2
    assert counters == same
    assert bias.startswith("arg")
    assert code.count("TensorDescriptor.from_tensor") == (3 if changes.get("tma") else 0)


def test_the_lowering_is_one_that_inductor_calls_itself() -> None:
    assert lower_skinny_mm._inductor_lowering_function  # type: ignore[attr-defined]


def test_a_matrix_that_is_added_comes_behind_the_product(generated: list[str]) -> None:
    plan = plan_of(replace(MM, device="cpu"), config=SPLIT)
    code = compiled(plan, generated, with_residual)
    assert hits(plan) == [1]
    assert code.count("skinny_mm_kernel_0.run(") == 1
    assert code.index("skinny_mm_kernel_0.run(") < code.rindex("cpp_fused")
