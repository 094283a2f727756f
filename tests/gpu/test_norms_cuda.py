"""Norms, rotary embeddings and gates on the card: our kernel and every rewriting within the error budget, and in a model."""

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
EPS = (("eps", 1e-5),)
FROM_ZERO = (("offset", 1.0), ("rounded", "late"))


def row_norm(rows: int, repeat: int, num_warps: int) -> Config:
    return {"kernel": "row_norm", "rows": rows, "repeat": repeat, "num_warps": num_warps}


def norm(
    op: str, dtype: str, *shapes: tuple[int, ...], stride: tuple[int, ...] | None = None, offset: bool = False
) -> Problem:  # fmt: skip
    specs = [TensorSpec.contiguous(shape, dtype) for shape in shapes]
    if stride is not None:
        specs[0] = TensorSpec(shape=shapes[0], dtype=dtype, stride=stride)
    constants = (2,) if op == "add_rms_norm" else (1,)
    return Problem(op=op, inputs=tuple(specs), device="cuda", constants=constants, scalars=(*FROM_ZERO * offset, *EPS))


LLAMA, DECODE = (512, 4096), (64, 4096)
ZIMAGE, SCALE, WIDTH = (1, 4352, 3840), (1, 1, 3840), (3840,)
CASES: Mapping[str, tuple[Problem, Config]] = {
    "prefill": (norm("rms_norm", "bfloat16", LLAMA, (4096,)), row_norm(1, 1, 4)),
    "decode, a block for each row": (norm("rms_norm", "bfloat16", DECODE, (4096,)), row_norm(1, 1, 16)),
    "several rows at a time": (norm("rms_norm", "bfloat16", LLAMA, (4096,)), row_norm(2, 4, 8)),
    "one row": (norm("rms_norm", "bfloat16", (1, 1, 4096), (4096,)), row_norm(1, 1, 32)),
    "heads": (norm("rms_norm", "bfloat16", (1, 4352, 30, 128), (128,)), row_norm(16, 4, 4)),
    "ragged": (norm("rms_norm", "float16", (333, 777), (777,)), row_norm(4, 2, 4)),
    "permuted": (norm("rms_norm", "float32", (37, 2, 768), (768,), stride=(768, 28416, 1)), row_norm(1, 1, 4)),
    "residual": (norm("add_rms_norm", "bfloat16", DECODE, DECODE, (4096,)), row_norm(1, 1, 8)),
    "residual in fp32": (norm("add_rms_norm", "float32", (1, 37, 768), (1, 37, 768), (768,)), row_norm(1, 1, 2)),
    "from zero": (norm("rms_norm", "bfloat16", DECODE, (4096,), offset=True), row_norm(1, 1, 16)),
    "residual, from zero": (
        norm("add_rms_norm", "bfloat16", (16, 1, 2560), (16, 1, 2560), (2560,), offset=True),
        row_norm(1, 1, 8),
    ),
    "condition": (norm("adaln_rms_norm", "bfloat16", ZIMAGE, WIDTH, SCALE), row_norm(1, 2, 8)),
    "gate": (norm("gated_rms_norm", "bfloat16", ZIMAGE, WIDTH, SCALE, ZIMAGE), row_norm(1, 1, 8)),
}


def assert_ok(problem: Problem, backend: str, config: Config) -> None:
    evaluation = EvaluateCandidate(candidate=Candidate(problem=problem, backend=backend, config=config), max_copies=4)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"
    assert evaluation.deterministic


@pytest.mark.parametrize("name", CASES)
def test_the_row_kernel_is_within_the_budget(name: str) -> None:
    problem, config = CASES[name]
    assert_ok(problem, "triton", config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rotary_embedding_without_complex_numbers(dtype: str) -> None:
    x, turns = TensorSpec.contiguous((1, 1088, 30, 128), dtype), TensorSpec.contiguous((1, 1088, 64), "complex64")
    problem = Problem(op="rotary_complex", inputs=(x, turns), device="cuda")
    assert_ok(problem, "aten", {"implementation": "stock"})
    assert_ok(problem, "inductor", {"implementation": "real"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rotary_embedding_in_halves(dtype: str) -> None:
    heads = TensorSpec(shape=(2, 32, 512, 128), dtype=dtype, stride=(512 * 4096, 128, 4096, 1))
    table = TensorSpec.contiguous((1, 1, 512, 128), dtype)
    problem = Problem(op="rotary", inputs=(heads, table, table), device="cuda")
    assert_ok(problem, "aten", {"implementation": "stock"})
    assert_ok(problem, "inductor", {"implementation": "halves"})


@pytest.mark.parametrize(("activation", "name"), [("silu", "by_sigmoid"), ("silu", "by_tanh"), ("gelu_tanh", "by_sigmoid")])
def test_gates(activation: str, name: str) -> None:
    specs = (TensorSpec.contiguous((64, 14336), "bfloat16"),) * 2
    problem = Problem(op="gated", inputs=specs, device="cuda", scalars=(("activation", activation),))
    assert_ok(problem, "inductor", {"implementation": name})


class Block(torch.nn.Module):
    """A residual sum, its norm, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.rand(1024))
        self.fc = torch.nn.Linear(1024, 1024, bias=False)

    def forward(self, stream: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stream = stream + branch
        wide = stream.float()
        normed = self.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(stream.dtype)
        return stream, self.fc(normed)


def test_a_model_with_a_bundle_runs_the_kernel() -> None:
    torch.manual_seed(0)
    model = Block().to("cuda", torch.bfloat16).eval()
    stream, branch = (torch.randn(4, 16, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    problem = norm("add_rms_norm", "bfloat16", (4, 16, 1024), (4, 16, 1024), (1024,))
    entry = Entry(problem=problem, backend="triton", config=row_norm(1, 1, 4))
    bundle = Bundle(name="norms", created="", version="", environment=current_environment("cuda"), entries=(entry,))
    backend = BundleBackend(bundle)
    with torch.no_grad():
        expected = model(stream, branch)
        found = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(stream, branch)
    (usage,) = backend.usage().values()
    assert (usage.hits, usage.reasons) == (1, [])
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=2e-2, atol=2e-2)
