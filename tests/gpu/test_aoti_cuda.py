"""AOTInductor packages for a GPU: Triton templates of the bundle are in them, and run in a process without autokernel.

Packages are compiled and loaded in processes of their own: where AOTInductor itself crashes, these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),  # each compiles for a minute or more, stock code first
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

if torch.cuda.is_available():
    from gpu.llama_like import check_error, make_input, make_model

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 300
LOAD = """
import json, sys, torch
folder = sys.argv[1]
inputs = [x.cuda() for x in torch.load(folder + "/inputs.pt")]
run = torch._inductor.aoti_load_package(folder + "/model.pt2")
outputs = [run(x) for x in inputs]
for x, out in zip(inputs, outputs):
    torch.testing.assert_close(run(x), out, rtol=0, atol=0)
torch.save([out.cpu() for out in outputs], folder + "/outputs.pt")
print(json.dumps([run.get_metadata().get("autokernel_device"), "autokernel" in sys.modules]))
"""
CAPTURE = """
import sys, torch
folder = sys.argv[1]
inputs = [x.cuda() for x in torch.load(folder + "/inputs.pt")]
run = torch._inductor.aoti_load_package(folder + "/model.pt2", run_single_threaded=True)  # to synchronise cannot be captured
static, stream = inputs[0].clone(), torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    for _ in range(3):
        run(static)
torch.cuda.current_stream().wait_stream(stream)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = run(static)
outputs = []
for x in inputs:
    static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    outputs.append(out.cpu())
torch.save(outputs, folder + "/outputs.pt")
"""


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with faulthandler, which says where it crashed."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, "-X", "faulthandler", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=env)


def finished(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process printed, which must have ended well."""
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
    return (done.stdout.strip().splitlines() or [""])[-1]


def compiled(case: str, folder: Path) -> dict[str, object]:
    return json.loads(finished(start(str(Path(__file__).with_name("aoti_job.py")), case, str(folder))))  # type: ignore[no-any-return]


def check_outputs(folder: Path, bias: bool = False) -> None:
    model = make_model(bias=bias)
    inputs, outputs = (torch.load(folder / f"{name}.pt") for name in ("inputs", "outputs"))
    assert len(inputs) == len(outputs) == 2
    with torch.no_grad():
        for x, out in zip(inputs, outputs, strict=True):
            check_error(model, x.cuda(), out.cuda())
    assert torch.equal(inputs[1], make_input(1).cpu())


@pytest.fixture(scope="module")
def aoti(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where AOTInductor does not work without any bundle, either."""
    folder = tmp_path_factory.mktemp("stock")
    for done in (
        start(str(Path(__file__).with_name("aoti_job.py")), "stock", str(folder)),
        start("-c", LOAD, str(folder)),
    ):
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            why = next((line for line in lines if line.startswith("Fatal Python error")), lines[-1] if lines else "")
            pytest.skip(f"stock AOTInductor does not work on this machine (exit code {done.returncode}): {why}")
    check_outputs(folder)


def package(case: str, folder: Path) -> str:
    """Compile, load in a fresh process, check, and return the generated host code."""
    made = compiled(case, folder)
    usage = made["usage"]
    assert isinstance(usage, dict)
    assert usage
    assert all(hits >= 2 and not reasons for hits, reasons in usage.values()), usage
    assert made["benchmarks"] == 0
    assert json.loads(finished(start("-c", LOAD, str(folder)))) == [torch.cuda.get_device_name(), False]
    check_outputs(folder, bias=case == "own")
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        return "\n".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp"))


def products(source: str) -> list[str]:
    """The products that a package leaves to torch, in order."""
    return re.findall(r"aoti_torch_cuda_(\w*mm\w*)\(", source)


@pytest.mark.usefixtures("aoti")
def test_triton_templates_are_in_the_package(tmp_path: Path) -> None:
    source = package("template", tmp_path)
    assert "triton_tem_fused" in source
    assert "mm_out" in products(source), "gate and up have no entry: cuBLAS"


@pytest.mark.usefixtures("aoti")
def test_merged_products_too(tmp_path: Path) -> None:
    source = package("merged", tmp_path)
    assert "triton_tem_fused" in source
    assert products(source) == []
    assert "_FOLDED_CONST_" in source, "weights are put side by side when the package is loaded"


@pytest.mark.usefixtures("aoti")
def test_our_own_kernel_is_compiled_in(tmp_path: Path) -> None:
    assert "skinny_mm" in package("own", tmp_path)


@pytest.mark.usefixtures("aoti")
def test_a_package_can_be_captured_in_a_cuda_graph(tmp_path: Path) -> None:
    compiled("merged", tmp_path)
    finished(start("-c", CAPTURE, str(tmp_path)))
    check_outputs(tmp_path)
