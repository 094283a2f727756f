"""A product with the norm behind it is found as real models spell it, and again in what its reference becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.function_module import Fn
from torch import nn

from autokernel.export.plan import region_key
from autokernel.ops import FusionOp, get_op
from autokernel.ops.linear_rms_norm import as_matrix, norm_of_squares
from autokernel.ops.rms_norm import norm_early, norm_late, norm_offset
from autokernel.records import Problem, TensorSpec

DTYPES = (torch.float32, torch.bfloat16)
OP = "linear_rms_norm"


class Ending(nn.Module):
    """The end of half a layer: a projection, the residual or none, and the norm; others use the sum as well."""

    def __init__(self, norm: nn.Module, residual: bool) -> None:
        super().__init__()
        self.project, self.norm, self.residual = nn.Linear(16, 32, bias=False), norm, residual

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        y = self.project(x.sin())
        y = residual.exp() + y if self.residual else y
        return y.cos(), self.norm(y).sin()


class LlamaNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class FromZero(LlamaNorm):
    """By 1 + weight, and rounded at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (normed * (1.0 + self.weight.float())).type_as(x)


def problems(graph: Any, op: str = OP) -> list[Problem]:
    fusion = get_op(op)
    assert isinstance(fusion, FusionOp)
    return [region.problem for region in fusion.match(graph, frozenset(), "cuda")]


