"""Rotary embeddings on the card, normed before or not, of one tensor and of two: within the error budget, and in a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from autokernel.environment import current_environment
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle, Entry
from autokernel.records import Candidate, ConfigValue, Problem, Status, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]

Config = Mapping[str, ConfigValue]
EPS = (("eps", 1e-6),)


def rotary(block_rows: int, num_warps: int) -> Config:
    return {"kernel": "rotary", "block_rows": block_rows, "num_warps": num_warps}


def spec(*shape: int, dtype: str = "bfloat16") -> TensorSpec:
    return TensorSpec.contiguous(shape, dtype)


def heads(batch: int, length: int, num: int, dim: int = 128, dtype: str = "bfloat16") -> TensorSpec:
    """`[B, H, T, D]` as a projection leaves it."""
    row = num * dim
    return TensorSpec(shape=(batch, num, length, dim), dtype=dtype, stride=(length * row, dim, row, 1))


def problem(
    op: str, *inputs: TensorSpec, constants: tuple[int, ...] = (), scalars: tuple[tuple[str, ConfigValue], ...] = ()
) -> Problem:
    return Problem(op=op, inputs=inputs, device="cuda", constants=constants, scalars=scalars)


def qwen3(batch: int, length: int) -> Problem:
    q, k, gain, table = spec(batch, length, 32, 128), spec(batch, length, 8, 128), spec(128), spec(1, 1, length, 128)
    return problem("rotary_qk", q, gain, k, gain, table, table, constants=(1, 3), scalars=EPS)


def llama(batch: int, length: int, dtype: str = "bfloat16") -> Problem:
    table = spec(1, 1, length, 128, dtype=dtype)
    return problem("rotary_qk", heads(batch, length, 32, 128, dtype), heads(batch, length, 8, 128, dtype), table, table)


def turns(length: int, dim: int = 128) -> TensorSpec:
    return spec(1, length, dim // 2, dtype="complex64")


X, GAIN = spec(1, 1088, 30, 128), spec(128)
CASES: Mapping[str, tuple[Problem, Config]] = {
    "qwen3 decode": (qwen3(1, 1), rotary(1, 1)),
    "qwen3 decode 64": (qwen3(64, 1), rotary(4, 1)),
    "qwen3 prompt": (qwen3(1, 512), rotary(16, 4)),
    "llama decode": (llama(1, 1), rotary(4, 2)),
    "llama prompt": (llama(2, 512), rotary(16, 4)),
    "llama in fp32": (llama(2, 33, "float32"), rotary(8, 1)),
    "zimage": (problem("rotary_qk", X, GAIN, X, GAIN, turns(1088), constants=(1, 3), scalars=EPS), rotary(16, 4)),
    "zimage, one": (problem("norm_rotary_complex", X, GAIN, turns(1088), constants=(1,), scalars=EPS), rotary(32, 8)),
    "complex numbers alone": (problem("rotary_complex", spec(2, 77, 6, 80), spec(2, 77, 40, dtype="complex64")), rotary(8, 2)),
    "halves alone": (problem("rotary", heads(2, 77, 6, 72), *(spec(1, 1, 77, 72),) * 2), rotary(2, 1)),
    "normed, one": (
        problem("norm_rotary", spec(2, 77, 6, 96), spec(96), *(spec(1, 1, 77, 96),) * 2, constants=(1,), scalars=EPS),
        rotary(8, 4),
    ),
    "heads first, from zero": (
        problem(
            "rotary_qk", heads(16, 1, 8, 256), spec(256), heads(16, 1, 4, 256), spec(256), *(spec(16, 1, 1, 256),) * 2,
            constants=(1, 3), scalars=(("offset", 1.0), ("rounded", "late"), ("heads", "first"), *EPS),
        ),
        rotary(4, 2),
    ),
    "fp16, heads first": (
        problem(
            "norm_rotary", heads(2, 33, 4, 64, "float16"), spec(64, dtype="float16"),
            *(spec(2, 1, 33, 64, dtype="float16"),) * 2, constants=(1,), scalars=(("heads", "first"), *EPS),
        ),
        rotary(4, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_within_the_budget(name: str) -> None:
    found, config = CASES[name]
    candidate = Candidate(problem=found, backend="triton", config=config)
    evaluation = EvaluateCandidate(candidate=candidate, max_copies=4)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"
    assert evaluation.deterministic


class Heads(torch.nn.Module):
    """Qwen3's way from the stream to queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(256, 8 * 64, bias=False)
        self.k = torch.nn.Linear(256, 2 * 64, bias=False)
        self.gains = torch.nn.ParameterList([torch.rand(64), torch.rand(64)])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: list[torch.Tensor] = []
        for layer, gain in zip((self.q, self.k), self.gains, strict=True):
            y = layer(x).view(*x.shape[:2], -1, 64)
            wide = y.float()
            normed = gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(y.dtype)
            turned = normed.transpose(1, 2)
            found.append(turned * cos + torch.cat((-turned[..., 32:], turned[..., :32]), -1) * sin)
        return tuple(found)


def test_a_model_with_a_bundle_runs_the_kernel_once() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    model, x = Heads().to(**options).eval(), torch.randn(2, 33, 256, **options)
    cos, sin = (torch.randn(1, 1, 33, 64, **options) for _ in range(2))
    q, k, gain, table = spec(2, 33, 8, 64), spec(2, 33, 2, 64), spec(64), spec(1, 1, 33, 64)
    entry = Entry(
        problem=problem("rotary_qk", q, gain, k, gain, table, table, scalars=EPS), backend="triton", config=rotary(4, 1)
    )
    bundle = Bundle(name="heads", created="", version="", environment=current_environment("cuda"), entries=(entry,))
    backend = BundleBackend(bundle)
    with torch.no_grad():
        expected = model(x, cos, sin)
        found = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x, cos, sin)
    (usage,) = backend.usage().values()
    assert (usage.hits, usage.reasons) == (1, [])
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=3e-2)
