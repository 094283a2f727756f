"""`torch.ops.autokernel.skinny_mm`, and the one place that launches the kernel behind it.

The operator is for calls by hand, `torch.compile` of models that call it, and tests. It zeroes its counters in each call that
shares tiles, which costs a launch; a graph with a bundle zeroes one buffer for all of its calls (`export/substitution.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from autokernel.kernels.config import SkinnyConfig


@torch.library.triton_op("autokernel::skinny_mm", mutates_args=())
def skinny_mm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, config: list[int]) -> torch.Tensor:
    """y = x @ w (+ bias) by the Triton kernel of `kernels/skinny_mm.py`.

    Args:
        x: [M, K] contiguous, M up to 128.
        w: [K, N], the transpose of a contiguous [N, K].
        bias: [N], or None.
        config: `SkinnyConfig.to_ints()`.

    Returns:
        [M, N], contiguous, in x's dtype.

    Raises:
        ValueError: shapes or layouts that the kernel does not take.
    """
    chosen = SkinnyConfig.from_ints(config)
    (m, k), n = x.shape, w.shape[1]
    wrong = chosen.problem(m, n, k) or layout_problem(x, w)
    if wrong:
        raise ValueError(wrong)
    num_units = num_units_of(x.device) if chosen.waves else 1
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    parts, counters = y, y  # stand-ins where no tile is shared
    if chosen.reduces:
        parts = torch.empty(chosen.num_parts(m, n, k, num_units), dtype=torch.float32, device=x.device)
        counters = torch.zeros(chosen.num_counters(m, n), dtype=torch.int32, device=x.device)
    launch(chosen, x, w.t(), bias, y, parts, counters, num_units=num_units, wrap=True)
    return y


def launch(
    config: SkinnyConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    parts: torch.Tensor,
    counters: torch.Tensor,
    *,
    num_units: int,
    wrap: bool = False,
) -> None:
    """Enqueue the kernel.

    Args:
        config: its parameters, legal for the problem.
        x: [M, K], contiguous.
        w: [N, K], contiguous.
        bias: [N], or None.
        y: [M, N], contiguous; written.
        parts: scratch of `config.num_parts` fp32 elements; any tensor where no tile is shared.
        counters: `config.num_counters` int32 zeros, which are zero again afterwards; any tensor where no tile is shared.
        num_units: multiprocessors of the device.
        wrap: let tracers see the kernel. Tensor descriptors cannot be traced: a traced launch reads through pointers.
    """
    from autokernel.kernels.skinny_mm import skinny_mm_kernel

    (m, k), n = x.shape, w.shape[0]
    traced = wrap and type(x) is not torch.Tensor
    constants = config.constants(m, n, k, bias=bias is not None, num_units=num_units)
    x_argument: Any = x
    w_argument: Any = w
    if traced:
        constants["TMA"] = 0
    elif config.tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x_argument = TensorDescriptor.from_tensor(x, [config.block_m, config.block_k])
        w_argument = TensorDescriptor.from_tensor(w, [config.block_n, config.block_k])
    kernel: Any = torch.library.wrap_triton(skinny_mm_kernel) if traced else skinny_mm_kernel
    kernel[(config.programs(m, n, k, num_units), 1, 1)](
        x_argument, w_argument, x if bias is None else bias, y, parts, counters,
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def layout_problem(x: torch.Tensor, w: torch.Tensor) -> str | None:
    """The rule about layouts that two matrices break, None if the kernel takes them."""
    k = x.shape[1]
    if x.dtype != w.dtype:
        return f"x and w must have one dtype; they have {x.dtype} and {w.dtype}"
    if w.shape[0] != k:
        return f"x and w must share K; they are {tuple(x.shape)} and {tuple(w.shape)}"
    if (x.shape[0] > 1 and x.stride(0) != k) or x.stride(1) != 1:
        return f"x must be contiguous; its strides are {tuple(x.stride())}"
    if tuple(w.stride()) != (1, k):
        return f"w must be the transpose of a contiguous [N, K]; its strides are {tuple(w.stride())}, not (1, {k})"
    return None


def num_units_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
