"""GEMMs with an entry of backend "cutedsl" become calls of compiled kernels. No GPU, and no compiler: objects are stand-ins.

What is in an object, and that it can be called as its record says, is for tests/cutedsl.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from export.pretended_h200 import H200, generated_code, plan_with
from export.stand_in_objects import BYTES, calls, entry, hits, info_of, path_of, reasons, spec, targets, traced, with_objects
from torch._subclasses import FakeTensorMode

from autokernel.cutedsl.spec import KernelSpec
from autokernel.errors import BundleError, StorageError
from autokernel.export import cutedsl
from autokernel.export.apply import BundleBackend, inductor_options
from autokernel.export.bundle import Bundle, read_bundle, read_objects, write_bundle
from autokernel.export.cute_specs import specs_of
from autokernel.export.cutedsl import CutePass
from autokernel.export.plan import Plan
from autokernel.records import ConfigValue, Problem, TensorSpec

M, N, K = 16, 512, 256
QUACK: dict[str, ConfigValue] = {"source": "quack", "tile_m": 128, "tile_n": 128, "cluster_n": 2, "pingpong": True}
FUSED: dict[str, ConfigValue] = {**QUACK, "fuse": True}
OPERATORS: dict[str, ConfigValue] = {"source": "operators", "tile_m": 64, "tile_n": 128}
Graph = Callable[..., torch.Tensor]

WEIGHT = TensorSpec(shape=(K, N), dtype="bfloat16", stride=(1, K))
MM = Problem(op="mm", inputs=(spec(M, K), WEIGHT), device="cuda", constants=(1,))
SILU_ADD = Problem(op="mm", inputs=(spec(M, K), WEIGHT, spec(M, N)), device="cuda", constants=(1,), epilogue=("silu", "add"))
ADDMM = Problem(op="addmm", inputs=(spec(N), spec(M, K), WEIGHT), device="cuda", constants=(0, 2))
BIAS_RELU = Problem(op="addmm", inputs=(spec(N), spec(M, K), WEIGHT), device="cuda", constants=(0, 2), epilogue=("relu",))


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as the pass asks, whose loader takes anything."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(cutedsl, "load", lambda path: path)


def epilogue_of(plan: Plan, node: torch.fx.Node) -> tuple[str, ...]:
    """What the object of a call computes behind the product."""
    (found,) = [info.spec.epilogue for info in plan.bundle.objects if info.file_name == Path(path_of(node)).name]
    return found


def file_of(plan: Plan, epilogue: tuple[str, ...]) -> str:
    """Of the object with an epilogue."""
    (found,) = [info.file_name for info in plan.bundle.objects if info.spec.epilogue == epilogue]
    return found


def test_a_product_becomes_one_call_of_its_object(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(MM, QUACK))
    module = traced(
        lambda x, w, v: torch.relu(x @ w.t()) + torch.as_strided(x @ v.t(), (M, N), (2 * N, 1)), (M, K), (N, K), (2 * N, K)
    )
    CutePass(plan)(module.graph)
    module.graph.lint()
    (call,) = calls(module)
    assert targets(module).count("aten.mm.default") == 1  # the other product
    assert Path(path_of(call)).read_bytes() == BYTES
    assert (call.meta["val"].shape, call.meta["val"].dtype) == ((M, N), torch.bfloat16)
    assert call.meta["val"].is_contiguous()
    with FakeTensorMode():
        a, b = torch.empty(M, K, dtype=torch.bfloat16, device="cuda"), torch.empty(K, N, dtype=torch.bfloat16, device="cuda")
        fake = call.target(a, b, *call.args[2:])  # type: ignore[operator]
    assert (fake.shape, fake.dtype, fake.stride()) == ((M, N), torch.bfloat16, (N, 1))
    assert hits(plan) == [1]


def test_what_follows_is_fused_with_its_operands(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(SILU_ADD, FUSED))
    module = traced(lambda x, w, r: torch.nn.functional.silu(x @ w.t()) + r, (M, K), (N, K), (M, N))
    CutePass(plan)(module.graph)
    module.graph.lint()
    (call,) = calls(module)
    assert epilogue_of(plan, call) == ("silu", "add")
    assert [node.name for node in call.args[2]] == ["r_1"]  # type: ignore[union-attr]
    assert targets(module) == ["aten.t.default", "autokernel.cute_gemm.fused"]


VECTORS = replace(SILU_ADD, inputs=(spec(M, K), WEIGHT, spec(M, 1), spec(N)), epilogue=("div_per_row", "rsub_per_column"))


def over_rows_from_columns(x: torch.Tensor, w: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return columns - (x @ w.t()).view(2, M // 2, N) / rows


def test_operands_for_rows_and_columns_are_vectors_for_the_kernel(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(VECTORS, FUSED))
    module = traced(over_rows_from_columns, (M, K), (N, K), (2, M // 2, 1), (1, N))
    CutePass(plan)(module.graph)
    module.graph.lint()
    (call,) = calls(module)
    assert epilogue_of(plan, call) == ("div_per_row", "rsub_per_column")
    assert [tuple(node.meta["val"].shape) for node in call.args[2]] == [(M,), (N,)]  # type: ignore[union-attr]
    assert not {"aten.div.Tensor", "aten.sub.Tensor"} & set(targets(module))


def test_rows_that_do_not_follow_each_other_in_memory_stay_behind_the_kernel(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(VECTORS, FUSED))

    def apart(x: torch.Tensor, w: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return over_rows_from_columns(x, w, torch.as_strided(rows, (2, M // 2, 1), (4 * M, 8, 1)), columns)

    module = traced(apart, (M, K), (N, K), (2, M // 2, 8), (1, N))
    CutePass(plan)(module.graph)
    (call,) = calls(module)
    assert epilogue_of(plan, call) == ()
    assert "aten.div.Tensor" in targets(module)


@pytest.mark.parametrize("strides", [(1, M), (N + 4, 1), (0, 1)], ids=str)
def test_what_lies_as_the_kernel_cannot_read_it_is_not_fused(tmp_path: Path, strides: tuple[int, int]) -> None:
    """Entries are found without their epilogue: its operands may lie differently here."""
    plan = with_objects(tmp_path, entry(SILU_ADD, FUSED))

    def block(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        added = torch.as_strided(r, (M, N), strides)
        return torch.nn.functional.silu(x @ w.t()) + added

    module = traced(block, (M, K), (N, K), (M, 2 * N))
    CutePass(plan)(module.graph)
    (call,) = calls(module)
    assert epilogue_of(plan, call) == ()
    assert "aten.add.Tensor" in targets(module)


def test_operands_and_result_in_another_shape_are_seen_through_views(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(SILU_ADD, FUSED))

    def block(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu((x @ w.t()).view(1, M, N)) + r

    module = traced(block, (M, K), (N, K), (1, M, N))
    CutePass(plan)(module.graph)
    module.graph.lint()
    (call,) = calls(module)
    (operand,) = call.args[2]  # type: ignore[misc]
    assert operand.meta["val"].shape == (M, N)
    (result,) = next(node for node in module.graph.nodes if node.op == "output").args
    assert result.meta["val"].shape == (1, M, N)
    assert not {"aten.silu.default", "aten.add.Tensor", "aten.mm.default"} & set(targets(module))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, w, r: torch.tanh(x @ w.t()) + r, id="another function"),
        pytest.param(lambda x, w, r: (torch.nn.functional.silu(x @ w.t()) + r, x @ w.t()), id="both kinds"),
        pytest.param(lambda x, w, r: torch.nn.functional.silu(x @ w.t()) + torch.as_strided(r, (M, N), (1, M)), id="columns"),
    ],
)
def test_a_product_with_another_epilogue_keeps_it_behind_a_plain_kernel(tmp_path: Path, function: Graph) -> None:
    plan = with_objects(tmp_path, entry(SILU_ADD, FUSED))
    module = traced(function, (M, K), (N, K), (M, N))
    CutePass(plan)(module.graph)
    module.graph.lint()
    assert () in {epilogue_of(plan, call) for call in calls(module)}
    assert "aten.mm.default" not in targets(module)
    assert any(name in targets(module) for name in ("aten.tanh.default", "aten.silu.default", "autokernel.cute_gemm.fused"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float16], ids=str)
def test_rounding_that_the_model_wants_is_no_part_of_an_epilogue(tmp_path: Path, dtype: torch.dtype) -> None:
    """Fake quantization: to few bits and back."""
    convert = torch.ops.prims.convert_element_type.default
    relu = Problem(op="mm", inputs=(spec(M, K), WEIGHT), device="cuda", constants=(1,), epilogue=("relu",))
    for through, fused in ((dtype, False), (torch.float32, True)):
        plan = with_objects(tmp_path, entry(relu, FUSED))
        module = traced(
            partial(lambda to, x, w: torch.relu(convert(convert(x @ w.t(), to), torch.bfloat16)), through), (M, K), (N, K)
        )
        CutePass(plan)(module.graph)
        (call,) = calls(module)
        assert epilogue_of(plan, call) == (("relu",) if fused else ())
        assert ("aten.relu.default" in targets(module)) is not fused


def test_a_bias_goes_into_the_kernel_or_behind_it(tmp_path: Path) -> None:
    def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.addmm(b, x, w.t()))

    inside = with_objects(tmp_path / "inside", entry(BIAS_RELU, FUSED))
    module = traced(linear, (M, K), (N, K), (N,))
    CutePass(inside)(module.graph)
    (call,) = calls(module)
    assert epilogue_of(inside, call) == ("bias", "relu")
    assert targets(module) == ["aten.t.default", "autokernel.cute_gemm.fused"]
    behind = with_objects(tmp_path / "behind", entry(ADDMM, QUACK))
    module = traced(linear, (M, K), (N, K), (N,))
    CutePass(behind)(module.graph)
    module.graph.lint()
    assert epilogue_of(behind, calls(module)[0]) == ()
    assert targets(module)[1:] == ["autokernel.cute_gemm.default", "aten.add.Tensor", "aten.relu.default"]


def test_a_residual_that_inductor_has_put_into_the_product(tmp_path: Path) -> None:
    residual = Problem(op="mm", inputs=(spec(M, K), WEIGHT, spec(M, N)), device="cuda", constants=(1,), epilogue=("add",))
    plan = with_objects(tmp_path, entry(residual, FUSED))
    module = traced(lambda x, w, r: torch.addmm(r, x, w.t()), (M, K), (N, K), (M, N))
    CutePass(plan)(module.graph)
    (call,) = calls(module)
    assert epilogue_of(plan, call) == ("add",)
    assert [node.name for node in call.args[2]] == ["r_1"]  # type: ignore[union-attr]


GATE_UP = Problem(
    op="merged_mm", inputs=(spec(M, K), WEIGHT, WEIGHT), device="cuda", constants=(1, 2), epilogue=("gated_silu",)
)


def gate_and_up(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x @ w.t()) * (x @ v.t())


def test_gate_and_up_become_one_kernel_with_half_the_columns(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(GATE_UP, {**FUSED, "merge": "concat"}))
    assert sorted(info.spec.epilogue for info in plan.bundle.objects) == [(), ("gated_silu",)]
    options = inductor_options(plan, {}, frozen=False, merges=True)
    code = generated_code(gate_and_up, [spec(M, K), spec(N, K), spec(N, K)], options)
    assert code.count("torch.ops.autokernel.cute_gemm.default(") == 1
    assert file_of(plan, ("gated_silu",)) in code
    assert f", ({M}, {N}), ({N}, 1)" in code
    assert "extern_kernels.mm" not in code
    assert hits(plan) == [1]


def test_a_product_takes_the_result_of_one_that_was_replaced_before_it(tmp_path: Path) -> None:
    """SwiGLU of two products, each with a kernel of its own; the first one's result is reshaped before the second takes it."""
    silu = Problem(op="mm", inputs=(spec(M, K), WEIGHT), device="cuda", constants=(1,), epilogue=("silu",))
    mul = Problem(op="mm", inputs=(spec(M, 64), spec(64, N), spec(M, N)), device="cuda", constants=(1,), epilogue=("mul",))
    plan = with_objects(tmp_path, entry(silu, FUSED), entry(mul, FUSED))

    def block(x: torch.Tensor, w: torch.Tensor, z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.silu((x.view(M, K) @ w.t()).view(1, M, N))
        return gate * (z.view(M, 64) @ v).view(1, M, N)

    module = traced(block, (1, M, K), (N, K), (1, M, 64), (64, N))
    CutePass(plan)(module.graph)
    module.graph.lint()
    first, second = calls(module)
    assert (epilogue_of(plan, first), epilogue_of(plan, second)) == (("silu",), ("mul",))
    (operand,) = second.args[2]  # type: ignore[misc]
    assert first in (operand, *operand.all_input_nodes, *operand.all_input_nodes[0].all_input_nodes)
    assert hits(plan) == [1, 1]


def test_gate_and_up_that_are_used_otherwise_get_the_plain_kernel(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(GATE_UP, {**FUSED, "merge": "concat"}))
    options = inductor_options(plan, {}, frozen=False, merges=True)
    code = generated_code(lambda x, w, v: torch.tanh(x @ w.t()) * (x @ v.t()), [spec(M, K), spec(N, K), spec(N, K)], options)
    assert code.count("torch.ops.autokernel.cute_gemm.default(") == 1
    assert file_of(plan, ()) in code


def test_parts_of_k_are_summed_in_front_of_what_follows(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(BIAS_RELU, {**QUACK, "split_k": 4, "separate": True}))
    (info,) = plan.bundle.objects
    assert (info.spec.out_dtype, info.spec.epilogue) == ("float32", ())

    def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.addmm(b, x, w.t()))

    module = traced(linear, (M, K), (N, K), (N,))
    CutePass(plan)(module.graph)
    module.graph.lint()
    (call,) = calls(module)
    assert (call.meta["val"].shape, call.meta["val"].dtype) == ((4, M, N), torch.float32)
    assert targets(module)[2:] == [
        "aten.sum.dim_IntList", "prims.convert_element_type.default", "aten.add.Tensor", "aten.relu.default"
    ]  # fmt: skip
    code = generated_code(linear, [spec(M, K), spec(N, K), spec(N)], inductor_options(plan, {}, frozen=False))
    assert code.count("torch.ops.autokernel.cute_gemm.default(") == 1
    assert "sum" in code
    assert code.count(".run(") == 1, "one kernel for sum, bias and activation"


