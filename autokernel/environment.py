"""Where a number was taken: the machine and the versions that can change it. Needs torch alone."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

from autokernel.records import Record, digest_of

_LIBRARIES = ("triton", "transformers", "numpy", "nvidia-cutlass-dsl", "nvidia-cutlass-operators", "quack-kernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment(Record):
    """Fingerprint of a machine and its software.

    `device_name` and what follows it up to `torch` decide whether a bundle's entries apply; the rest is provenance.
    """

    device: str  # "cpu" or "cuda"
    device_name: str  # "AMD EPYC", "NVIDIA H200"
    isa: str  # "AVX512" for a CPU, "sm_90" for a GPU
    num_units: int  # threads for a CPU, multiprocessors for a GPU
    torch: str
    python: str = ""
    platform: str = ""
    driver: str = ""
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def differences(self, other: Environment) -> list[str]:
        """What is not the same there, in words. The kernel's release is left out: it changes no time that is compared."""
        mine, theirs = self._flat(), other._flat()
        names = dict.fromkeys([*mine, *theirs])
        return [f"{n} {mine.get(n) or 'none'}, not {theirs.get(n) or 'none'}" for n in names if mine.get(n) != theirs.get(n)]

    def _flat(self) -> dict[str, object]:
        values = self.to_json()
        del values["platform"]
        return {**values.pop("libraries"), **values}


def current_environment(device: str, threads: int | None = None) -> Environment:
    """The environment of this process.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads the model runs with; default: what torch is set to.
    """
    import torch

    libraries = {}
    for name in _LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, isa = properties.name, f"sm_{properties.major}{properties.minor}"
        units, driver = properties.multi_processor_count, _nvidia_driver()
        libraries["cuda"] = torch.version.cuda or ""
    else:
        name, isa = cpu_name(), torch.backends.cpu.get_cpu_capability()
        units, driver = threads or torch.get_num_threads(), ""
    return Environment(
        device=device,
        device_name=name,
        isa=isa,
        num_units=units,
        torch=torch.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        driver=driver,
        libraries=libraries,
    )


def cpu_name() -> str:
    """The processor's own name, with family and model where the name alone is vague ("AMD EPYC" in a guest)."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if not line.strip():
                    break
                facts[key.strip()] = value.strip()
    except OSError:
        return platform.processor() or platform.machine()
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts['cpu family']} model {facts['model']})" if "cpu family" in facts else name


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once where that can be told."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import psutil

        return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
    except ImportError:  # production may have torch alone
        return allowed


def _nvidia_driver() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as f:
            return next((word for word in f.readline().split() if word[0].isdigit() and "." in word), "")
    except (OSError, StopIteration):
        return ""
