"""CUDA graphs of whole steps, captured by hand as serving engines do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_WARMUP = 2


class Capturer:
    """Captures steps one after the other. Their graphs share memory, so only one of them may run at a time.

    What a graph computes with belongs to it only while it runs; its outputs are good until another one runs.
    """

    def __init__(self) -> None:
        import torch

        self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of one call, and the outputs that each replay writes.

        Args:
            call: reads and writes the same memory each time; has run before, so that nothing is left to compile.

        Raises:
            RuntimeError: it waits for the device, copies from or to the host, or is otherwise nothing that a graph can hold.
        """
        import torch

        outer = torch.cuda.current_stream()
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARMUP):
                call()
        outer.wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = call()
        except RuntimeError:
            torch.cuda.set_stream(outer)  # a capture that fails to end leaves its own stream behind
            raise
        graph.replay()
        torch.cuda.synchronize()
        return graph, outputs
