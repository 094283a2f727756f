"""Compiled kernels called to the very launch, on a machine without a GPU. For the tests of this folder.

The objects, their loader and its checks of every argument are real. The CUDA runtime below them is `pretended_cuda.c`, and
tensors lie in the CPU's memory and claim to be on a GPU: nothing reads them, since nothing runs.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("pretended_cuda.c")
_CUDA = 2  # DLPack's number for the kind of device


class Launched(ctypes.Structure):
    """What was launched last."""

    _fields_ = (
        ("count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("programmatic", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
    )


class PretendedCuda:
    """The runtime, found by every object that is loaded in this process from now on."""

    def __init__(self, folder: Path) -> None:
        library = folder / "libpretended_cuda.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)], check=True)
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.launched = Launched.in_dll(self._library, "launched")

    def fail_next(self, code: int) -> None:
        """Let the next launch return an error."""
        self._library.pretend_error(code)


class _DeviceOfTensor(ctypes.Structure):
    """The beginning of DLPack's DLTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _OnGpu:
    """A tensor, handed over as one of a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule = torch.utils.dlpack.to_dlpack(self._tensor)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        _DeviceOfTensor.from_address(pointer(capsule, b"dltensor")).kind = _CUDA
        return capsule


def on_gpu(value: Any) -> Any:
    """Tensors, also inside tuples, as those of a GPU; everything else as it is."""
    import tvm_ffi

    if isinstance(value, torch.Tensor):
        return tvm_ffi.from_dlpack(_OnGpu(value))
    return tuple(map(on_gpu, value)) if isinstance(value, tuple) else value
