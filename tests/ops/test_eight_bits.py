"""Scaled and integer products: what is found of them in real graphs, their references and costs, how they are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from autokernel.backends import Built
from autokernel.evaluate.budget import Expected, errors_of, expectation_bytes, expected_outputs
from autokernel.evaluate.numerics import check
from autokernel.evaluate.probes import DRAWS, join, make_constants, make_inputs, make_variables
from autokernel.ops import get_op
from autokernel.ops.scaled_mm import scaling_of
from autokernel.records import Problem, TensorSpec, Verdict
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space
from autokernel.tracking.titles import problem_title

M, N, K = 32, 48, 256
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Kernel = Callable[..., torch.Tensor]


def scaled(
    left: str = "float8_e4m3fn", right: str = "float8_e4m3fn", *, rows: bool = False, bias: bool = False,
    out: str = "bfloat16", epilogue: tuple[str, ...] = (), device: str = "cpu", n: int = N,
) -> Problem:  # fmt: skip
    inputs = [
        TensorSpec.contiguous((M, K), left),
        TensorSpec(shape=(K, n), dtype=right, stride=(1, K)),
        *(TensorSpec.contiguous(shape, "float32") for shape in (((M, 1), (1, n)) if rows else ((), ()))),
        *([TensorSpec.contiguous((n,), out)] if bias else []),
        *([TensorSpec.contiguous((M, n), out)] if "add" in epilogue else []),
    ]
    return Problem(
        op="scaled_mm", inputs=tuple(inputs), device=device, constants=(1, 3, 4) if bias else (1, 3),
        scalars=(("out_dtype", out), ("use_fast_accum", False)), epilogue=epilogue,
    )  # fmt: skip


INTEGER = Problem(
    op="int_mm",
    inputs=(TensorSpec.contiguous((M, K), "int8"), TensorSpec(shape=(K, N), dtype="int8", stride=(1, K))),
    device="cpu",
    constants=(1,),
)
CASES = {
    "tensor-wise": scaled(),
    "row-wise, bias": scaled(rows=True, bias=True),
    "e5m2": scaled("float8_e5m2", out="float16"),
    "e5m2 weight": scaled(right="float8_e5m2", rows=True),
    "to fp32": scaled(out="float32"),
    "residual": scaled(rows=True, bias=True, epilogue=("silu", "add")),
}


class Scaled(nn.Module):
    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.options = {"out_dtype": torch.bfloat16} | options

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(x, self.weight.t(), scale, self.scale, **self.options)


def sites(post_grad: Any, module: nn.Module, *inputs: torch.Tensor, op: str = "scaled_mm") -> list[Problem]:
    graph, constants = post_grad(module, *inputs)
    return [site.problem for site in get_op(op).find(graph, constants, "cpu")]


def eight_bits(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def test_a_scaled_product_is_found_with_its_scales_and_options(post_grad: Any) -> None:
    module = Scaled(eight_bits(N, K), torch.rand(1, N), use_fast_accum=True)
    (found,) = sites(post_grad, module, eight_bits(M, K), torch.rand(M, 1))
    assert found == replace(scaled(rows=True), scalars=(("out_dtype", "bfloat16"), ("use_fast_accum", True)))
    (found,) = sites(post_grad, Scaled(eight_bits(N, K), torch.tensor(2.0)), eight_bits(M, K, dtype=E5M2), torch.tensor(0.5))
    assert found == scaled("float8_e5m2")
    assert not sites(post_grad, module, eight_bits(M, K), torch.rand(M, 1), op="mm")


def test_a_bias_is_an_input_of_its_own_and_what_follows_the_epilogue(post_grad: Any) -> None:
    class Biased(Scaled):
        def forward(self, x: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            product = torch._scaled_mm(x, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=torch.bfloat16)
            return nn.functional.silu(product) + residual

    module = Biased(eight_bits(N, K), torch.rand(1, N))
    module.bias = nn.Parameter(torch.randn(N).bfloat16())
    (found,) = sites(post_grad, module, eight_bits(M, K), torch.rand(M, 1), torch.randn(M, N).bfloat16())
    assert found == CASES["residual"]


@pytest.mark.parametrize("scale", [torch.rand(M, K // 128), torch.rand(M, 1).half(), torch.rand(M)])
def test_other_scales_are_none_of_ours(scale: torch.Tensor) -> None:
    a, b, *_ = scaled(rows=True).inputs
    of_scale = TensorSpec.contiguous(tuple(scale.shape), str(scale.dtype).removeprefix("torch."))
    assert scaling_of(a, b, of_scale, TensorSpec.contiguous((1, N), "float32")) is None


def test_an_integer_product_is_found_without_what_makes_floats_of_it(post_grad: Any) -> None:
    class Integer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-128, 128, (N, K), dtype=torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch._int_mm(x, self.weight.t()).float() * 0.01

    x = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    (found,) = sites(post_grad, Integer(), x, op="int_mm")
    assert found == INTEGER
    assert not sites(post_grad, Integer(), x, op="mm")


@pytest.mark.parametrize("name", CASES)
def test_the_reference_in_8_bits_is_its_own_definition_rounded(name: str) -> None:
    problem = CASES[name]
    op, inputs = get_op("scaled_mm"), make_inputs(problem, 1)
    (eager,) = op.reference(problem, *inputs)
    (exact,) = op.reference(problem, *(x.double() for x in inputs))
    assert eager.dtype == getattr(torch, str(dict(problem.scalars)["out_dtype"]))
    assert exact.dtype == torch.float64
    a, b, scale_a, scale_b = (x.double() for x in inputs[:4])
    by_hand = (a @ b) * scale_a * scale_b
    if "bias" in name or "residual" in name:
        by_hand = by_hand + inputs[4].double()
    if "residual" in name:
        by_hand = nn.functional.silu(by_hand) + inputs[5].double()
    torch.testing.assert_close(exact, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(eager.double(), exact, rtol=4 * torch.finfo(eager.dtype).eps, atol=1e-2)


def test_integers_are_exact() -> None:
    x, w = make_inputs(INTEGER, 1, "large")
    (out,) = get_op("int_mm").reference(INTEGER, x, w)
    assert out.dtype == torch.int32
    assert torch.equal(out.long(), x.long() @ w.long())


def test_costs_count_the_result_in_its_own_dtype() -> None:
    problem = CASES["residual"]
    op = get_op("scaled_mm")
    assert op.dims(problem) == {
        "batch": 1, "m": M, "n": N, "k": K, "dtype_bytes": 1, "out_bytes": 2, "has_constant_weight": 1, "k_major": 1,
        "fast_sums": 0, "num_epilogue": 3, "row_scaled": 1,
    }  # fmt: skip
    assert op.flops(problem) == 2 * M * N * K
    assert op.num_bytes(problem) == M * K + K * N + 4 * (M + N) + 2 * N + 2 * M * N + 2 * M * N
    assert op.dims(scaled())["row_scaled"] == 0
    integers = get_op("int_mm")
    assert integers.dims(INTEGER)["out_bytes"] == 4
    assert integers.num_bytes(INTEGER) == M * K + K * N + 4 * M * N
    row_major = replace(INTEGER, inputs=(INTEGER.inputs[0], TensorSpec.contiguous((K, N), "int8")))
    assert (integers.dims(INTEGER)["k_major"], integers.dims(row_major)["k_major"]) == (1, 0)


def test_memory_for_references_is_that_of_results() -> None:
    assert expectation_bytes(get_op("scaled_mm"), scaled(), 3) == 3 * M * N * 4  # kept in fp32
    assert expectation_bytes(get_op("scaled_mm"), scaled(out="float32"), 3) == 3 * M * N * 8
    assert expectation_bytes(get_op("int_mm"), INTEGER, 3) == 3 * M * N * 4


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", ["tensor-wise", "row-wise, bias", "e5m2"])
def test_scales_are_positive_and_the_result_is_as_large_as_the_activations(name: str, draw: str) -> None:
    problem = CASES[name]
    fixed = make_constants(problem, 0, 2)
    variables = make_variables(problem, 5, draw)
    a, b, scale_a, scale_b, *_ = inputs = join(problem, variables, fixed[1])
    assert all(bool((scale > 0).all() and scale.isfinite().all()) for scale in (scale_a, scale_b))
    assert 0.3 < b.float().std().item() < 3  # no weight is lost below what 8 bits hold
    assert int((~a.float().isfinite()).sum()) == (3 if draw == "nonfinite" else 0)
    (out,) = get_op("scaled_mm").reference(problem, *inputs)
    finite = out.float()[out.float().isfinite()]
    if draw == "model":
        assert 0.1 < finite.std().item() < 10
    assert finite.numel() > 0


def judged(problem: Problem, kernel: Kernel) -> Verdict:
    constants = make_constants(problem, 0, 2)
    num_variables = len(problem.inputs) - len(problem.constants)

    def run(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        copies = [flat[i * num_variables : (i + 1) * num_variables] for i in range(2)]
        return tuple([kernel(*join(problem, copy, fixed)) for copy, fixed in zip(copies, constants, strict=True)])

    return check(get_op(problem.op), problem, Built(run=run, num_copies=2), constants, seed=3)


def in_half_sums(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
    """Sums kept in 16 bits every 32 products."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    for k in range(0, a.shape[1], 32):
        total += (a.float()[:, k : k + 32] @ b.float()[k : k + 32]).bfloat16()
    return (total.float() * scale_a * scale_b).bfloat16()


