"""AOTInductor packages for a GPU: Triton templates of the bundle are in them, and run in a process without autokernel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import autokernel
from autokernel.export.bundle import Bundle, Entry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

if torch.cuda.is_available():
    from gpu.llama_like import DOWN, DOWN_TILE, bundle_of, check_error, make_input, make_model, template_bundle

LOAD = """
import sys, torch
folder = sys.argv[1]
inputs, expected = torch.load(folder + "/expected.pt")
run = torch._inductor.aoti_load_package(folder + "/model.pt2")
for x, out in zip(inputs, expected):
    torch.testing.assert_close(run(x), out, rtol=0, atol=0)
print(run.get_metadata()["autokernel_device"], "|", "autokernel" in sys.modules)
"""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def package(bundle: Bundle, folder: Path) -> str:
    """Compile, check here and in a fresh process ,and return the generated host code."""
    model, inputs = make_model(), [make_input(seed) for seed in range(2)]
    program = torch.export.export(model, (inputs[0],))
    made = autokernel.aoti_compile_and_package(program, bundle, package_path=folder / "model.pt2")
    assert [usage.reasons for usage in made.usage.values()] == [[] for _ in bundle.entries]
    assert all(usage.hits >= 2 for usage in made.usage.values()), made.usage
    assert counters["inductor"]["select_algorithm_autotune"] == 0
    run = torch._inductor.aoti_load_package(made.path)
    outputs = [run(x) for x in inputs]
    for x, out in zip(inputs, outputs, strict=True):
        check_error(model, x, out)
    torch.save((inputs, outputs), folder / "expected.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{torch.cuda.get_device_name()} | False"
    with zipfile.ZipFile(made.path) as archive:
        return "\n".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp"))


def test_triton_templates_are_in_the_package(tmp_path: Path) -> None:
    source = package(bundle_of(Entry(problem=DOWN, backend="inductor", config=DOWN_TILE)), tmp_path)
    assert "triton_tem_fused" in source
    assert "mm_out" in source, "gate and up have no entry: cuBLAS"


def test_merged_products_too(tmp_path: Path) -> None:
    source = package(template_bundle(), tmp_path)
    assert "triton_tem_fused" in source
    assert "mm_out" not in source
    assert "_FOLDED_CONST_" in source, "weights are put side by side when the package is loaded"


def test_our_own_kernel_is_compiled_in(tmp_path: Path) -> None:
    pytest.importorskip("autokernel.export.substitution", reason="this version has no kernel of its own")
    config = {"kernel": "skinny_mm", "mode": "swap", "block_m": 16, "block_n": 64, "block_k": 128, "split_k": 2}
    source = package(bundle_of(Entry(problem=DOWN, backend="triton", config=config)), tmp_path)
    assert "skinny_mm" in source


def test_a_package_can_be_captured_in_a_cuda_graph(tmp_path: Path) -> None:
    model, static = make_model(), make_input()
    program = torch.export.export(model, (static,))
    made = autokernel.aoti_compile_and_package(program, template_bundle(), package_path=tmp_path / "model.pt2")
    run = torch._inductor.aoti_load_package(made.path, run_single_threaded=True)  # its synchronisation cannot be captured
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)
    static.copy_(make_input(1))
    graph.replay()
    torch.cuda.synchronize()
    check_error(model, static, out)
