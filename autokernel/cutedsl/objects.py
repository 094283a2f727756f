"""Loading and launching compiled kernels: all that production needs, and the only import of tvm_ffi.

An object lies in a file with its record beside it (`<key>.so`, `<key>.json`). Loading one is running code: `load` checks the
digest, the processor, the CUDA runtime and the GPU first. It takes well under a millisecond.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import math
import operator
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autokernel.cutedsl.spec import Launch, ObjectInfo
from autokernel.errors import AutokernelError

_TRANSPOSED = "^T"


class ObjectError(AutokernelError):
    """A compiled kernel is missing or damaged, or not for this machine. The message is one sentence with the cure."""


class Kernel:
    """A loaded kernel.

    Call it with a [M, K], b [K, N] (batched: a dimension in front of each) and the epilogue's operands, all on one GPU, of the
    spec's dtypes and majors; it returns [M, N] ([M, N / 2] if it is gated), row by row. Launched on torch's current stream;
    nothing is waited for, and result and scratch memory come from torch's allocator, so it can be captured in a graph. Sizes
    that it does not take are the object's own errors: they name the argument.
    """

    def __init__(self, info: ObjectInfo, function: Callable[..., Any]) -> None:
        # all that is the same for every call is worked out here: a call must cost the host next to nothing
        self.info = info
        self._function = function
        self._dtype: torch.dtype = getattr(torch, info.spec.out_dtype)
        self._halves = info.spec.gated
        self._launch = info.launch if info.launch.scratch_tile else None
        readers = [_reader(part) for part in info.launch.arguments]
        self._fixed = [
            part if reader is None else None for part, reader in zip(_tuples(info.launch.arguments), readers, strict=True)
        ]
        self._read = [(position, reader) for position, reader in enumerate(readers) if reader is not None]
        self._needs_stream = "stream" in _names(info.launch.arguments)
        self._operands = tuple(info.spec.operands())

    def __call__(self, a: torch.Tensor, b: torch.Tensor, operands: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        size = list(a.shape)
        size[-1] = b.shape[-1] // 2 if self._halves else b.shape[-1]
        out = torch.empty(size, dtype=self._dtype, device=a.device)
        tensors: dict[str, Any] = {"a": a, "b": b, "out": out}
        if operands:
            tensors.update(zip(self._operands, operands, strict=True))
        if self._launch is not None:
            tensors["semaphore"], tensors["workspace"] = scratch(self._launch, out)
        if self._needs_stream:
            tensors["stream"] = ctypes.c_void_p(_stream(a.get_device()))
        arguments = self._fixed.copy()
        for position, read in self._read:
            arguments[position] = read(tensors)
        self._function(*arguments)
        return out


def _stream(device: int) -> int:
    """torch's current stream on a GPU: what `torch.cuda.current_stream` says, without the Python object around it."""
    return torch._C._cuda_getCurrentRawStream(device)


def scratch(launch: Launch, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel that splits K sums its parts in: an int32 per tile, [tiles along M, along N, batch], zero; and the parts.

    Args:
        launch: of the kernel.
        out: its result, [M, N] or [batch, M, N].

    Returns:
        The counters, and fp32 [elements of a tile, tiles along M, along N, batch].
    """
    tile_m, tile_n, cluster_m, cluster_n = launch.scratch_tile
    m, n = out.shape[-2:] if not launch.transposed else (out.shape[-1], out.shape[-2])
    batch = out.shape[0] if out.dim() == 3 else 1
    tiles = (batch, _rounded(m, tile_m, cluster_m), _rounded(n, tile_n, cluster_n))
    semaphore = torch.zeros(tiles, dtype=torch.int32, device=out.device)
    make = torch.zeros if launch.zeroed_workspace else torch.empty
    workspace = make((*tiles, tile_m * tile_n), dtype=torch.float32, device=out.device)
    return semaphore.permute(1, 2, 0), workspace.permute(3, 1, 2, 0)


def _rounded(size: int, tile: int, cluster: int) -> int:
    """Tiles along an axis, in whole clusters."""
    return math.ceil(math.ceil(size / tile) / cluster) * cluster


def _names(template: Sequence[object]) -> set[str]:
    found: set[str] = set()
    for part in template:
        if isinstance(part, str):
            found.add(part)
        elif isinstance(part, list | tuple):
            found |= _names(part)
    return found


def _tuples(template: Sequence[object]) -> tuple[Any, ...]:
    """The template, as JSON has it, with tuples for its lists."""
    return tuple(_tuples(part) if isinstance(part, list | tuple) else part for part in template)


def _reader(part: object) -> Callable[[Mapping[str, Any]], Any] | None:
    """A part of the template as a function of the tensors by name, None where no tensor is in it."""
    if isinstance(part, str):
        name = part.removesuffix(_TRANSPOSED)
        if name != part:
            return lambda tensors: tensors[name].mT if tensors[name].dim() > 1 else tensors[name]
        return operator.itemgetter(name)
    if isinstance(part, list | tuple) and _names(part):
        inner = [(_reader(item), item) for item in part]
        return lambda tensors: tuple([item if read is None else read(tensors) for read, item in inner])
    return None


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
        raise ObjectError(
            f"{info_path(path)}: no readable record of a compiled kernel: {error}; export the bundle again"
        ) from None


def check_content(info: ObjectInfo, path: Path) -> None:
    """Raises ObjectError if the file is not the object that the record is of."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ObjectError(f"{path}: the compiled kernel cannot be read: {error}; export the bundle again") from None
    if digest != info.sha256:
        raise ObjectError(f"{path}: the file was changed after it was compiled (sha256 differs): export the bundle again")


def why_not_here(info: ObjectInfo) -> str | None:
    """Why the object cannot run on this machine, None if it can. Names the cure."""
    if platform.machine() != info.machine:
        return f"it was compiled for {info.machine} processors, this is {platform.machine()}: tune on such a machine"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "its loader is not installed: pip install 'apache-tvm-ffi>=0.1.11,<0.2'"
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


@functools.cache
def load(path: str) -> Kernel:
    """A kernel, loaded once in this process.

    Args:
        path: of the shared object, whose record lies beside it.

    Raises:
        ObjectError: missing, damaged, or not for this machine.
    """
    file = Path(path)
    info = read_info(file)
    check_content(info, file)
    if (reason := why_not_here(info)) is not None:
        raise ObjectError(f"compiled kernel {file.name}: {reason}")
    _share_cuda_runtime(info.cuda_major)
    import tvm_ffi

    try:
        function = tvm_ffi.load_module(path)[info.launch.function]
    except (RuntimeError, AttributeError, KeyError) as error:
        raise ObjectError(f"compiled kernel {file.name} does not load: {error}; export the bundle again") from error
    return Kernel(info, function)


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
