"""Kernels of quack-kernels: the only import of it, with `epilogue_source`. Import it with `compiler.environment` set.

quack compiles through its epilogue frontend for any sizes; what it would pass at each call is written down as a `Launch`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from quack.cute_dsl_utils import get_max_active_clusters, torch2cute_dtype_map
from quack.gemm import GemmDefaultSm90, _compile_gemm
from quack.gemm_config import SplitKMode, cta_tile_shape_m
from quack.gemm_runtime.host import _compile_gemm_epi
from quack.gemm_sm90 import GemmSm90
from quack.gemm_sm100 import GemmSm100
from quack.rounding import RoundingMode

from autokernel.cutedsl.epilogue_source import GATED_RESULT, epilogue_of
from autokernel.cutedsl.spec import (
    AT_A_CALL,
    BIAS,
    MATRICES,
    SCALE_A,
    SQUARES,
    TRANSPOSED,
    KernelSpec,
    Launch,
)
from autokernel.ops.epilogue import PER_COLUMN, PER_ROW, operand_kind


def compile_spec(
    spec: KernelSpec, matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor], function: str
) -> tuple[Any, Launch]:
    """One kernel on SM90 or SM100.

    Args:
        spec: whose config fits its architecture.
        matrices: a, b and the result, of any legal size: examples.
        function: what the kernel is to be called.

    Returns:
        What has `export_to_c`, and how to call it.
    """
    config = spec.cute
    for remembered in (_compile_gemm, _compile_gemm_epi):  # under keys that know nothing of what it is told below
        remembered.cache_clear()
    if config.separate:
        with _told(spec):
            return _compiled_parts(spec), _launch(spec, GemmDefaultSm90.EpilogueArguments._fields, function, config.swap)
    a, b, out = matrices
    # quack swaps when it traces, so that nothing is transposed at a call; with parts of K or sums it does not: there we do
    by_hand = config.swap and (config.split_k > 1 or spec.squares)
    if by_hand:
        a, b, out = b.mT, a.mT, out.mT
    with _told(spec):
        plan = epilogue_of(spec, swapped=by_hand).gemm(
            a,
            b,
            None if spec.gated else out,
            epi_args={GATED_RESULT: out} if spec.gated else _operands(spec, matrices[2], by_hand),
            tile_M=config.tile_m,
            tile_N=config.tile_n,
            tile_K=config.tile_k or None,
            cluster_M=config.cluster_m,
            cluster_N=config.cluster_n,
            pingpong=config.pingpong,
            b_kn=True,
            swap_ab=config.swap and not by_hand,
            split_k=config.split_k,
            split_k_mode=SplitKMode.SERIAL if config.ordered else SplitKMode.PARALLEL,
            concat_layout=("B",) if spec.gated else None,  # gate and up are B's halves, not every other column
            _launch=False,
        )
    return plan.compiled_fn, _launch(spec, plan.gemm_cls.EpilogueArguments._fields, function, by_hand)


@contextlib.contextmanager
def _told(spec: KernelSpec) -> Iterator[None]:
    """While a kernel is compiled: what its class can be told and no frontend tells it.

    That is how it keeps sums of 8-bit products, and whether it is launched programmatically. By itself it would be, and calls
    that follow each other, as where it is timed, would overlap.
    """
    sums = {"fp8_fast_accum": True} if spec.cute.fast_accum else {}
    with contextlib.ExitStack() as undo:
        for kind, of_kind in ((GemmSm90, sums), (GemmSm100, {})):
            made = kind.__init__
            undo.callback(setattr, kind, "__init__", made)
            kind.__init__ = _made(made, {"use_pdl": spec.pdl, **of_kind})
        yield


def _made(made: Callable[..., None], said: dict[str, bool]) -> Callable[..., None]:
    """A class's constructor, with these arguments whatever it is called with."""

    @functools.wraps(made)
    def made_so(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, **said})

    return made_so


