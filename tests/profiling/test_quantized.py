"""A model of 8-bit layers: kept in 8 bits, its products found, timed, weighed, and evaluated as they were found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.evaluate.roofline import Ceilings
from autokernel.profiling.capture import CapturedScenario, calls_of, capture
from autokernel.profiling.hotspots import rank
from autokernel.profiling.language import raised
from autokernel.profiling.precision import convert
from autokernel.profiling.workload import build_scenario, load_model
from autokernel.records import Candidate, Problem, Status, TensorSpec

MODEL = Path(__file__).parents[1] / "data" / "quantized.yaml"
ROWS, TENSORS, INTEGERS, PLAIN = range(4)


@pytest.fixture(scope="module")
def experiment() -> LoadedExperiment:
    return load_experiment(MODEL)


@pytest.fixture(scope="module")
def quantized(experiment: LoadedExperiment) -> nn.Module:
    return load_model(experiment, "cpu")


@pytest.fixture(scope="module")
def captured(experiment: LoadedExperiment, quantized: nn.Module) -> Iterator[CapturedScenario]:
    torch.compiler.reset()
    scenario = experiment.experiment.scenarios["rows"]
    yield capture(build_scenario(quantized, scenario, "rows", 0, "cpu", "bfloat16", loaded=experiment), "cpu", budget_s=0.1)
    torch.compiler.reset()


def problems(captured: CapturedScenario) -> list[Problem]:
    """In the order of the layers."""
    found = {site.problem.op: [] for site in captured.sites}  # type: dict[str, list[Problem]]
    for site in captured.sites:
        found[site.problem.op].append(site.problem)
    assert {op: len(sites) for op, sites in found.items()} == {"scaled_mm": 2, "int_mm": 1, "mm": 1}
    return [*found["scaled_mm"], *found["int_mm"], *found["mm"]]


def test_quantized_layers_keep_their_dtypes_and_others_take_the_models(quantized: nn.Module) -> None:
    assert quantized[0].weight.dtype == torch.float8_e4m3fn
    assert quantized[0].scale.dtype == torch.float32
    assert quantized[3].weight.dtype == torch.int8
    assert quantized[4].weight.dtype == torch.bfloat16


def test_a_converted_model_shares_what_it_shared() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight = model[0].weight
    assert convert(model, torch.float16) is model
    assert model[0].weight is model[1].weight
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_quantized_layers_are_as_they_are_in_higher_precision_too(quantized: nn.Module) -> None:
    seen = []
    handles = [m.register_forward_hook(lambda _, __, out: seen.append(out.dtype)) for m in (quantized[0], quantized[4])]
    with torch.no_grad(), raised(quantized, torch.float32):
        quantized(torch.randn(32, 64))
    for handle in handles:
        handle.remove()
    assert seen == [torch.float32, torch.float32]
    assert quantized[4].weight.dtype == torch.bfloat16


def test_products_of_8_bits_are_found_with_their_scales(captured: CapturedScenario) -> None:
    found = problems(captured)
    e4m3, fp32 = "float8_e4m3fn", "float32"
    weight = TensorSpec(shape=(64, 128), dtype=e4m3, stride=(1, 64))
    bias = TensorSpec.contiguous((128,), "bfloat16")
    scales = (TensorSpec.contiguous((32, 1), fp32), TensorSpec.contiguous((1, 128), fp32))
    assert found[ROWS].inputs == (TensorSpec.contiguous((32, 64), e4m3), weight, *scales, bias)
    assert found[ROWS].constants == (1, 3, 4)
    assert found[ROWS].epilogue == ("silu",)
    assert found[ROWS].scalars == (("out_dtype", "bfloat16"), ("use_fast_accum", False))
    assert [spec.shape for spec in found[TENSORS].inputs] == [(32, 128), (128, 64), (), (), (64,)]
    assert found[TENSORS].constants == (1, 3, 4)
    weight = TensorSpec(shape=(64, 128), dtype="int8", stride=(1, 64))
    assert found[INTEGERS].inputs == (TensorSpec.contiguous((32, 64), "int8"), weight)
    assert found[INTEGERS].constants == (1,)
    assert found[PLAIN].inputs[0].dtype == "bfloat16"


def test_they_have_times_and_weights(captured: CapturedScenario) -> None:
    assert all(captured.call_us[problem.key] > 0 for problem in problems(captured))
    hotspots = rank([captured], Ceilings(read_gb_per_s=10.0, tflops={"bfloat16": 1.0, "int8": 2.0}))
    assert {hotspot.problem.op for hotspot in hotspots} == {"scaled_mm", "int_mm", "mm"}
    assert 0 < sum(hotspot.share for hotspot in hotspots) <= 1.0001


def test_layouts_that_a_gpu_would_refuse_are_known_calls_of_a_cpu(captured: CapturedScenario) -> None:
    row_major = TensorSpec.contiguous((20, 12), "float8_e4m3fn")
    scale = TensorSpec.contiguous((), "float32")
    problem = Problem(
        op="scaled_mm",
        inputs=(TensorSpec.contiguous((32, 20), "float8_e4m3fn"), row_major, scale, scale),
        device="cpu",
        scalars=(("out_dtype", "float32"), ("use_fast_accum", False)),
    )
    (call,) = calls_of(problem)
    assert (call.name, call.shapes) == ("aten::_scaled_mm", ((32, 20), (20, 12)))


@pytest.mark.slow
@pytest.mark.parametrize("which", [ROWS, TENSORS, INTEGERS])
def test_what_was_found_can_be_evaluated(
    captured: CapturedScenario, which: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    candidate = Candidate(problem=problems(captured)[which], backend="aten", config={"prepack": False})
    result = EvaluateCandidate(candidate=candidate, max_copies=2, threads=1)()
    assert result.status is Status.OK, result.message
    assert result.measurement is not None
