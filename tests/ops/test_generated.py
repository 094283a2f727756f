"""Which regions are found in real post-grad graphs, why the others end, and a test for each rule of legality."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu.generated_problems import PROGRAMS
from gpu.generated_problems import problem as measured_problem
from ops.generated_graphs import OP, SQUARE, K, Make, N, V, W, found, graph_of, only, ops_of, rms, rows
from torch import nn
from torch.fx import Graph
from torch.nn import functional

from autokernel.backends.compiled import Copies
from autokernel.ops.generated import Explained, count_rules, explain
from autokernel.ops.legality import Rule
from autokernel.ops.matching import settled, spec_of, tensor_spec
from autokernel.ops.program import program_of, results_of
from autokernel.records import Problem, TensorSpec

# ---- what is found


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def llama(request: pytest.FixtureRequest, post_grad: Any) -> Graph:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=request.param).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    return post_grad(Logits(), torch.randint(0, 64, (2, 5)))[0]  # type: ignore[no-any-return]


def test_a_llama_has_a_region_around_every_product(llama: Graph) -> None:
    assert [item.node for item in explain(llama) if item.is_product and item.num_regions == 0] == []
    programs = {ops_of(region) for region in found(llama)}
    norm, swiglu = "pow mean add rsqrt mul mul", "neg exp add div"
    assert f"{norm} mm mm mm" in programs, "norm and Q/K/V"
    assert f"{norm} mm {swiglu} mm mul" in programs, "norm, gate, up and SwiGLU"
    assert f"{norm} mm mm" in programs, "the prologue alone"
    assert f"mm {swiglu} mm mul" in programs, "the epilogue alone"
    assert f"{swiglu} mul mm add" in programs, "SwiGLU, down and the residual"
    assert "mm add" in programs, "a product and the residual"
    assert f"add {norm}" in programs, "the residual and a norm, both written"
    (both,) = [region for region in found(llama) if ops_of(region) == f"add {norm}" and len(region.outputs) == 2]
    assert len(both.inputs) == 3


def test_a_program_compiled_alone_is_the_same_region(llama: Graph, post_grad: Any) -> None:
    for problem in {ops_of(region): region.problem for region in found(llama)}.values():
        copies = Copies(replace(problem, constants=()), [[], []])
        examples = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in problem.inputs * 2]
        graph = post_grad(copies, *(x.zero_() for x in examples))[0]
        assert [region.problem.key for region in found(graph)].count(problem.key) == 2, problem.key


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_measured_on_a_gpu_is_spelled_as_it_is_found(name: str, post_grad: Any) -> None:
    problem = replace(measured_problem(name, 16), device="cpu", constants=())
    examples = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in problem.inputs]
    graph = post_grad(Copies(problem, [[]]), *examples)[0]
    assert problem in [region.problem for region in found(graph)]


def test_what_a_problem_says_of_its_results_is_what_the_graph_has(llama: Graph) -> None:
    for region in found(llama):
        results, names = results_of(region.problem), program_of(region.problem).outputs
        for name, node in zip(names, region.outputs, strict=True):
            spec = tensor_spec(node)
            assert spec is not None
            assert settled(results[name]) == settled(spec)


def test_sites_are_for_a_gpu_alone(llama: Graph) -> None:
    assert OP.find(llama, frozenset(), "cpu") == []
    sites = OP.find(llama, frozenset({"arg2_1"}), "cuda")
    assert len(sites) == len(found(llama))
    assert {site.problem.device for site in sites} == {"cuda"}


def test_sizes_and_costs() -> None:
    text = "t0 = pow(i0, 2); t1 = mean(t0); t2 = mul(i0, t1); t3 = t(i1); t4 = mm(t2, t3); o0 = relu(t4)"
    specs = tuple(spec for x in (rows(6, K), W) if (spec := spec_of(x)) is not None)
    problem = Problem(op="generated", inputs=specs, device="cpu", scalars=(("program", text),))
    dims = OP.dims(problem)
    assert {name: dims[name] for name in ("has_gemm", "m", "n", "k", "num_products", "num_reductions", "scaled")} == {
        "has_gemm": 1, "m": 6, "n": N, "k": K, "num_products": 1, "num_reductions": 1, "scaled": 1,
    }  # fmt: skip
    assert OP.num_bytes(problem) == 4 * (6 * K + N * K + 6 * N)
    assert OP.flops(problem) >= 2 * 6 * N * K


def test_layer_norm_softmax_and_permuted_rows_are_found(post_grad: Any) -> None:
    (region,) = found(graph_of(post_grad, lambda x: functional.layer_norm(x, (K,)).exp(), rows(3, 5, K)))
    assert ops_of(region) == "var_mean sub add rsqrt mul exp"
    (region,) = found(graph_of(post_grad, lambda x: rms(x.transpose(0, 1)), rows(3, 5, K)))
    assert ops_of(region) == "pow mean add rsqrt mul"
    assert region.problem.inputs[0].stride == (K, 5 * K, 1)
    (region,) = found(graph_of(post_grad, lambda x: x.sin().softmax(-1), rows(3, 5, K)))
    assert ops_of(region) == "sin amax sub exp sum div"


def test_a_gate_with_one_row_for_all_is_computed_where_it_is_used(post_grad: Any) -> None:
    def function(x: torch.Tensor, gate: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return r + functional.linear(x, w) * torch.tanh(gate)

    (region,) = found(graph_of(post_grad, function, rows(2, 5, K), rows(1, 1, N), rows(2, 5, N), weights=(W,)))
    assert ops_of(region) == "mm tanh mul add"


# ---- why regions end: each rule


def linear_then(post_grad: Any, behind: Make, *more: torch.Tensor) -> Explained:
    """What ends the epilogue of a product of [6, K] by [K, N], with `sigmoid` in front of whatever comes, the last of it."""

    def function(x: torch.Tensor, *rest: torch.Tensor) -> Any:
        return behind(functional.linear(x, rest[-1]).sigmoid(), *rest[:-1])

    graph = graph_of(post_grad, function, rows(6, K), *more, weights=(W,))
    assert next(ops_of(region) for region in found(graph) if "sigmoid" in ops_of(region)) == "mm sigmoid"
    assert not any("float64" in str(region.problem) for region in found(graph))
    return next(item for item in explain(graph) if item.op == "aten.mm")


@pytest.mark.parametrize(
    ("behind", "more", "rule"),
    [
        (lambda y: torch.cumsum(y, 1), (), Rule.NO_CODE),
        (lambda y: y.view(6, 4, 12).transpose(0, 1).exp(), (), Rule.VIEW),
        (lambda y: y.double().exp(), (), Rule.DTYPE),
        (lambda y, z: y + z, (rows(5, 6, N),), Rule.BROADCAST),
        (lambda y, w: y @ w, (rows(N, N),), Rule.PRODUCT),
        (lambda y: y, (), Rule.RESULT),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_an_epilogue_ends(post_grad: Any, behind: Make, more: tuple[torch.Tensor, ...], rule: Rule) -> None:
    item = linear_then(post_grad, behind, *more)
    assert item.num_regions == 1, "the sigmoid is in"
    assert rule in [broken.rule for broken in item.behind], item.behind


def test_an_epilogue_ends_before_rows_that_are_too_long(post_grad: Any) -> None:
    weight = torch.randn(4096, K)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, w).sigmoid().softmax(-1)

    graph = graph_of(post_grad, function, rows(6, K), weights=(weight,))
    assert ops_of(found(graph)[0]) == "mm sigmoid"
    item = only(graph, "aten.mm")
    assert item.num_regions == 1, "the sigmoid is in"
    said = "a reduction of rows that no program holds whole: amax (rows of 4096 do not fit into a block)"
    assert said in map(str, item.behind), item.behind


def test_an_epilogue_ends_before_other_users(post_grad: Any) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = functional.linear(x, w).sigmoid()
        return y.exp(), y.cumsum(0)

    graph = graph_of(post_grad, function, rows(6, K), weights=(W,))
    assert [ops_of(region) for region in found(graph)] == ["mm sigmoid"]


def test_a_prologue_that_others_use_is_read_from_memory(post_grad: Any) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, extra: bool) -> tuple[torch.Tensor, ...]:
        normed = rms(x)
        return functional.linear(normed, w), normed.cumsum(0) if extra else x

    alone = graph_of(post_grad, lambda x, w: function(x, w, False), rows(6, K), weights=(W,))
    shared = graph_of(post_grad, lambda x, w: function(x, w, True), rows(6, K), weights=(W,))
    assert "pow mean add rsqrt mul mm" in [ops_of(region) for region in found(alone)]
    assert [ops_of(region) for region in found(shared)] == ["mm", "pow mean add rsqrt mul"]
    assert Rule.USER in [broken.rule for broken in only(shared, "aten.mm").before]


def test_products_that_share_a_prologue_are_one_region(post_grad: Any) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = rms(x)
        return functional.linear(normed, w).cumsum(0), functional.linear(normed, v).cumsum(0)

    regions = found(graph_of(post_grad, function, rows(2, 3, K), weights=(W, V)))
    assert [ops_of(region) for region in regions] == ["pow mean add rsqrt mul mm mm", "mm mm", "pow mean add rsqrt mul"]
    assert len(regions[0].outputs) == 2


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, ["mm"]), (torch.bfloat16, [])])
def test_products_alone_are_a_region_where_nothing_else_serves_them(
    post_grad: Any, dtype: torch.dtype, expected: list[str]
) -> None:
    graph = graph_of(post_grad, lambda x, w: x @ w.t(), rows(6, K, dtype=dtype), weights=(W.to(dtype),))
    assert [ops_of(region) for region in found(graph)] == expected


def test_nothing_is_fused_over_a_write_to_what_is_read(post_grad: Any) -> None:
    def function(x: torch.Tensor, state: torch.Tensor, new: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return functional.linear(x, w).sigmoid() * state, new.cumsum(0)

    graph = graph_of(post_grad, function, rows(6, K), rows(6, N), rows(6, N), weights=(W,))
    (region,) = found(graph)
    assert ops_of(region) == "mm sigmoid mul"
    sigmoid = next(node for node in region.inner if node.name.startswith("sigmoid"))
    state, new = (node for node in graph.nodes if node.op == "placeholder" and tensor_spec(node).shape == (6, N))  # type: ignore[union-attr]
    with graph.inserting_after(sigmoid):
        write = graph.call_function(torch.ops.aten.copy_.default, (state, new))
        write.meta["val"] = state.meta["val"]
    assert found(graph) == []
    whole = only(graph, "aten.mm").whole
    assert whole is not None
    assert whole.rule is Rule.MUTATION
    assert str(whole) == "a mutation between: copy__default"


def test_an_operand_that_depends_on_the_region_stays_outside(post_grad: Any) -> None:
    def function(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + r
        normed = rms(y)
        return (y + normed.cumsum(0)).exp(), y

    graph = graph_of(post_grad, function, rows(6, K), rows(6, K))
    (region,) = found(graph)
    assert ops_of(region) == "add pow mean add rsqrt mul"
    assert len(region.outputs) == 2
    assert Rule.LATE in [broken.rule for broken in only(graph, "aten.mean").behind]


@pytest.mark.parametrize(
    ("function", "op", "rule"),
    [
        (lambda x: x.exp().mean(0, keepdim=True) + 1, "aten.mean", Rule.REDUCTION),
        (lambda x: x.exp().mean(-1) + 1, "aten.mean", Rule.REDUCTION),
        (lambda x: x.double().exp().mean(-1, keepdim=True) + 1, "aten.mean", Rule.DTYPE),
        (lambda x: x.double() @ SQUARE.double(), "aten.mm", Rule.DTYPE),
        (lambda x: x[:, :1] @ SQUARE[:1], "aten.mm", Rule.NO_CODE),
        (lambda x: torch.baddbmm(x, x.expand(2, 6, K), SQUARE.expand(2, K, K), alpha=0.5), "aten.baddbmm", Rule.NO_CODE),
    ],
)
def test_what_has_no_region_says_why(post_grad: Any, function: Make, op: str, rule: Rule) -> None:
    graph = graph_of(post_grad, function, rows(6, K))
    item = only(graph, op)
    assert item.num_regions == 0
    assert item.whole is not None
    assert item.whole.rule is rule
    assert count_rules([item]) == {str(rule): 1}


def test_a_prologue_ends_at_an_input_of_the_graph(post_grad: Any) -> None:
    graph = graph_of(post_grad, lambda x, w: functional.linear(x.exp(), w), rows(6, K), weights=(W,))
    (placeholder,) = [node for node in graph.nodes if node.op == "placeholder" and tensor_spec(node).shape == (6, K)]  # type: ignore[union-attr]
    assert list(map(str, only(graph, "aten.mm").before)) == [f"an input of the graph: {placeholder.name}"]
    assert [ops_of(region) for region in found(graph)] == ["exp mm", "mm"]


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: (x @ SQUARE).exp(), "aten.mm"),
        (lambda x: rms(x.exp()), "aten.mean"),
    ],
)
def test_values_of_any_size_have_no_region(post_grad: Any, function: Make, op: str) -> None:
    x = rows(6, K)
    torch._dynamo.mark_dynamic(x, 0)
    graph = graph_of(post_grad, function, x)
    assert any(not isinstance(size, int) for node in graph.nodes if "val" in node.meta and hasattr(node.meta["val"], "shape")
               for size in node.meta["val"].shape), "the size is a symbol"  # fmt: skip
    assert found(graph) == []
    item = only(graph, op)
    assert item.whole is not None
    assert item.whole.rule is Rule.SHAPE
    assert count_rules([item]) == {"a value without static sizes": 1}


def test_an_epilogue_ends_where_sizes_are_not_known(post_grad: Any) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, w).sigmoid().exp()

    graph = graph_of(post_grad, function, rows(6, K), weights=(W,))
    assert ops_of(found(graph)[0]) == "mm sigmoid exp"
    next(node for node in graph.nodes if node.name.startswith("exp")).meta["val"] = None
    assert ops_of(found(graph)[0]) == "mm sigmoid"
    assert [broken.rule for broken in only(graph, "aten.mm").behind] == [Rule.SHAPE]


def test_a_region_is_not_too_large(post_grad: Any) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, w)
        for i in range(80):
            y = (y * (1 + i / 100)).sin()
        return y

    sizes = [len(region.inner) for region in found(graph_of(post_grad, function, rows(6, K), weights=(W,)))]
    assert all(size <= 65 for size in sizes)


# ---- what it is computed in


@pytest.mark.parametrize(
    ("dtypes", "program", "dtype"),
    [
        (["bfloat16", "bfloat16"], "t0 = t(i1); o0 = mm(i0, t0)", "bfloat16"),
        (["float32", "bfloat16"], "t0 = convert(i0, bfloat16); o0 = mm(t0, i1)", "bfloat16"),
        (["float32", "bfloat16"], "t0 = convert(i1, float32); o0 = mm(i0, t0)", "float32"),
        (["bool", "float16", "bfloat16"], "t0 = convert(i1, bfloat16); t1 = mm(t0, i2); o0 = where(i0, t1, 0.0)", "bfloat16"),
        (["float32", "float16", "bfloat16"], "t0 = convert(i1, bfloat16); o0 = addmm(i0, t0, i2)", "bfloat16"),
        (["float16", "int8"], "t0 = convert(i1, float16); o0 = mm(i0, t0)", "float16"),
        # fp32 holds each bf16 exactly: a kernel may multiply what was there before
        (["bfloat16"], "t0 = convert(i0, float32); t1 = t(i0); t2 = convert(t1, float32); o0 = mm(t0, t2)", "bfloat16"),
        (["bfloat16"], "t0 = convert(i0, float32); t1 = exp(t0); t2 = t(t0); o0 = mm(t1, t2)", "float32"),
        # of several products the fastest: nothing right is called impossible
        (["float32", "bfloat16"], "o0 = mm(i0, i0); o1 = mm(i1, i1)", "bfloat16"),
        (["bool", "float32"], "t0 = where(i0, i1, 0.0); o0 = sum(t0)", "float32"),
        (["bfloat16", "float32"], "t0 = mul(i0, i1); o0 = mean(t0)", "float32"),
        (["bool", "int8"], "t0 = where(i0, i1, i1); o0 = amax(t0)", "bool"),
    ],
)  # fmt: skip
def test_operations_have_the_dtype_of_the_product_or_of_the_widest_input(
    dtypes: list[str], program: str, dtype: str
) -> None:  # fmt: skip
    inputs = tuple(TensorSpec.contiguous((16, 16), name) for name in dtypes)
    problem = Problem(op="generated", inputs=inputs, device="cuda", scalars=(("program", program),))
    assert OP.compute_dtype(problem) == dtype


def test_a_norm_and_a_product_under_autocast_are_computed_in_bf16(post_grad: Any) -> None:
    norm = nn.RMSNorm(K)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.linear(norm(x), w).relu()

    regions = found(graph_of(post_grad, function, rows(6, K), weights=(W,)))
    whole = next(region for region in regions if ops_of(region).startswith("pow mean"))
    assert ops_of(whole).endswith("mm relu")
    assert whole.problem.inputs[0].dtype == "float32"
    assert {("mm" in ops_of(r), OP.compute_dtype(r.problem)) for r in regions} == {(True, "bfloat16"), (False, "float32")}