def _compiled_parts(spec: KernelSpec) -> Any:
    """The kernel that leaves the parts of K. Its own frontends would sum them in a second kernel, with no epilogue of ours."""
    config = spec.cute
    a_major, b_major, d_major = spec.a_major, spec.b_major, "n"
    if config.swap:
        a_major, b_major, d_major = ("k" if spec.b_major == "k" else "m"), ("k" if spec.a_major == "k" else "n"), "m"
    dtypes = [torch2cute_dtype_map[getattr(torch, name)] for name in spec.dtypes]
    a_dtype, b_dtype = reversed(dtypes) if config.swap else dtypes
    given = {
        **dict.fromkeys(inspect.signature(inspect.unwrap(_compile_gemm)).parameters),
        **{"a_dtype": a_dtype, "b_dtype": b_dtype, "d_dtype": torch2cute_dtype_map[torch.float32]},
        **{"a_major": a_major, "b_major": b_major, "d_major": d_major, "b_kn": True, "batched": False, "sf_batched": True},
        "tile_shape_mn": (config.tile_m, config.tile_n, *((config.tile_k,) if config.tile_k else ())),
        "cluster_shape_mnk": (config.cluster_m, config.cluster_n, 1),
        **{"pingpong": config.pingpong, "persistent": True, "is_dynamic_persistent": False, "concat_layout": ()},
        **{"colvec_ndim": 0, "alpha_mode": 0, "beta_mode": 0, "sr_seed_mode": 0, "sfd_norm_const_mode": 0},
        **dict.fromkeys(("add_to_output", "varlen_m", "varlen_k", "gather_A", "use_tma_gather"), False),
        **{"has_batch_idx_permute": False, "has_ag": False, "rounding_mode": RoundingMode.RN},
        **{"device_capacity": (9, 0), "split_k": config.split_k, "split_k_mode": SplitKMode.SEPARATE},
    }
    return _compile_gemm(**given)


def _operands(spec: KernelSpec, out: torch.Tensor, transposed: bool) -> dict[str, torch.Tensor]:
    """Examples of the epilogue's operands and sums, [M, N] as the caller has it unless `transposed`."""
    made: dict[str, torch.Tensor] = {}
    for operand, name in spec.operands().items():
        if name in MATRICES:
            made[operand] = torch.empty_like(out.mT if transposed else out)
        elif name == BIAS or operand_kind(name) == PER_COLUMN:
            made[operand] = torch.empty(out.shape[-1], dtype=out.dtype)
        elif operand_kind(name) == PER_ROW:
            made[operand] = torch.empty(out.shape[-2], dtype=out.dtype)
        else:
            size = {SCALE_A: out.shape[-2], "scale_b": out.shape[-1]}.get(name, 1)
            made[operand] = torch.empty(size, dtype=torch.float32)
    if spec.squares:
        rows, tiles = out.shape[-2], -(-out.shape[-1] // spec.squared_columns)
        sums = torch.empty((rows, tiles), dtype=torch.float32)
        made[SQUARES] = sums.mT if transposed else sums
    return made


def _launch(spec: KernelSpec, fields: tuple[str, ...], function: str, by_hand: bool) -> Launch:
    """How quack's own `run_gemm_epi_plan` would call the kernel."""
    config = spec.cute
    mark = TRANSPOSED if by_hand else ""
    first, second = ("b", "a") if config.swap else ("a", "b")
    epilogue: list[object] = []
    sums = config.split_k > 1 and not config.separate
    for field in fields:
        if field == GATED_RESULT:
            epilogue.append("out")
        elif field in spec.operands() or (field == SQUARES and spec.squares):
            epilogue.append(field + mark)
        else:
            scratch = {"split_k_semaphore": "semaphore", "split_k_workspace": "workspace"}
            epilogue.append(scratch.get(field) if sums else None)
    clusters = get_max_active_clusters(config.cluster_m * config.cluster_n)
    scheduler = [clusters, None, AT_A_CALL, None, None, None]
    result = None if spec.gated else "out" + mark
    arguments = (first + mark, second + mark, result, None, epilogue, scheduler, None, None, None)
    tile_m = cta_tile_shape_m(config.tile_m, config.cluster_m, int(spec.arch[3:-2]))
    return Launch(
        function=function,
        arguments=arguments,
        scratch_tile=(tile_m, config.tile_n, config.cluster_m, config.cluster_n) if sums else (),
        transposed=config.swap,
        zeroed_workspace=sums and not config.ordered,
    )
