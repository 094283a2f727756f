"""Products of 8 bits are never taken for plain ones, nor for each other."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autokernel.environment import Environment
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.matching import Gemm, gemm_of
from autokernel.export.passes import MergePass
from autokernel.export.plan import Plan
from autokernel.export.substitution import SubstitutionPass
from autokernel.export.templates import TemplatePass, gemm_of_node
from autokernel.records import ConfigValue, Problem, TensorSpec

aten = torch.ops.aten
M, N, K = 32, 128, 64
HERE = Environment(device="cuda", device_name="NVIDIA H200", isa="sm_90", num_units=132, torch=torch.__version__)


def matrices(left: str, right: str) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec.contiguous((M, K), left), TensorSpec(shape=(K, N), dtype=right, stride=(1, K))


def scaled(
    left: str = "float8_e4m3fn", right: str = "float8_e4m3fn", scaling: str = "row", bias: bool = False,
    out: str = "bfloat16", fast: bool = False, epilogue: tuple[str, ...] = (),
) -> Problem:  # fmt: skip
    shapes = ((M, 1), (1, N)) if scaling == "row" else ((), ())
    inputs = (
        *matrices(left, right),
        *(TensorSpec.contiguous(shape, "float32") for shape in shapes),
        *([TensorSpec.contiguous((N,), out)] if bias else []),
        *([TensorSpec.contiguous((M, N), out)] if "add" in epilogue else []),
    )
    constants = (1, 3, 4) if bias else (1, 3)
    scalars = (("out_dtype", out), ("use_fast_accum", fast))
    return Problem(op="scaled_mm", inputs=inputs, device="cuda", constants=constants, scalars=scalars, epilogue=epilogue)


def plain(op: str, dtype: str) -> Problem:
    return Problem(op=op, inputs=matrices(dtype, dtype), device="cuda", constants=(1,))


# Everything that has these sizes.
PROBLEMS = {
    "bf16": plain("mm", "bfloat16"),
    "fp16": plain("mm", "float16"),
    "fp8, as if it were plain": plain("mm", "float8_e4m3fn"),
    "int8 to int8": plain("mm", "int8"),
    "int8": plain("int_mm", "int8"),
    "bf16 + bias": Problem(
        op="addmm", inputs=(TensorSpec.contiguous((N,), "bfloat16"), *matrices("bfloat16", "bfloat16")), device="cuda"
    ),
    "rows": scaled(),
    "rows + bias": scaled(bias=True),
    "tensors": scaled(scaling="tensor"),
    "fast": scaled(fast=True),
    "to fp16": scaled(out="float16"),
    "e5m2 left": scaled(left="float8_e5m2"),
    "e5m2 right": scaled(right="float8_e5m2"),
}


def node_of(problem: Problem) -> torch.fx.Node:
    """The product as it is in a post-grad graph; keyword arguments as Dynamo leaves them."""
    graph = torch.fx.Graph()
    with FakeTensorMode():
        nodes = []
        for i, spec in enumerate(problem.inputs):
            nodes.append(graph.placeholder(f"x{i}"))
            dtype = getattr(torch, spec.dtype)
            nodes[-1].meta["val"] = torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device="cuda")
        scalars = dict(problem.scalars)
        dtype = getattr(torch, str(scalars.get("out_dtype", "int32" if problem.op == "int_mm" else problem.inputs[-1].dtype)))
        if problem.op == "scaled_mm":
            arguments: tuple[Any, ...] = (*nodes[:4], nodes[4] if len(nodes) > 4 else None, None, dtype)
            options = {"use_fast_accum": True} if scalars["use_fast_accum"] else {}
            node = graph.call_function(aten._scaled_mm.default, arguments, options)
        else:
            target = {"mm": aten.mm.default, "addmm": aten.addmm.default, "int_mm": aten._int_mm.default}[problem.op]
            node = graph.call_function(target, tuple(nodes))
        node.meta["val"] = torch.empty(M, N, dtype=dtype, device="cuda")
    graph.output(node)
    return node


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_product_in_a_graph_is_that_of_its_problem(name: str) -> None:
    assert gemm_of_node(node_of(PROBLEMS[name])) == gemm_of(PROBLEMS[name])


def test_no_two_of_them_are_the_same() -> None:
    for one, other in itertools.combinations(PROBLEMS, 2):
        assert gemm_of(PROBLEMS[one]) != gemm_of(PROBLEMS[other]), f"{one} and {other}"


def test_they_are_spelled() -> None:
    assert str(gemm_of(PROBLEMS["int8"])) == "int8 32x128x64 -> int32"
    expected = "float8_e5m2 32x128x64 x float8_e4m3fn, scaled by row -> bfloat16"
    assert str(gemm_of(PROBLEMS["e5m2 left"])) == expected
    assert str(gemm_of(scaled(fast=True, bias=True))).endswith("scaled by row -> bfloat16, fast + bias")


def test_an_operand_of_the_epilogue_is_no_bias() -> None:
    residual = scaled(epilogue=("add",))
    assert gemm_of(residual) == gemm_of(PROBLEMS["rows"])
    both = scaled(bias=True, epilogue=("silu", "add"))
    assert gemm_of(both) == gemm_of(PROBLEMS["rows + bias"])


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (2, TensorSpec.contiguous((M, 1), "bfloat16")),
        (2, TensorSpec.contiguous((M, 2), "float32")),
        (2, TensorSpec.contiguous((1,), "float32")),
        (3, TensorSpec.contiguous((N, 1), "float32")),
    ],
    ids=["bf16", "blocks", "one tensor's", "columns"],
)
def test_scales_of_another_kind_are_left_alone(change: int, value: TensorSpec) -> None:
    inputs = list(PROBLEMS["rows"].inputs)
    inputs[change] = value
    assert gemm_of_node(node_of(replace(PROBLEMS["rows"], inputs=tuple(inputs)))) is None


def test_a_result_in_8_bits_or_scaled_again_is_left_alone() -> None:
    assert gemm_of_node(node_of(scaled(out="float8_e4m3fn"))) is None
    node = node_of(PROBLEMS["tensors"])
    node.args = (*node.args[:5], node.args[2], *node.args[6:])
    assert gemm_of_node(node) is None


ENTRIES: dict[str, tuple[str, dict[str, ConfigValue]]] = {
    "template": (
        "inductor",
        {"template": "mm", "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_stages": 3, "num_warps": 4, "GROUP_M": 8},
    ),
    "kernel": (
        "triton",
        {"kernel": "skinny_mm", "mode": "rows", "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "split_k": 1, "waves": 0,
         "tma": False, "num_warps": 4, "num_stages": 3, "m_min": 1, "m_max": 64},
    ),
    "merge": ("aten", {"merge": "concat"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("name", ["int8", "rows", "tensors", "rows + bias"])
@pytest.mark.parametrize("tuned", ["bf16", "int8 to int8", "own"])
def test_passes_for_plain_products_leave_them_alone(kind: str, name: str, tuned: str) -> None:
    backend, config = ENTRIES[kind]
    problem = PROBLEMS[name] if tuned == "own" else PROBLEMS[tuned]
    plan = Plan(
        Bundle(
            name="t", created="", version="", environment=HERE,
            entries=(Entry(problem=problem, backend=backend, config=config),),
        )
    )  # fmt: skip
    node = node_of(PROBLEMS[name])
    before = str(node.graph)
    for graph_pass in (MergePass(plan), TemplatePass(plan), SubstitutionPass(plan)):
        graph_pass(node.graph)
    assert str(node.graph) == before
    assert all(not usage.hits for usage in plan.usage.values())


def test_an_entry_of_8_bits_is_found_for_its_own_product_alone() -> None:
    for name, problem in PROBLEMS.items():
        entry = Entry(problem=problem, backend="cutedsl", config={"source": "quack"})
        plan = Plan(Bundle(name="t", created="", version="", environment=HERE, entries=(entry,)))
        found = [other for other in PROBLEMS if plan.find_or_merged(gemm_of_node(node_of(PROBLEMS[other])) or _NONE)]
        assert found == [name]


_NONE = Gemm("", 0, 0, (), 0, False)