KERNELS: dict[str, tuple[Kernel, bool]] = {
    "scales behind the sum": (lambda a, b, s, t: ((a.float() @ b.float()) * s * t).bfloat16(), True),
    "scales in front": (lambda a, b, s, t: ((a.float() * s) @ (b.float() * t)).bfloat16(), True),
    "sums in bf16": (in_half_sums, False),
    "one scale forgotten": (lambda a, b, s, _: ((a.float() @ b.float()) * s).bfloat16(), False),
    "the first row's scale for all": (lambda a, b, s, t: ((a.float() @ b.float()) * s[:1] * t).bfloat16(), False),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_held_to_the_budget_of_scaled_products(name: str) -> None:
    kernel, right = KERNELS[name]
    verdict = judged(scaled(rows=True), kernel)
    assert verdict.passed == right, verdict.failures


def test_integers_have_no_tolerance() -> None:
    def off_by_one(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = torch._int_mm(x, w)
        out[-1, -1] += 1
        return out

    assert judged(INTEGER, torch._int_mm).passed
    assert {c.name for c in judged(INTEGER, off_by_one).failures} >= {"error_max[model]"}
    (expected,) = expected_outputs(get_op("int_mm"), INTEGER, make_inputs(INTEGER, 0))
    assert isinstance(expected, Expected)
    assert (expected.exact, expected.limit_max, expected.limit_norm) == (True, 0.0, 0.0)
    assert errors_of(expected.reference.clone(), expected).max == 0


def test_titles_are_as_of_other_products() -> None:
    assert problem_title(CASES["residual"]) == f"scaled_mm {M}×{N}×{K} e4m3 +silu +add"
    assert problem_title(scaled("float8_e5m2")) == f"scaled_mm {M}×{N}×{K} e5m2/e4m3"
    assert problem_title(INTEGER) == f"int_mm {M}×{N}×{K} int8"


H200 = DeviceFacts(device="cuda", isa="sm_90", l2_bytes=60 << 20, smem_bytes=232448, num_units=132)


@pytest.mark.parametrize("op", ["scaled_mm", "int_mm"])
def test_cutedsl_spaces_hold_kernels_that_there_are_and_only_for_layouts_that_they_read(op: str) -> None:
    from autokernel.cutedsl.config import CuteConfig

    problem = replace(scaled(n=2048, device="cuda", bias=True) if op == "scaled_mm" else INTEGER, device="cuda")
    space = load_space(op)["cutedsl"]
    dims = dict(get_op(op).dims(problem)) | {"m": 2048, "n": 4096, "k": 4096}
    configs = list(space.enumerate(names_for(dims, H200)))
    assert len(configs) > 20
    assert all(CuteConfig.from_entry(config).problem() is None for config in configs)
    assert space.default(names_for(dims, H200)) in configs
    assert any(config.get("fuse") for config in configs) == (op == "scaled_mm")
    for change in ({"k_major": 0}, {"k": 4100}, {"n": 4097}):
        assert space.count(names_for(dims | change, H200)) == 0
