"""Inductor generates code for an H200 that is not there. For the tests of this folder; nothing is compiled or run."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autokernel.environment import Environment
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.plan import Plan
from autokernel.records import TensorSpec

H200 = Environment(device="cuda", device_name="NVIDIA H200", isa="sm_90", num_units=132, torch=torch.__version__)
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200",
    gcnArchName="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=141 << 30,
    L2_cache_size=60 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)


def plan_with(entries: Iterable[Entry]) -> Plan:
    """The plan of a bundle that was made on such a device."""
    return Plan(Bundle(name="b", created="", version="", environment=H200, entries=tuple(entries)))


class Generated(Exception):
    """The code is there; in place of compiling it."""


@contextlib.contextmanager
def pretended_h200() -> Iterator[None]:
    """torch, Inductor and Triton believe in the device, as far as code generation asks."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch.utils._triton as torch_triton
    import triton.runtime.driver as driver
    from triton.backends.compiler import GPUTarget

    class Interface(interfaces.CudaInterface):  # type: ignore[misc]
        class Worker:
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda *_: PROPERTIES)

        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        get_device_properties = staticmethod(lambda *_: PROPERTIES)
        is_available = staticmethod(lambda: True)
        get_compute_capability = staticmethod(lambda *_: "90")
        is_bf16_supported = staticmethod(lambda *_, **__: True)
        is_triton_capable = staticmethod(lambda *_: True)
        raise_if_triton_unavailable = staticmethod(lambda *_: None)

    replaced: list[tuple[Any, Mapping[str, Any]]] = [
        (
            torch.cuda,
            {
                "is_available": lambda: True,
                "is_initialized": lambda: False,
                "current_device": lambda: 0,
                "device_count": lambda: 1,
                "get_device_properties": lambda *_: PROPERTIES,
                "get_device_capability": lambda *_: (9, 0),
                "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
                "set_rng_state": lambda *_: None,
                "synchronize": lambda *_: None,
                "_lazy_init": lambda: None,
                "_exchange_device": lambda _: 0,
                "_maybe_exchange_device": lambda _: 0,
            },
        ),
        # its patterns are traced on tensors of the device
        (joint_graph, {"lazy_init": lambda *_, **__: None}),
        (torch_triton, {name: lambda *_, **__: True for name in dir(torch_triton) if name.startswith("has_triton")}),
    ]
    cached = [value for name, value in vars(torch_triton).items() if name.startswith("has_triton")]
    with contextlib.ExitStack() as stack:
        # other modules hold these functions, and the functions their answers: from before, and from now on
        for function in cached:
            function.cache_clear()
            stack.callback(function.cache_clear)
        for owner, attributes in replaced:
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        interfaces.get_interface_for_device("cpu")  # fills the table
        stack.enter_context(mock.patch.dict(interfaces.device_interfaces, {"cuda": Interface, "cuda:0": Interface}))
        target = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
        stack.callback(driver.set_active, driver._active)
        driver.set_active(target)
        yield


def generated_code(function: Callable[..., Any], specs: list[TensorSpec], options: dict[str, Any]) -> str:
    """The module that Inductor writes for a function of such inputs."""
    return code_of(torch.fx.symbolic_trace(function), specs, options)


def code_of(module: torch.fx.GraphModule, specs: list[TensorSpec], options: dict[str, Any]) -> str:
    """The module that Inductor writes for a graph of such inputs."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    generate, seen = GraphLowering.codegen, []

    def codegen(self: Any) -> Any:
        made = generate(self)
        if type(self) is GraphLowering and not self.name:  # not a graph within it
            seen.append(getattr(made[0], "value", made[0]))
            raise Generated
        return made

    def copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return torch.ops.aten.copy_.default(self, source, non_blocking)  # the method itself asks for a device

    with (
        pretended_h200(),
        mock.patch.object(GraphLowering, "codegen", codegen),
        mock.patch.object(torch.Tensor, "copy_", copy),
        torch.no_grad(),
    ):
        with FakeTensorMode():
            inputs = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype), device="cuda") for s in specs]
        try:
            # padding is timed on the device; where an earlier compilation has made its patterns, it would be tried
            patches = {"fx_graph_cache": False, "shape_padding": False, **options}
            compile_fx(module, inputs, config_patches=patches)
        except torch._inductor.exc.InductorError as error:
            if not isinstance(error.__cause__, Generated) and "Generated" not in str(error):
                raise
    (code,) = seen
    return str(code)
