"""Loading and launching compiled kernels: all that production needs, and the only import of tvm_ffi.

An object lies in a file with its record beside it (`<key>.so`, `<key>.json`). Loading one is running code: `load` checks the
digest, the processor, the loader's version, the CUDA runtime and the GPU first. It takes well under a millisecond.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from autokernel.cutedsl.call import current_gpu, on_device_of_operands, written
from autokernel.cutedsl.config import DEFAULT_SWIZZLE
from autokernel.cutedsl.spec import ObjectInfo
from autokernel.errors import AutokernelError
from autokernel.requirements import declared_ranges, installed_version, out_of_range

_LOADER = "apache-tvm-ffi"
_CURE = "export its bundle again; if it lies in the kernel cache, start the program again, which compiles it"


class ObjectError(AutokernelError):
    """A compiled kernel is missing or damaged, or not for this machine. The message is one sentence with the cure."""


class Kernel:
    """A loaded kernel.

    Call it, or `run`, with a [M, K], b [K, N] (batched: a dimension in front of each) and the epilogue's operands, all on one
    GPU, of the spec's dtypes and majors; it returns [M, N] ([M, N / 2] if it is gated), row by row, and with it, if the spec
    has them, sums of squares [M, tiles of N]. Launched on torch's current stream; nothing is waited for, and results and
    scratch memory come from torch's allocator, so it can be captured in a graph. Sizes that it does not take are the object's
    own errors: they name the argument.

    Args:
        info: of the object.
        function: the object's own.
        swizzle: for kernels that take it at a call.
    """

    def __init__(self, info: ObjectInfo, function: Callable[..., Any], swizzle: int = DEFAULT_SWIZZLE) -> None:
        from tvm_ffi import convert

        self.info = info
        self.function = function
        self.run = written(info, function, current_gpu(), swizzle, convert)
        if torch.cuda.device_count() > 1:
            self.run = on_device_of_operands(self.run)

    def __call__(self, a: torch.Tensor, b: torch.Tensor, operands: Sequence[torch.Tensor] = ()) -> Any:
        return self.run(a, b, operands)


def info_path(path: Path) -> Path:
    """Where an object's record lies."""
    return path.with_suffix(".json")


def read_info(path: Path) -> ObjectInfo:
    """The record beside an object.

    Raises:
        ObjectError: missing or damaged.
    """
    try:
        return ObjectInfo.from_json(json.loads(info_path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ObjectError(f"{info_path(path)}: no readable record of a compiled kernel: {error}; {_CURE}") from None


def check_content(info: ObjectInfo, path: Path) -> None:
    """Raises ObjectError if the file is not the object that the record is of."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ObjectError(f"{path}: the compiled kernel cannot be read: {error}; {_CURE}") from None
    if digest != info.sha256:
        raise ObjectError(f"{path}: the file was changed after it was compiled (sha256 differs); {_CURE}")


def why_not_here(info: ObjectInfo) -> str | None:
    """Why the object cannot run on this machine, None if it can. Names the cure."""
    if platform.machine() != info.machine:
        return f"it was compiled for {info.machine} processors, this is {platform.machine()}: tune on such a machine"
    if (wrong := _wrong_loader()) is not None:
        return wrong
    cuda = torch.version.cuda
    if cuda is None or not torch.cuda.is_available():
        return "torch sees no CUDA device: install the NVIDIA driver, or a CUDA build of torch"
    if int(cuda.split(".")[0]) != info.cuda_major:
        return (
            f"it calls CUDA {info.cuda_major}, this torch has {cuda}: install a torch for CUDA {info.cuda_major}, or tune again"
        )
    major, minor = torch.cuda.get_device_capability()
    if info.spec.arch.removesuffix("a") != f"sm_{major}{minor}":
        return f"it was compiled for {info.spec.arch}, this GPU is sm_{major}{minor}: tune again on this GPU"
    return None


def _wrong_loader() -> str | None:
    """Why the installed loader cannot load objects, with the cure."""
    wanted, version = _loader_range(), installed_version(_LOADER)
    cure = f"pip install '{_LOADER}{wanted}'"
    if importlib.util.find_spec("tvm_ffi") is None:
        return f"its loader is not installed: {cure}"
    wrong = out_of_range(version, wanted) if version is not None else None
    return f"its loader, {_LOADER} {version}, is {wrong}: {cure}" if wrong is not None else None


@functools.cache
def _loader_range() -> str:
    return declared_ranges().get(_LOADER, "")


@functools.cache
def load(path: str, swizzle: int = DEFAULT_SWIZZLE) -> Kernel:
    """A kernel, loaded once in this process.

    Args:
        path: of the shared object, whose record lies beside it.
        swizzle: for kernels that take it at a call.

    Raises:
        ObjectError: missing, damaged, or not for this machine.
    """
    info, function = _loaded(path)
    return Kernel(info, function, swizzle)


@functools.cache
def _loaded(path: str) -> tuple[ObjectInfo, Callable[..., Any]]:
    file = Path(path)
    info = read_info(file)
    check_content(info, file)
    if (reason := why_not_here(info)) is not None:
        raise ObjectError(f"compiled kernel {file.name}: {reason}")
    _share_cuda_runtime(info.cuda_major)
    import tvm_ffi

    try:
        return info, tvm_ffi.load_module(path)[info.launch.function]
    except (RuntimeError, AttributeError, KeyError) as error:
        raise ObjectError(f"compiled kernel {file.name} does not load: {error}; {_CURE}") from error


def _share_cuda_runtime(major: int) -> None:
    """Let objects find the functions of the CUDA runtime that torch has loaded, privately so far.

    Raises:
        ObjectError: there is none as a shared library.
    """
    name = f"libcudart.so.{major}"
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        cure = f"pip install nvidia-cuda-runtime, or nvidia-cuda-runtime-cu{major}"
        raise ObjectError(f"compiled kernels need {name}, which torch has not loaded: {error}; {cure}") from None
