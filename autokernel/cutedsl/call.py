"""The Python function that calls one kernel: written out for its launch, so that a call itself costs the host a microsecond.

It allocates the result, and scratch memory where K is split, and hands everything over in the order of the object's function:
no template is walked and no tensor looked up by name at a call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autokernel.cutedsl.spec import AT_A_CALL, SQUARES, TRANSPOSED, KernelSpec, Launch, ObjectInfo

Call = Callable[[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], Any]  # a tensor, or two
Empty = Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a call asks of torch.

    Args:
        empty: (shape, strides, dtype) -> memory on the current GPU, from torch's allocator.
        stream: number of a GPU -> address of torch's current stream on it.
    """

    empty: Empty
    stream: Callable[[int], int]


def current_gpu() -> Device:
    """The functions that code compiled by Inductor calls: a third of the time that their public counterparts take."""
    guards: Any = torch._C._dynamo.guards
    return Device(empty=guards._empty_strided_cuda, stream=torch._C._cuda_getCurrentRawStream)


def written(info: ObjectInfo, function: Callable[..., Any], device: Device, swizzle: int, keep: Callable[[Any], Any]) -> Call:
    """The function that calls a kernel with a, b and the epilogue's operands, and returns the result, or both.

    Args:
        info: of the kernel's object.
        function: the object's own.
        device: where the tensors will be.
        swizzle: for kernels that take it at a call.
        keep: turns a tuple without tensors into what the loader needs not convert at each call.

    Raises:
        ValueError: the record asks for a tensor that there is not.
    """
    launch, operands = info.launch, info.spec.operands()
    names: dict[str, Any] = {
        "function": function,
        "empty": device.empty,
        "stream_of": device.stream,
        "pointer": ctypes.c_void_p,
        "dtype": getattr(torch, info.spec.out_dtype),
        "float32": torch.float32,
        "parts": info.spec.num_parts,
        "scratch": functools.partial(scratch, launch, empty=device.empty),
    }
    squares = (SQUARES,) if info.spec.squares else ()
    tensors = ("a", "b", "out", *squares, *operands, *(("semaphore", "workspace") if launch.scratch_tile else ()))
    arguments = [_spelled(part, tensors, names, keep) for part in _with_swizzle(launch.arguments, swizzle)]
    columns = "b.shape[-1] // 2" if info.spec.gated else "b.shape[-1]"
    lines = [
        "def call(a, b, operands=()):",
        f"    [{', '.join(operands)}] = operands",
        f"    columns = {columns}",
        *(_PARTS if info.spec.num_parts else _BATCHED if info.spec.batched else _PLAIN),
        *(_squares(info.spec) if squares else []),
        *(["    semaphore, workspace = scratch(out)"] if launch.scratch_tile else []),
        f"    function({', '.join(arguments)})",
        f"    return {', '.join(('out', *squares))}",
    ]
    exec("\n".join(lines), names)  # noqa: S102  known names, and numbers
    call: Call = names["call"]
    return call


_PLAIN = ("    rows, _ = a.shape", "    out = empty((rows, columns), (columns, 1), dtype)")
_BATCHED = ("    batch, rows, _ = a.shape", "    out = empty((batch, rows, columns), (rows * columns, columns, 1), dtype)")
_PARTS = ("    rows, _ = a.shape", "    out = empty((parts, rows, columns), (rows * columns, columns, 1), dtype)")


def _squares(spec: KernelSpec) -> list[str]:
    """The lines that make room for the sums of squares, [rows, tiles of columns]."""
    return [
        f"    tiles = (columns + {spec.squared_columns - 1}) // {spec.squared_columns}",
        "    squares = empty((rows, tiles), (tiles, 1), float32)",
    ]


def _with_swizzle(template: Sequence[object], swizzle: int) -> tuple[object, ...]:
    """The template, as JSON has it, with tuples for its lists and a number for the swizzle."""
    return tuple(
        _with_swizzle(part, swizzle) if isinstance(part, list | tuple) else swizzle if part == AT_A_CALL else part
        for part in template
    )


def _spelled(part: object, tensors: Sequence[str], names: dict[str, Any], keep: Callable[[Any], Any]) -> str:
    """A part of the template as an expression of the function's variables; adds to `names` what it refers to."""
    if isinstance(part, tuple):
        if not _has_tensors(part):
            name = f"fixed{len(names)}"
            names[name] = keep(part)
            return name
        return f"({''.join(_spelled(item, tensors, names, keep) + ', ' for item in part)})"
    if part is None or isinstance(part, int | float):
        return repr(part)
    if part == "stream":
        return "pointer(stream_of(a.get_device()))"
    name = str(part).removesuffix(TRANSPOSED)
    if name not in tensors:
        raise ValueError(f"the record of a compiled kernel asks for {part!r}, and has {', '.join(tensors)}: tune again")
    return name if name == part else f"({name}.mT if {name}.ndim > 1 else {name})"


def _has_tensors(part: object) -> bool:
    return any(map(_has_tensors, part)) if isinstance(part, tuple) else isinstance(part, str)


def scratch(launch: Launch, out: torch.Tensor, empty: Empty) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel that splits K sums its parts in: an int32 per tile, [tiles along M, along N, batch], zero; and the parts.

    Args:
        launch: of the kernel.
        out: its result, [M, N] or [batch, M, N].
        empty: as `Device.empty`.

    Returns:
        The counters, and fp32 [elements of a tile, tiles along M, along N, batch].
    """
    tile_m, tile_n, cluster_m, cluster_n = launch.scratch_tile
    *batches, m, n = out.shape
    if launch.transposed:
        m, n = n, m
    batch = batches[0] if batches else 1
    rows = -(-m // (tile_m * cluster_m)) * cluster_m  # in whole clusters
    columns = -(-n // (tile_n * cluster_n)) * cluster_n
    size, tiles = tile_m * tile_n, rows * columns
    semaphore = empty((rows, columns, batch), (columns, 1, tiles), torch.int32).zero_()
    workspace = empty((size, rows, columns, batch), (1, columns * size, size, tiles * size), torch.float32)
    return semaphore, workspace.zero_() if launch.zeroed_workspace else workspace


def on_device_of_operands(call: Call) -> Call:
    """For a machine with several GPUs: a call whose tensors lie on another one than the current makes theirs the current."""

    def guarded(a: torch.Tensor, b: torch.Tensor, operands: Sequence[torch.Tensor] = ()) -> Any:
        number = a.get_device()
        if number == torch.cuda.current_device():
            return call(a, b, operands)
        with torch.cuda.device(number):
            return call(a, b, operands)

    return guarded
