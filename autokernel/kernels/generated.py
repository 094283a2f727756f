"""Planners of the op `generated`: a problem's program and a config become a kernel, its grid and its arguments.

The source is written to a file named by its digest, for Triton reads functions from files; it is made again from the
problem wherever it is needed, and nothing of it is part of a bundle.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autokernel.kernels.generated_config import ProductsConfig, RowsConfig
from autokernel.kernels.generated_products import products_source
from autokernel.kernels.generated_source import Columns, Scope, Writer, indented, kernel_source, products_of
from autokernel.kernels.launch import AHEAD, Buffer, KernelPlan, Launch, Operand
from autokernel.kernels.parameters import power_of_two
from autokernel.ops.generated import Generated
from autokernel.ops.program import REDUCTIONS, Program, program_of, results_of
from autokernel.records import ConfigValue, Problem, TensorSpec

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "AUTOKERNEL_CACHE_DIR"
MAX_ELEMENTS = 2**31 - 1  # offsets are 32-bit


def plan_rows(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """The launch for a program without products.

    Raises:
        ValueError: the config is not legal for it.
    """
    chosen, program, results = RowsConfig.from_entry(config), program_of(problem), results_of(problem)
    if products_of(program):
        raise ValueError("generated_rows is for programs without matrix products: use generated_mm")
    if not any(line.op in REDUCTIONS for line in program.lines):
        raise ValueError("generated_rows is for programs that reduce rows; this one reduces none")
    dims = Generated().dims(problem)
    rows, columns = dims["m"], dims["n"]
    _refuse(chosen.problem(columns), problem.inputs, results, program)
    name, source = rows_source(program, results, rows, columns, chosen)
    return _plan(program, results, name, source, (-(-rows // chosen.block_m), 1, 1), chosen.num_warps, chosen.num_stages)


def plan_products(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """The launch for a program with matrix products.

    Raises:
        ValueError: the config is not legal for it.
    """
    chosen, program, results = ProductsConfig.from_entry(config), program_of(problem), results_of(problem)
    if not products_of(program):
        raise ValueError("generated_mm is for programs with matrix products: use generated_rows")
    dims = Generated().dims(problem)
    rows, depth = dims["m"], dims["k"]
    whole_row = dims["n"] // dims["num_products"] if dims["whole_rows"] else 0
    _refuse(chosen.problem(rows, depth, whole_row), problem.inputs, results, program)
    made = products_source(program, results, rows, depth, chosen)
    scratch: tuple[Buffer, ...] = ()
    if chosen.split_k > 1:
        scratch = (Buffer((made.part_elements,), "float32"), Buffer((made.num_tiles,), "int32", zeroed=True))
    grid = (made.num_tiles * chosen.split_k, 1, 1)
    return _plan(program, results, made.name, made.source, grid, chosen.num_warps, chosen.num_stages, scratch, made.weights)


def rows_source(
    program: Program, results: Mapping[str, TensorSpec], rows: int, columns: int, config: RowsConfig
) -> tuple[str, str]:
    """(name, source) of the kernel for a program of rows."""
    writer = Writer(program, results, rows, config.block_m)
    block = config.block_k or power_of_two(columns)
    lines = [f"m = tl.program_id(0) * {config.block_m} + tl.arange(0, {config.block_m})[:, None]"]
    lines.append(f"row = tl.minimum(m, {rows - 1})" if rows % config.block_m else "row = m")
    scope = Scope(Columns("c", columns, block))
    outputs = set(program.outputs)
    if config.block_k == 0:
        lines.append(f"c = tl.arange(0, {block})[None, :]")
        writer.at_once(outputs, scope)
        for name in program.outputs:
            writer.store(name, scope)
        lines += scope.lines
    else:
        writer.walk(outputs, scope.columns, lines)
        for name in program.outputs:
            writer.store(name, scope)
        lines.append(f"for start in range(0, {columns}, {block}):")
        lines.append(f"    c = start + tl.arange(0, {block})[None, :]")
        lines += [f"    {line}" for line in scope.lines]
    return kernel_source(indented(lines), (*program.inputs, *program.outputs))


def load_kernel(name: str, source: str) -> Any:
    """The kernel of this name in a source, by way of a file: Triton reads functions from files."""
    module_name = f"autokernel_{name}"
    module = sys.modules.get(module_name)
    if module is None:
        try:
            path = _written(_folder(), name, source)
        except OSError as error:  # a container's home may be read-only: no reason for a model not to run
            path = _written(_spare_folder(), name, source)
            log.info("autokernel: kernels are written to %s: %s (set %s)", path.parent, error, FOLDER_VARIABLE)
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[module_name] = module
    return getattr(module, name)


def _written(folder: Path, name: str, source: str) -> Path:
    path = folder / f"{name}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(source)
        os.replace(file.name, path)  # whoever reads it meanwhile sees a whole file
    return path


@functools.cache
def _spare_folder() -> Path:
    """One of this process, gone with it."""
    folder = tempfile.mkdtemp(prefix="autokernel-generated-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _folder() -> Path:
    """In the user's cache folder, unless AUTOKERNEL_CACHE_DIR names another."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser() / "generated"
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "autokernel" / "generated"


def _plan(
    program: Program,
    results: Mapping[str, TensorSpec],
    name: str,
    source: str,
    grid: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
    scratch: Sequence[Buffer] = (),
    weights: tuple[str, ...] = (),
) -> KernelPlan:
    arguments: dict[str, Operand | int] = {}
    for position, operand in enumerate(program.inputs):
        arguments[operand] = Operand("in", position)
    for position, operand in enumerate(program.outputs):
        arguments[operand] = Operand("out", position)
    for position, operand in enumerate(("parts", "counters")[: len(scratch)]):
        arguments[operand] = Operand("scratch", position)
    if weights:
        arguments[AHEAD] = 0
    launch = Launch(load_kernel(name, source), grid, arguments, num_warps, num_stages, weights or None)
    return KernelPlan(tuple(results[output] for output in program.outputs), tuple(scratch), (launch,))


def _refuse(wrong: str | None, inputs: Sequence[TensorSpec], results: Mapping[str, TensorSpec], program: Program) -> None:
    """Raises ValueError if a rule is broken."""
    if wrong is not None:
        raise ValueError(wrong)
    for spec in (*inputs, *(results[name] for name in program.outputs)):
        if spec.reach > MAX_ELEMENTS:
            raise ValueError(
                f"generated kernels have 32-bit offsets; {spec} reaches {spec.reach} elements, more than {MAX_ELEMENTS}"
            )
