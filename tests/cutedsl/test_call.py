"""The function that is written out for a kernel's launch: what it allocates, and what it hands over. Nothing is compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from autokernel.cutedsl.call import Call, Device, on_device_of_operands, scratch, written
from autokernel.cutedsl.spec import KernelSpec, Launch, ObjectInfo

M, N, K = 48, 64, 32
CPU = Device(empty=torch._C._dynamo.guards._empty_strided_cpu, stream=lambda device: 70 + device)
SCHEDULER = [66, None, "swizzle", None]


class Kept(tuple[Any, ...]):
    """A tuple that was converted once."""


def call_of(
    arguments: tuple[object, ...], given: list[Any], *, swizzle: int = 8, scratch_tile: tuple[int, ...] = (), **changes: Any
) -> Call:
    """The function for a launch, which leaves in `given` what the object's function would get."""
    facts = {"dtype": "bfloat16", "out_dtype": "float32", "a_major": "k", "b_major": "n", **changes}
    info = ObjectInfo(
        key="k",
        spec=KernelSpec(**{"config": {"source": "quack", "tile_m": 128, "tile_n": 128}, **facts}),
        launch=Launch(function="k", arguments=arguments, scratch_tile=scratch_tile),
        sha256="",
        num_bytes=0,
        machine="x86_64",
        cuda_major=13,
    )
    return written(info, lambda *all_of_them: given.append(all_of_them), CPU, swizzle, Kept)


def matrices(*lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(*lead, M, K, dtype=torch.bfloat16), torch.zeros(*lead, K, N, dtype=torch.bfloat16)


def test_arguments_come_in_the_order_of_the_record() -> None:
    given: list[Any] = []
    arguments = ("b^T", "a", "out", None, ["operand1", None, "operand0^T"], SCHEDULER, "stream", 2)
    call = call_of(arguments, given, swizzle=4, epilogue=("bias", "silu", "add"))
    a, b = matrices()
    bias, residual = torch.zeros(N), torch.zeros(M, N)
    out = call(a, b, [bias, residual])
    ((second, first, result, nothing, epilogue, scheduler, stream, number),) = given
    assert second.shape == (N, K)
    assert second.data_ptr() == b.data_ptr()
    assert first is a
    assert result is out
    assert (out.shape, out.dtype, out.is_contiguous()) == ((M, N), torch.float32, True)
    assert epilogue[0] is residual
    assert epilogue[2] is bias  # a vector has no transpose
    assert (nothing, epilogue[1], number) == (None, None, 2)
    assert isinstance(scheduler, Kept)
    assert scheduler == (66, None, 4, None)
    assert stream.value == 69  # of device -1, the CPU


def test_results_are_batched_or_half_as_wide_as_the_kernel_says() -> None:
    given: list[Any] = []
    assert call_of(("out",), given, batched=True)(*matrices(3), ()).stride() == (M * N, N, 1)
    assert call_of(("out",), given, epilogue=("gated_silu",))(*matrices(), ()).shape == (M, N // 2)


@pytest.mark.parametrize("swap", [False, True])
def test_sums_of_squares_are_a_second_result(swap: bool) -> None:
    """One for each row and begun tile of the columns, those of a row side by side: tiles are 64 x 128, N is 192."""
    given: list[Any] = []
    config = {"source": "quack", "tile_m": 64, "tile_n": 128, "swap": swap}
    call = call_of(("out", "squares^T"), given, epilogue=("add", "squares"), config=config)
    a, b, residual = torch.zeros(M, K), torch.zeros(K, 192), torch.zeros(M, 192)
    out, squares = call(a, b, [residual])
    assert out.shape == (M, 192)
    assert (squares.shape, squares.dtype, squares.is_contiguous()) == ((M, 3 if swap else 2), torch.float32, True)
    ((_, transposed),) = given
    assert (transposed.shape, transposed.data_ptr()) == (squares.mT.shape, squares.data_ptr())


@pytest.mark.parametrize("num_operands", [0, 2])
def test_operands_are_as_many_as_the_epilogue_takes(num_operands: int) -> None:
    with pytest.raises(ValueError, match="values to unpack"):
        call_of(("a", "operand0"), [], epilogue=("add",))(*matrices(), [torch.zeros(M, N)] * num_operands)


def test_what_a_record_asks_for_and_no_call_has_is_refused() -> None:
    for name in ("semaphore", "operand0", "print(1)"):
        with pytest.raises(ValueError, match="asks for"):
            call_of(("a", [name]), [])


def test_scratch_counts_tiles_in_whole_clusters() -> None:
    launch = Launch(function="k", arguments=(), scratch_tile=(128, 64, 2, 1), transposed=True, zeroed_workspace=True)
    semaphore, workspace = scratch(launch, torch.empty(2, 60, 300), CPU.empty)
    assert (semaphore.shape, workspace.shape) == ((4, 1, 2), (128 * 64, 4, 1, 2))
    assert semaphore.stride() == (1, 1, 4)
    assert workspace.stride() == (1, 128 * 64, 128 * 64, 4 * 128 * 64)
    assert not semaphore.any()
    assert not workspace.any()
    given: list[Any] = []
    call_of(("a", ["semaphore", "workspace"]), given, scratch_tile=(16, 16, 1, 1))(*matrices(), ())
    assert [tensor.shape for tensor in given[0][1]] == [(3, 4, 1), (256, 3, 4, 1)]


def test_the_gpu_of_the_operands_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    @contextlib.contextmanager
    def device(number: int) -> Iterator[None]:
        entered.append(number)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    call = on_device_of_operands(lambda a, b, operands: a)
    a, b = matrices()
    for current, expected in ((-1, []), (0, [-1])):  # the CPU's number is -1
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert call(a, b, ()) is a
        assert entered == expected
