"""The LM head with top-k sampling on the card: logits and tokens of each place are right, and in a model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from autokernel.environment import current_environment
from autokernel.evaluate.budget import errors_of, expected_outputs
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle, Entry
from autokernel.kernels.launch import run
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import Candidate, ConfigValue, Problem, Status, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]

OP = "lm_head_topk"
Config = Mapping[str, ConfigValue]
SWAP: Config = {
    "kernel": OP, "mode": "swap", "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 4, "width": 2048,
}  # fmt: skip
ROWS: Config = {**SWAP, "mode": "rows", "num_warps": 8}
VECTOR: Config = {**SWAP, "mode": "vector", "block_n": 4, "block_k": 1024, "num_stages": 2}


def problem(
    x: tuple[int, ...], vocabulary: int, top: int, dtype: str = "bfloat16", *, cast: bool = True, **scalars: ConfigValue
) -> Problem:
    specs = (TensorSpec.contiguous(x, dtype), TensorSpec.contiguous((vocabulary, x[-1]), dtype))
    named = {"cast": cast, **scalars, "top": top}
    return Problem(op=OP, inputs=specs, device="cuda", constants=(1,), scalars=tuple(named.items()))


CASES: Mapping[str, tuple[Problem, Config]] = {
    "one row": (problem((1, 1, 4096), 128256, 50), VECTOR),
    "one row, the best of larger tiles": (problem((1, 4096), 50257, 8), {**VECTOR, "block_n": 16, "block_k": 512}),
    "one row by matrices": (problem((1, 1, 4096), 32000, 50, cast=False), SWAP),
    "the largest alone": (problem((16, 1, 4096), 128256, 1), SWAP),
    "sixteen": (problem((16, 1, 4096), 128256, 50), SWAP),
    "many": (problem((64, 1, 4096), 128256, 40, cast=False), {**SWAP, "num_warps": 8}),
    "all": (problem((128, 1, 4096), 128256, 64), ROWS),
    "all, tiles left whole": (problem((128, 1024), 32001, 64), {**ROWS, "block_n": 64}),
    "ragged": (problem((17, 768), 50257, 20, "float16", cast=False), {**ROWS, "width": 512}),
    "last positions": (problem((4, 32, 2048), 32000, 50, position="last"), SWAP),
}


@pytest.mark.parametrize("name", CASES)
def test_every_place_has_what_belongs_there(name: str) -> None:
    case, config = CASES[name]
    evaluation = EvaluateCandidate(candidate=Candidate(problem=case, backend="triton", config=config), max_copies=3)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"
    assert evaluation.deterministic


def test_of_equal_logits_the_first_ones_are_taken() -> None:
    case = problem((16, 64), 1000, 50)
    x = torch.ones(16, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(1000, 64, device="cuda", dtype=torch.bfloat16)
    weight[[990, 17, 500], 0] = torch.tensor([3.0, 1.0, 3.0], device="cuda", dtype=torch.bfloat16)
    values, indices = run(plan_of(case, SWAP), x, weight)
    others = [i for i in range(50) if i != 17][:47]
    assert indices.tolist() == [[500, 990, 17, *others]] * 16
    assert values.tolist() == [[3.0, 3.0, 1.0, *[0.0] * 47]] * 16


def test_stock_code_is_a_candidate() -> None:
    stock = Candidate(problem=problem((16, 1, 1024), 32000, 50), backend="aten", config={"implementation": "stock"})
    evaluation = EvaluateCandidate(candidate=stock, max_copies=3)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"


class Sampled(torch.nn.Module):
    """The end of a language model, without the dice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(1024)
        self.head = torch.nn.Linear(1024, 32000, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values, indices = torch.topk(self.head(self.norm(x))[:, -1].float(), 50)
        return values * 2, indices + 1


@pytest.mark.parametrize("config", [SWAP, {**ROWS, "num_warps": 4}], ids=["swap", "rows"])
def test_a_model_with_a_bundle_runs_the_kernels(config: Config) -> None:
    torch.manual_seed(0)
    model = Sampled().to("cuda", torch.bfloat16).eval()
    case = problem((16, 1, 1024), 32000, 50, position="last")
    entry = Entry(problem=case, backend="triton", config=config)
    bundle = Bundle(name="head", created="", version="", environment=current_environment("cuda"), entries=(entry,))
    backend = BundleBackend(bundle)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(16, 1, 1024, device="cuda", dtype=torch.bfloat16)
            values, indices = compiled(x)
            wanted = expected_outputs(get_op(OP), case, (model.norm(x), model.head.weight))
            for found, expected in zip((values / 2, indices - 1), wanted, strict=True):
                errors = errors_of(found, expected)
                assert errors.misplaced == 0
                assert errors.max <= expected.limit_max
    (usage,) = backend.usage().values()
    assert (usage.hits, usage.reasons) == (1, [])
