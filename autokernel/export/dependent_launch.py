"""Programmatic dependent launch of Triton kernels: the graph option `pdl`, for our own (true) or for all of a graph ("all").

A kernel that is launched so starts while the one in front of it still runs, and waits for its results as the first thing it
does: what is saved is the launch, and the time until all multiprocessors are busy. Every such kernel lets the next one
start at once, and waits before it reads or writes anything; whatever else is in the stream waits for all of it, as always.
Some of ours read their first weights before they wait: parameters, which no kernel of a graph writes (`may_read_ahead`).

Inductor knows such launches for kernels that it writes itself (`triton.enable_pdl`), but not for those of others and for
templates, and its own wait only for the kernel in front, where they need its results. Here the word is put in where Inductor
writes a kernel's text, as are the two instructions.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from autokernel.kernels.launch import AHEAD
from autokernel.records import ConfigValue

log = logging.getLogger(__name__)

OPTION, ALL = "pdl", "all"
_OURS = ("autokernel.kernels.", "autokernel_")  # modules of kernels that are read from files, and of generated ones
_DECORATOR, _META, _LAUNCH = "@triton_heuristics.", "triton_meta={", "'launch_pdl': True, "
_SAID = re.compile(r"'launch_pdl': False(, )?")  # by Inductor, of kernels of its own
_COOPERATIVE = "'launch_cooperative_grid': True"  # all blocks at once: launched as usual
_LAUNCH_NEXT, _WAIT = "tl.extra.cuda.gdc_launch_dependents()", "tl.extra.cuda.gdc_wait()"
_WAITS_ITSELF = re.compile(rf"'{AHEAD}': 1\b")  # in what Inductor says of compile-time arguments
_QUOTES = "'''"

_state = threading.local()


@contextlib.contextmanager
def dependent_launches(of: ConfigValue, inputs: Sequence[Any]) -> Iterator[None]:
    """While Inductor compiles in this thread: kernels of ours are launched so, or all of Triton's.

    Args:
        of: the option's value, True or "all"; with False nothing changes.
        inputs: of the graph that is compiled.
    """
    import torch

    _install()
    _state.active = of
    _state.parameters = [isinstance(value, torch.nn.Parameter) for value in inputs]
    try:
        yield
    finally:
        _state.active, _state.parameters = False, []


def _install() -> None:
    """Make Inductor ask here what becomes of a kernel's text. Idempotent."""
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    wrapper: Any = PythonWrapperCodegen
    if hasattr(wrapper.define_kernel, "autokernel"):
        return
    define, define_user = wrapper.define_kernel, wrapper.define_user_defined_triton_kernel

    @functools.wraps(define_user)
    def define_user_defined_triton_kernel(self: Any, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        _state.ours = str(getattr(kernel.fn, "__module__", "")).startswith(_OURS)
        try:
            return define_user(self, kernel, *args, **kwargs)
        finally:
            _state.ours = False

    @functools.wraps(define)
    def define_kernel(self: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> Any:
        active = getattr(_state, "active", False)
        if active and (getattr(_state, "ours", False) or (active == ALL and _DECORATOR in kernel_body)):
            kernel_body = dependent(kernel_body)
        return define(self, kernel_name, kernel_body, *args, **kwargs)

    define_kernel.autokernel = True  # type: ignore[attr-defined]
    wrapper.define_kernel, wrapper.define_user_defined_triton_kernel = define_kernel, define_user_defined_triton_kernel


def may_read_ahead(weights: Iterable[Any]) -> bool:
    """Whether kernels may read these before the kernel in front of them has ended.

    While dependent launches are on, of constants of the graph, and of its inputs that are parameters which it does not
    change. Whatever else may be the result of a kernel that still runs, even one of another graph.

    Args:
        weights: Inductor's nodes of them.
    """
    if not getattr(_state, "active", False):
        return False
    from torch._inductor.virtualized import V

    graph: Any = V.graph
    placeholders = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(_state.parameters):  # inputs that were taken apart: which is which, nobody says
        placeholders = []
    parameters = {
        node.target: node for node, is_parameter in zip(placeholders, _state.parameters, strict=False) if is_parameter
    }

    def is_kept(name: str) -> bool:
        return name in graph.constants or (name in parameters and not any(map(_writes, parameters[name].users)))

    return all(is_kept(weight.get_name()) for weight in weights)


def _writes(node: Any) -> bool:
    """Whether a call may change its operands: ours do not."""
    schema = getattr(node.target, "_schema", None)
    ours = hasattr(node.target, "_inductor_lowering_function")
    return node.op == "call_function" and not ours and (schema is None or bool(schema.is_mutable))


def dependent(body: str) -> str:
    """Inductor's text of a kernel, as one that is launched while another runs; unchanged if it is not as expected."""
    if _COOPERATIVE in body:
        return body
    try:
        start, end = body.index(_QUOTES) + len(_QUOTES), body.rindex(_QUOTES)
        source = body[start:end].replace("\\'\\'\\'", _QUOTES)
        meta = source.index(_META, source.index(_DECORATOR)) + len(_META)
        source = f"{source[:meta]}{_LAUNCH}{_SAID.sub('', source[meta:], count=1)}"
        lines = source.splitlines()
        tree = ast.parse(source)
        kernel = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_entry(node))
        first = next(node for node in kernel.body if not _is_text(node))
    except (ValueError, SyntaxError, StopIteration) as error:
        log.warning("autokernel: a kernel is launched as usual, for Inductor's text of it is not as expected: %s", error)
        return body
    begin = [_LAUNCH_NEXT] if _WAITS_ITSELF.search(source, meta) else [_LAUNCH_NEXT, _WAIT]
    lines[first.lineno - 1 : first.lineno - 1] = [" " * first.col_offset + line for line in begin]
    return body[:start] + "\n".join(lines).replace(_QUOTES, "\\'\\'\\'") + "\n" + body[end:]


def _is_entry(function: ast.FunctionDef) -> bool:
    """What is launched: the function under Inductor's own decorator, not one that it calls."""
    return any("triton_heuristics" in ast.dump(decorator) for decorator in function.decorator_list)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
