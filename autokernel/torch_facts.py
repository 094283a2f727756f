"""What torch says of itself and of this machine, asked in a child process: importing a broken torch can end a process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_TIMEOUT_S = 120

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
            free_gb = round(torch.cuda.mem_get_info(i)[0] / 2**30, 1)
            facts["gpus"].append({
                "name": p.name, "memory_gb": memory_gb, "free_gb": free_gb, "arch": arch,
                "num_sms": p.multi_processor_count, "l2_mb": p.L2_cache_size / 2**20,
            })
except RuntimeError as error:
    facts["error"] = str(error)
if facts["gpus"]:
    x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    facts["cublas"] = ""
    try:
        facts["cublas"] = "" if float((x @ x).sum()) == 64**3 else "a product of ones is wrong"
    except RuntimeError as error:
        facts["cublas"] = str(error).splitlines()[0]
    try:
        import triton
        facts["triton"] = triton.__version__
        facts["triton_error"] = ""
        out = torch.compile(lambda v: (v * 2 + 1).relu(), dynamic=False)(x)  # builds and launches a kernel
        facts["triton_error"] = "" if float(out.sum()) == 3 * 64**2 else "a compiled kernel is wrong"
    except Exception as error:
        facts["triton_error"] = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    try:
        from autokernel.cutedsl.compiler import unavailable
        facts["cutedsl"] = unavailable() or ""
    except ImportError as error:
        facts["cutedsl"] = str(error)
    try:
        import pynvml
        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetClockInfo(pynvml.nvmlDeviceGetHandleByIndex(0), pynvml.NVML_CLOCK_SM)
        facts["nvml"] = ""
    except Exception as error:
        facts["nvml"] = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
print("\\n" + json.dumps(facts))
"""


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
