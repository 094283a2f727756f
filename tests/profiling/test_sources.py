"""Models of a class: from its arguments, from a config, from a folder."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from autokernel import requirements
from autokernel.config import LoadedExperiment, load_experiment
from autokernel.errors import ConfigError, WorkloadError
from autokernel.profiling.workload import load_model

VIT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip
PARTS = """
import torch

class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        assert width != 7, "seven is too much"
        self.linear = torch.nn.Linear(width, 2)
        self.register_buffer("table", torch.ones(2, dtype=torch.float32))
        self.register_buffer("running", torch.zeros(2))

    def forward(self, x):
        return self.linear(x)

def function():
    return Net()

def broken():
    return Net(WDTH)

def made_of_a_broken_part():
    return torch.nn.Linear("4", 2)
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """write(model section) -> the experiment, in a folder with parts.py."""
    (tmp_path / "parts.py").write_text(PARTS)

    def make(model: dict[str, Any]) -> LoadedExperiment:
        scenario = {"kind": "call", "inputs": {"x": {"shape": ["batch", 4]}}}
        path = tmp_path / "x.yaml"
        path.write_text(json.dumps({"name": "x", "model": model, "scenarios": {"c": scenario}, "device": "cpu"}))
        return load_experiment(path)

    return make


def test_a_class_and_its_arguments(write: Any) -> None:
    model = load_model(write({"class_path": "torch.nn:Linear", "arguments": {"in_features": 4, "out_features": 2}}), "cpu")
    assert type(model) is torch.nn.Linear
    assert not model.training
    assert not model.weight.requires_grad


def test_weights_have_the_experiments_dtype_and_buffers_their_own(write: Any) -> None:
    model: Any = load_model(write({"class_path": "parts.py:Net", "dtype": "bfloat16"}), "cpu")
    assert model.linear.weight.dtype == model.running.dtype == torch.bfloat16
    assert model.table.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_random_weights_follow_the_seed(write: Any) -> None:
    first, second, third = (load_model(write({"class_path": "parts.py:Net", "seed": seed}), "cpu") for seed in (1, 1, 2))
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert not torch.equal(first.linear.weight, third.linear.weight)


def test_a_class_of_transformers_from_a_config(write: Any, tmp_path: Path) -> None:
    path = "transformers:ViTForImageClassification"
    model: Any = load_model(write({"class_path": path, "config": VIT}), "cpu")
    assert type(model).__name__ == "ViTForImageClassification"
    assert model.classifier.out_features == 3
    (tmp_path / "config.json").write_text(json.dumps(VIT | {"architectures": ["ViTModel"], "model_type": "vit"}))
    section = {"class_path": path, "config": "config.json", "config_overrides": {"num_hidden_layers": 1}}
    shorter: Any = load_model(write(section), "cpu")
    assert shorter.config.num_hidden_layers == 1
    assert shorter.classifier.weight.dtype == torch.bfloat16


