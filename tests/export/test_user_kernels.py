"""What Inductor is told of kernels of ours, and that it analyses those of others as before."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from export.pretended_h200 import generated_code, plan_with
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import ir

from autokernel.export.apply import inductor_options
from autokernel.export.bundle import Entry
from autokernel.export.dependent_launch import dependent_launches
from autokernel.records import ConfigValue, Problem, TensorSpec

M, K, N = 1, 1024, 512
X, W = TensorSpec.contiguous((M, K), "bfloat16"), TensorSpec.contiguous((N, K), "bfloat16")
MM = Problem(op="mm", inputs=(X, TensorSpec(shape=(K, N), dtype="bfloat16", stride=(1, K))), device="cuda", constants=(1,))
NORM = Problem(op="rms_norm", inputs=(X, TensorSpec.contiguous((K,), "bfloat16")), device="cuda", scalars=(("eps", 1e-6),))
SKINNY: dict[str, ConfigValue] = {
    "kernel": "skinny_mm", "mode": "vector", "BLOCK_M": 1, "BLOCK_N": 16, "BLOCK_K": 256, "split_k": 1, "waves": 0,
    "tma": False, "num_warps": 4, "num_stages": 2,
}  # fmt: skip


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) @ w.t()


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize(
    ("function", "problem", "config", "writes"),
    [
        (product, MM, SKINNY, {"y"}),
        (product, MM, {**SKINNY, "split_k": 2}, {"y", "parts", "counters"}),
        (norm, NORM, {"kernel": "row_norm", "rows": 1, "repeat": 1, "num_warps": 4}, {"y"}),
    ],
)
def test_inductor_is_told_what_a_kernel_writes_and_compiles_nothing_for_it(
    function: Any,
    problem: Problem,
    config: dict[str, ConfigValue],
    writes: set[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    told: list[dict[str, Any]] = []
    made: list[Any] = []
    initialise = ir.UserDefinedTritonKernel.__init__

    def keep(self: Any, **arguments: Any) -> None:
        initialise(self, **arguments)
        told.append(arguments["kernel_args"])
        made.append(self)

    def forbidden(*_: Any) -> Any:
        raise AssertionError("the kernel is compiled to be analysed")

    monkeypatch.setattr(ir.UserDefinedTritonKernel, "__init__", keep)
    monkeypatch.setattr(triton_kernel_wrap, "generate_ttir", forbidden)
    monkeypatch.setattr("autokernel.export.substitution.may_read_ahead", lambda *_: True)  # it waits in the kernel itself
    plan = plan_with((Entry(problem=problem, backend="triton", config=config),))
    specs = [X, W if problem is MM else problem.inputs[1]]
    with caplog.at_level(logging.WARNING), dependent_launches(True, []):
        generated_code(function, specs, inductor_options(plan, {}, frozen=False))
    assert sum(usage.hits for usage in plan.usage.values()) == 1
    ((arguments,), (kernel,)) = told, made
    tensors = {name: value for name, value in arguments.items() if isinstance(value, ir.TensorBox)}
    assert {name for name, value in tensors.items() if any(value is one for one in kernel.mutable_args)} >= writes
    assert len(kernel.mutable_args) == len(writes)
    assert "assuming every input is mutated" not in caplog.text


def test_kernels_of_others_are_analysed_as_before(caplog: pytest.LogCaptureFixture) -> None:
    from autokernel.export.user_kernels import _install

    _install()
    analyse: Any = getattr(triton_kernel_wrap, "identify_accessed_tensors", None)
    analyse = analyse or triton_kernel_wrap.identify_mutated_tensors  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        found = analyse(object(), {"a": torch.ones(1), "b": 3}, {})
    assert "assuming every input is mutated" in caplog.text, "torch looked at it, and could make nothing of it"
    names = found if isinstance(found, list) else [write.name for write in found.read_writes.writes]
    assert names == ["a"]
