"""Programmatic dependent launch of Triton kernels: the graph option `pdl`, for our own (true), for all of a graph ("all"),
for those of ours that have something to do before they need what the kernel in front of them writes ("ahead"), or for these
and all whose programs find room on the device at once ("one_wave").

A kernel that is launched so starts while the one in front of it still runs, and waits for its results as the first thing it
does: what is saved is the launch, and the time until all multiprocessors are busy. Every such kernel lets the next one
start at once, and waits before it reads or writes anything; whatever else is in the stream waits for all of it, as always.
Some of ours read their first weights before they wait: parameters, which no kernel of a graph writes (`may_read_ahead`).

Each program pays for the wait, and where thousands of short ones follow each other only the first wave of them gains. With
"ahead" a kernel is launched so if it reads or asks for memory ahead, its programs are a few waves at most, and its loop is not
pipelined (the pipeline would start when the first weights are multiplied); all others are launched as usual, and only let the
next one start. With "one_wave" so are those of more programs than find room at once, and nothing is asked for but weights;
Inductor's own kernels count as small, as they are where launches matter.

Inductor knows such launches for kernels that it writes itself (`triton.enable_pdl`), but not for those of others and for
templates, and its own wait only for the kernel in front, where they need its results. Here the word is put in where Inductor
writes a kernel's text, as are the two instructions.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import json
import logging
import math
import re
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from autokernel.errors import BundleError
from autokernel.kernels.launch import AHEAD
from autokernel.kernels.op import num_units_of
from autokernel.records import ConfigValue

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

OPTION, ALL, ONLY_AHEAD, ONE_WAVE = "pdl", "all", "ahead", "one_wave"
_VALUES: tuple[ConfigValue, ...] = (True, ALL, ONLY_AHEAD, ONE_WAVE, False)
_OURS = ("autokernel.kernels.", "autokernel_")  # modules of kernels that are read from files, and of generated ones
_DECORATOR, _META, _LAUNCH = "@triton_heuristics.", "triton_meta={", "'launch_pdl': True, "
_SAID = re.compile(r"'launch_pdl': False(, )?")  # by Inductor, of kernels of its own
_COOPERATIVE = "'launch_cooperative_grid': True"  # all blocks at once: launched as usual
_LAUNCH_NEXT, _WAIT = "tl.extra.cuda.gdc_launch_dependents()", "tl.extra.cuda.gdc_wait()"
_WAITS_ITSELF = re.compile(rf"'{AHEAD}': 1\b")  # in what Inductor says of compile-time arguments
_QUOTES = "'''"

_MAX_PROGRAMS, _MAX_WARPS = 32, 64  # of a multiprocessor, from Hopper on
_MAX_WAVES = 8

_state = threading.local()


@contextlib.contextmanager
def dependent_launches(of: ConfigValue, inputs: Sequence[Any]) -> Iterator[None]:
    """While Inductor compiles in this thread: kernels of ours are launched so, or all of Triton's.

    Args:
        of: the option's value, True, "all", "ahead" or "one_wave"; with False nothing changes.
        inputs: of the graph that is compiled.

    Raises:
        BundleError: there is no such value.
    """
    import torch

    if of not in _VALUES:
        known = ", ".join(json.dumps(value) for value in _VALUES)
        raise BundleError(f"graph option {OPTION}: {of!r} is unknown; write one of {known}, or leave it out")
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
    signature = inspect.signature(define_user)

    @functools.wraps(define_user)
    def define_user_defined_triton_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        _state.ours = str(getattr(given["kernel"].fn, "__module__", "")).startswith(_OURS)
        if _state.ours and getattr(_state, "active", False) == ONE_WAVE:
            _state.many = _waves(given["grids"][0], given["configs"][0].num_warps) > 1
        try:
            return define_user(self, *args, **kwargs)
        finally:
            _state.ours = _state.many = False

    @functools.wraps(define)
    def define_kernel(self: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> Any:
        active = getattr(_state, "active", False)
        if active and (getattr(_state, "ours", False) or (active is not True and _DECORATOR in kernel_body)):
            kernel_body = dependent(kernel_body, only_ahead=active == ONLY_AHEAD or getattr(_state, "many", False))
        return define(self, kernel_name, kernel_body, *args, **kwargs)

    define_kernel.autokernel = True  # type: ignore[attr-defined]
    wrapper.define_kernel, wrapper.define_user_defined_triton_kernel = define_kernel, define_user_defined_triton_kernel


def may_read_ahead(weights: Sequence[Any], grid: Sequence[int], num_warps: int, num_stages: int) -> bool:
    """Whether a kernel may read these before the kernel in front of it has ended.

    If it is launched while that one runs: constants of the graph, and its inputs that are parameters which it does not
    change. Whatever else may be the result of a kernel that still runs, even one of another graph.

    Args:
        weights: Inductor's nodes of them.
        grid: the kernel's.
        num_warps: of each of its programs.
        num_stages: that its loop is pipelined in.
    """
    active = getattr(_state, "active", False)
    dear = active in (ONLY_AHEAD, ONE_WAVE) and (_waves(grid, num_warps) > _MAX_WAVES or (bool(weights) and num_stages > 1))
    # on an H200 attention took as much longer where it asked for its keys early as it began earlier
    asks = active == ONE_WAVE and not weights
    if not active or dear or asks:
        return False
    from torch._inductor.virtualized import V

    graph: Any = V.graph
    kept = {*graph.constants, *(node.target for node in _kept_parameters(graph.module.graph))}
    return all(weight.get_name() in kept for weight in weights)


def _kept_parameters(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The graph's inputs that are parameters, and that it does not change."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(_state.parameters):  # inputs that were taken apart: which is which, nobody says
        return []
    of_inputs = zip(placeholders, _state.parameters, strict=True)
    return [node for node, is_parameter in of_inputs if is_parameter and not any(map(_writes, node.users))]


def _waves(grid: Sequence[Any], num_warps: int) -> float:
    """How often the programs of a grid fill the device, if nothing but their number and warps limits them."""
    import torch

    room = num_units_of(torch.device("cuda")) * min(_MAX_PROGRAMS, _MAX_WARPS // num_warps)
    return math.prod(int(size) for size in grid) / room


def _writes(node: Any) -> bool:
    """Whether a call may change its operands: ours do not."""
    schema = getattr(node.target, "_schema", None)
    ours = hasattr(node.target, "_inductor_lowering_function")
    return node.op == "call_function" and not ours and (schema is None or bool(schema.is_mutable))


def dependent(body: str, *, only_ahead: bool = False) -> str:
    """Inductor's text of a kernel, as one that is launched while another runs; unchanged if it is not as expected.

    Args:
        body: the text.
        only_ahead: a kernel that does nothing before its wait is launched as usual, and only lets the next one start.
    """
    if _COOPERATIVE in body:
        return body
    try:
        start, end = body.index(_QUOTES) + len(_QUOTES), body.rindex(_QUOTES)
        source = body[start:end].replace("\\'\\'\\'", _QUOTES)
        meta = source.index(_META, source.index(_DECORATOR)) + len(_META)
        waits_itself = _WAITS_ITSELF.search(source, meta) is not None
        if waits_itself or not only_ahead:
            source = f"{source[:meta]}{_LAUNCH}{_SAID.sub('', source[meta:], count=1)}"
        lines = source.splitlines()
        tree = ast.parse(source)
        kernel = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_entry(node))
        first = next(node for node in kernel.body if not _is_text(node))
    except (ValueError, SyntaxError, StopIteration) as error:
        log.warning("autokernel: a kernel is launched as usual, for Inductor's text of it is not as expected: %s", error)
        return body
    begin = [_LAUNCH_NEXT] if waits_itself or only_ahead else [_LAUNCH_NEXT, _WAIT]
    lines[first.lineno - 1 : first.lineno - 1] = [" " * first.col_offset + line for line in begin]
    return body[:start] + "\n".join(lines).replace(_QUOTES, "\\'\\'\\'") + "\n" + body[end:]


def _is_entry(function: ast.FunctionDef) -> bool:
    """What is launched: the function under Inductor's own decorator, not one that it calls."""
    return any("triton_heuristics" in ast.dump(decorator) for decorator in function.decorator_list)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
