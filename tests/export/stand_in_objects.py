"""Entries of backend "cutedsl" with objects that nothing could run, for passes that ask no more of them than a name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from export.pretended_h200 import H200
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from autokernel.cutedsl.spec import KernelSpec, Launch, ObjectInfo
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.cute_specs import specs_of
from autokernel.export.plan import Plan
from autokernel.records import ConfigValue, Problem, TensorSpec

BYTES = b"no kernel"


def spec(*shape: int, dtype: str = "bfloat16") -> TensorSpec:
    return TensorSpec.contiguous(shape, dtype)


def entry(problem: Problem, config: dict[str, ConfigValue]) -> Entry:
    return Entry(problem=problem, backend="cutedsl", config=config)


def info_of(kernel: KernelSpec, data: bytes = BYTES) -> ObjectInfo:
    return ObjectInfo(
        key=kernel.key({}),
        spec=kernel,
        launch=Launch(function="k", arguments=("a", "b", "out")),
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        machine="x86_64",
        cuda_major=13,
    )


def with_objects(folder: Path, *entries: Entry) -> Plan:
    """The plan of a bundle that brings the objects of all its entries."""
    folder.mkdir(exist_ok=True)
    kernels = [kernel for e in entries for kernel in specs_of(e, arch="sm_90a", num_units=132)]
    infos = {info.key: info for info in map(info_of, kernels)}
    for info in infos.values():
        (folder / info.file_name).write_bytes(BYTES)
        (folder / f"{info.key}.json").write_text(json.dumps(info.to_json()))
    bundle = Bundle(name="b", created="", version="", environment=H200, entries=entries, objects=tuple(infos.values()))
    return Plan(bundle, None, {key: folder / info.file_name for key, info in infos.items()})


def traced(function: Callable[..., Any], *sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.fx.GraphModule:
    """A graph as Inductor has it, with tensors that claim to be on a GPU."""
    with FakeTensorMode():
        return make_fx(function)(*(torch.empty(size, dtype=dtype, device="cuda") for size in sizes))


def targets(module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def calls(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in module.graph.nodes if "cute_gemm" in str(node.target)]


def reasons(plan: Plan) -> str:
    return "; ".join(reason for usage in plan.usage.values() for reason in usage.reasons)


def hits(plan: Plan) -> list[int]:
    return [usage.hits for usage in plan.usage.values()]


def path_of(call: torch.fx.Node) -> str:
    """Of the object that a call names."""
    return str(call.args[2] if str(call.target).endswith("default") else call.args[3])
