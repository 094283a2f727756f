"""AOTInductor packages with a bundle's kernels inside: compiled here, loaded and run by a process that has torch alone."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import autokernel
from autokernel.environment import current_environment
from autokernel.errors import BundleError
from autokernel.export.bundle import Bundle, Entry, write_bundle
from autokernel.records import Problem, TensorSpec

M, K, HIDDEN = 16, 64, 96


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(K, HIDDEN, bias=False)
        self.up = nn.Linear(K, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "float32")


def weight(k: int, n: int) -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype="float32", stride=(1, k))


BOTH = Problem(op="merged_mm", inputs=(spec(M, K), weight(K, HIDDEN), weight(K, HIDDEN)), device="cpu", constants=(1, 2))
DOWN = Problem(op="addmm", inputs=(spec(K), spec(M, HIDDEN), weight(HIDDEN, K)), device="cpu", constants=(0, 2))


def bundle_of(*entries: Entry, **options: str) -> Bundle:
    environment = current_environment("cpu")
    return Bundle(name="packed", created="", version="", environment=environment, entries=entries, graph_options=options)


def merged_and_down() -> Bundle:
    config = {"template": "cpp_gemm", "merge": "concat", "threads_m": 1, "threads_n": torch.get_num_threads(), "threads_k": 1}
    return bundle_of(
        Entry(problem=BOTH, backend="inductor", config=config),
        Entry(problem=DOWN, backend="aten", config={"prepack": True}),
    )


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def generated(path: str) -> str:
    with zipfile.ZipFile(path) as package:
        return "\n".join(package.read(name).decode() for name in package.namelist() if name.endswith(".cpp"))


def test_a_package_holds_the_entries_and_runs_in_a_fresh_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(M, K)
    bundle, _ = write_bundle(merged_and_down(), tmp_path / "bundle")
    program = torch.export.export(model, (x,))
    package = autokernel.aoti_compile_and_package(program, bundle, package_path=tmp_path / "model.pt2")
    assert package.path == str(tmp_path / "model.pt2")
    assert [usage.hits for usage in package.usage.values()] == [1, 1]
    assert counters["inductor"]["select_algorithm_autotune"] == 0
    source = generated(package.path)
    assert "_linear_pointwise" in source, "the packed product"
    assert "micro_gemm" in source
    assert re.search(rf"N = {2 * HIDDEN}\b", source), "the merged template"
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    program_text = f"""
import sys, torch
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
run = torch._inductor.aoti_load_package({package.path!r})
torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)
other = torch.randn_like(x)
assert not torch.allclose(run(other), expected)
print(run.get_metadata()["autokernel_bundle"], "autokernel" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program_text], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["packed", "False"]


def test_it_is_linked_with_the_libstdcxx_that_torch_has(tmp_path: Path, static_gxx: str) -> None:
    """With a copy of its own the process that loads it would end."""
    model, x = Gated().eval(), torch.randn(M, K)
    plain = bundle_of(Entry(problem=DOWN, backend="aten", config={"prepack": False}))
    with torch._inductor.config.patch({"cpp.cxx": static_gxx}):
        package = autokernel.aoti_compile_and_package(
            torch.export.export(model, (x,)), plain, package_path=tmp_path / "model.pt2"
        )
    loads = f"import torch; torch._inductor.aoti_load_package({package.path!r})(torch.randn({M}, {K}))"
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_a_packed_weight_nothing_is_frozen(tmp_path: Path) -> None:
    """Weights of such a package can still be exchanged."""
    plain = Entry(problem=DOWN, backend="aten", config={"prepack": False})
    model, x = Gated().eval(), torch.randn(M, K)
    program = torch.export.export(model, (x,))
    package = autokernel.aoti_compile_and_package(program, bundle_of(plain), package_path=tmp_path / "model.pt2")
    run = torch._inductor.aoti_load_package(package.path)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert "_linear_pointwise" not in generated(package.path)


def test_another_machine_gets_stock_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = merged_and_down()
    foreign = replace(bundle, environment=replace(bundle.environment, device_name="Another CPU"))
    model, x = Gated().eval(), torch.randn(M, K)
    program = torch.export.export(model, (x,))
    with caplog.at_level(logging.WARNING):
        package = autokernel.aoti_compile_and_package(program, foreign, package_path=tmp_path / "model.pt2")
    assert [usage.hits for usage in package.usage.values()] == [0, 0]
    assert "stock code instead" in caplog.text
    with pytest.raises(BundleError, match="tune again on this machine"):
        autokernel.aoti_compile_and_package(program, foreign, on_mismatch="error")


def test_what_a_package_cannot_do_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Gated().eval(), torch.randn(M, K)
    with caplog.at_level(logging.WARNING):
        autokernel.aoti_compile_and_package(
            torch.export.export(model, (x,)), bundle_of(blas_library="cublaslt"), package_path=tmp_path / "model.pt2"
        )
    assert "preferred_blas_library('cublaslt')" in caplog.text
