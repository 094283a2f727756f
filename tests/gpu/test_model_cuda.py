"""A small Llama on a GPU: built there, captured, timed in every mode from CUDA graphs, checked, and gone afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.environment import current_environment
from autokernel.evaluate.cuda_graphs import Capturer
from autokernel.evaluate.end_to_end import (
    BUNDLE,
    Contender,
    TimeScenario,
    against_stock,
    build_program,
    compile_errors,
    prepare,
    scenario_result,
)
from autokernel.evaluate.outputs import verdict_of
from autokernel.evaluate.whole_model import JobTurns, free_memory
from autokernel.export.bundle import Bundle
from autokernel.ops import get_op
from autokernel.profiling.footprint import by_peaks, footprint
from autokernel.profiling.workload import load_model
from autokernel.stages.profile import ProfileScenario

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
]

CONFIG = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
SCENARIOS = {
    "decode": {"kind": "decode", "batch": 16, "context": 128},
    "prefill": {"kind": "prefill", "batch": 2, "length": 256, "logits": "last"},
}
ROUNDS = 7


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedExperiment:
    data = {"name": "small", "model": {"config": CONFIG, "seed": 3}, "device": "cuda", "scenarios": SCENARIOS}
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(data))
    return load_experiment(path)


def stock_bundle(**options: str | bool) -> Bundle:
    environment = current_environment("cuda")
    return Bundle(name="t", created="", version="", environment=environment, entries=(), graph_options=options)


def job(loaded: LoadedExperiment, scenario: str, *contenders: Contender, **options: object) -> TimeScenario:
    baselines = (contenders[0].name,)
    made = TimeScenario(
        loaded=loaded, scenario=scenario, device="cuda", threads=4, contenders=contenders, baselines=baselines, rounds=ROUNDS
    )
    return replace(made, **options)  # type: ignore[arg-type]


def test_random_weights_are_made_on_the_gpu(loaded: LoadedExperiment) -> None:
    model = load_model(loaded, "cuda")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert {t.device.type for _, t in tensors} == {"cuda"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.get_parameter("model.norm.weight"), torch.ones(512, device="cuda", dtype=torch.bfloat16))
    on_cpu = load_model(loaded, "cpu")
    frequencies = model.get_buffer("model.rotary_emb.inv_freq")
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies.cpu(), on_cpu.get_buffer("model.rotary_emb.inv_freq").float(), rtol=0.01, atol=0)
    again = load_model(loaded, "cuda")
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(tensors, [*again.named_parameters(), *again.named_buffers()], strict=True)
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("mode", ["eager", "default"])
def test_replays_of_a_captured_step_are_the_step(loaded: LoadedExperiment, scenario: str, mode: str) -> None:
    turns = JobTurns("cuda")
    model = load_model(loaded, "cuda")
    program = build_program(loaded, model, scenario, "cuda", 0)
    prepared = prepare(Contender(name=mode), program, turns)
    expected = prepared.call().clone()
    graph, outputs = Capturer().capture(prepared.call)
    for _ in range(40):  # more than the KV cache has room for
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(outputs, expected)
    for static, fresh in zip(program.inputs, program.fresh_inputs(9), strict=True):
        static.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(outputs, expected)
    assert torch.equal(outputs, prepared.call())


def test_graphs_that_share_memory_do_not_disturb_each_other(loaded: LoadedExperiment) -> None:
    model = load_model(loaded, "cuda")
    program = build_program(loaded, model, "decode", "cuda", 0)
    capturer = Capturer()
    captured = []
    for mode in ("eager", "default"):
        prepared = prepare(Contender(name=mode), program, JobTurns("cuda"))
        captured.append((*capturer.capture(prepared.call), prepared))
    alone = []
    for graph, outputs, _ in captured:
        graph.replay()
        torch.cuda.synchronize()
        alone.append(outputs.clone())
    for _ in range(5):
        for (graph, outputs, _), expected in zip(captured, alone, strict=True):
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(outputs, expected)


def test_what_cannot_be_captured_raises_and_leaves_the_stream_alone() -> None:
    stream = torch.cuda.current_stream()
    x = torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError):
        Capturer().capture(lambda: x.sum().item())
    assert torch.cuda.current_stream() == stream
    graph, outputs = Capturer().capture(lambda: x * 2)
    graph.replay()
    torch.cuda.synchronize()
    assert outputs.sum().item() == 16


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_profiling_finds_the_gemms_with_their_times(loaded: LoadedExperiment, scenario: str) -> None:
    captured = ProfileScenario(loaded=loaded, scenario=scenario, device="cuda", threads=4, seed=0)()
    assert 0 < captured.step_us < 50_000
    assert 0 < captured.kernel_us <= captured.step_us
    shapes = {}
    for site in captured.sites:
        assert site.problem.device == "cuda"
        if site.problem.op in ("mm", "bmm"):  # with logits of the last token only, that of the prefill is a bmm
            dims = get_op(site.problem.op).dims(site.problem)
            assert dims["k"] > 1, "the outer product of rotary embeddings is no GEMM"
            shapes.setdefault((dims["n"], dims["k"]), []).append(captured.call_us[site.problem.key])
    assert set(shapes) == {(512, 512), (128, 512), (1536, 512), (512, 1536), (4096, 512)}
    assert len(shapes[512, 512]) == 4, "q and o of two layers"
    assert all(0 < us < captured.step_us for times in shapes.values() for us in times)
    merged = {len(site.problem.inputs) for site in captured.sites if site.problem.op == "merged_mm"}
    assert merged, "q, k and v, and gate and up, could be merged"


def test_every_mode_runs_from_a_graph_and_the_bundle_is_checked(loaded: LoadedExperiment) -> None:
    contenders = against_stock(stock_bundle(freezing="all"))
    timing = job(loaded, "decode", *contenders, baselines=("eager", "default", "max-autotune"), check=True)()
    assert timing.failures == {}
    assert {mode.mode for mode in timing.modes} == {"eager", "default", "max-autotune", BUNDLE}
    assert all(0 < mode.median_us < 50_000 for mode in timing.modes)
    assert set(timing.benchmarks.values()) == {0}
    assert timing.check is not None
    verdict = verdict_of([timing.check], 0.99)
    assert verdict.passed, verdict.failures
    assert timing.check.num_tokens >= 256
    assert scenario_result(timing).best_stock == timing.baseline


def test_reduce_overhead_is_timed_as_it_is_called(tmp_path: Path) -> None:
    model = {"class_path": "transformers:ViTForImageClassification", "config": {"num_hidden_layers": 4}}
    inputs = {"pixel_values": {"shape": ["batch", 3, 224, 224]}}
    scenarios = {"images": {"kind": "call", "batch": 32, "inputs": inputs, "outputs": ["logits"]}}
    path = tmp_path / "vit.yaml"
    path.write_text(json.dumps({"name": "vit", "model": model, "device": "cuda", "scenarios": scenarios}))
    contenders = against_stock(stock_bundle(), ("default", "reduce-overhead"))
    timing = job(load_experiment(path), "images", *contenders, baselines=("default", "reduce-overhead"))()
    assert timing.failures == {}
    medians = {mode.mode: mode.median_us for mode in timing.modes}
    assert medians["reduce-overhead"] < 2 * medians["default"], "milliseconds of replay, and a copy of its inputs"


def test_reduce_overhead_that_falls_back_is_no_contender() -> None:
    class Counts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x.sin()

    program: Any = SimpleNamespace(module=Counts(), inputs=(torch.zeros(4, 4, device="cuda"),), reset=lambda: None)
    with torch.no_grad(), pytest.raises(compile_errors(), match="mutated inputs"):
        prepare(Contender(name="reduce-overhead"), program, JobTurns("cuda"))


def test_a_wrong_model_fails_its_check(loaded: LoadedExperiment) -> None:
    from autokernel.evaluate.quality import check_program

    model = load_model(loaded, "cuda")
    program = build_program(loaded, model, "decode", "cuda", 0)

    def worse(*inputs: torch.Tensor) -> torch.Tensor:
        return program.module(*inputs) * 1.05  # type: ignore[no-any-return]

    with torch.no_grad():
        assert verdict_of([check_program(loaded, "decode", program, model, program.module, 0)], 0.99).passed
        assert not verdict_of([check_program(loaded, "decode", program, model, worse, 0)], 0.99).passed


def test_option_sets_take_turns_and_unknown_ones_are_failures(loaded: LoadedExperiment) -> None:
    plain = Contender(name="plain", bundle=stock_bundle())
    sets = {
        "fusion": stock_bundle(epilogue_fusion=False), "nonsense": stock_bundle(no_such_option=True),
        "frozen": stock_bundle(freezing="all"),
    }  # fmt: skip
    contenders = (plain, *(Contender(name=name, bundle=bundle) for name, bundle in sets.items()))
    timing = job(loaded, "prefill", *contenders, in_turn=True)()
    assert timing.baseline == "plain"
    assert set(timing.speedups) == {"fusion", "frozen"}
    assert set(timing.failures) == {"nonsense"}
    assert "has no option no_such_option" in timing.failures["nonsense"]


def test_the_footprint_is_no_less_than_what_a_job_takes(loaded: LoadedExperiment) -> None:
    estimate = footprint(loaded, 0)
    free_memory()
    # cuBLAS keeps a workspace of 32 MB per handle and stream for as long as the process lives
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.reset_peak_memory_stats()
    compared = job(loaded, "decode", *against_stock(stock_bundle(freezing="all"), ("eager", "default")))
    compared()
    assert torch.cuda.max_memory_reserved() < estimate.scenarios["decode"]
    torch._C._cuda_clearCublasWorkspaces()
    left = torch.cuda.memory_allocated()
    compared()
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() - left < 4 << 20, "the job left its model behind"


def test_what_profiling_takes_tells_what_comparing_a_model_that_says_nothing_takes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = {"class_path": "transformers:ViTForImageClassification", "config": sizes, "depth_key": "num_hidden_layers"}
    inputs = {"pixel_values": {"shape": ["batch", 3, 224, 224]}}
    scenarios = {"images": {"kind": "call", "batch": 32, "inputs": inputs, "outputs": ["logits"]}}
    path = tmp_path / "vit.yaml"
    path.write_text(json.dumps({"name": "vit", "model": model, "device": "cuda", "scenarios": scenarios}))
    loaded = load_experiment(path)
    assert not footprint(loaded, 0).scenarios, "its config is not read"
    peaks = []
    for layers in (None, 4):
        free_memory()
        captured = ProfileScenario(loaded=loaded, scenario="images", device="cuda", threads=1, seed=0, layers=layers)()
        assert captured is not None
        peaks.append(captured.peak_bytes)
    whole, reckoned = peaks
    assert whole > 6 * 12 * 512**2 * 2, "the weights alone"
    assert reckoned == pytest.approx(whole, rel=0.5)
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    job(loaded, "images", *against_stock(stock_bundle(freezing="all"), ("eager", "default")))()
    assert torch.cuda.max_memory_reserved() < by_peaks({"images": min(peaks)}, 0).scenarios["images"]
