"""What this machine has, what it can tune, and what to do about what is missing. Never fails: it reports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autokernel.environment import cpu_name, physical_cores
from autokernel.records import Record
from autokernel.requirements import declared_ranges, installed_version, out_of_range
from autokernel.torch_facts import ask_torch

OK, ADVICE, MISSING = "ok", "advice", "missing"

_LEAST_DISK_GB = 2.0
_HEURISTICS, _CUTE_DSL = "nvidia-matmul-heuristics", "nvidia-cutlass-dsl"
_TAKEN_GPU_MEMORY = 0.1  # part of a GPU's memory: more than contexts take, so somebody works there
_TIMEOUT_S = 120

# distributions whose absence breaks a run; the others are for one backend, one seeder or development
_ESSENTIAL = ("torch", "numpy", "scipy", "optuna", "ray", "mlflow", "pydantic", "typer", "rich", "pyyaml", "psutil", "jinja2")
_SHOWN = (
    "torch", "ray", "optuna", "mlflow", "transformers", "safetensors", "triton", "nvidia-matmul-heuristics",
    _CUTE_DSL, "nvidia-cutlass-operators", "quack-kernels", "apache-tvm-ffi", "matplotlib",
)  # fmt: skip
_GPU_ONLY = {
    "triton": "Triton kernels",
    _CUTE_DSL: "CuTe DSL kernels",
    "nvidia-cutlass-operators": "CuTe DSL kernels",
    "quack-kernels": "CuTe DSL kernels",
    "apache-tvm-ffi": "CuTe DSL kernels",
}

# What Inductor's CPU kernels need: OpenMP, and Python's own headers.
_PROGRAM = """#include <Python.h>
#include <omp.h>
int main() {
  int total = 0;
  #pragma omp parallel for reduction(+ : total)
  for (int i = 0; i < 100; i++) total += 1;
  return total == 100 ? 0 : 1;
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding(Record):
    """One thing looked at. `fix` is the command or the step that mends it."""

    group: str
    name: str
    state: str  # "ok", "advice" (runs do without) or "missing" (they do not)
    value: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport(Record):
    """Everything found, and what can be tuned here."""

    findings: tuple[Finding, ...]
    devices: tuple[str, ...]  # of "cpu", "cuda"
    can_run: bool
    torch: Mapping[str, Any] = field(default_factory=dict)


def examine(runs_folder: Path) -> DoctorReport:
    """Look at this machine; takes some seconds, for torch is imported in a child process."""
    torch_facts = ask_torch()
    compiler = check_compiler()
    findings = [check_python(), *check_packages(), *check_torch(torch_facts), compiler]
    gpu = check_gpu(torch_facts)
    findings += [*check_cpu(torch_facts), *gpu, check_folder(runs_folder), check_disk(runs_folder)]
    works = "version" in torch_facts
    devices = []
    if works and compiler.state == OK:
        devices.append("cpu")
    if works and torch_facts.get("gpus") and not torch_facts.get("cublas"):
        devices.append("cuda")
    blocked = any(f.state == MISSING and f.group in ("packages", "python", "storage") for f in findings)
    return DoctorReport(
        findings=tuple(findings), devices=tuple(devices), can_run=bool(devices) and not blocked, torch=torch_facts
    )


def check_python() -> Finding:
    """This Python against the range that is supported."""
    version = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info[:2] < (3, 15)
    return Finding(
        group="python",
        name="python",
        state=OK if supported else MISSING,
        value=f"{version} ({sys.executable})",
        fix="" if supported else "make a virtual environment of Python 3.11 to 3.14: uv venv --python 3.13",
    )


def check_packages() -> list[Finding]:
    """The libraries that matter, against the ranges that autokernel declares."""
    ranges = declared_ranges()
    names = list(dict.fromkeys([*_SHOWN, *(n for n in ranges if n in _ESSENTIAL)]))
    findings = [finding for name in names if (finding := check_package(name, ranges.get(name, "")))]
    if installed_version("nvidia-cutlass") is not None:
        findings.append(
            Finding(
                group="packages",
                name="nvidia-cutlass",
                state=ADVICE,
                value=f"{installed_version('nvidia-cutlass')}: also owns the module `cutlass`, clashes with nvidia-cutlass-dsl",
                fix="pip uninstall -y nvidia-cutlass && pip install --force-reinstall --no-deps nvidia-cutlass-dsl",
            )
        )
    return findings


def check_package(name: str, wanted: str) -> Finding | None:
    """One library; None for one that is fine and only a dependency nobody asks about."""
    version = installed_version(name)
    requirement = f"'{name}{wanted}'"
    essential = name in _ESSENTIAL
    if version is None:
        if not essential and name not in _GPU_ONLY and not wanted:
            return None
        if name in _GPU_ONLY and nvidia_driver() is None:
            return Finding(group="packages", name=name, state=OK, value=f"not installed; only for {_GPU_ONLY[name]} on a GPU")
        return Finding(
            group="packages",
            name=name,
            state=MISSING if essential else ADVICE,
            value="not installed" + (f": no {_GPU_ONLY[name]}" if name in _GPU_ONLY else ""),
            fix=f"pip install {requirement}",
        )
    problem = out_of_range(version, wanted)
    if problem is None:
        shown = name in _SHOWN
        return Finding(group="packages", name=name, state=OK, value=version) if shown else None
    return Finding(
        group="packages",
        name=name,
        state=MISSING if essential else ADVICE,
        value=f"{version} is {problem}: {wanted} is supported",
        fix=f"pip install {requirement}",
    )


def check_torch(facts: Mapping[str, Any]) -> list[Finding]:
    """Whether torch can be imported, and what it was built for."""
    if "version" not in facts:
        if installed_version("torch") is None:
            return []  # said already, as a missing package
        fix = "pip install --force-reinstall 'torch" + declared_ranges().get("torch", "") + "'"
        return [Finding(group="packages", name="torch import", state=MISSING, value=facts["error"], fix=fix)]
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU only"
    return [Finding(group="packages", name="torch build", state=OK, value=f"{facts['version']}, {build}")]


def check_compiler() -> Finding:
    """A C++ compiler for Inductor's CPU kernels: really compiles and runs an OpenMP program that includes Python.h."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["clang++", "g++"] if sys.platform == "darwin" else ["g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        said = f"CXX={asked} is not there" if asked else "neither g++ nor clang++ is on the PATH"
        return Finding(group="compiler", name="C++ compiler", state=MISSING, value=said, fix=_install("g++"))
    with tempfile.TemporaryDirectory(prefix="autokernel-doctor-") as name:
        source, program = Path(name, "try.cpp"), Path(name, "try")
        source.write_text(_PROGRAM)
        include = sysconfig.get_path("include")
        command = [found, str(source), "-O1", "-fopenmp", f"-I{include}", "-o", str(program)]
        try:
            built = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            ran = subprocess.run([str(program)], timeout=_TIMEOUT_S, check=False) if built.returncode == 0 else None
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding(group="compiler", name="C++ compiler", state=MISSING, value=f"{found}: {error}", fix=_install("g++"))
    if ran is not None and ran.returncode == 0:
        return Finding(group="compiler", name="C++ compiler", state=OK, value=f"{found} builds OpenMP programs")
    if "Python.h" in built.stderr:
        value, fix = (
            f"{found} finds no Python.h in {include}",
            _install(f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"),
        )
    elif re.search(r"openmp|omp\.h|-l[gi]?omp", built.stderr):
        value, fix = f"{found} has no OpenMP", _install("libomp-dev")
    else:
        lines = built.stderr.strip().splitlines()
        value, fix = f"{found} does not build a program: {lines[0] if lines else 'no message'}", _install("g++")
    return Finding(group="compiler", name="C++ compiler", state=MISSING, value=value, fix=fix)


def _install(package: str) -> str:
    """The system's own command for a Debian package's counterpart."""
    if sys.platform == "darwin":
        return "xcode-select --install && brew install libomp"
    names = {"g++": "gcc-c++", "libomp-dev": "libomp-devel"}
    if shutil.which("dnf"):
        return f"sudo dnf install {names.get(package, 'python3-devel' if package.startswith('python') else package)}"
    return f"sudo apt-get install {package}"


def check_cpu(facts: Mapping[str, Any]) -> list[Finding]:
    """What the processor offers."""
    cores = physical_cores()
    findings = [Finding(group="CPU", name="processor", state=OK, value=f"{cpu_name()}, {cores} cores")]
    if "version" not in facts:
        return findings
    findings.append(Finding(group="CPU", name="instruction set", state=OK, value=facts["isa"]))
    if facts["onednn"]:
        bf16 = "with bfloat16" if facts["bf16"] else "no fast bfloat16 here: float32 will be the faster dtype"
        findings.append(Finding(group="CPU", name="oneDNN", state=OK if facts["bf16"] else ADVICE, value=f"available, {bf16}"))
    else:
        fix = "install torch from its own wheels: pip install torch"
        findings.append(
            Finding(group="CPU", name="oneDNN", state=ADVICE, value="this torch has none: no packed weights on CPU", fix=fix)
        )
    return findings


def check_gpu(facts: Mapping[str, Any]) -> list[Finding]:
    """GPUs, and why torch does not see one that is there."""
    driver = nvidia_driver()
    gpus = facts.get("gpus", [])
    if "version" not in facts:
        return []
    if gpus:
        versions = Finding(group="GPU", name="driver", state=OK, value=f"driver {driver or '?'}, CUDA {facts['cuda']}")
        return [*(_gpu(i, gpu) for i, gpu in enumerate(gpus)), versions, *check_gpu_software(facts)]
    if driver is None:
        return [Finding(group="GPU", name="GPU", state=OK, value="none here: CPU kernels can be tuned")]
    if facts["cuda"] is None:
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        return [Finding(group="GPU", name="GPU", state=ADVICE, value=f"driver {driver}, but torch is a CPU build", fix=fix)]
    why = facts.get("error") or "torch sees no GPU"
    fix = "nvidia-smi shows whether the driver works; unset CUDA_VISIBLE_DEVICES; a newer CUDA build needs a newer driver"
    return [Finding(group="GPU", name="GPU", state=ADVICE, value=f"driver {driver}, CUDA {facts['cuda']}: {why}", fix=fix)]


def _gpu(number: int, gpu: Mapping[str, Any]) -> Finding:
    """One GPU: what it is, and whether another process sits on it, which every timing would feel."""
    value = (
        f"{gpu['name']}, {gpu['arch']}, {gpu['num_sms']} multiprocessors, {gpu['l2_mb']:.0f} MiB L2, {gpu['memory_gb']} GiB, "
        f"{gpu['free_gb']} GiB free"
    )
    taken = gpu["memory_gb"] - gpu["free_gb"] > _TAKEN_GPU_MEMORY * gpu["memory_gb"]
    fix = "nvidia-smi shows who uses it; end those processes, or choose another GPU with CUDA_VISIBLE_DEVICES" if taken else ""
    return Finding(group="GPU", name=f"GPU {number}", state=ADVICE if taken else OK, value=value, fix=fix)


def check_gpu_software(facts: Mapping[str, Any]) -> list[Finding]:
    """What candidates for the GPU are made with: each tried for real, in torch's child process."""
    ranges = declared_ranges()

    def install(name: str) -> str:
        return f"pip install '{name}{ranges.get(name, '')}'"

    def tried(name: str, wrong: str, good: str, bad: str, fix: str, state: str = ADVICE) -> Finding:
        value, fix = (f"{bad}: {wrong}", fix) if wrong else (good, "")
        return Finding(group="GPU", name=name, state=state if wrong else OK, value=value, fix=fix)

    reinstall = install("torch").replace("install", "install --force-reinstall", 1)
    heuristics = installed_version(_HEURISTICS)
    missing = "" if heuristics else "not installed"
    archs = {gpu["arch"] for gpu in facts.get("gpus", ())}
    why_no_cute, _, cute_fix = facts.get("cutedsl", "").rpartition(": ")
    if archs - {"sm_90"}:
        why_no_cute, cute_fix = (
            f"its kernels are for sm_90, not for {', '.join(sorted(archs))}",
            "leave cutedsl out of `backends`",
        )
    return [
        tried(
            "cuBLAS",
            facts.get("cublas", ""),
            "multiplies: backend aten can be used",
            "a product fails",
            f"nvidia-smi shows whether the driver works; {reinstall}",
            MISSING,
        ),
        tried(
            "Triton",
            facts.get("triton_error", ""),
            f"{facts.get('triton', '?')} builds kernels: backends inductor and triton can be used",
            "no backends inductor and triton",
            f"{reinstall}, which brings its own triton; that needs a C compiler as well: {_install('g++')}",
        ),
        tried(
            "CuTe DSL",
            why_no_cute,
            f"{installed_version(_CUTE_DSL)} compiles kernels: backend cutedsl can be used",
            "no backend cutedsl",
            cute_fix,
        ),
        tried(
            "NVML",
            facts.get("nvml", ""),
            "tells clocks, power and temperature",
            "confirmations have no clocks, power and temperature",
            f"{install('nvidia-ml-py')}; a container needs the driver's libnvidia-ml.so as well",
        ),
        tried("nvMatmulHeuristics", missing, f"{heuristics}: proposes first configs", "no seeds", install(_HEURISTICS)),
    ]


def nvidia_driver() -> str | None:
    """Version of the kernel module, None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b[0-9]+\.[0-9]+(?:\.[0-9]+)?\b", text)
    return found.group() if found else "unknown"


def check_folder(folder: Path) -> Finding:
    """Whether runs can be written: tried for real, for permissions say little on network file systems."""
    place = existing_part(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        fix = f"make it writable (chmod u+w {place}), or name another with --runs"
        return Finding(
            group="storage", name="runs folder", state=MISSING, value=f"{folder.resolve()}: {error.strerror}", fix=fix
        )
    return Finding(group="storage", name="runs folder", state=OK, value=f"{folder.resolve()} can be written")


def check_disk(folder: Path) -> Finding:
    """Room for journals, MLflow's database and compiled kernels."""
    free = shutil.disk_usage(existing_part(folder)).free / 1e9
    temporary = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    least = min(free, temporary)
    value = f"{free:.1f} GB free for runs, {temporary:.1f} GB for compiled kernels in {tempfile.gettempdir()}"
    fix = (
        "" if least >= _LEAST_DISK_GB else f"free some: {_LEAST_DISK_GB:.0f} GB are enough; TMPDIR and --runs name other places"
    )
    return Finding(group="storage", name="disk", state=OK if least >= _LEAST_DISK_GB else ADVICE, value=value, fix=fix)


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    place = folder.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
