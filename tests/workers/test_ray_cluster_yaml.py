"""`ray_cluster.yaml`, and the variants that docs/cluster.md describes, against Ray's own schema and checks; no network."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from autokernel.config import Experiment

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "cluster.md").read_text()


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    import ray

    return dict(json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text()))


@pytest.fixture
def config() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # local paths of file_mounts are relative to where `ray up` runs


def snippets() -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", DOCS, flags=re.DOTALL)]


def check(config: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(config, schema)
    prepared = dict(prepare_config(copy.deepcopy(config)))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(config: dict[str, Any], schema: dict[str, Any]) -> None:
    prepared = check(config, schema)
    assert set(prepared["available_node_types"]) == {"head", "gpu_worker"}
    assert prepared["available_node_types"]["gpu_worker"]["resources"]["GPU"] == 8
    assert prepared["available_node_types"]["gpu_worker"]["min_workers"] >= 1


def test_ray_accepts_the_variant_for_machines_of_your_own(config: dict[str, Any], schema: dict[str, Any]) -> None:
    (local,) = [snippet for snippet in snippets() if "provider" in snippet]
    for key in ("provider", "auth", "head_node_type", "available_node_types"):
        config.pop(key)
    prepared = check(config | local, schema)
    assert prepared["provider"]["type"] == "local"
    assert prepared["max_workers"] == len(local["provider"]["worker_ips"])


def test_a_typo_would_be_seen(config: dict[str, Any], schema: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(config | {"max_worker": 3}, schema)


def test_versions_agree_with_the_constraints(config: dict[str, Any]) -> None:
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert config["docker"]["image"].startswith(f"rayproject/ray:{pinned}-py3")


def test_what_it_mounts_and_sets(config: dict[str, Any]) -> None:
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local / "pyproject.toml").is_file()
    options = " ".join(config["docker"]["run_options"])
    for variable in ("RAY_USAGE_STATS_ENABLED=0", "RAY_AUTH_MODE=token", "MLFLOW_DISABLE_TELEMETRY=true"):
        assert f"-e {variable}" in options
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert any("ray start" in command for command in commands)


def test_the_experiment_of_the_documentation_is_valid() -> None:
    (shared,) = [snippet for snippet in snippets() if "storage" in snippet]
    model = {"factory": "package.module:make"}
    experiment = Experiment.model_validate(
        {"name": "x", "model": model, "scenarios": {"a": {"kind": "call", "inputs": "package.module:inputs"}}, **shared}
    )
    assert str(experiment.storage).startswith("postgresql+psycopg2://")
    assert str(experiment.tracking).startswith("http")
    assert experiment.cluster.address not in ("local", "inline"), "it sends the run to the cluster"
    assert experiment.cluster.gpus_per_worker == 1
