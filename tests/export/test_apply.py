"""Production: `torch.compile` with a bundle builds what the bundle says, times nothing, and never runs stale weights."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_layers import BATCHES, BOTH, BOTH_BIASED, DOWN, GATE, HIDDEN, Gated, K, M, bf16, bundle_of, entry, weight
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code
from torch.testing._internal.two_tensor import TwoTensor

import autokernel
from autokernel.errors import BundleError
from autokernel.export.apply import BundleBackend, stock_backend
from autokernel.export.bundle import Bundle, Entry, ScenarioOptions, write_bundle
from autokernel.export.passes import SitePass


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def compiled_with(model: nn.Module, bundle: Bundle) -> tuple[object, BundleBackend]:
    backend = autokernel.backend(bundle)
    return torch.compile(model, backend=backend, fullgraph=True), backend


@pytest.mark.parametrize(
    ("entries", "hits"),
    [
        ([entry(GATE, "aten", prepack=True), entry(DOWN, "aten", prepack=True)], [2, 1]),
        ([entry(GATE, "inductor", template="cpp_gemm"), entry(DOWN, "inductor", template="cpp_gemm")], [2, 1]),
        ([entry(BOTH, "aten", prepack=True, merge="concat")], [1]),
        ([entry(BOTH, "aten", prepack=False, merge="concat")], [1]),
        ([entry(BOTH, "inductor", template="cpp_gemm", merge="concat")], [1]),
    ],
    ids=["packed", "template", "concat", "concat unpacked", "concat template"],
)
def test_entries_are_hit_right_and_nothing_is_benchmarked(entries: list[Entry], hits: list[int]) -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(*entries))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert [usage.hits for usage in backend.usage().values()] == hits
    assert counters["inductor"]["select_algorithm_autotune"] == 0


def test_biased_layers_merge_too() -> None:
    model, x = Gated(bias=True), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(entry(BOTH_BIASED, "aten", prepack=True, merge="concat")))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert [usage.hits for usage in backend.usage().values()] == [1]


def test_bf16_layers_group_in_one_template() -> None:
    model, x = Gated().bfloat16(), torch.randn(M, K).bfloat16()
    compiled, backend = compiled_with(model, bundle_of(entry(bf16(BOTH), "inductor", template="cpp_gemm", merge="grouped")))
    torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
    assert [usage.hits for usage in backend.usage().values()] == [1]


class TwoGroups(nn.Module):
    """Two layers on one input, two more on the first one's result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, K, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, other = self.layers[0](x), self.layers[1](x)
        out: torch.Tensor = self.layers[2](first) * self.layers[3](first) + other
        return out


def test_a_group_takes_its_input_from_another_group() -> None:
    square = replace(BOTH, inputs=(BOTH.inputs[0], weight(K, K), weight(K, K)))
    model, x = TwoGroups().bfloat16(), torch.randn(M, K).bfloat16()
    compiled, backend = compiled_with(model, bundle_of(entry(bf16(square), "inductor", template="cpp_gemm", merge="grouped")))
    torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
    assert [usage.hits for usage in backend.usage().values()] == [2]


def test_batches_use_their_template_however_often_they_are_compiled() -> None:
    left, right = torch.randn(4, 32, K), torch.randn(4, K, 48)
    for _ in range(2):
        torch.compiler.reset()
        backend = autokernel.backend(bundle_of(entry(BATCHES, "inductor", template="cpp_bmm")))
        product = torch.compile(torch.bmm, backend=backend)(left, right)
        torch.testing.assert_close(product, torch.bmm(left, right), rtol=1e-4, atol=1e-5)
        assert next(iter(backend.usage().values())).hits == 1


def test_thread_factors_and_blocks_reach_the_generated_code() -> None:
    threads = torch.get_num_threads()
    config = {"template": "cpp_gemm", "threads_m": 1, "threads_n": threads, "threads_k": 1}
    config |= {"block_m": 1, "block_n": 2, "block_k": 8}
    model, x = Gated(), torch.randn(M, K)
    sources = []
    for chosen in (config, {"template": "cpp_gemm"}):
        torch.compiler.reset()
        compiled, _ = compiled_with(model, bundle_of(entry(GATE, "inductor", **chosen)))
        _, (code, *_) = torch._inductor.utils.run_and_get_code(compiled, x)
        sources.append(code)
    assert "Kc_blocks = 8;" in sources[0]
    assert "Kc_blocks = 8;" not in sources[1]


