"""Kernels of our own for fusions: what the backend takes, and that every config of a space is one that the kernel takes."""

from __future__ import annotations

from typing import Any

import pytest

from autokernel.backends import Refused, get_backend
from autokernel.kernels.launch import KernelPlan
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import Candidate, ConfigValue, Problem, TensorSpec
from autokernel.search.space import BoundSpace, DeviceFacts, names_for
from autokernel.search.space_file import load_space

pytest.importorskip("triton", reason="Triton is not installed")

H200 = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232_448, l2_bytes=60 << 20)
DECODE: dict[str, ConfigValue] = {
    "kernel": "decode_attention", "BLOCK_S": 64, "num_splits": 4, "skip": False, "num_warps": 4, "num_stages": 3,
}  # fmt: skip


def attention(
    batch: int, heads: tuple[int, int], q_len: int, kv_len: int, *, dim: int = 128, dtype: str = "bfloat16",
    mask: str | None = None, causal: bool = False, device: str = "cuda",
) -> Problem:  # fmt: skip
    q = TensorSpec.contiguous((batch, heads[0], q_len, dim), dtype)
    kv = TensorSpec.contiguous((batch, heads[1], kv_len, dim), dtype)
    masks = () if mask is None else (TensorSpec.contiguous((batch, 1, q_len, kv_len), mask),)
    scalars: tuple[tuple[str, Any], ...] = (("causal", True), ("scale", 0.1)) if causal else (("scale", 0.1),)
    return Problem(op="attention", inputs=(q, kv, kv, *masks), device=device, scalars=scalars)


def space(problem: Problem, backend: str = "triton") -> BoundSpace:
    return load_space("attention")[backend].bind(names_for(get_op("attention").dims(problem), H200))


DECODING = attention(64, (32, 8), 1, 2048, mask="bool")
CASES = {
    "decode 1": (attention(1, (32, 8), 1, 2048, mask="bool"), {"kernel": "decode_attention", "num_splits": 16}),
    "decode 16": (attention(16, (32, 8), 1, 2048, mask="bool"), {"kernel": "decode_attention", "num_splits": 1}),
    "decode 64": (DECODING, {"kernel": "decode_attention", "num_splits": 1}),
    "odd": (attention(4, (32, 8), 1, 2049), {"kernel": "decode_attention", "num_splits": 4}),
    "tiny": (attention(1, (12, 12), 1, 5, dim=64), {"kernel": "decode_attention", "num_splits": 1}),
    "prompt": (attention(1, (32, 8), 512, 512, causal=True), {"kernel": "flash_attention", "BLOCK_M": 64}),
    "masked prompt": (
        attention(1, (32, 8), 2048, 2048, mask="bool"),
        {"kernel": "flash_attention", "skip": True, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    ),
    "chronos": (
        attention(1, (12, 12), 37, 37, dim=64, dtype="float32", mask="float32"),
        {"kernel": "flash_attention", "BLOCK_M": 16, "num_stages": 1, "precision": "tf32x3"},
    ),
    "vit": (attention(8, (12, 12), 197, 197, dim=64), {"kernel": "flash_attention"}),
    "wide": (attention(1, (4, 4), 300, 300, dim=256, dtype="float32"), {"kernel": "flash_attention"}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_config_of_the_space_is_one_that_the_kernel_takes(name: str) -> None:
    problem, expected = CASES[name]
    bound = space(problem)
    default = bound.default()
    assert default is not None
    assert not bound.violations(default)
    assert {key: default.get(key) for key in expected} == expected
    assert isinstance(plan_of(problem, default), KernelPlan)
    configs = list(bound.enumerate(400))
    assert len(configs) > 5
    for config in configs:
        plan_of(problem, config)


def test_it_takes_fusions_that_have_a_kernel_on_a_gpu() -> None:
    backend = get_backend("triton")
    assert backend.supports(DECODING) is None
    assert "not for cpu" in (backend.supports(attention(1, (4, 4), 1, 64, device="cpu")) or "")


def test_illegal_configs_are_refused() -> None:
    few = Candidate(problem=DECODING, backend="triton", config={**DECODE, "BLOCK_S": 128, "num_splits": 20})
    with pytest.raises(Refused, match="16 blocks of 128 are too few"):
        get_backend("triton").build(few, [[]])
    other = Candidate(problem=DECODING, backend="triton", config={"kernel": "skinny_mm"})
    with pytest.raises(Refused, match="no Triton kernel 'skinny_mm'"):
        get_backend("triton").build(other, [[]])


@pytest.mark.parametrize(
    ("problem", "known"),
    [
        (DECODING, {"stock", "grouped", "cudnn"}),
        (attention(64, (32, 8), 1, 2048), {"stock", "grouped", "flash", "efficient", "cudnn"}),
        (attention(1, (4, 4), 64, 64, causal=True), {"stock", "flash", "efficient", "cudnn"}),
        (attention(1, (4, 4), 32, 64, causal=True), {"stock"}),
        (attention(1, (4, 4), 37, 37, dim=20), {"stock"}),
        (attention(1, (12, 12), 37, 37, dim=64, dtype="float32", mask="float32"), {"stock"}),
        (attention(1, (12, 12), 37, 37, dim=64, dtype="float32"), {"stock", "efficient"}),
    ],
)
def test_the_librarys_kernels_are_tried_where_they_can_be_right(problem: Problem, known: set[str]) -> None:
    assert {config["implementation"] for config in space(problem, "aten").enumerate(100)} == known
