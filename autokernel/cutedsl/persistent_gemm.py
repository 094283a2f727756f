"""The cluster kernel for products of many columns: a block keeps its part of x, and computes one tile after another.

It is only imported where it is compiled, with `compiler.environment` set.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import cute, pipeline
from cutlass._mlir.dialects.nvvm import MemScopeKind
from cutlass.cute.nvgpu import cpasync, warpgroup

from autokernel.cutedsl.cluster_gemm import ALIGN, BLOCK_K, WARP, ClusterGemm
from autokernel.cutedsl.config import CuteConfig

_WITHOUT = 3


class PersistentGemm(ClusterGemm):
    """The same where rows are so few that a block keeps its part of x, and reads nothing but weights from its second tile on.

    As many clusters as run at once take tiles by turns. What a tile's parts add up to is stored while the next tile is
    multiplied: sums have two places by turns, and each block tells the others when it has read one.
    """

    def __init__(self, config: CuteConfig, num_units: int) -> None:
        super().__init__(config)
        self.x_blocks = self.kept_k = config.kept_k
        # clusters lie within groups of up to 18 multiprocessors, so that larger ones leave some of those without
        self.clusters = num_units // config.split_k - (_WITHOUT if config.split_k > 2 else 0)

    def across(self, tiles: Any) -> Any:
        return cutlass.min(tiles, self.clusters)

    @cute.kernel  # type: ignore[untyped-decorator]
    def kernel(self, of_w: Any, of_x: Any, out: cute.Tensor, mma: cute.TiledMma, w_layout: Any, x_layout: Any) -> None:
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        start, rows, part = cute.arch.block_idx()
        step, _, _ = cute.arch.grid_dim()

        if warp == self.consumers:
            cpasync.prefetch_descriptor(of_w[0])
            cpasync.prefetch_descriptor(of_x[0])

        memory = cutlass.utils.SmemAllocator()
        barriers = memory.allocate_array(cutlass.Int64, 2 * self.stages)
        kept = memory.allocate_array(cutlass.Int64, self.kept_k)  # x's blocks of K have come
        arrived = memory.allocate_array(cutlass.Int64, 2)  # all sums of a tile have come
        free = memory.allocate_array(cutlass.Int64, 2)  # every block has read the sums that lay there
        sums = memory.allocate_array(cutlass.Float32, 2 * self.sums, byte_alignment=128)
        w_shared = memory.allocate_tensor(self.dtype, w_layout.outer, byte_alignment=ALIGN, swizzle=w_layout.inner)
        x_shared = memory.allocate_tensor(self.dtype, x_layout.outer, byte_alignment=ALIGN, swizzle=x_layout.inner)

        pipe = self.stage_pipe(barriers, self.tile_m)
        if thread == 0:
            for place in cutlass.range_constexpr(2):
                cute.arch.mbarrier_init(arrived + place, 1)
                cute.arch.mbarrier_init(free + place, self.split_k * self.consumers)
                cute.arch.mbarrier_arrive_and_expect_tx(arrived + place, 4 * self.sums)
        if thread < self.kept_k:
            cute.arch.mbarrier_init(kept + thread, 1)
            cute.arch.mbarrier_arrive_and_expect_tx(kept + thread, self.tile_n * BLOCK_K * 2)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.cluster_arrive_relaxed()

        count = (cute.ceil_div(out.shape[1], self.tile_m) - start + step - 1) // step
        if warp == self.consumers:
            self.read_all(pipe, (*of_w, w_shared), (*of_x, x_shared), kept, (start, step, count), rows, part)
            cute.arch.cluster_wait()
        else:
            cute.arch.cluster_wait()
            places = (sums, arrived, free)
            self.multiply_all(
                pipe, mma, (w_shared, x_shared), kept, places, out, (start, step, count), rows, part, warp, thread
            )

    @cute.jit  # type: ignore[untyped-decorator]
    def read_all(self, pipe: Any, of_w: Any, of_x: Any, kept: Any, turns: Any, rows: Any, part: Any) -> None:
        """One warp: x with the first tile's weights, then weights alone."""
        (w_atom, w_tma, w_shared), (x_atom, x_tma, x_shared), (start, step, count) = of_w, of_x, turns
        w_tiles = cute.local_tile(w_tma, (self.tile_m, BLOCK_K), (None, None))
        x_tiles = cute.local_tile(x_tma, (self.tile_n, BLOCK_K), (rows, None))
        alone = cute.make_layout(1)
        w_to, w_from = cpasync.tma_partition(
            w_atom, 0, alone, cute.group_modes(w_shared, 0, 2), cute.group_modes(w_tiles, 0, 2)
        )
        x_to, x_from = cpasync.tma_partition(
            x_atom, 0, alone, cute.group_modes(x_shared, 0, 2), cute.group_modes(x_tiles, 0, 2)
        )
        first = part * self.kept_k
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        once, again = self.hints()
        for turn in cutlass.range(count, unroll=1):
            tile = start + turn * step
            for k in cutlass.range(self.kept_k, unroll=1):
                pipe.producer_acquire(state)
                barrier = pipe.producer_get_barrier(state)
                w_stage = w_to[(None, state.index)]
                cute.copy(w_atom, w_from[(None, tile, first + k)], w_stage, tma_bar_ptr=barrier, cache_policy=once)
                if turn == 0:
                    cute.copy(x_atom, x_from[(None, first + k)], x_to[(None, k)], tma_bar_ptr=kept + k, cache_policy=again)
                state.advance()

    @cute.jit  # type: ignore[untyped-decorator]
    def multiply_all(
        self, pipe: Any, mma: Any, shared: Any, kept: Any, places: Any, out: Any, turns: Any, rows: Any, part: Any, warp: Any,
        thread: Any,
    ) -> None:  # fmt: skip
        """Warpgroups: tile after tile; the sums of each are added up behind the next one's products."""
        (w_shared, x_shared), (sums, arrived, free), (start, step, count) = shared, places, turns
        lane = thread % WARP
        parts, accumulated, reads, releases = self.fragments(mma, w_shared, x_shared, thread)
        for turn in cutlass.range(count, unroll=1):
            accumulated.fill(0.0)
            warpgroup.fence()
            reads, releases = self.over_k(pipe, mma, parts, accumulated, reads, releases, kept, self.kept_k)
            place = turn % 2
            if turn > 1:
                cute.arch.mbarrier_wait(free + place, (turn // 2 + 1) % 2)
            self.send(accumulated, sums + place * self.sums, arrived + place, warp, lane, part, 0)
            if turn > 0:
                self.finish((sums, arrived, free), out, start + (turn - 1) * step, rows, part, warp, thread, turn - 1, count)
        if count > 0:
            self.finish((sums, arrived, free), out, start + (count - 1) * step, rows, part, warp, thread, count - 1, count)

    @cute.jit  # type: ignore[untyped-decorator]
    def finish(
        self, places: Any, out: Any, tile: Any, rows: Any, part: Any, warp: Any, thread: Any, turn: Any, count: Any
    ) -> None:
        """All warps: one tile's sums, when all have come; the place is free for the tile after the next."""
        (sums, arrived, free), place, lane = places, turn % 2, thread % WARP
        cute.arch.mbarrier_wait(arrived + place, (turn // 2) % 2)
        again = turn + 2 < count
        if again and thread == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(arrived + place, 4 * self.sums)
        self.add_up(sums + place * self.sums, out, warp, lane, tile, rows, part)
        if again:
            cute.arch.sync_warp()
            if lane < self.split_k:
                cute.arch.mbarrier_arrive(free + place, lane, scope=MemScopeKind.CLUSTER)
