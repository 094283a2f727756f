"""The experiments on models of several kinds, at a small size on a GPU: captured, timed from CUDA graphs, and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_experiments import NEEDS, SMALL

from autokernel.config import load_experiment
from autokernel.environment import current_environment
from autokernel.evaluate.end_to_end import BUNDLE, TimeScenario, against_stock
from autokernel.evaluate.outputs import verdict_of
from autokernel.export.bundle import Bundle
from autokernel.profiling.workload import load_model
from autokernel.stages.profile import ProfileScenario

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("name", sorted(SMALL))
def test_an_experiment_is_profiled_timed_and_checked(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="needs the extra `models`")
    loaded = load_experiment(EXPERIMENTS / f"{name}.yaml", SMALL[name])
    scenario = next(iter(loaded.experiment.scenarios))
    captured = ProfileScenario(loaded=loaded, scenario=scenario, device="cuda", threads=1, seed=0)()
    assert captured is not None
    assert captured.sites
    assert captured.step_us > 0
    bundle = Bundle(name=name, created="", version="", environment=current_environment("cuda"), entries=())
    timing = TimeScenario(
        loaded=loaded,
        scenario=scenario,
        device="cuda",
        threads=1,
        contenders=against_stock(bundle, ("eager", "default")),
        baselines=("eager", "default"),
        rounds=7,
        check=True,
    )()
    assert not timing.failures  # eager as well must fit into a CUDA graph
    assert {mode.mode for mode in timing.modes} == {"eager", "default", BUNDLE}
    assert timing.check is not None
    verdict = verdict_of([timing.check], 0.99)
    assert verdict.passed, verdict.failures


def test_weights_are_drawn_on_the_device() -> None:
    loaded = load_experiment(EXPERIMENTS / "vit.yaml", SMALL["vit"])
    model = load_model(loaded, "cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    again = load_model(loaded, "cuda").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
