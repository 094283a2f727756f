"""What `autokernel doctor` finds: on this machine, and on machines that lack something."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autokernel import doctor
from autokernel.display.health import doctor_view
from autokernel.doctor import DoctorReport, Finding

GPU = {"name": "Invented H9000", "memory_gb": 141.0, "free_gb": 140.0, "arch": "sm_90", "num_sms": 132, "l2_mb": 60.0}


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> DoctorReport:
    """The real thing, once."""
    return doctor.examine(tmp_path_factory.mktemp("runs"))


def test_this_machine_can_run(here: DoctorReport) -> None:
    assert here.can_run, [f for f in here.findings if f.state == "missing"]
    assert "cpu" in here.devices
    found = {f.name: f for f in here.findings}
    assert found["torch"].value.startswith("2.")
    assert found["processor"].value.endswith("cores")
    assert found["instruction set"].value == here.torch["isa"]
    assert {"python", "ray", "optuna", "mlflow", "C++ compiler", "oneDNN", "runs folder", "disk"} <= set(found)
    assert json.loads(json.dumps(here.to_json()))["can_run"] is True
    assert DoctorReport.from_json(here.to_json()) == here


@pytest.mark.parametrize(
    ("version", "wanted", "problem"),
    [
        ("2.13.0+cpu", ">=2.11,<2.16", None),
        ("2.10.9", ">=2.11,<2.16", "too old"),
        ("2.16.0", ">=2.11,<2.16", "too new"),
        ("2.16.0.dev20990101", ">=2.11,<2.16", "too new"),
        ("0.1.0.27", ">=0.1.0.27,<0.2", None),
        ("0.1.0.26", ">=0.1.0.27,<0.2", "too old"),
        ("0.6.5", "==0.6.5", None),
        ("0.6.6", "==0.6.5", "too new"),
        ("0.6.4", "==0.6.5", "too old"),
        ("1.0", "", None),
    ],
)
def test_versions_against_ranges(version: str, wanted: str, problem: str | None) -> None:
    assert doctor.out_of_range(version, wanted) == problem


def test_ranges_are_those_of_the_project() -> None:
    ranges = doctor.declared_ranges()
    assert ranges["torch"].startswith(">=2.")
    assert ranges["ray"].startswith(">="), "extras in brackets are no part of the name"
    assert ranges["nvidia-matmul-heuristics"].startswith(">=0.1"), "markers are no part of the range"
    assert "0.6.5" in ranges["quack-kernels"]


def test_missing_and_wrong_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "ray", "1.0.0")
    distribution(tmp_path, "optuna", "99.0")
    distribution(tmp_path, "nvidia-cutlass", "4.2.0.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = {f.name: f for f in doctor.check_packages()}
    ranges = doctor.declared_ranges()
    assert found["ray"].state == "missing"
    assert found["ray"].value == f"1.0.0 is too old: {ranges['ray']} is supported"
    assert found["ray"].fix == f"pip install 'ray{ranges['ray']}'"
    assert "too new" in found["optuna"].value
    assert (found["mlflow"].state, found["mlflow"].value) == ("missing", "not installed")
    assert (found["transformers"].state, found["transformers"].fix) == (
        "advice",
        f"pip install 'transformers{ranges['transformers']}'",
    )
    assert "clashes with nvidia-cutlass-dsl" in found["nvidia-cutlass"].value
    assert found["nvidia-cutlass"].fix.startswith("pip uninstall -y nvidia-cutlass")


def test_a_torch_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = doctor.ask_torch()
    assert facts == {"error": "ImportError: libcudart.so.13: cannot open shared object file"}
    (finding,) = doctor.check_torch(facts)
    assert finding.state == "missing"
    assert finding.fix.startswith("pip install --force-reinstall 'torch>=")
    assert [f.name for f in doctor.check_cpu(facts)] == ["processor"]
    assert doctor.check_gpu(facts) == []


def test_a_torch_that_kills_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "error" in doctor.ask_torch()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_compiler_really_compiles() -> None:
    assert doctor.check_compiler().state == "ok"


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.check_compiler()
    assert (finding.state, finding.value) == ("missing", "neither g++ nor clang++ is on the PATH")
    assert finding.fix == "sudo apt-get install g++"
    monkeypatch.setenv("CXX", "my-c++")
    assert doctor.check_compiler().value == "CXX=my-c++ is not there"


@pytest.mark.parametrize(
    ("body", "value", "fix"),
    [
        ('echo "try.cpp:1: fatal error: Python.h: No such file" >&2; exit 1', "finds no Python.h in", "-dev"),
        ('echo "clang: error: unsupported option -fopenmp" >&2; exit 1', "has no OpenMP", "libomp-dev"),
        ('echo "internal compiler error" >&2; exit 1', "does not build a program: internal compiler error", "g++"),
        ("exit 1", "does not build a program: no message", "g++"),
        ("exit 0", "", "g++"),  # says it did, and there is no program
    ],
)
def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, value: str, fix: str) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", body)))
    finding = doctor.check_compiler()
    assert finding.state == "missing"
    assert value in finding.value
    assert fix in finding.fix


def test_the_runs_folder(tmp_path: Path) -> None:
    assert doctor.check_folder(tmp_path / "not" / "yet").state == "ok"
    (tmp_path / "file").write_text("")
    finding = doctor.check_folder(tmp_path / "file" / "runs")
    assert finding.state == "missing"
    assert "name another with --runs" in finding.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert doctor.check_folder(tmp_path / "runs").state == "missing"


def test_gpus_that_torch_sees_and_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "999.01")
    facts = {"version": "2.13.0", "cuda": "13.0", "hip": None, "error": ""}
    found = {f.name: f for f in doctor.check_gpu({**facts, "gpus": [GPU], "triton": "3.6.0"})}
    assert found["GPU 0"].value == "Invented H9000, sm_90, 132 multiprocessors, 60 MiB L2, 141.0 GiB, 140.0 GiB free"
    assert found["driver"].value == "driver 999.01, CUDA 13.0"
    assert found["Triton"].value == "3.6.0 builds kernels: backends inductor and triton can be used"
    assert {f.state for f in found.values()} == {"ok"}
    (finding,) = doctor.check_gpu({**facts, "gpus": [], "cuda": None})
    assert (finding.state, finding.value) == ("advice", "driver 999.01, but torch is a CPU build")
    (finding,) = doctor.check_gpu({**facts, "gpus": [], "error": "CUDA driver too old"})
    assert finding.value == "driver 999.01, CUDA 13.0: CUDA driver too old"
    dsl = doctor.check_package("nvidia-cutlass-dsl", ">=4.8,<5")
    assert dsl is not None
    assert dsl.state == "advice" or dsl.value[0].isdigit()


@pytest.mark.parametrize(
    ("said", "name", "state", "value", "fix"),
    [
        ({"triton_error": "0 active drivers"}, "Triton", "advice", "no backends inductor and triton: 0 active", "g++"),
        ({"nvml": "No module named 'pynvml'"}, "NVML", "advice", "no clocks, power", "pip install 'nvidia-ml-py>="),
        ({"cublas": "CUBLAS_STATUS_ALLOC_FAILED"}, "cuBLAS", "missing", "a product fails", "nvidia-smi"),
        (
            {"cutedsl": "quack-kernels is not installed: pip install 'quack-kernels>=0.6.5,<0.6.6'"},
            "CuTe DSL",
            "advice",
            "no backend cutedsl: quack-kernels is not installed",
            "pip install 'quack-kernels>=0.6.5,<0.6.6'",
        ),
        ({"gpus": [{"arch": "sm_80"}]}, "CuTe DSL", "advice", "for sm_90, not for sm_80", "leave cutedsl out of `backends`"),
        ({"gpus": [{"free_gb": 20.0}]}, "GPU 0", "advice", "20.0 GiB free", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_a_gpu_lacks(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], name: str, state: str, value: str, fix: str
) -> None:
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "999.01")
    gpus = [{**GPU, **extra} for extra in said.pop("gpus", [{}])]
    facts = {"version": "2.13.0", "cuda": "13.0", "hip": None, "error": "", "triton": "3.6.0", "gpus": gpus, **said}
    found = {f.name: f for f in doctor.check_gpu(facts)}
    assert found[name].state == state
    assert value in found[name].value
    assert fix in found[name].fix
    assert [f.name for f in found.values() if f.state != "ok"] == [name]


def test_the_heuristics_library_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    found = {f.name: f for f in doctor.check_gpu_software({})}
    assert found["nvMatmulHeuristics"].fix.startswith("pip install 'nvidia-matmul-heuristics>=")


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/proc/driver/nvidia/version").exists(), reason="needs an NVIDIA GPU")
def test_a_real_gpu_is_described(here: DoctorReport) -> None:
    found = {f.name: f for f in here.findings if f.group == "GPU"}
    assert {"GPU 0", "driver", "cuBLAS", "Triton", "CuTe DSL", "NVML", "nvMatmulHeuristics"} <= set(found)
    assert found["cuBLAS"].state == found["Triton"].state == "ok", found
    assert "cuda" in here.devices


def test_the_view_lists_commands_that_mend() -> None:
    findings = (
        Finding(group="python", name="python", state="ok", value="3.11"),
        Finding(group="packages", name="ray", state="missing", value="not installed", fix="pip install ray"),
        Finding(group="CPU", name="oneDNN", state="advice", value="no [fast] bfloat16"),
    )
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(doctor_view(DoctorReport(findings=findings, devices=(), can_run=False)))
    text = console.export_text()
    assert "✗    ray" in text
    assert "  ray: pip install ray" in text
    assert "no [fast] bfloat16" in text
    assert "This machine cannot run anything yet: ray." in text
