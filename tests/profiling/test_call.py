"""Any model as a function of tensors: declared inputs in, chosen outputs out, one graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autokernel.config import CallScenario, load_experiment
from autokernel.errors import ConfigError, WorkloadError
from autokernel.profiling.workload import ScenarioProgram, build_scenario, load_model

GATED = Path(__file__).parents[1] / "data" / "gated.yaml"


@dataclass
class Result:
    total: torch.Tensor
    parts: tuple[Any, ...]


class Structured(nn.Module):
    """Takes a list and plain values, and returns a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, images: list[torch.Tensor], scale: float, *, ids: torch.Tensor, plain: bool = False) -> Any:
        self.calls += 1
        total = self.linear(torch.cat(images)) * scale
        return total if plain else Result(total=total, parts=({"ids": ids + 1}, total.sum()))


class Lazy(nn.Module):
    """Makes a table at its first call, in a way that no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tables: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.tables:
            with torch.device("cpu"):
                self.tables.append(torch.arange(4.0))
        return self.linear(x) + self.tables[0]


INPUTS = {
    "images": [{"shape": [1, 4]}, {"shape": ["batch", 4]}],
    "scale": 2.0,
    "ids": {"shape": ["batch"], "distribution": "integers", "high": 9},
}


class Rows(nn.Module):
    """All rows, and those from the third on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.linear(x)
        return out, out[2:]


X = {"x": {"shape": ["batch", 4]}}


def program(model: nn.Module, inputs: dict[str, Any], outputs: tuple[str, ...] = (), dtype: str = "float32") -> ScenarioProgram:
    scenario = CallScenario.model_validate({"kind": "call", "inputs": inputs, "outputs": outputs, "batch": 2})
    return build_scenario(model.eval(), scenario, "c", 0, "cpu", dtype)


def test_structures_go_in_and_tensors_come_out() -> None:
    model = Structured()
    built = program(model, INPUTS, ("parts.0.ids", "total", "parts.-1"))
    assert [x.shape for x in built.inputs] == [(1, 4), (2, 4), (2,)]
    with torch.no_grad():
        ids, total, last = built.module(*built.inputs)
        expected = model(list(built.inputs[:2]), 2.0, ids=built.inputs[2])
    assert torch.equal(ids, built.inputs[2] + 1)
    assert torch.equal(total, expected.total)
    assert torch.equal(last, expected.parts[1])
    assert torch.equal(built.fresh_inputs(0)[0], built.inputs[0])
    assert not torch.equal(built.fresh_inputs(1)[0], built.inputs[0])


def test_one_output_is_a_tensor_and_all_is_what_the_model_returns() -> None:
    assert isinstance(
        program(Structured(), INPUTS, ("total",)).module(*program(Structured(), INPUTS, ("total",)).inputs), torch.Tensor
    )
    plain = program(Structured(), {**INPUTS, "plain": True})
    assert plain.module(*plain.inputs).shape == (3, 4)


def test_it_compiles_as_one_graph() -> None:
    built = program(Structured(), INPUTS, ("total", "parts.0.ids"))
    compiled = torch.compile(built.module, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        first, second = compiled(*built.inputs), built.module(*built.inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tables_of_the_first_call_are_there_when_it_is_compiled() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Lazy(), backend="eager", fullgraph=True)(torch.ones(2, 4))
    built = program(Lazy(), X)
    compiled = torch.compile(built.module, backend="eager", fullgraph=True, dynamic=False)
    assert compiled(*built.inputs).shape == (2, 4)


def test_a_copy_in_higher_precision_is_not_called() -> None:
    model = Structured()
    program(model, INPUTS, ("total",))
    assert model.calls == 1
    program(copy.deepcopy(model).double(), INPUTS, ("total",))  # float32 inputs would not suit it
    assert model.calls == 1


@pytest.mark.parametrize(
    ("model", "inputs", "outputs", "message"),
    [
        (
            Structured(),
            {"x": X["x"]},
            (),
            r"scenarios.c.inputs: Structured cannot be called with x: .*arguments are images, scale",
        ),
        (
            Structured(),
            {**INPUTS, "images": [{"shape": [1, 5]}]},
            ("total",),
            r"does not run with the inputs float32\[1, 5\], int64\[2\] and the outputs total: RuntimeError: mat1 and mat2",
        ),
        (Structured(), INPUTS, ("parts.2",), r"outputs parts.2: IndexError: tuple index out of range"),
        (Structured(), INPUTS, ("totals",), r"outputs totals: AttributeError: .*no attribute .totals"),
        (Structured(), INPUTS, (), r"the model returns Result; name the tensors that count under `outputs`"),
        (Structured(), INPUTS, ("parts.0",), r"the model returns dict with ids; name the tensors"),
        (nn.Linear(4, 4), {"input": {"shape": [2, 4], "mean": 1e38, "std": 1e38}}, (), "output 0 is nowhere finite"),
        (
            Rows(),
            X,
            (),
            r"scenario c: output 1 is empty, so nothing could be compared; with the inputs float32\[2, 4\] its shape is "
            r"\[0, 4\]: give inputs for which it is not empty, or name only the outputs that count under `outputs`",
        ),
        (Rows(), X, ("0", "1"), "output 1 is empty"),
    ],
)
def test_what_does_not_suit_the_model_is_told(model: nn.Module, inputs: Any, outputs: tuple[str, ...], message: str) -> None:
    if isinstance(model, nn.Linear):
        nn.init.constant_(model.weight, 10)
    with pytest.raises((WorkloadError, ConfigError), match=message):
        program(model, inputs, outputs)


def test_an_empty_output_that_does_not_count_is_left_out() -> None:
    built = program(Rows(), X, ("0",))
    assert built.module(*built.inputs).shape == (2, 4)


def test_inputs_without_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "gated.py").write_text(GATED.with_suffix(".py").read_text().replace("torch.randn(batch,", "torch.randn(0,"))
    (tmp_path / "x.yaml").write_text(GATED.read_text())
    loaded = load_experiment(tmp_path / "x.yaml")
    model = load_model(loaded, "cpu")
    with pytest.raises(
        WorkloadError, match=r"scenario one: output 0 is empty, .* inputs bfloat16\[0, 256\] its shape is \[0, 256\]"
    ):
        build_scenario(model, loaded.experiment.scenarios["one"], "one", 0, "cpu", "bfloat16", loaded)


@pytest.mark.parametrize(
    ("batch", "x", "reason"),
    [
        (10**18, {"shape": ["batch", 4]}, "RuntimeError: Storage size calculation overflowed"),
        (10**30, {"shape": ["batch", 4]}, "TypeError: .*failed to unpack"),
        (10**30, {"shape": [1, "batch"], "distribution": "arange"}, "OverflowError: int too big to convert"),
    ],
)
def test_a_batch_beyond_all_memory_is_told(batch: int, x: dict[str, Any], reason: str) -> None:
    scenario = CallScenario.model_validate({"kind": "call", "inputs": {"input": x}, "batch": batch})
    cure = r"; use a smaller batch, or smaller sizes under scenarios\.c\.inputs$"
    with pytest.raises(WorkloadError, match=rf"^scenario c: .* made with scenarios\.c\.batch={batch}: {reason}.*{cure}"):
        build_scenario(nn.Linear(4, 4), scenario, "c", 0, "cpu", "float32")