E4M3 = {"dtype": "float8_e4m3fn"}
OUT = (("out_dtype", "bfloat16"), ("use_fast_accum", True))


def scaled(*scales: TensorSpec, bias: bool = False) -> Problem:
    w = TensorSpec(shape=(K, N), dtype="float8_e4m3fn", stride=(1, K))
    inputs = (spec(M, K, **E4M3), w, *scales, *((spec(N),) if bias else ()))
    return Problem(op="scaled_mm", inputs=inputs, device="cuda", constants=(1,), scalars=OUT)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("sizes", "inside"),
    [(((1,), ()), ("tensor_scale_a", "tensor_scale_b")), (((M, 1), (1, N)), ("scale_a", "scale_b"))],
    ids=["by tensors", "by rows"],
)
def test_scales_of_8_bit_products_go_into_the_kernel(
    tmp_path: Path, sizes: tuple[tuple[int, ...], ...], inside: tuple[str, ...], fuse: bool
) -> None:
    scales = [spec(*size, dtype="float32") for size in sizes]
    plan = with_objects(tmp_path, entry(scaled(*scales, bias=True), {**QUACK, "fuse": fuse}))

    def linear(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        return torch._scaled_mm(x, w.t(), a.float(), b.float(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)

    module = traced(linear, (M, K), (N, K), *sizes, (N,))
    CutePass(plan)(module.graph)
    module.graph.lint()
    (call,) = calls(module)
    assert epilogue_of(plan, call) == ((*inside, "bias") if fuse else inside)
    shapes = [tuple(node.meta["val"].shape) for node in call.args[2]]  # type: ignore[union-attr]
    assert shapes[:2] == ([(1,), (1,)] if "tensor" in inside[0] else [(M,), (N,)])
    assert len(shapes) == (3 if fuse else 2)
    assert ("aten.add.Tensor" in targets(module)) != fuse
    assert call.meta["val"].dtype == torch.bfloat16


def test_integer_products_have_integer_sums(tmp_path: Path) -> None:
    inputs = (spec(M, K, dtype="int8"), TensorSpec(shape=(K, N), dtype="int8", stride=(1, K)))
    plan = with_objects(tmp_path, entry(Problem(op="int_mm", inputs=inputs, device="cuda", constants=(1,)), OPERATORS))
    module = traced(lambda x, w: torch._int_mm(x.to(torch.int8), w.to(torch.int8).t()), (M, K), (N, K))
    CutePass(plan)(module.graph)
    (call,) = calls(module)
    assert call.meta["val"].dtype == torch.int32
    assert hits(plan) == [1]


@pytest.mark.parametrize(
    ("function", "strides", "offset", "reason"),
    [
        (lambda x, w, r: torch.addmm(r, x, w.t(), beta=2), (), 0, "the product is scaled"),
        (lambda x, w, r: x @ w.t(), (2 * K, 2), 0, "neither its rows nor its columns are contiguous"),
        (lambda x, w, r: x @ w.t(), (K + 8, 1), 4, "begins 4 elements into its memory"),
        (lambda x, w, r: x @ w.t(), (K + 4, 1), 0, "must be multiples of 16 bytes"),
    ],
)
def test_what_no_kernel_takes_stays_stock_and_says_why(
    tmp_path: Path, function: Graph, strides: tuple[int, ...], offset: int, reason: str
) -> None:
    plan = with_objects(tmp_path, entry(MM, QUACK))

    def viewed(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return function(torch.as_strided(x, (M, K), strides or (K, 1), offset), w, r)

    module = traced(viewed, (M, 3 * K), (N, K), (M, N))
    before = targets(module)
    CutePass(plan)(module.graph)
    assert targets(module) == before
    assert reason in reasons(plan)
    assert hits(plan) == [0]


def test_an_object_that_is_not_with_the_bundle_leaves_stock_code(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(MM, QUACK))
    for path in tmp_path.glob("*.json"):
        path.unlink()
    module = traced(lambda x, w: x @ w.t(), (M, K), (N, K))
    CutePass(plan)(module.graph)
    assert not calls(module)
    assert "no readable record of a compiled kernel" in reasons(plan)


def test_a_cache_that_cannot_be_written_leaves_stock_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bundle without its objects, on a machine that may keep none: the model runs all the same."""

    def refuses(kernel: KernelSpec) -> None:
        raise StorageError("the cache cannot be written")

    monkeypatch.setattr(cutedsl, "compiled_object", refuses)
    plan = plan_with((entry(MM, QUACK),))
    module = traced(lambda x, w: x @ w.t(), (M, K), (N, K))
    CutePass(plan)(module.graph)
    assert not calls(module)
    assert "the cache cannot be written" in reasons(plan)


def test_merged_weights_are_one_matrix() -> None:
    inputs = (spec(M, K), WEIGHT, TensorSpec(shape=(K, 64), dtype="bfloat16", stride=(1, K)))
    merged = Problem(op="merged_mm", inputs=inputs, device="cuda", constants=(1, 2))
    (kernel,) = specs_of(entry(merged, {**QUACK, "merge": "concat"}), arch="sm_90a", num_units=132)
    assert (kernel.a_major, kernel.b_major, kernel.epilogue) == ("k", "k", ())
    assert "merge" not in kernel.config


@pytest.mark.parametrize(("config", "objects"), [(QUACK, 1), (OPERATORS, 2)], ids=["quack", "operators"])
def test_what_a_kernel_takes_at_a_call_is_not_compiled_into_it(
    config: dict[str, ConfigValue], objects: int, tmp_path: Path
) -> None:
    entries = [entry(MM, {**config, "swizzle": swizzle}) for swizzle in (8, 2)]
    plans = [with_objects(tmp_path, one) for one in entries]
    found = []
    for plan in plans:
        module = traced(lambda x, w: x @ w.t(), (M, K), (N, K))
        CutePass(plan)(module.graph)
        found.append(calls(module)[0].args[2:])
    assert len({path for path, *_ in found}) == objects
    assert [rest for _, *rest in found] == ([[], [2]] if objects == 1 else [[], []])


def test_objects_of_an_earlier_version_serve_what_they_were_made_for(tmp_path: Path) -> None:
    """Their records say the swizzle, which is left to calls now; nothing is compiled where a bundle is used."""
    one = entry(MM, {**QUACK, "swizzle": 4})
    (kernel,) = specs_of(one, arch="sm_90a", num_units=132)
    earlier = replace(kernel, config={**kernel.config, "swizzle": 4})
    info = info_of(earlier)
    (tmp_path / info.file_name).write_bytes(BYTES)
    (tmp_path / f"{info.key}.json").write_text(json.dumps(info.to_json()))
    bundle = Bundle(name="b", created="", version="", environment=H200, entries=(one,), objects=(info,))
    plan = Plan(bundle, None, {info.key: tmp_path / info.file_name})
    module = traced(lambda x, w: x @ w.t(), (M, K), (N, K))
    CutePass(plan)(module.graph)
    assert [path_of(call) for call in calls(module)] == [str(tmp_path / info.file_name)]


def test_without_its_folder_a_bundles_objects_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = with_objects(tmp_path, entry(MM, QUACK))
    (cached,) = shipped.files.values()
    monkeypatch.setattr(cutedsl, "compiled_here", lambda spec: cached)
    module = traced(lambda x, w: x @ w.t(), (M, K), (N, K))
    plan = Plan(shipped.bundle, None)
    CutePass(plan)(module.graph)
    assert [path_of(call) for call in calls(module)] == [str(cached)]
    assert [usage.hits for usage in plan.report().values()] == [1]


def test_entries_that_differ_in_merging_and_fusing_alone_share_an_object() -> None:
    keys = {
        kernel.key({})
        for config in (QUACK, {**QUACK, "fuse": False}, {**QUACK, "merge": "none"})
        for kernel in specs_of(entry(MM, config), arch="sm_90a", num_units=132)
    }
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(op="mm", inputs=(spec(M, 100), spec(100, 60)), device="cuda"), "multiples of 16 bytes"),
        (Problem(op="mm", inputs=(spec(M, K, dtype="float32"), spec(K, N, dtype="float32")), device="cuda"), "of one dtype of"),
    ],
)
def test_problems_that_no_kernel_solves(problem: Problem, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        specs_of(entry(problem, QUACK), arch="sm_90a", num_units=132)


def test_inductor_calls_the_object_with_the_strides_of_the_graph(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(SILU_ADD, FUSED))

    def block(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(torch.sin(x) @ w.t()) + r

    code = generated_code(block, [spec(M, K), spec(N, K), spec(M, N)], inductor_options(plan, {}, frozen=False))
    assert code.count("torch.ops.autokernel.cute_gemm.fused(") == 1
    assert f"reinterpret_tensor(arg1_1, ({K}, {N}), (1, {K}), 0)" in code
    assert str(tmp_path) in code
    assert "extern_kernels.mm" not in code
    assert hits(plan) == [1]


def test_a_bundle_carries_its_objects_in_folder_and_archive(tmp_path: Path) -> None:
    plan = with_objects(tmp_path / "cache", entry(SILU_ADD, FUSED), entry(ADDMM, QUACK))
    assert len(plan.bundle.objects) == 2  # the plain kernel serves both
    folder, archive = write_bundle(plan.bundle, tmp_path / "bundle", plan.files)
    for where in (folder, archive, folder / "bundle.json"):
        bundle = read_bundle(where)
        assert bundle == plan.bundle.sealed()
        (tmp_path / "unpacked").mkdir(exist_ok=True)
        files = read_objects(where, bundle, tmp_path / "unpacked")
        assert {key: path.read_bytes() for key, path in files.items()} == dict.fromkeys(plan.files, BYTES)
    assert BundleBackend(bundle, "apply", archive).plan.files.keys() == plan.files.keys()
    write_bundle(plan.bundle.__class__(name="b", created="", version="", environment=H200), folder)
    assert not list((folder / "objects").iterdir())


def test_files_are_unpacked_where_they_belong_and_only_if_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = with_objects(tmp_path / "cache", entry(SILU_ADD, FUSED), entry(ADDMM, QUACK))
    _, archive = write_bundle(plan.bundle, tmp_path / "bundle", plan.files)
    bundle = read_bundle(archive)
    monkeypatch.setattr("autokernel.export.apply.read_objects", lambda *_: pytest.fail("nothing of it applies here"))
    assert BundleBackend(bundle, "stock", archive).plan.files == {}
    first, *rest = bundle.objects
    evil = replace(bundle, objects=(replace(first, key="../evil"), *rest)).sealed()
    (tmp_path / "evil.json").write_text(json.dumps(evil.to_json()))
    with pytest.raises(BundleError, match=r"a compiled kernel's key is letters and digits, not '../evil'"):
        read_bundle(tmp_path / "evil.json")


def test_an_archive_that_lacks_a_kernel_has_the_others(tmp_path: Path) -> None:
    plan = with_objects(tmp_path / "cache", entry(SILU_ADD, FUSED), entry(ADDMM, QUACK))
    _, archive = write_bundle(plan.bundle, tmp_path / "bundle", plan.files)
    gone = plan.bundle.objects[0].file_name
    with zipfile.ZipFile(archive) as packed, zipfile.ZipFile(tmp_path / "less.zip", "w") as less:
        for name in packed.namelist():
            if not name.endswith(gone):
                less.writestr(name, packed.read(name))
    (tmp_path / "unpacked").mkdir()
    files = read_objects(tmp_path / "less.zip", read_bundle(tmp_path / "less.zip"), tmp_path / "unpacked")
    assert {path.name: path.exists() for path in files.values()} == {
        info.file_name: info.file_name != gone for info in plan.bundle.objects
    }


def test_a_kernel_that_is_not_the_recorded_one_is_not_exported(tmp_path: Path) -> None:
    plan = with_objects(tmp_path / "cache", entry(MM, QUACK))
    (path,) = plan.files.values()
    path.write_bytes(b"another")
    with pytest.raises(BundleError, match="is not the one that was recorded"):
        write_bundle(plan.bundle, tmp_path / "bundle", plan.files)


def test_objects_decide_the_digest_of_what_is_applied(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(MM, QUACK))
    (info,) = plan.bundle.objects
    other = Bundle.from_json({**plan.bundle.to_json(), "objects": [info_of(info.spec, b"other").to_json()]})
    assert other.applied_digest != plan.bundle.applied_digest


def test_cached_code_serves_neither_objects_elsewhere_nor_another_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the file of an object, which lies in a folder of its own in each process that unpacks an archive."""
    plans = [with_objects(tmp_path / place, entry(MM, QUACK)) for place in ("one", "one", "another")]
    first, same, elsewhere = (CutePass(plan).uuid() for plan in plans)
    assert plans[0].digest == plans[2].digest
    assert first == same != elsewhere
    monkeypatch.setattr("autokernel.cutedsl.op.PLAIN", torch.ops.aten.mm.default)
    assert CutePass(plans[0]).uuid() != first
