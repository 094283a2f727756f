"""The experiments on models of several kinds, at a small size: each is one graph, and needs no code of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small_experiments import NEEDS, SMALL

from autokernel.config import load_experiment
from autokernel.profiling.functions import load_function
from autokernel.profiling.workload import build_scenario, load_model

FORECASTS = "models/forecasts.py:quantile_losses"
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHAPES = {"gemma": (1, 1, 2000), "vit": (1, 5), "chronos2": (1, 21, 64), "zimage": (16, 1, 16, 16)}
LOGITS = {"gemma": ("scenarios.decode-b1.sample=none",)}  # tokens have no spread


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_step_is_one_graph(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="needs the extra `models`")
    overrides = ("device=cpu", "backends=[aten]", *SMALL[name], *LOGITS.get(name, ()))
    loaded = load_experiment(EXPERIMENTS / f"{name}.yaml", overrides)
    model, dtype = load_model(loaded, "cpu"), loaded.experiment.model.dtype
    scenario = next(iter(loaded.experiment.scenarios))
    program = build_scenario(model, loaded.experiment.scenarios[scenario], scenario, 0, "cpu", dtype, loaded=loaded)
    torch.compiler.reset()
    compiled = torch.compile(program.module, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        eager, graph = program.module(*program.inputs), compiled(*program.inputs)
    assert eager.shape == SHAPES[name]
    assert eager.isfinite().all()
    assert eager.std() > 0
    torch.testing.assert_close(graph, eager)
    torch.compiler.reset()


def levels_of_a_normal(quantiles: list[float]) -> torch.Tensor:
    return torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(quantiles)).view(1, -1, 1)


@dataclass
class Forecast:
    quantile_preds: torch.Tensor


def test_forecasts_are_scored_quantile_by_quantile() -> None:
    loaded = load_experiment(EXPERIMENTS / "chronos2.yaml", ("device=cpu", "backends=[aten]"))
    score = load_function(loaded, FORECASTS, "validation.eval.metric")
    quantiles = [0.1, 0.5, 0.9]
    seen: list[torch.Tensor] = []

    def forward(context: torch.Tensor, shift: float) -> Forecast:
        seen.append(context)
        return Forecast(levels_of_a_normal(quantiles).expand(len(context), -1, 80) + shift)

    plain = score(forward, quantiles, series=4, batch=2, length=96, horizon=48, arguments={"shift": 0.0})
    high = score(forward, quantiles, series=4, batch=2, length=96, horizon=48, arguments={"shift": 1.0})
    assert [x.shape for x in seen] == [(2, 96)] * 4
    assert seen[0].isnan().any()
    assert torch.equal(seen[0].nan_to_num(), seen[2].nan_to_num())  # the same series each time
    assert len(plain) == 3
    assert 0 < plain[1] < high[1]  # too high: the median loses, and low quantiles most
    assert high[0] / plain[0] > high[1] / plain[1]
    with pytest.raises(ValueError, match="series must be a multiple of batch, not 4 of 3"):
        score(forward, quantiles, series=4, batch=3, arguments={"shift": 0.0})


def test_a_perfect_forecast_has_no_loss() -> None:
    loaded = load_experiment(EXPERIMENTS / "chronos2.yaml", ("device=cpu", "backends=[aten]"))
    score = load_function(loaded, FORECASTS, "validation.eval.metric")
    _, future = score.__globals__["_series"](4, 96, 48)
    batches = iter(future.split(2))
    losses = score(
        lambda context: Forecast(next(batches).unsqueeze(1).expand(-1, 2, -1)),
        [0.2, 0.8],
        series=4,
        batch=2,
        length=96,
        horizon=48,
    )
    assert losses == [0.0, 0.0]