def test_a_class_of_transformers_from_a_folder(write: Any, tmp_path: Path) -> None:
    path = "transformers:ViTForImageClassification"
    model = load_model(write({"class_path": path, "config": VIT, "dtype": "float32"}), "cpu")
    model.save_pretrained(tmp_path / "weights")  # type: ignore[operator]
    again = load_model(write({"class_path": path, "checkpoint": "weights", "dtype": "float32", "seed": 5}), "cpu")
    assert type(again) is type(model)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    half = load_model(write({"class_path": path, "checkpoint": "weights", "dtype": "bfloat16"}), "cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_class_of_diffusers_from_a_config_and_from_a_folder(write: Any, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs the extra `models`")
    config = {"dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8}
    config |= {"axes_dims": [4, 2, 2], "axes_lens": [64, 8, 8]}
    path = "diffusers:ZImageTransformer2DModel"
    model: Any = load_model(write({"class_path": path, "config": config, "dtype": "float32"}), "cpu")
    assert len(model.layers) == 1
    model.save_pretrained(tmp_path / "weights")
    again: Any = load_model(write({"class_path": path, "checkpoint": "weights"}), "cpu")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.layers[0].feed_forward.w1.weight, model.layers[0].feed_forward.w1.weight.bfloat16())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"class_path": "no_such_package:Net"}, r"model.class_path: no_such_package:Net: .*install the package"),
        ({"class_path": "parts.py:Nett"}, r"model.class_path: parts.py has no function or class 'Nett'; did you mean Net\?$"),
        (
            {"class_path": "parts.py:Wholly"},
            r"x.yaml: model.class_path: parts.py has no function or class 'Wholly'; it has Net, broken, function",
        ),
        ({"class_path": "torch.nn:Linearr"}, r"torch.nn has no function or class 'Linearr'; did you mean Linear, .* or \w+\?$"),
        ({"class_path": "torch.nn:Qqqqqq"}, r"torch.nn has no function or class 'Qqqqqq'; it has (\w+, ){11}\w+ and \d+ more$"),
        ({"class_path": "parts.py:function"}, r"parts.py:function is no class of a torch.nn.Module; .*under `factory`"),
        ({"class_path": "parts.py:Net", "arguments": {"depth": 2}}, r"model.arguments: parts.py:Net does not take \['depth'\]"),
        (
            {"class_path": "parts.py:Net", "arguments": {"width": 7}},
            r"model.arguments: parts.py:Net cannot be built of that: AssertionError: seven is too much",
        ),
        ({"class_path": "parts.py:Net", "config": {"width": 2}}, r"parts.py:Net has neither config_class nor from_config"),
        ({"class_path": "parts.py:Net", "checkpoint": "empty"}, r"model.checkpoint: parts.py:Net has no from_pretrained"),
        (
            {"class_path": "transformers:ViTForImageClassification", "checkpoint": "empty"},
            r"model.checkpoint: transformers:ViTForImageClassification cannot load .*empty",
        ),
        (
            {"class_path": "transformers:ViTModel", "config": {"hidden_act": "no_such"}},
            r"model.config: transformers:ViTModel cannot be built of that: KeyError",
        ),
    ],
)
def test_a_class_that_cannot_be_built_says_why(write: Any, tmp_path: Path, section: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises((ConfigError, WorkloadError), match=message):
        load_model(write(section), "cpu")


@pytest.mark.parametrize("reference", ["chronos:Chronos2Pipeline", "chronos.chronos2:Chronos2Model", "needs.py:Net"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.setitem(sys.modules, "chronos", None)
    (tmp_path / "needs.py").write_text("import chronos\n")
    cure = "chronos-forecasting has it: pip install -c constraints.txt -e '.[models]' in autokernel's checkout"
    with pytest.raises(ConfigError) as caught:
        load_model(write({"class_path": reference}), "cpu")
    assert str(caught.value).startswith(f"{tmp_path / 'x.yaml'}: model.class_path: ")
    assert str(caught.value).endswith(f"; {cure}")


def test_extras_that_messages_name_are_those_of_the_project() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for distribution, extra in requirements._EXTRAS.values():
        assert any(requirement.startswith(distribution) for requirement in extras[extra]), distribution


def test_a_package_that_lacks_what_it_needs_says_so(write: Any, tmp_path: Path) -> None:
    folder = tmp_path / "parts.py"
    folder.write_text("def __getattr__(name):\n    raise RuntimeError('needs frobnicate')\n")
    with pytest.raises(ConfigError, match=r"model.class_path: parts.py:Net: needs frobnicate; install what it needs"):
        load_model(write({"class_path": "parts.py:Net"}), "cpu")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("parts.py:broken", r"model.factory: parts.py:broken failed at .*parts.py:19: NameError: name 'WDTH' is not defined"),
        (
            "parts.py:made_of_a_broken_part",
            r"model.factory: parts.py:made_of_a_broken_part failed at .*parts.py:22: TypeError: ",
        ),
    ],
)
def test_a_factory_that_fails_says_where(write: Any, factory: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        load_model(write({"factory": factory}), "cpu")


def test_a_file_that_fails_when_it_is_imported_says_where(write: Any, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("import math\n\nWIDTH = math.sqrt(-1)\n")
    loaded = write({"factory": "wrong.py:function"})
    for _ in range(2):  # nothing of it is left
        with pytest.raises(ConfigError, match=r"wrong.py cannot be imported at .*wrong.py:3: ValueError: "):
            load_model(loaded, "cpu")


def test_a_device_without_room_is_no_fault_of_the_factory(write: Any, tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text("import torch\n\ndef make():\n    raise torch.OutOfMemoryError('no room')\n")
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        load_model(write({"factory": "large.py:make"}), "cpu")
