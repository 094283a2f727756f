"""The LM head with greedy sampling is found in whatever way models write it, and only where nobody wants the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.function_module import Fn

from autokernel.export.plan import region_key
from autokernel.ops import ChoosingOp, FusionOp, Site, get_op
from autokernel.records import Problem

OP = "lm_head_argmax"
SPELLINGS: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[tuple[str, Any], ...]]] = {
    "argmax": (lambda logits: logits.argmax(-1), (("keepdim", False),)),
    "kept dimension": (lambda logits: logits.argmax(2, keepdim=True), (("keepdim", True),)),
    "in float32": (lambda logits: logits.float().argmax(dim=-1), (("keepdim", False),)),
    "maximum": (lambda logits: torch.max(logits.float(), -1)[1], (("keepdim", False),)),
    "generate": (
        lambda logits: logits[:, -1, :].to(torch.float32, copy=True).argmax(-1, keepdim=True),
        (("keepdim", True), ("position", "last")),
    ),
}


def found(post_grad: Any, function: Callable[..., Any], *inputs: torch.Tensor) -> list[Problem]:
    graph, _ = post_grad(Fn(function), *inputs)
    op = get_op(OP)
    assert isinstance(op, FusionOp)
    return [region.problem for region in op.match(graph, frozenset(), "cpu")]


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_spellings(post_grad: Any, name: str, dtype: torch.dtype) -> None:
    choose, scalars = SPELLINGS[name]
    x, weight = torch.randn(2, 3, 32).to(dtype), torch.randn(100, 32).to(dtype)
    (problem,) = found(post_grad, lambda x, w: choose(torch.nn.functional.linear(x.relu(), w)) + 1, x, weight)
    assert [spec.shape for spec in problem.inputs] == [(2, 3, 32), (100, 32)]
    assert problem.scalars == scalars
    op = get_op(OP)
    rows = 2 if len(scalars) == 2 else 6
    assert op.dims(problem) == {"m": rows, "n": 100, "k": 32, "dtype_bytes": dtype.itemsize}
    assert op.flops(problem) == 2 * rows * 100 * 32
    assert op.num_bytes(problem) == dtype.itemsize * (rows * 32 + 100 * 32) + 8 * rows
    assert isinstance(op, ChoosingOp)
    (scores,), (index,) = op.scores(problem, x, weight), op.reference(problem, x, weight)
    assert torch.equal(scores.argmax(-1), index.reshape(scores.shape[:-1]))
    # production looks for the problem in graphs that candidates were not built from
    again = found(post_grad, lambda *inputs: op.reference(problem, *inputs), x, weight)
    assert [region_key(p) for p in again] == [region_key(problem)]


OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "logits are returned": lambda logits: (logits.argmax(-1), logits),
    "their maximum is": lambda logits: torch.max(logits, -1),
    "of all rows together": lambda logits: logits.argmax(),
    "along the rows": lambda logits: logits.argmax(0),
    "scaled": lambda logits: (logits * 2).argmax(-1),
    "an earlier position": lambda logits: logits[:, 0].argmax(-1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(post_grad: Any, name: str) -> None:
    x, weight = torch.randn(2, 3, 32), torch.randn(100, 32)
    assert found(post_grad, lambda x, w: OTHERS[name](torch.nn.functional.linear(x.relu(), w)), x, weight) == []


class Greedy(torch.nn.Module):
    """A language model's next tokens, with its logits or without."""

    def __init__(self, model: torch.nn.Module, with_logits: bool) -> None:
        super().__init__()
        self.model, self.with_logits = model, with_logits

    def forward(self, ids: torch.Tensor) -> Any:
        logits = self.model(ids, use_cache=False).logits
        return (logits.argmax(-1), logits) if self.with_logits else logits.argmax(-1)


def test_a_language_model_of_transformers(post_grad: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids, op = torch.arange(3).view(3, 1), get_op(OP)

    def sites(with_logits: bool) -> list[Site]:
        graph, constants = post_grad(Greedy(model, with_logits), ids)
        return op.find(graph, constants, "cpu")

    (site,) = sites(with_logits=False)
    assert site.problem.key == f"cpu: {OP}(bfloat16[3x1x32], const bfloat16[96x32], keepdim=False)"
    assert sites(with_logits=True) == []
