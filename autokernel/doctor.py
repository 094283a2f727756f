"""What this machine has, what it can tune, and what to do about what is missing. Never fails: it reports."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autokernel.environment import cpu_name, physical_cores
from autokernel.records import Record

OK, ADVICE, MISSING = "ok", "advice", "missing"

_LEAST_DISK_GB = 2.0
_TIMEOUT_S = 120

# distributions whose absence breaks a run; the others are for one backend, one seeder or development
_ESSENTIAL = ("torch", "numpy", "scipy", "optuna", "ray", "mlflow", "pydantic", "typer", "rich", "pyyaml", "psutil", "jinja2")
_SHOWN = (
    "torch", "ray", "optuna", "mlflow", "transformers", "safetensors", "triton", "nvidia-matmul-heuristics",
    "nvidia-cutlass-dsl", "nvidia-cutlass-operators", "quack-kernels", "matplotlib",
)  # fmt: skip
_GPU_ONLY = {
    "triton": "Triton kernels",
    "nvidia-cutlass-dsl": "CuTe DSL kernels",
    "nvidia-cutlass-operators": "CuTe DSL kernels",
    "quack-kernels": "CuTe DSL kernels",
}

# Run by a child: importing a broken torch can end a process.
_ASK_TORCH = """
import json, platform, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "gpus": [], "error": ""}
facts["isa"] = torch.backends.cpu.get_cpu_capability()
facts["onednn"] = torch.backends.mkldnn.is_available()
facts["bf16"] = bool(facts["onednn"] and torch.ops.mkldnn._is_mkldnn_bf16_supported())
try:
    if torch.version.cuda and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            memory_gb, arch = round(p.total_memory / 2**30, 1), f"sm_{p.major}{p.minor}"
            facts["gpus"].append({"name": p.name, "memory_gb": memory_gb, "arch": arch})
except RuntimeError as error:
    facts["error"] = str(error)
print("\\n" + json.dumps(facts))
"""

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
    if works and torch_facts.get("gpus"):
        devices.append("cuda")
    blocked = any(f.state == MISSING and f.group in ("packages", "python", "storage") for f in findings)
    return DoctorReport(
        findings=tuple(findings), devices=tuple(devices), can_run=bool(devices) and not blocked, torch=torch_facts
    )


def ask_torch() -> dict[str, Any]:
    """What torch says of itself and this machine; {"error": ...} alone if it cannot be imported."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"its process ended with code {done.returncode}"}
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


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


def installed_version(name: str) -> str | None:
    """Version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def declared_ranges() -> dict[str, str]:
    """Distribution -> version range, of every dependency and extra: from the installed package, or the checkout's own file."""
    requirements = []
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        requirements = [
            *table.get("dependencies", ()),
            *(r for e in table.get("optional-dependencies", {}).values() for r in e),
        ]
    else:
        try:
            requirements = importlib.metadata.requires("autokernel") or []
        except importlib.metadata.PackageNotFoundError:
            return {}
    ranges: dict[str, str] = {}
    for requirement in requirements:
        parsed = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)", requirement)
        if parsed:
            name = re.sub(r"[-_.]+", "-", parsed.group(1)).lower()
            ranges.setdefault(name, parsed.group(2).replace(" ", ""))
    return ranges


def out_of_range(version: str, wanted: str) -> str | None:
    """ "too old" or "too new" for a range like `>=2.11,<2.16`; None if it is inside."""
    have = _numbers(version)
    for clause in filter(None, wanted.split(",")):
        parsed = re.fullmatch(r"(>=|<=|==|<|>|!=|~=)([0-9][0-9.]*).*", clause)
        if parsed is None:
            continue
        operator, limit = parsed.group(1), _numbers(parsed.group(2))
        if operator in (">=", ">", "~=", "==") and have < limit:
            return "too old"
        if (operator == "<" and have >= limit) or (operator in ("<=", "==") and have[: len(limit)] > limit):
            return "too new"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


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
    findings = [
        Finding(
            group="GPU",
            name=f"GPU {i}",
            state=OK,
            value=f"{g['name']}, {g['memory_gb']} GiB, {g['arch']}, driver {driver or '?'}",
        )
        for i, g in enumerate(gpus)
    ]
    if gpus or "version" not in facts:
        return findings
    if driver is None:
        return [Finding(group="GPU", name="GPU", state=OK, value="none here: CPU kernels can be tuned")]
    if facts["cuda"] is None:
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        return [Finding(group="GPU", name="GPU", state=ADVICE, value=f"driver {driver}, but torch is a CPU build", fix=fix)]
    why = facts.get("error") or "torch sees no GPU"
    fix = "nvidia-smi shows whether the driver works; unset CUDA_VISIBLE_DEVICES; a newer CUDA build needs a newer driver"
    return [Finding(group="GPU", name="GPU", state=ADVICE, value=f"driver {driver}, CUDA {facts['cuda']}: {why}", fix=fix)]


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
