"""Candidates built the way production builds them: through `torch.compile` with a bundle of one entry.

What is timed is what is exported. Several copies of the problem, each with weights of its own, make one compiled graph.

Compiling for a GPU launches nothing there, so that it can go on beside another process's timing: example inputs are not
even filled, and the graph's first run is put off (`_Gate`). What Inductor folds at compile time (weights laid side by side)
is the exception: a copy of the weights, which one of many samples of that timing may see.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx

from autokernel.backends import BuildError, Built, Refused
from autokernel.environment import current_environment
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.matching import parts_of_merged
from autokernel.ops import Op, get_op
from autokernel.records import Candidate, Problem


class Copies(torch.nn.Module):
    """`num_copies` independent instances of a problem; constants are parameters, as in a model.

    forward takes the non-constant inputs of every copy in order and returns the outputs of every copy in order.
    """

    def __init__(self, problem: Problem, constants: list[list[torch.Tensor]]) -> None:
        super().__init__()
        self.num_copies = len(constants)
        self.num_inputs = len(problem.inputs) - len(problem.constants)
        self._problem = problem
        # a model adds its residual behind the GEMM: only Inductor, and not always, makes one addmm of them
        self._residual = problem.op == "addmm" and len(problem.inputs[0].shape) == 2 and not problem.scalars
        self._compiled_as = with_residual(problem) if self._residual else problem
        self._op: Op = get_op(self._compiled_as.op)
        self._num_constants = len(problem.constants)
        # a transposed weight is a view of the row-major parameter that nn.Linear keeps
        self._transposed = [_is_transposed(problem, i) for i in problem.constants]
        for copy, tensors in enumerate(constants):
            for index, tensor in enumerate(tensors):
                stored = tensor.t() if self._transposed[index] else tensor
                self.register_parameter(f"c{copy}_{index}", torch.nn.Parameter(stored, requires_grad=False))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs: tuple[torch.Tensor, ...] = ()
        for copy in range(self.num_copies):
            variable = list(inputs[copy * self.num_inputs : (copy + 1) * self.num_inputs])
            arguments = []
            constant = 0
            for position in range(self.num_inputs + self._num_constants):
                if position in self._problem.constants:
                    tensor = getattr(self, f"c{copy}_{constant}")
                    arguments.append(tensor.t() if self._transposed[constant] else tensor)
                    constant += 1
                else:
                    arguments.append(variable.pop(0))
            if self._residual:
                arguments = [arguments[1], arguments[2], arguments[0], *arguments[3:]]
            outputs += self._op.reference(self._compiled_as, *arguments)
        return outputs


def with_residual(problem: Problem) -> Problem:
    """addmm(residual, x, w) as mm(x, w) + residual."""
    residual, x, weight, *rest = problem.inputs
    constants = tuple(sorted({0: 2, 1: 0, 2: 1}.get(i, i) for i in problem.constants))
    return replace(
        problem, op="mm", inputs=(x, weight, residual, *rest), constants=constants, epilogue=("add", *problem.epilogue)
    )


def _is_transposed(problem: Problem, index: int) -> bool:
    spec = problem.inputs[index]
    return len(spec.shape) == 2 and spec.stride[0] == 1 and spec.shape[1] > 1 and spec.stride[1] == spec.shape[0]


class _CompiledOnly(Exception):
    """In place of a graph's first run: it is compiled, and that is all that was wanted."""


class _Gate:
    """A `torch.compile` backend whose graphs are compiled at once (kernels included) but do not run while it is shut.

    Inductor loads its generated module, and Triton compiles the module's kernels, before the backend returns: with one
    compile thread (`TORCHINDUCTOR_COMPILE_THREADS=1`) in this process, with more when the module is loaded.
    """

    def __init__(self, backend: Callable[..., Callable[..., Any]]) -> None:
        self._backend = backend
        self.shut = True

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        compiled = self._backend(gm, inputs, **options)

        def run(*args: Any) -> Any:
            if self.shut:
                raise _CompiledOnly
            return compiled(*args)

        return run


def build(
    candidate: Candidate, constants: list[list[torch.Tensor]], *, stock: bool, options: Mapping[str, Any] | None = None
) -> Built:
    """Compile copies of a candidate's problem. On a GPU nothing runs yet: the first call does (it tunes pointwise kernels).

    Args:
        candidate: its config becomes the one entry of a bundle.
        constants: per copy, the problem's constant inputs in order.
        stock: compile with Inductor's defaults and no bundle instead.
        options: of Inductor, for stock code.

    Raises:
        BuildError: the compiler failed.
    """
    from autokernel.export.apply import BundleBackend

    problem = candidate.problem
    module = Copies(problem, constants).eval()
    entry = Entry(problem=problem, backend=candidate.backend, config=dict(candidate.config))

    def compile_stock(gm: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        return compile_fx(gm, list(inputs), config_patches=dict(options) if options else None)

    backend: Any = compile_stock
    if not stock:
        environment = current_environment(problem.device)
        entries = expanded(entry)
        bundle = Bundle(name=candidate.id, created="", version="", environment=environment, entries=entries)
        backend = BundleBackend(bundle)
    gate = _Gate(backend)
    gate.shut = problem.device == "cuda"
    compiled = torch.compile(module, backend=gate, fullgraph=True, dynamic=False)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return compiled(*inputs)  # type: ignore[no-any-return]

    # compile now: a failure is the build's, and timing must not pay for it
    examples = [_example(problem, i) for _ in constants for i in range(len(problem.inputs)) if i not in problem.constants]
    try:
        run(*examples)
    except _CompiledOnly:
        pass
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise BuildError(_first_line(error)) from error
    except torch._inductor.exc.InductorError as error:
        raise BuildError(_first_line(error)) from error
    gate.shut = False
    usage = [] if stock else list(backend.usage().values())
    hits = len(constants) if stock else min(item.hits for item in usage)
    reasons = [reason for item in usage for reason in item.reasons]
    return Built(run=run, num_copies=len(constants), hits=hits, notes={"reasons": "; ".join(reasons)})


def expanded(entry: Entry) -> tuple[Entry, ...]:
    """The entry itself; or, for GEMMs that share an input but stay apart, one entry for each of them."""
    problem = entry.problem
    if problem.op != "merged_mm" or entry.config.get("merge", "none") != "none":
        return (entry,)
    config = {name: value for name, value in entry.config.items() if name != "merge"}
    parts = {part.key: Entry(problem=part, backend=entry.backend, config=config) for part in parts_of_merged(problem)}
    return tuple(parts.values())


def release() -> None:
    """Let go of everything that was compiled in this process, of its folded weights, and of the device memory for them."""
    torch.compiler.reset()
    for module in PyCodeCache.modules:  # Inductor leaves them where imported modules are, with the weights that it folded
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]
        for name in [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]:
            delattr(module, name)
    PyCodeCache.cache_clear()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _example(problem: Problem, index: int) -> torch.Tensor:
    spec = problem.inputs[index]
    dtype = getattr(torch, spec.dtype)
    out = torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device=problem.device)
    if problem.device == "cuda":  # filling it would launch a kernel, and nothing is going to read it
        return out
    return out.normal_() if dtype.is_floating_point and dtype.itemsize > 1 else out.zero_()  # 8 bits have no random numbers


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:500]


def refuse_without_constant_weight(candidate: Candidate) -> None:
    """Raises Refused if the config packs a weight that the problem does not have."""
    if not candidate.problem.constants:
        raise Refused(f"{candidate.label} packs a weight, but {candidate.problem.op} here has no constant input")
