"""A product and the norm behind it become one call with two results, and one kernel of Inductor's. No GPU, and no compiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export.pretended_h200 import generated_code
from export.stand_in_objects import BYTES, calls, entry, hits, path_of, reasons, spec, targets, with_objects
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from autokernel.cutedsl import op
from autokernel.cutedsl.objects import ObjectError
from autokernel.export import cute_regions
from autokernel.export.apply import inductor_options
from autokernel.export.bundle import read_bundle, read_objects, write_bundle
from autokernel.export.plan import Plan
from autokernel.export.regions import RegionPass
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec

N, K = 512, 256
TILE: dict[str, ConfigValue] = {"source": "quack", "tile_m": 64, "tile_n": 128, "pingpong": True}
Layer = Callable[..., Any]


def problem(*rows: int, residual: bool = True, late: bool = False, offset: bool = False) -> Problem:
    weight = TensorSpec(shape=(K, N), dtype="bfloat16", stride=(1, K))
    return Problem(
        op="linear_rms_norm",
        inputs=(spec(*rows, K), weight, spec(N), *[spec(*rows, N)] * residual),
        device="cuda",
        constants=(1, 2),
        scalars=(*[("offset", 1.0)] * offset, *[("rounded", "late")] * late, ("residual", residual), ("eps", 1e-5)),
    )


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def late_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * gain).to(x.dtype)


def norm_from_zero(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * (1.0 + gain.float())).to(x.dtype)


def layer(x: torch.Tensor, w: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor) -> Any:
    """Both results have users of their own, behind which more follows."""
    total = residual + x.sin() @ w.t()
    return total, norm(total, gain).exp()


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as the pass asks, whose loader takes anything."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: type("Properties", (), {"multi_processor_count": 132}))
    monkeypatch.setattr(cute_regions, "load", lambda path: path)


def traced(function: Layer, *sizes: tuple[int, ...]) -> torch.fx.GraphModule:
    """A graph as Inductor has it, with tensors that claim to be on a GPU."""
    with FakeTensorMode():
        given = [torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes]
        return make_fx(function, decomposition_table=select_decomp_table())(*given)


def emulated(a: torch.Tensor, b: torch.Tensor, operands: list[torch.Tensor], tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes."""
    wide = a.float() @ b.float() + sum(x.float() for x in operands)
    squares = torch.stack([part.square().sum(-1) for part in wide.split(tile, dim=1)], dim=1)
    return wide.to(a.dtype), squares


