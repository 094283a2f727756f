"""Two linear layers in one kernel on the card: within the error budget, and in a model."""

from __future__ import annotations

from collections.abc import Mapping

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
CHRONOS: Config = {
    "kernel": "mlp", "BLOCK_M": 64, "BLOCK_H": 32, "BLOCK_K": 64, "BLOCK_N": 128, "swap_in": False, "swap_out": False,
    "num_warps": 4, "num_stages": 4, "prefetch": True, "sum_block": 128, "sum_parts": 32, "sum_warps": 4, "precision": "tf32x3",
}  # fmt: skip
HALF: Config = {name: value for name, value in CHRONOS.items() if name != "precision"}


def problem(
    rows: tuple[int, ...],
    k: int = 768,
    hidden: int = 3072,
    n: int = 768,
    *,
    dtype: str = "float32",
    activation: str = "relu",
    bias: str = "none",
    residual: bool = True,
) -> Problem:
    parts = [
        (TensorSpec.contiguous((*rows, k), dtype), True, False),
        (TensorSpec(shape=(k, hidden), dtype=dtype, stride=(1, k)), True, True),
        (TensorSpec.contiguous((hidden,), dtype), bias in ("first", "both"), True),
        (TensorSpec(shape=(hidden, n), dtype=dtype, stride=(1, hidden)), True, True),
        (TensorSpec.contiguous((n,), dtype), bias in ("second", "both"), True),
        (TensorSpec.contiguous((*rows, n), dtype), residual, False),
    ]
    there = [(spec, constant) for spec, given, constant in parts if given]
    return Problem(
        op="mlp",
        inputs=tuple(spec for spec, _ in there),
        device="cuda",
        constants=tuple(i for i, (_, constant) in enumerate(there) if constant),
        scalars=(("activation", activation), ("bias", bias), ("residual", residual)),
    )


SERIES = problem((1, 37))
IMAGE = problem((1, 64), dtype="bfloat16", activation="gelu", bias="both")
CASES: Mapping[str, tuple[Problem, Config]] = {
    "chronos-2": (SERIES, CHRONOS),
    "chronos-2, the first product swapped": (SERIES, {**CHRONOS, "BLOCK_H": 64, "swap_in": True}),
    "chronos-2, the second product swapped": (SERIES, {**CHRONOS, "swap_out": True, "prefetch": False}),
    "chronos-2, both swapped, small slices": (SERIES, {**CHRONOS, "BLOCK_H": 16, "swap_in": True, "swap_out": True}),
    "chronos-2, vector units": (problem((5,)), {**CHRONOS, "BLOCK_M": 16, "precision": "ieee", "num_stages": 2}),
    "bf16, biases": (IMAGE, HALF),
    "bf16, swapped": (IMAGE, {**HALF, "swap_out": True, "BLOCK_N": 64, "num_warps": 8}),
    "bf16, 128 rows": (problem((2, 64), dtype="bfloat16", activation="silu"), {**HALF, "BLOCK_M": 128, "BLOCK_N": 64}),
    "bf16, one row": (
        problem((1,), dtype="bfloat16", activation="gelu_tanh", bias="first", residual=False),
        {**HALF, "BLOCK_M": 16, "BLOCK_H": 16, "BLOCK_K": 128, "swap_out": True},
    ),
    "fp16, ragged": (
        problem((3, 7), 200, 500, 136, dtype="float16", activation="gelu", bias="both"),
        {**HALF, "BLOCK_M": 32, "num_stages": 3, "sum_parts": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_within_the_budget(name: str) -> None:
    found, config = CASES[name]
    evaluation = EvaluateCandidate(candidate=Candidate(problem=found, backend="triton", config=config), max_copies=4)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"
    assert evaluation.deterministic


def test_stock_code_is_within_the_budget() -> None:
    candidate = Candidate(problem=SERIES, backend="aten", config={"implementation": "stock"})
    evaluation = EvaluateCandidate(candidate=candidate, max_copies=4)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"


class Layers(torch.nn.Module):
    """The stream, and what an MLP adds to it, twice."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = torch.nn.ModuleList([torch.nn.Linear(256, 1024, bias=bias) for _ in range(2)])
        self.down = torch.nn.ModuleList([torch.nn.Linear(1024, 256, bias=bias) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(torch.nn.functional.normalize(x, dim=-1))))
        return x


@pytest.mark.parametrize("bias", ["none", "both"])
def test_a_model_with_a_bundle_runs_the_kernel(bias: str) -> None:
    torch.manual_seed(0)
    model, x = Layers(bias == "both").to("cuda").eval(), torch.randn(1, 37, 256, device="cuda")
    entry = Entry(problem=problem((1, 37), 256, 1024, 256, bias=bias), backend="triton", config={**CHRONOS, "sum_parts": 8})
    bundle = Bundle(name="mlp", created="", version="", environment=current_environment("cuda"), entries=(entry,))
    backend = BundleBackend(bundle)
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x)
    (usage,) = backend.usage().values()
    assert (usage.hits, usage.reasons) == (2, [])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
