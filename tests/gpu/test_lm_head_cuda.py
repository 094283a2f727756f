"""The LM head with greedy sampling on the card: tokens as likely as the most likely one, and in a model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from autokernel.environment import current_environment
from autokernel.evaluate.budget import errors_of, expected_outputs
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle, Entry
from autokernel.ops import get_op
from autokernel.records import Candidate, ConfigValue, Problem, Status, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]

OP = "lm_head_argmax"
Config = Mapping[str, ConfigValue]
SWAP: Config = {"kernel": OP, "mode": "swap", "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 4}
ROWS: Config = {**SWAP, "mode": "rows", "join": "launch"}
VECTOR: Config = {**SWAP, "mode": "vector", "block_n": 4, "block_k": 1024, "num_stages": 2}


def problem(x: tuple[int, ...], vocabulary: int, dtype: str = "bfloat16", **scalars: ConfigValue) -> Problem:
    specs = (TensorSpec.contiguous(x, dtype), TensorSpec.contiguous((vocabulary, x[-1]), dtype))
    named = {"keepdim": False, **scalars}
    return Problem(op=OP, inputs=specs, device="cuda", constants=(1,), scalars=tuple(named.items()))


CASES: Mapping[str, tuple[Problem, Config]] = {
    "one row": (problem((1, 1, 4096), 128256), VECTOR),
    "one row, joined by a launch": (problem((1, 4096), 50257), {**VECTOR, "join": "launch"}),
    "one row by matrices": (problem((1, 1, 4096), 32000), SWAP),
    "sixteen": (problem((16, 1, 4096), 128256), SWAP),
    "many": (problem((64, 1, 4096), 128256), {**SWAP, "join": "launch"}),
    "all": (problem((128, 1, 4096), 128256, keepdim=True), ROWS),
    "all, joined by the last": (problem((128, 1024), 32001), {**ROWS, "join": "last"}),
    "ragged": (problem((17, 768), 50257, "float16"), {**ROWS, "block_n": 128}),
    "last positions": (problem((4, 32, 2048), 32000, position="last"), SWAP),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_as_likely_as_the_most_likely(name: str) -> None:
    case, config = CASES[name]
    evaluation = EvaluateCandidate(candidate=Candidate(problem=case, backend="triton", config=config), max_copies=3)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"
    assert evaluation.deterministic


def test_stock_code_is_a_candidate() -> None:
    case = problem((16, 1, 1024), 32000)
    stock = Candidate(problem=case, backend="aten", config={"implementation": "stock"})
    evaluation = EvaluateCandidate(candidate=stock, max_copies=3)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"


class Greedy(torch.nn.Module):
    """The end of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(1024)
        self.head = torch.nn.Linear(1024, 32000, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))[:, -1].float().argmax(-1)


@pytest.mark.parametrize("config", [SWAP, ROWS], ids=["joined by the last", "by a launch"])
def test_a_model_with_a_bundle_runs_the_kernel(config: Config) -> None:
    torch.manual_seed(0)
    model = Greedy().to("cuda", torch.bfloat16).eval()
    case = problem((16, 1, 1024), 32000, position="last")
    entry = Entry(problem=case, backend="triton", config=config)
    bundle = Bundle(name="head", created="", version="", environment=current_environment("cuda"), entries=(entry,))
    backend = BundleBackend(bundle)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(3):  # the counter is zero again each time
            x = torch.randn(16, 1, 1024, device="cuda", dtype=torch.bfloat16)
            found = compiled(x)
            (expected,) = expected_outputs(get_op(OP), case, (model.norm(x), model.head.weight))
            errors = errors_of(found, expected)
            assert errors.misplaced == 0
            assert errors.max <= expected.limit_max
    (usage,) = backend.usage().values()
    assert (usage.hits, usage.reasons) == (1, [])
