"""Short spellings of problems."""

from __future__ import annotations

import pytest

from autokernel.records import Problem, TensorSpec
from autokernel.tracking.titles import problem_title


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mask", "causal", "title"),
    [
        (32, 8, True, False, "attention 4·32/8 1×2048×128 bf16 +mask"),
        (6, 6, False, True, "attention 4·6 1×2048×128 bf16 +causal"),
        (6, 6, False, False, "attention 4·6 1×2048×128 bf16"),
    ],
)
def test_attention_says_sequences_heads_and_sizes(heads: int, kv_heads: int, mask: bool, causal: bool, title: str) -> None:
    q, kv = ((4, heads, 1, 128), (4, kv_heads, 2048, 128))
    specs = [TensorSpec.contiguous(shape, "bfloat16") for shape in (q, kv, kv)]
    specs += [TensorSpec.contiguous((4, 1, 1, 2048), "bool")] if mask else []
    scalars: tuple[tuple[str, float | bool], ...] = (("scale", 0.1),)
    problem = Problem(
        op="attention", inputs=tuple(specs), device="cpu", scalars=(("causal", True), *scalars) if causal else scalars
    )  # fmt: skip
    assert problem_title(problem) == title
