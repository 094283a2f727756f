"""CUDA graphs of many calls of one kernel, which is how kernels are timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class CaptureError(RuntimeError):
    """A call cannot be captured. PyTorch's allocator and random numbers may take the capture for unfinished ever after, so
    the process should end.
    """


def graph_of(function: Callable[[], Any], num_calls: int, warm_ups: int = 2) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph that holds `num_calls` calls, and what the last of them returned (its static outputs).

    Not by `torch.cuda.graph`, which gives all cached memory back first: that takes longer than a whole screen.

    Args:
        function: what is captured; work that it leaves on a stream of its own makes the capture fail.
        num_calls: how often.
        warm_ups: calls before, which compile, allocate workspaces and tune what is tuned at a first launch.

    Raises:
        CaptureError: it waits for the device, or leaves work on another stream.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    # the one stream of this process that captures: cuBLAS keeps a workspace for every stream that it ever saw
    side = torch.cuda.graph(graph).capture_stream
    assert side is not None  # given or made by its constructor
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            function()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for _ in range(num_calls):
                outputs = function()
            graph.capture_end()
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):  # the capture is spoilt, and says so once more
                graph.capture_end()
            raise CaptureError(f"it cannot be captured in a CUDA graph: {error}") from error
    torch.cuda.current_stream().wait_stream(side)
    return graph, outputs
