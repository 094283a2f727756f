"""SM100's operators of nvidia-cutlass-operators, by name: all that it offers. Compiled, never run by us.

None of their parameters are a `CuteConfig`'s (MMA over two blocks, schedulers, preferred clusters): an operator's name says
them all. Ampere's operators are among them, which newer GPUs run slowly. Import this with `compiler.environment` set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from cutlass import operators
from cutlass.operators.heuristics import NvMatmulHeuristics
from cutlass.operators.metadata import Sm100DesignMetadata

from autokernel.cutedsl.config import BLACKWELL_GROUPS, BLACKWELL_OTHERS, BLACKWELL_PROBLEMS
from autokernel.errors import CompileError

ARCH = "sm_100a"
NUM_UNITS = 148  # multiprocessors of a B200
# dtypes of A, B, the result and the sums
_DTYPES = {
    "dense": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
    "batched": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
    "fused": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16, torch.float16, torch.float32),
    "float8": (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32, torch.float32),
    "int8": (torch.int8, torch.int8, torch.int32, torch.int32),
    "mixed": (torch.int8, torch.bfloat16, torch.bfloat16, torch.float32),
}
_BATCH = 2
_EPILOGUE = "def epilogue(accum, other):\n    D = relu(accum) + other\n    return D\n"


def offered(problem: str, shape: tuple[int, int, int]) -> dict[str, tuple[str, ...]]:
    """All operators for a problem: name of the class -> names of its operators.

    Args:
        problem: of `BLACKWELL_PROBLEMS` or `BLACKWELL_OTHERS`.
        shape: M, N, K; with groups M is that of all together.
    """
    found: dict[str, tuple[str, ...]] = {}
    for operator in _listed(arguments_of(problem, shape)):
        kind = type(operator).__name__
        found[kind] = (*found.get(kind, ()), _name(operator))
    return found


def seeded(shape: tuple[int, int, int], limit: int) -> tuple[str, ...]:
    """The operators for a dense bf16 problem that nvMatmulHeuristics ranks first for a B200, the best first."""
    ranked = operators.get_operators(
        arguments_of("dense", shape), target_sm=_target(), heuristic=NvMatmulHeuristics("B200"), limit=limit
    )
    return tuple(_name(operator) for operator in ranked)


def named(problem: str, shape: tuple[int, int, int], wanted: Sequence[tuple[int, int, int, int]]) -> tuple[str, ...]:
    """The operators that are nearest to what is wanted, in its order, each once.

    Tiles have to be equal. Of clusters the nearest is taken: block-scaled operators have none of fewer than two blocks along M.

    Args:
        problem: of `BLACKWELL_PROBLEMS`.
        shape: as of `offered`.
        wanted: tile of one block, M and N, and blocks of a cluster, M and N.
    """
    found: list[str] = []
    listed = _listed(arguments_of(problem, shape))
    operators_of = [operator for operator in listed if isinstance(operator.metadata.design, Sm100DesignMetadata)]
    for tile_m, tile_n, *cluster in wanted:
        fitting = [operator for operator in operators_of if _tile_of_block(operator) == (tile_m, tile_n)]
        if fitting:
            found.append(_name(min(fitting, key=lambda operator: _distance(operator, cluster))))
    return tuple(dict.fromkeys(found))


def _tile_of_block(operator: Any) -> tuple[int, int]:
    """Its part of the tile: two blocks that multiply together share the rows."""
    tile_m, tile_n = operator.metadata.design.tile_shape[:2]
    return tile_m // (2 if operator.metadata.design.use_2cta_mma else 1), tile_n


def _distance(operator: Any, cluster: Sequence[int]) -> tuple[float, bool]:
    """Between clusters, in doublings; the same cluster with its blocks multiplying in pairs is nearer than without."""
    blocks = operator.metadata.design.cluster_shape[:2]
    pairs = bool(operator.metadata.design.use_2cta_mma)
    return sum(abs(math.log2(a / b)) for a, b in zip(blocks, cluster, strict=True)), pairs != (cluster[0] % 2 == 0)


def compile_operator(name: str, problem: str, shape: tuple[int, int, int]) -> Any:
    """What has `export_to_c`.

    Raises:
        CompileError: there is no such operator for the problem.
    """
    arguments = arguments_of(problem, shape)
    found = [operator for operator in _listed(arguments) if _name(operator) == name]
    if not found:
        raise CompileError(f"nvidia-cutlass-operators has no {name} for {problem} {shape}: take one of `offered`")
    return found[0].compile(arguments, target_sm=_target()).compiled_obj


def arguments_of(problem: str, shape: tuple[int, int, int]) -> Any:
    """Operands on the CPU, contiguous along K.

    Raises:
        CompileError: no such problem.
    """
    m, n, k = shape
    if problem in _DTYPES:
        return _plain_arguments(problem, shape)
    out = torch.empty(m, n, dtype=torch.bfloat16)
    if problem == "grouped":
        a, b = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(BLACKWELL_GROUPS, n, k, dtype=torch.bfloat16).mT
        ends = torch.arange(1, BLACKWELL_GROUPS + 1, dtype=torch.int32) * (m // BLACKWELL_GROUPS)
        return operators.IndexPtrGroupedGemmArguments(
            a, b, out, accumulator_type=torch.float32, offsets=ends, offsets_along="m"
        )
    if problem == "mxfp8":
        block, scales = operators.ScaleMode.Blockwise1x32, torch.float8_e8m0fnu
        a, b = torch.empty(m, k, dtype=torch.float8_e4m3fn), torch.empty(n, k, dtype=torch.float8_e4m3fn).mT
    elif problem == "nvfp4":
        block, scales = operators.ScaleMode.Blockwise1x16, torch.float8_e4m3fn
        a = torch.empty(m, k // 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        b = torch.empty(n, k // 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).mT
    else:
        raise CompileError(f"problems for SM100 are {', '.join((*BLACKWELL_PROBLEMS, *BLACKWELL_OTHERS))}, not {problem}")
    layout = operators.ScaleSwizzleMode.Swizzle32x4x4
    scaled = []
    for matrix, rows in ((a, m), (b, n)):
        num_scales = operators.ScaledOperand.numel_scale((rows, k), block, layout)
        scale = torch.empty(num_scales, dtype=torch.uint8).view(scales)
        scaled.append(operators.ScaledOperand(matrix, scale, block, layout))
    return operators.GemmArguments(*scaled, out, accumulator_type=torch.float32)


def _plain_arguments(problem: str, shape: tuple[int, int, int]) -> Any:
    """Of matrices without scales."""
    m, n, k = shape
    lead = (_BATCH,) if problem == "batched" else ()
    a_dtype, b_dtype, out_dtype, accumulator = _DTYPES[problem]
    a, b = torch.empty(*lead, m, k, dtype=a_dtype), torch.empty(*lead, n, k, dtype=b_dtype).mT
    out, epilogue = torch.empty(*lead, m, n, dtype=out_dtype), None
    if problem == "fused":
        epilogue = operators.EpilogueArguments(_EPILOGUE, other=torch.empty(m, n, dtype=out_dtype), D=out)
    return operators.GemmArguments(a, b, out, accumulator_type=accumulator, epilogue=epilogue)


def _listed(arguments: Any) -> list[Any]:
    return list(operators.get_operators(arguments, target_sm=_target()))


def _name(operator: Any) -> str:
    return str(operator.metadata.operator_name)


def _target() -> str:
    return ARCH.removeprefix("sm_")
