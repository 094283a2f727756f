"""SM100's operators of nvidia-cutlass-operators, by name: dense, block-scaled and grouped. Compiled, never run by us.

None of their parameters are a `CuteConfig`'s (MMA over two blocks, schedulers, preferred clusters): an operator's name says
them all. Import this with `compiler.environment` set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from cutlass import operators
from cutlass.operators.heuristics import NvMatmulHeuristics

from autokernel.cutedsl.config import BLACKWELL_GROUPS, BLACKWELL_PROBLEMS
from autokernel.errors import CompileError

ARCH = "sm_100a"
NUM_UNITS = 148  # multiprocessors of a B200


def offered(problem: str, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Names of all operators for a problem.

    Args:
        problem: of `BLACKWELL_PROBLEMS`.
        shape: M, N, K; with groups M is that of all together.
    """
    return tuple(_name(operator) for operator in _listed(arguments_of(problem, shape)))


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
    operators_of = _listed(arguments_of(problem, shape))
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
    """Operands on the CPU, contiguous along K, and a bf16 result.

    Raises:
        CompileError: no such problem.
    """
    m, n, k = shape
    out = torch.empty(m, n, dtype=torch.bfloat16)
    if problem == "dense":
        a, b = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(n, k, dtype=torch.bfloat16).mT
        return operators.GemmArguments(a, b, out, accumulator_type=torch.float32)
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
        raise CompileError(f"problems for SM100 are {', '.join(BLACKWELL_PROBLEMS)}, not {problem}")
    layout = operators.ScaleSwizzleMode.Swizzle32x4x4
    scaled = []
    for matrix, rows in ((a, m), (b, n)):
        num_scales = operators.ScaledOperand.numel_scale((rows, k), block, layout)
        scale = torch.empty(num_scales, dtype=torch.uint8).view(scales)
        scaled.append(operators.ScaledOperand(matrix, scale, block, layout))
    return operators.GemmArguments(*scaled, out, accumulator_type=torch.float32)


def _listed(arguments: Any) -> list[Any]:
    found = operators.get_operators(arguments, target_sm=_target())
    return [operator for operator in found if "Sm80" not in _name(operator)]  # older GPUs' kernels run on newer ones, slowly


def _name(operator: Any) -> str:
    return str(operator.metadata.operator_name)


def _target() -> str:
    return ARCH.removeprefix("sm_")