def test_factors_for_other_threads_fall_back_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    wrong = entry(GATE, "inductor", template="cpp_gemm", threads_m=1, threads_n=torch.get_num_threads() + 1, threads_k=1)
    model, x = Gated(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(wrong))
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert next(iter(backend.usage().values())).hits == 0
    assert "do not multiply to this process's" in caplog.text


def test_options_of_a_scenario_reach_its_graph_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def compile_and_tell(*args: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches.get("epilogue_fusion"))
        return compile_fx(*args, config_patches=config_patches)

    monkeypatch.setattr("autokernel.export.apply.compile_fx", compile_and_tell)
    products = (f"float32 {M}x{HIDDEN}x{K}", f"float32 {M}x{K}x{HIDDEN}")
    part = ScenarioOptions(scenario="s", products=tuple(sorted(products)), options={"epilogue_fusion": False})
    bundle = replace(bundle_of(), scenario_options=(part,))
    model = Gated()
    for rows, expected in ((M, False), (M + 1, None)):
        torch.compiler.reset()
        compiled, backend = compiled_with(model, bundle)
        x = torch.randn(rows, K)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)  # type: ignore[operator]
        assert seen.pop() is expected, backend.graphs


def test_other_shapes_get_stock_code() -> None:
    model, x = Gated(), torch.randn(M + 1, K)
    compiled, backend = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert next(iter(backend.usage().values())).hits == 0


def test_weights_changed_in_place_are_seen() -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, _ = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    compiled(x)
    model.gate.weight.mul_(-2)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_layers_that_share_code_keep_their_own_weights() -> None:
    layers = [Gated() for _ in range(3)]
    backend = autokernel.backend(bundle_of(entry(GATE, "aten", prepack=True)))
    x = torch.randn(M, K)
    for _ in range(2):
        for layer in layers:
            compiled = torch.compile(layer, backend=backend)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_weights_that_change_all_the_time_end_in_stock_code(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, _ = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            model.gate.weight.add_(0.1)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert "runs without packed weights" in caplog.text


def test_gradients_are_never_frozen_away(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    with torch.enable_grad(), caplog.at_level(logging.WARNING):
        compiled(x).sum().backward()
    assert model.gate.weight.grad is not None
    assert next(iter(backend.usage().values())).hits == 0
    assert "gradients are enabled" in caplog.text


def test_with_gradients_the_code_is_stock() -> None:
    """Weights that nobody folds would be put side by side in every call."""
    model, x = Gated(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(entry(BOTH, "aten", prepack=True, merge="concat")))
    with torch.enable_grad():
        _, codes = run_and_get_code(compiled, x)
    assert codes
    assert not re.search(rf"\b{2 * HIDDEN}\b", "".join(codes)), "no matrix has both layers' columns"
    (usage,) = backend.usage().values()
    assert (usage.hits, len(usage.reasons)) == (0, 1)


def test_weights_that_are_no_parameters_are_not_put_side_by_side() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("gate", "up"):
                self.register_buffer(name, torch.randn(HIDDEN, K))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.gate) * nn.functional.linear(x, self.up)  # type: ignore[arg-type]

    model, x = Buffers(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(entry(BOTH, "aten", prepack=True, merge="concat")))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    (usage,) = backend.usage().values()
    assert usage.hits == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"device": "cuda"}, "it was tuned for cuda, and this graph is on cpu"), ({"num_units": 77}, "threads 77, this is")],
    ids=["device", "threads"],
)
def test_what_a_graph_is_compiled_for_counts_and_not_what_was_there_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], reason: str
) -> None:
    """One machine has both devices, and threads may change between two compilations."""
    bundle = bundle_of(entry(GATE, "aten", prepack=True))
    monkeypatch.setattr("autokernel.export.apply.mismatch", lambda made, here: None)
    monkeypatch.setattr("autokernel.export.apply._device_there", lambda device: True)
    monkeypatch.setattr("autokernel.export.apply.current_environment", lambda device: bundle.environment)
    model, x = Gated(), torch.randn(M, K)
    with caplog.at_level(logging.WARNING):
        compiled, backend = compiled_with(model, replace(bundle, environment=replace(bundle.environment, **changed)))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    assert reason in caplog.text
    assert next(iter(backend.usage().values())).hits == 0