class Emulation(torch.fx.Interpreter):
    """Runs a graph on the CPU, with the kernel's results for a call of it: they look as the operator's fake says."""

    tile = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not op.SQUARES:
            return super().call_function(target, args, kwargs)
        results = emulated(*args[:3], self.tile)
        like = op._squares_fake(*args[:4])
        assert [(x.shape, x.stride(), x.dtype) for x in results] == [(x.shape, x.stride(), x.dtype) for x in like]
        return results


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("rows", [(2, 8), (1, 1), (2048,)], ids=str)
def test_inductor_writes_one_kernel_behind_the_call(tmp_path: Path, rows: tuple[int, ...], swap: bool) -> None:
    plan = with_objects(tmp_path, entry(problem(*rows), {**TILE, "swap": swap, "swizzle": 4}))
    specs = [spec(*rows, K), spec(N, K), spec(N), spec(*rows, N)]
    code = generated_code(layer, specs, inductor_options(plan, {}, frozen=False))
    (call,) = re.findall(r"torch\.ops\.autokernel\.cute_gemm\.squares\(.*\)", code)
    assert call.endswith(".so', 4)")
    assert f", ({K}, {N}), (1, {K}), 0)" in call
    assert "extern_kernels" not in code.split("def call(")[1]
    kernels = code.split("async_compile.triton(")[1:]
    assert len(kernels) == 2, "one in front of the product, one behind it"
    assert "rsqrt" in kernels[1]
    assert "sin" in kernels[0]
    assert "exp" in kernels[1]
    assert len(re.findall(r"\.run\(", code)) == 2
    assert (hits(plan), reasons(plan)) == ([1], "")


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("rows", "residual", "spelled"),
    [
        ((2, 9), True, norm), ((2, 9), False, late_norm), ((7,), True, late_norm), ((7,), False, norm),
        ((2, 9), False, norm_from_zero), ((7,), True, norm_from_zero),
    ],
)  # fmt: skip
def test_results_are_those_of_the_layer(
    tmp_path: Path, rows: tuple[int, ...], residual: bool, spelled: Layer, swap: bool
) -> None:  # fmt: skip
    """In its shapes and layouts, and as exact."""
    wanted = problem(*rows, residual=residual, late=spelled is not norm, offset=spelled is norm_from_zero)

    def end(x: torch.Tensor, w: torch.Tensor, gain: torch.Tensor, *added: torch.Tensor) -> Any:
        total = x @ w.t()
        total = added[0] + total if residual else total
        return total.cos(), spelled(total, gain)

    plan = with_objects(tmp_path, entry(wanted, {**TILE, "swap": swap}))
    module = traced(end, (*rows, K), (N, K), (N,), *[(*rows, N)] * residual)
    RegionPass(plan)(module.graph)
    module.graph.lint()
    (call,) = calls(module)
    assert hits(plan) == [1]
    assert Path(path_of(call)).read_bytes() == BYTES
    assert not {"aten.mm.default", "aten.mean.dim"} & set(targets(module))
    generator = torch.Generator().manual_seed(len(rows))
    inputs = [torch.randn(s, generator=generator).bfloat16() for s in ((*rows, K), (N, K), (N,), *[(*rows, N)] * residual)]
    run = Emulation(module)
    run.tile = 64 if swap else 128
    given = [inputs[0].double(), inputs[1].double().t(), *(x.double() for x in inputs[2:])]
    exact = get_op("linear_rms_norm").reference(wanted, *given)
    for got, own, right in zip(run.run(*inputs), end(*inputs), (exact[0].cos(), exact[1]), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (own.shape, own.stride(), own.dtype)
        assert (got.double() - right).norm() <= 2 * (own.double() - right).norm() + 1e-6 * right.norm()


def test_one_layers_sum_is_the_next_ones_residual(tmp_path: Path) -> None:
    def layers(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor) -> Any:
        total = residual + x @ w.t()
        again = total + torch.relu(norm(total, gain)).narrow(-1, 0, K) @ v.t()
        return norm(again, gain)

    plan = with_objects(tmp_path, entry(problem(2, 8), TILE))
    module = traced(layers, (2, 8, K), (N, K), (N, K), (N,), (2, 8, N))
    RegionPass(plan)(module.graph)
    module.graph.lint()
    assert hits(plan) == [2]
    assert len({path_of(call) for call in calls(module)}) == 1
    assert "aten.add.Tensor" in targets(module), "of eps"
    assert targets(module).count("aten.add.Tensor") == 2


@pytest.mark.parametrize("strides", [(1, 16), (N + 4, 1), (0, 1)], ids=str)
def test_stock_code_stays_where_the_kernel_cannot_read(tmp_path: Path, strides: tuple[int, int]) -> None:
    """The entry is for the sizes; what lies differently in memory here is looked at here."""
    plan = with_objects(tmp_path, entry(problem(16), TILE))
    module = traced(
        lambda x, w, g, r: layer(x, w, g, torch.as_strided(r, (16, N), strides)), (16, K), (N, K), (N,), (16, 2 * N)
    )
    RegionPass(plan)(module.graph)
    assert calls(module) == []
    assert hits(plan) == [0]
    assert f"what is added has strides {strides}: the kernel reads aligned rows" in reasons(plan)


def test_stock_code_stays_where_no_object_is_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: str) -> None:
        raise ObjectError("not for this GPU")

    plan = with_objects(tmp_path, entry(problem(16), TILE))
    monkeypatch.setattr(cute_regions, "load", refuses)
    module = traced(layer, (16, K), (N, K), (N,), (16, N))
    RegionPass(plan)(module.graph)
    assert (calls(module), hits(plan), reasons(plan)) == ([], [0], "not for this GPU")


def test_a_package_keeps_stock_code(tmp_path: Path) -> None:
    plan = with_objects(tmp_path, entry(problem(16), TILE))
    module = traced(layer, (16, K), (N, K), (N,), (16, N))
    with V.set_aot_compilation(True):
        RegionPass(plan)(module.graph)
    assert calls(module) == []
    assert "a package runs without Python" in reasons(plan)


def test_a_bundle_carries_the_kernel(tmp_path: Path) -> None:
    plan = with_objects(tmp_path / "cache", entry(problem(2, 8), TILE))
    folder = write_bundle(plan.bundle, tmp_path / "bundle", plan.files)[0]
    bundle = read_bundle(folder)
    assert [info.spec.epilogue for info in bundle.objects] == [("add", "squares")]
    again = Plan(bundle, None, read_objects(folder, bundle, tmp_path / "unpacked"))
    module = traced(layer, (2, 8, K), (N, K), (N,), (2, 8, N))
    RegionPass(again)(module.graph)
    (call,) = calls(module)
    assert hits(again) == [1]
    assert Path(path_of(call)).parent == folder / "objects"
