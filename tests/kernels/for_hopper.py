"""Launches of a plan through Triton's compiler for Hopper, without a GPU. For the tests of this folder."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from autokernel.kernels.launch import KernelPlan, Operand, as_real
from autokernel.records import Problem

_POINTERS = {
    "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "bool": "*i1", "int32": "*i32", "int64": "*i64",
}  # fmt: skip


def compiled(problem: Problem, plan: KernelPlan, which: int = -1) -> Any:
    """A launch of the problem's plan, the last one if nothing is said; tensors are aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = plan.launches[which]
    dtypes = {
        "in": [as_real(spec).dtype for spec in problem.inputs],
        "out": [spec.dtype for spec in plan.outputs],
        "scratch": [buffer.dtype for buffer in plan.scratch],
    }
    names, given = launch.kernel.arg_names, launch.arguments
    pointers = {name: _POINTERS[dtypes[a.kind][a.index]] for name, a in given.items() if isinstance(a, Operand)}
    source = ASTSource(
        fn=launch.kernel,
        signature={name: pointers.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in given.items() if name not in pointers},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def ptx_of(problem: Problem, plan: KernelPlan, which: int = -1) -> str:
    return str(compiled(problem, plan, which).asm["ptx"])


def bytes_of_stack(ptx: str, folder: Path) -> int:
    """What each thread of a kernel spills; the assembler takes the text."""
    from triton import knobs

    (folder / "kernel.ptx").write_text(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stderr
    (found,) = re.findall(r"(\d+) bytes stack frame", said)
    return int(found)


def read_before_and_after(ptx: str, weight: int) -> tuple[set[bool], set[bool]]:
    """Whether what is loaded and stored before and behind the wait belongs to the weight, by its parameter's position."""
    sources: dict[str, set[int]] = {}
    found: tuple[set[bool], set[bool]] = (set(), set())
    behind = 0
    for line in ptx.splitlines():
        if "griddepcontrol.wait" in line:
            behind = 1
        if match := re.search(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            sources[match[1]] = {int(match[2])}
        elif match := re.match(r"\s+(?:@%p\d+ )?(ld|st)\.global\S*.*\[ ?(%rd\d+)", line):
            found[behind].add(match[1] == "ld" and sources.get(match[2], set()) == {weight})
        elif match := re.match(r"\s+(?:mad|add|cvta|mov|mul)\S*\s+(%rd\d+), (.*);", line):
            known = set().union(*(sources.get(name, set()) for name in re.findall(r"%rd\d+", match[2])))
            sources[match[1]] = known
    return found