def test_what_torch_compile_is_told_besides_is_not_swallowed() -> None:
    backend = autokernel.backend(bundle_of(entry(GATE, "aten", prepack=True)))
    with pytest.raises(Exception, match=r"takes no mode='reduce-overhead': graph options belong in the bundle"):
        torch.compile(Gated(), backend=backend, mode="reduce-overhead")(torch.randn(M, K))


def test_a_model_that_goes_leaves_nothing_behind() -> None:
    backend = autokernel.backend(bundle_of(entry(GATE, "aten", prepack=True)))
    model, x = Gated(), torch.randn(M, K)
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    assert next(iter(backend.usage().values())).hits == 2
    kept = [weakref.ref(tensor) for tensor in (model.gate.weight, model.down.weight, x)]
    del model, compiled, x
    torch.compiler.reset()
    gc.collect()
    assert [reference() for reference in kept] == [None, None, None]


def test_weights_that_were_written_to_behind_their_back_are_packed_again_when_told() -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    compiled(x)  # type: ignore[operator]
    model.gate.weight.data += 1
    backend.refresh()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)  # type: ignore[operator]


def test_another_machine_gets_stock_code_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    bundle = bundle_of(entry(GATE, "aten", prepack=True), entry(DOWN, "aten", prepack=True))
    foreign = replace(bundle, environment=replace(bundle.environment, device_name="Another CPU"))
    model, x = Gated(), torch.randn(M, K)
    with caplog.at_level(logging.WARNING):
        compiled, backend = compiled_with(model, foreign)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len([r for r in caplog.records if "stock code instead" in r.message]) == 1
    assert next(iter(backend.usage().values())).hits == 0
    with pytest.raises(BundleError, match="tune again on this machine"):
        autokernel.backend(foreign, on_mismatch="error")
    with pytest.raises(BundleError, match=r"on_mismatch is one of 'stock', 'apply', 'error', not 'raise'"):
        autokernel.backend(foreign, on_mismatch="raise")  # type: ignore[arg-type]
    applied = autokernel.backend(foreign, on_mismatch="apply")
    torch.compiler.reset()
    torch.compile(model, backend=applied)(x)
    assert next(iter(applied.usage().values())).hits == 2


def test_it_works_from_another_thread() -> None:
    model, x = Gated(), torch.randn(M, K)
    expected, seen = model(x), []
    backend = autokernel.backend(bundle_of(entry(GATE, "inductor", template="cpp_gemm")))

    def work() -> None:
        with torch.no_grad():
            seen.append(torch.compile(model, backend=backend)(x))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert next(iter(backend.usage().values())).hits == 2


def test_stock_compilations_beside_it_are_left_alone() -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, _ = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    compiled(x)
    torch.compiler.reset()
    counters.clear()
    torch.compile(model)(x)
    assert counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"] == 0


def test_two_bundles_do_not_share_a_cached_graph() -> None:
    """Without packed weights the FX graph cache is on: the digest has to keep two plans apart."""
    model, x = Gated(), torch.randn(M, K)
    first = bundle_of(entry(BOTH, "aten", prepack=False, merge="concat"))
    compiled, backend = compiled_with(model, first)
    compiled(x)
    torch.compiler.reset()
    other = bundle_of(entry(DOWN, "aten", prepack=False))
    _, (code, *_) = torch._inductor.utils.run_and_get_code(compiled_with(model, other)[0], x)
    assert f"{2 * HIDDEN}" not in code.split("def call", 1)[1].split("return", 1)[0].replace("reinterpret", "")
    assert next(iter(backend.usage().values())).hits == 1


def test_the_options_form_keeps_the_inductor_backend() -> None:
    model, x = Gated(), torch.randn(M, K)
    bundle = bundle_of(entry(BOTH, "aten", prepack=False, merge="concat"))
    compiled = torch.compile(model, options=dict(autokernel.options(bundle)))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counters["inductor"]["select_algorithm_autotune"] == 0
    with torch._dynamo.config.patch(prepare_freezing=True):
        torch.compiler.reset()
        counters.clear()
        packed = bundle_of(entry(GATE, "inductor", template="cpp_gemm"))
        compiled = torch.compile(model, options=dict(autokernel.options(packed)))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counters["inductor"]["select_algorithm_autotune"] == 0
    assert counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"] > 0