def assert_found_in_its_reference(post_grad: Any, problem: Problem) -> None:
    """Production looks for the problem in graphs that candidates were not built from."""
    inputs = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)) for s in problem.inputs]
    graph, _ = post_grad(Fn(lambda *x: get_op(OP).reference(problem, *x)), *inputs)
    assert [region_key(p) for p in problems(graph)] == [region_key(problem)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_what_is_added_in_each_rank(
    post_grad: Any, rows: tuple[int, ...], residual: bool, dtype: torch.dtype
) -> None:  # fmt: skip
    """Of two dimensions, Inductor makes the residual a part of the product."""
    x, added = torch.randn(*rows, 16).to(dtype), torch.randn(*rows, 32).to(dtype)
    graph, constants = post_grad(Ending(LlamaNorm(), residual).to(dtype), x, added)
    (site,) = get_op(OP).find(graph, constants, "cuda")
    problem, op, size = site.problem, get_op(OP), dtype.itemsize
    assert dict(problem.scalars) == {"residual": residual, "eps": 1e-5}
    assert [spec.shape for spec in problem.inputs] == [(*rows, 16), (16, 32), (32,), *[(*rows, 32)] * residual]
    assert (problem.constants, problem.inputs[1].stride) == ((1, 2), (1, 16))
    assert dict(op.dims(problem)) == {"m": 6, "k": 16, "n": 32, "dtype_bytes": size, "has_residual": residual}
    assert op.flops(problem) == 2 * 6 * 16 * 32
    assert op.num_bytes(problem) == size * (6 * 16 + 16 * 32 + 32 + residual * 6 * 32 + 2 * 6 * 32)
    assert op.find(graph, constants, "cpu") == [], "there is no kernel for it"
    assert_found_in_its_reference(post_grad, problem)


def test_torchs_own_norm_rounds_behind_the_weight(post_grad: Any) -> None:
    x, added = torch.randn(2, 3, 16).bfloat16(), torch.randn(2, 3, 32).bfloat16()
    graph, _ = post_grad(Ending(nn.RMSNorm(32, eps=1e-5), True).bfloat16(), x, added)
    (problem,) = problems(graph)
    assert dict(problem.scalars)["rounded"] == "late"
    assert_found_in_its_reference(post_grad, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_a_weight_that_one_is_added_to(
    post_grad: Any, rows: tuple[int, ...], residual: bool, dtype: torch.dtype
) -> None:  # fmt: skip
    x, added = torch.randn(*rows, 16).to(dtype), torch.randn(*rows, 32).to(dtype)
    graph, constants = post_grad(Ending(FromZero(), residual).to(dtype), x, added)
    (site,) = get_op(OP).find(graph, constants, "cuda")
    assert dict(site.problem.scalars) == {"offset": 1.0, "rounded": "late", "residual": residual, "eps": 1e-5}
    assert (site.problem.inputs[2].shape, site.problem.constants) == ((32,), (1, 2))
    assert_found_in_its_reference(post_grad, site.problem)


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_a_bias_is_no_residual(post_grad: Any, rows: tuple[int, ...]) -> None:
    def biased(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = x @ w + bias
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    graph, _ = post_grad(Fn(biased), torch.randn(*rows, 16), torch.randn(16, 32), torch.randn(32), torch.randn(32))
    assert problems(graph) == []


def test_a_language_model_of_transformers(post_grad: Any) -> None:
    """Both projections of each layer; the model's own norm ends the last one. At the same places the norm alone is found."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    graph, constants = post_grad(Fn(lambda ids: model(ids, use_cache=False).logits), torch.arange(12).view(2, 6))
    sites = get_op(OP).find(graph, constants, "cuda")
    assert [site.problem.inputs[0].shape for site in sites] == [(2, 6, 32), (2, 6, 64)] * 2
    assert all(dict(site.problem.scalars)["residual"] for site in sites)
    for site, norm in zip(sites, get_op("add_rms_norm").find(graph, constants, "cuda"), strict=True):
        assert set(norm.nodes) < set(site.nodes), "rivals: a plan has one of them"
    for gemm in get_op("mm").find(graph, constants, "cuda"):
        rivals = [site for site in sites if not {*site.nodes}.isdisjoint(gemm.nodes)]
        assert len(rivals) == (gemm.problem.inputs[1].shape[1] == 32 and "add" in gemm.problem.epilogue)


@pytest.mark.parametrize("tile", [128, 160])
@pytest.mark.parametrize(("rounded", "offset"), [("early", 0.0), ("late", 0.0), ("late", 1.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_from_sums_of_squares(dtype: torch.dtype, rounded: str, offset: float, tile: int) -> None:
    """Of sums before they are rounded, as a kernel has them: nearer to the exact norm than twice the reference's own error."""
    generator = torch.Generator().manual_seed(tile)
    shapes = ((7, 64), (64, 416), (416,), (7, 416))
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    fixed = ((("offset", offset),) if offset else ()) + (("rounded", rounded),) * (rounded == "late")
    scalars = (*fixed, ("residual", True), ("eps", 1e-5))
    specs = tuple(TensorSpec.contiguous(shape, str(dtype).removeprefix("torch.")) for shape in shapes)
    problem, op = Problem(op=OP, inputs=specs, device="cuda", scalars=scalars), get_op(OP)
    exact = op.reference(problem, *(x.double() for x in inputs))
    own = op.reference(problem, *inputs)
    wide = inputs[0].float() @ inputs[1].float() + inputs[3].float()
    squares = torch.stack([part.square().sum(-1) for part in wide.split(tile, dim=-1)], dim=-1)
    total = wide.to(dtype)
    norm = norm_of_squares(total, squares, inputs[2], eps=1e-5, rounded=rounded, offset=offset)
    assert norm.dtype == dtype
    spelled = (norm_offset if offset else norm_late if fixed else norm_early)(total, inputs[2], 1e-5)
    if dtype is torch.bfloat16:
        assert float((norm == spelled).float().mean()) > 0.9, "rounded where the op rounds"
    for got, mine, right in zip((total, norm), own, exact, strict=True):
        errors = [(value.double() - right).norm() for value in (got, mine)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * right.norm()


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((6, 8), (8, 1)),
        ((6, 8), (32, 1)),
        ((2, 3, 8), (24, 8, 1)),
        ((2, 3, 8), (8, 16, 1)),
        ((2, 3, 8), (96, 32, 1)),
        ((2, 3, 8), (0, 8, 1)),
        ((1, 3, 8), (5, 16, 1)),
        ((2, 1, 8), (64, 5, 1)),
        ((1, 1, 8), (5, 7, 1)),
        ((2, 3, 2, 8), (96, 32, 16, 1)),
        ((2, 3, 2, 8), (96, 48, 8, 1)),
    ],
)  # fmt: skip
def test_rows_of_any_rank_are_a_matrix(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    matrix = as_matrix(TensorSpec(shape=shape, dtype="bfloat16", stride=stride))
    torchs = torch.empty_strided(shape, stride, dtype=torch.bfloat16).reshape(-1, shape[-1])
    assert matrix.shape == tuple(torchs.shape)
    if matrix.shape[0] > 1:  # of one row the distance says nothing
        assert matrix.stride == torchs.stride()
