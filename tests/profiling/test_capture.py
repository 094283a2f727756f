"""The quickstart's model, captured for real: exactly the products that it has, with times that add up."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from autokernel.config import LoadedExperiment
from autokernel.errors import WorkloadError
from autokernel.evaluate.roofline import Ceilings
from autokernel.profiling.capture import CapturedScenario, calls_of, capture
from autokernel.profiling.hotspots import rank
from autokernel.profiling.workload import ScenarioProgram, build_scenario
from autokernel.records import Problem, TensorSpec

ROWS = {"prefill": 512, "decode-b1": 1, "decode-b8": 8}
NUM_LAYERS = 3


def program_of(loaded: LoadedExperiment, model: nn.Module, name: str) -> ScenarioProgram:
    return build_scenario(model, loaded.experiment.scenarios[name], name, 0, "cpu", "bfloat16", loaded=loaded)


@pytest.fixture(scope="module")
def captured(loaded: LoadedExperiment, model: nn.Module) -> Iterator[dict[str, CapturedScenario]]:
    torch.compiler.reset()
    yield {name: capture(program_of(loaded, model, name), "cpu", budget_s=0.5) for name in ROWS}
    torch.compiler.reset()


def products(scenario: CapturedScenario) -> Counter[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]]:
    """(shape of the left matrix, of the right one, epilogue) of every mm."""
    problems = [site.problem for site in scenario.sites if site.problem.op == "mm"]
    return Counter((p.inputs[0].shape, p.inputs[1].shape, p.epilogue) for p in problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_products_are_those_of_the_model(captured: dict[str, CapturedScenario], name: str) -> None:
    m = ROWS[name]
    assert products(captured[name]) == {
        ((m, 384), (384, 384), ()): 3 * NUM_LAYERS,  # q, k, v
        ((m, 384), (384, 384), ("add",)): NUM_LAYERS,  # o and the residual
        ((m, 384), (384, 1152), ("silu",)): NUM_LAYERS,  # gate
        ((m, 384), (384, 1152), ("mul",)): NUM_LAYERS,  # up, times the gate
        ((m, 1152), (1152, 384), ("add",)): NUM_LAYERS,  # down and the residual
        ((m, 384), (384, 256), ()): 1,  # the head
    }
    ops = Counter(site.problem.op for site in captured[name].sites)
    assert ops["attention"] == NUM_LAYERS
    assert not {"addmm", "bmm", "baddbmm"} & set(ops)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_weights_are_constant_and_transposed(captured: dict[str, CapturedScenario], name: str) -> None:
    for site in captured[name].sites:
        if site.problem.op == "mm":
            k, n = site.problem.inputs[1].shape
            assert site.problem.constants == (1,)
            assert site.problem.inputs[1] == TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_products_of_one_input_are_groups(captured: dict[str, CapturedScenario], name: str) -> None:
    groups = [site for site in captured[name].sites if site.problem.op == "merged_mm"]
    columns = Counter(tuple(w.shape[1] for w in site.problem.inputs[1:]) for site in groups)
    assert columns == {(384, 384, 384): NUM_LAYERS, (1152, 1152): NUM_LAYERS}
    paths = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert [part.split(" ")[0] for part in groups[0].name.split(" + ")] == paths


@pytest.mark.slow
def test_sites_know_their_neighbours(captured: dict[str, CapturedScenario]) -> None:
    by_name = {site.name.split(" ")[0]: site for site in captured["decode-b8"].sites if site.problem.op == "mm"}
    assert by_name["model.layers.0.self_attn.q_proj"].producers == ("aten.mul",)
    assert by_name["model.layers.1.self_attn.o_proj"].producers[0].startswith("aten._scaled_dot_product")
    assert by_name["model.layers.0.mlp.up_proj"].consumers == ("aten.mm",)
    assert by_name["lm_head"].consumers == ("output",)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_times_add_up(captured: dict[str, CapturedScenario], name: str) -> None:
    scenario = captured[name]
    plain = [scenario.call_us[site.problem.key] for site in scenario.sites if site.problem.op in ("mm", "attention")]
    assert all(us > 0 for us in plain)
    assert sum(plain) <= scenario.step_us * 1.0001
    assert scenario.kernel_us == pytest.approx(sum(plain), rel=1e-6)
    for site in scenario.sites:
        if site.problem.op == "merged_mm":
            x, *weights = site.problem.inputs
            parts = sum(
                us for w in weights for key, us in scenario.call_us.items() if key == f"cpu: mm({x}, const {w})"
            ) or sum(scenario.call_us[f"cpu: mm({x}, const {w}) + silu"] for w in weights)
            assert scenario.call_us[site.problem.key] == pytest.approx(parts, rel=1e-6)


@pytest.mark.slow
def test_hotspots_weigh_scenarios_equally(captured: dict[str, CapturedScenario]) -> None:
    ceilings = Ceilings(read_gb_per_s=10.0, tflops={"bfloat16": 1.0}, cache_gb_per_s=50.0, cache_bytes=1 << 25)
    hotspots = rank(list(captured.values()), ceilings)
    assert sum(h.num_calls for h in hotspots if h.problem.op == "mm") == 3 * (7 * NUM_LAYERS + 1)
    for name in ROWS:
        shares = [h.share for h in hotspots if h.scenario == name and h.problem.op == "mm"]
        assert 0 < sum(shares) <= 1.0001
    assert sum(h.weight for h in hotspots if h.problem.op == "mm") <= 1.0001


@pytest.mark.slow
def test_a_captured_scenario_is_plain_data(captured: dict[str, CapturedScenario]) -> None:
    scenario = captured["prefill"]
    assert pickle.loads(pickle.dumps(scenario)) == scenario
    assert "aten.mm.default" in scenario.graph
    assert scenario.step_us > 0
    assert scenario.compile_s > 0


@pytest.mark.slow
def test_compiled_scenarios_of_one_model_stay_apart(loaded: LoadedExperiment, model: nn.Module) -> None:
    torch.compiler.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("decode-b8", "prefill", "decode-b1"):
            program = program_of(loaded, model, name)
            module = torch.compile(program.module, backend="eager", fullgraph=True, dynamic=False)
            first = module(*program.inputs)
            module(*program.fresh_inputs(1))
            assert torch.equal(module(*program.inputs), first)
            torch.compiler.reset()


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1


def test_a_graph_break_is_a_workload_error() -> None:
    x = (torch.ones(2),)
    program = ScenarioProgram(name="s", module=Breaks(), inputs=x, make_inputs=lambda seed: x, restore=lambda: None)
    with pytest.raises(WorkloadError, match=r"scenario s: torch.compile cannot make one graph of it"):
        capture(program, "cpu")


class Updates(nn.Module):
    """A weight that the model itself writes is no constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Parameter(torch.randn(16, 16), requires_grad=False)
        self.register_buffer("moving", torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = (x @ self.fixed).sin() @ self.moving
        self.moving.mul_(0.5)
        return out


def test_a_buffer_that_the_model_writes_is_no_constant() -> None:
    x = (torch.randn(8, 16),)
    program = ScenarioProgram(name="s", module=Updates(), inputs=x, make_inputs=lambda seed: x, restore=lambda: None)
    problems = [site.problem for site in capture(program, "cpu", budget_s=0.1).sites]
    assert [(p.op, p.constants) for p in problems] == [("mm", (1,)), ("mm", ())]


def test_calls_of_a_problem_are_those_of_its_reference() -> None:
    x, w = TensorSpec.contiguous((4, 8), "float32"), TensorSpec(shape=(8, 6), dtype="float32", stride=(1, 8))
    merged = Problem(op="merged_mm", inputs=(x, w, w), device="cpu", constants=(1, 2))
    calls = calls_of(merged)
    assert [call.name for call in calls] == ["aten::mm", "aten::mm"]
    assert calls[0].shapes == ((4, 8), (8, 6))
    assert calls[0].strides == ((8, 1), (1, 8))