def test_a_stock_bundle_is_stock_inductor() -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, _ = compiled_with(model, bundle_of())
    torch.testing.assert_close(compiled(x), torch.compile(model)(x), rtol=0, atol=0)
    assert dict(autokernel.options(bundle_of())) == {}


def test_the_backend_by_name_says_what_to_write() -> None:
    with pytest.raises(BundleError, match=r"backend=autokernel\.backend"):
        stock_backend(torch.fx.symbolic_trace(nn.Identity()), [])


def test_production_imports_no_search_stack(tmp_path: Path) -> None:
    write_bundle(bundle_of(entry(GATE, "aten", prepack=True)), tmp_path / "bundle")
    program = f"""
import sys, torch, autokernel
model = torch.nn.Linear({K}, {HIDDEN}, bias=False)
with torch.no_grad():
    compiled = torch.compile(model, backend=autokernel.backend({str(tmp_path / "bundle")!r}))
    compiled(torch.randn({M}, {K}))
heavy = [m for m in ("ray", "optuna", "mlflow", "pydantic", "typer", "transformers", "nvMatmulHeuristics") if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- graphs for several sizes


class Scaled(nn.Module):
    """A number that changes from call to call, and rows that grow: after two calls Dynamo makes a graph for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(K, HIDDEN, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor, by: int, rows: torch.Tensor) -> torch.Tensor:
        return (rows @ self.gate(x).t()).sum() * by + self.gate(x) * by


def calls(model: nn.Module, compiled: Any, numbers: tuple[int, ...]) -> None:
    x = torch.randn(M, K)
    for number in numbers:
        rows = torch.randn(number, HIDDEN)
        torch.testing.assert_close(compiled(x, number, rows), model(x, number, rows), rtol=1e-3, atol=1e-2)


def test_a_graph_for_several_sizes_stays_right_when_weights_change(caplog: pytest.LogCaptureFixture) -> None:
    model = Scaled()
    backend = autokernel.backend(bundle_of(entry(GATE, "aten", prepack=True)))
    compiled = torch.compile(model, backend=backend)
    with caplog.at_level(logging.WARNING):
        calls(model, compiled, (5, 6, 7))
    assert "dynamic=False" in caplog.text
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
    calls(model, compiled, (7, 8, 3))
    ((usage,),) = [backend.usage().values()]
    assert usage.hits == 1, "the first graph, of one size, has it"
    assert [reason for reason in usage.reasons if "of fixed sizes" in reason]


def test_layers_that_share_a_graph_for_several_sizes_are_right() -> None:
    backend = autokernel.backend(bundle_of(entry(GATE, "aten", prepack=True)))
    layers = [Scaled(), Scaled()]
    for layer in layers:
        layer.compile(backend=backend)
    for number in (5, 6, 7, 8):
        for layer in layers:
            calls(layer.forward, layer, (number,))  # type: ignore[arg-type]


# ---- other threads, other processes


class Layer(nn.Module):
    """Its instances share a compiled graph."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(K, HIDDEN, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x).relu()


def test_packing_weights_again_disturbs_no_other_thread() -> None:
    backend = autokernel.backend(bundle_of(entry(GATE, "aten", prepack=True)))
    other: Any = torch.compile(lambda x: x.sin() + 1, dynamic=False)
    layers, y, errors, done = [], torch.randn(8), [], threading.Event()
    other(y)

    def calls_another() -> None:
        with torch.no_grad():
            while not done.is_set():
                try:
                    other(y)
                except RuntimeError as error:
                    errors.append(error)

    thread = threading.Thread(target=calls_another)
    thread.start()
    try:
        for _ in range(6):
            layers.append(Layer())
            layers[-1].compile(backend=backend)
            layers[-1](torch.randn(M, K))
    finally:
        done.set()
        thread.join()
    assert not errors


def test_a_compiled_model_can_be_saved() -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    expected = compiled(x)  # type: ignore[operator]
    saved = io.BytesIO()
    torch.save(compiled, saved)
    saved.seek(0)
    again = torch.load(saved, weights_only=False)
    torch.testing.assert_close(again(x), expected)
    fresh = pickle.loads(pickle.dumps(backend))
    assert [usage.hits for usage in fresh.usage().values()] == [0]
    assert fresh.bundle.digest == backend.bundle.digest


# ---- what is near a product by a weight, and none


class Vector(nn.Module):
    """Behind a tuned layer a weight of one dimension, and one of three."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(K, HIDDEN, bias=False)
        self.vector = nn.Parameter(torch.randn(HIDDEN))
        self.batches = nn.Parameter(torch.randn(2, HIDDEN, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.gate(x)
        return torch.matmul(hidden, self.vector)[:, None] + torch.matmul(hidden, self.batches).sum((0, 2))[:, None]


def test_weights_that_are_no_matrices_are_left_alone() -> None:
    model, x = Vector(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)  # type: ignore[operator]
    assert [usage.hits for usage in backend.usage().values()] == [1]


@pytest.mark.parametrize("options", [{}, {"freezing": "all"}])
def test_weights_within_a_wrapper_are_no_constants(options: dict[str, Any]) -> None:
    layer, x = nn.Linear(K, HIDDEN, bias=False), torch.randn(M, K)
    parts = [layer.weight.data.clone(), layer.weight.data.clone()]
    layer.weight = nn.Parameter(TwoTensor(*parts), requires_grad=False)
    compiled, _ = compiled_with(layer, bundle_of(entry(GATE, "aten", prepack=True), **options))
    compiled(x)  # type: ignore[operator]
    layer.weight.a.mul_(3)
    torch.testing.assert_close(compiled(x).a, layer(x).a, rtol=1e-3, atol=1e-3)  # type: ignore[operator]


def test_a_compiled_model_can_be_copied() -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    expected = compiled(x)  # type: ignore[operator]
    again: Any = copy.deepcopy(compiled)
    torch.testing.assert_close(again(x), expected)
    assert sum(usage.hits for usage in backend.usage().values()) >= 2


# ---- a graph that cannot be compiled with the bundle


def failing(self: SitePass, graph: torch.fx.Graph) -> None:
    raise RuntimeError("\nptxas died\nof something")


def test_a_graph_that_cannot_be_compiled_with_the_bundle_gets_stock_code_and_is_counted_as_such(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Gated(), torch.randn(M, K)
    bundle = bundle_of(entry(GATE, "inductor", template="cpp_gemm"), entry(DOWN, "aten", prepack=True))
    compiled, backend = compiled_with(model, bundle)
    first = compiled(x)
    before = {key: usage.hits for key, usage in backend.usage().items()}
    assert sum(before.values()) == 3
    torch.compiler.reset()
    monkeypatch.setattr(SitePass, "__call__", failing)
    again = torch.compile(model, backend=backend, fullgraph=True)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(again(x), first, rtol=1e-4, atol=1e-5)
    said = "a graph could not be compiled with it: "
    assert [record.getMessage() for record in caplog.records if said in record.getMessage()], caplog.text
    assert "ptxas died" in caplog.text
    for key, usage in backend.usage().items():
        assert usage.hits == before[key], "what failed is in no graph"
        assert [reason for reason in usage.reasons if said in reason and "ptxas died" in reason]


def test_weights_that_cannot_be_packed_again_leave_the_model_running(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Gated(), torch.randn(M, K)
    compiled, backend = compiled_with(model, bundle_of(entry(GATE, "aten", prepack=True)))
    call: Any = compiled
    call(x)
    monkeypatch.setattr(SitePass, "__call__", failing)
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-3)
    assert caplog.text.count("ptxas died") == 1
    (usage,) = backend.usage().values()
    assert [reason for reason in usage.reasons if "ptxas died" in reason]


def test_whoever_builds_a_candidate_is_told_that_it_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SitePass, "__call__", failing)
    compiled = torch.compile(Gated(), backend=BundleBackend(bundle_of(entry(GATE, "aten", prepack=True))))
    with pytest.raises(Exception, match="ptxas died"):
        compiled(torch.randn(M, K))


def test_a_model_that_does_not_compile_at_all_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "autokernel.export.apply.compile_fx", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no compiler"))
    )
    compiled, _ = compiled_with(Gated(), bundle_of(entry(GATE, "aten", prepack=True)))
    with pytest.raises(Exception, match="no compiler"):
        compiled(torch.randn(M, K))
