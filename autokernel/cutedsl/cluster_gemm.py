"""A GEMM of our own for few rows on SM90: the blocks of a cluster share a tile's K, and join their sums in shared memory.

With few rows, a product is as fast as its weights are read. Every multiprocessor is to read some of them at once, which few
tiles of all of K allow; and parts of K that are joined through global memory cost what they were to save. Here the parts of a
tile are the blocks of one cluster: each reads its part of the weights and of x by TMA, multiplies, and sends its sums into
the shared memory of the block that adds them up, in the order of the parts: results repeat to the bit.

It is only imported where it is compiled, with `compiler.environment` set.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import cute, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import LayoutEnum
from cutlass.utils import hopper_helpers as sm90

from autokernel.cutedsl.config import CLUSTER_BLOCK_K, CLUSTER_ROWS, CuteConfig

WARP = 32
WARPGROUP = 128
BLOCK_K = CLUSTER_BLOCK_K  # 128 bytes of 16 bits: the widest swizzle
ALIGN = 1024  # bytes, of the swizzle's pattern
_ROWS = CLUSTER_ROWS


class ClusterGemm:
    """out[M, N] = x[M, K] @ w[K, N], w contiguous along K, the others along their last dimension; x and w in 16 bits.

    Of the config, `tile_m` is rows of w in a tile, a warpgroup for each 64, `tile_n` rows of x; `cluster_m` tiles lie beside
    each other whose blocks share what they read of x, and `split_k` blocks share a tile.
    """

    def __init__(self, config: CuteConfig) -> None:
        self.tile_m, self.tile_n, self.cluster_m, self.split_k = config.tile_m, config.tile_n, config.cluster_m, config.split_k
        self.groups = config.tile_m // _ROWS
        self.consumers = 4 * self.groups  # warps
        self.mine = self.consumers // config.split_k  # warps' rows that a block adds up
        self.eights = config.tile_n // 8
        self.sums = config.tile_m * config.tile_n  # fp32, of all parts of what a block adds up
        self.block_k = config.tile_k or BLOCK_K  # of a stage, in swizzled blocks side by side
        self.stages = config.cluster_stages

    @cute.jit  # type: ignore[untyped-decorator]
    def __call__(self, w: cute.Tensor, x: cute.Tensor, out: cute.Tensor, stream: Any) -> None:
        w = cute.make_tensor(w.iterator, cute.select(w.layout, mode=[1, 0]))  # here, where it costs the host no microsecond
        mma, w_layout, x_layout = self.shared_layouts(w.element_type)
        read = cpasync.CopyBulkTensorTileG2SOp()
        shared = read if self.cluster_m == 1 else cpasync.CopyBulkTensorTileG2SMulticastOp()
        w_stage, x_stage = (cute.slice_(layout, (None, None, 0)) for layout in (w_layout, x_layout))
        w_atom, w_tma = cpasync.make_tiled_tma_atom(read, w, w_stage, (self.tile_m, self.block_k))
        x_tile = (self.tile_n, self.block_k)
        x_atom, x_tma = cpasync.make_tiled_tma_atom(shared, x, x_stage, x_tile, num_multicast=self.cluster_m)
        tiles = cute.ceil_div(cute.ceil_div(out.shape[1], self.tile_m), self.cluster_m) * self.cluster_m
        self.kernel((w_atom, w_tma), (x_atom, x_tma), out, mma, w_layout, x_layout).launch(
            grid=(tiles, cute.ceil_div(out.shape[0], self.tile_n), self.split_k),
            block=((self.consumers + 1) * WARP, 1, 1),
            cluster=(self.cluster_m, 1, self.split_k),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel  # type: ignore[untyped-decorator]
    def kernel(self, of_w: Any, of_x: Any, out: cute.Tensor, mma: cute.TiledMma, w_layout: Any, x_layout: Any) -> None:
        """`of_w` and `of_x`: a TMA atom and its tensor."""
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        tile, rows, part = cute.arch.block_idx()
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())  # cluster_m first, then parts of K
        beside = rank % self.cluster_m

        if warp == self.consumers:
            cpasync.prefetch_descriptor(of_w[0])
            cpasync.prefetch_descriptor(of_x[0])

        memory = cutlass.utils.SmemAllocator()
        barriers = memory.allocate_array(cutlass.Int64, 2 * self.stages)
        arrived = memory.allocate_array(cutlass.Int64, 1)
        sums = memory.allocate_array(cutlass.Float32, self.sums, byte_alignment=128)
        w_shared = memory.allocate_tensor(self.dtype, w_layout.outer, byte_alignment=ALIGN, swizzle=w_layout.inner)
        x_shared = memory.allocate_tensor(self.dtype, x_layout.outer, byte_alignment=ALIGN, swizzle=x_layout.inner)

        pipe = self.stage_pipe(barriers)
        if thread == 0:
            cute.arch.mbarrier_init(arrived, 1)
            cute.arch.mbarrier_arrive_and_expect_tx(arrived, 4 * self.sums)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.cluster_arrive_relaxed()
        if cutlass.const_expr(self.cluster_m > 1):
            cute.arch.cluster_wait()

        k_tiles = cute.ceil_div(of_w[1].shape[1], self.block_k)
        per_part = cute.ceil_div(k_tiles, self.split_k)
        first = part * per_part
        count = cutlass.max(cutlass.min(k_tiles - first, per_part), 0)

        if warp == self.consumers:
            self.read(pipe, (*of_w, w_shared), (*of_x, x_shared), (tile, rows), beside, first, count)
            if cutlass.const_expr(self.cluster_m == 1):
                cute.arch.cluster_wait()
        else:
            accumulated = self.multiply(pipe, mma, w_shared, x_shared, thread, count)
            if cutlass.const_expr(self.cluster_m == 1):
                cute.arch.cluster_wait()
            self.send(accumulated, sums, arrived, warp, thread % WARP, part, beside)
            cute.arch.mbarrier_wait(arrived, 0)
            self.add_up(sums, out, warp, thread % WARP, tile, rows, part)

    def shared_layouts(self, dtype: Any) -> tuple[Any, Any, Any]:
        """How warpgroups multiply, and how w's stages and x's blocks of K lie in shared memory."""
        self.dtype = dtype
        major = LayoutEnum.ROW_MAJOR.sm90_mma_major_mode()
        mma = sm90.make_trivial_tiled_mma(
            dtype, dtype, major, major, cutlass.Float32, (self.groups, 1, 1), tiler_mn=(_ROWS, self.tile_n)
        )
        atom = warpgroup.make_smem_layout_atom(sm90.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, BLOCK_K), dtype)
        w_layout = cute.tile_to_shape(atom, (self.tile_m, self.block_k, self.stages), order=(0, 1, 2))
        return mma, w_layout, cute.tile_to_shape(atom, (self.tile_n, self.block_k, self.stages), order=(0, 1, 2))

    def stage_pipe(self, barriers: Any) -> Any:
        """Between the warp that reads and those that multiply."""
        return pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers,
            num_stages=self.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, self.cluster_m * self.consumers),
            tx_count=(self.tile_m + self.tile_n) * self.block_k * 2,
            cta_layout_vmnk=cute.make_layout((1, self.cluster_m, 1, self.split_k)),
            defer_sync=True,
        )

    @cute.jit  # type: ignore[untyped-decorator]
    def read(self, pipe: Any, of_w: Any, of_x: Any, tiles: Any, beside: Any, first: Any, count: Any) -> None:
        """One warp: asks for all of the block's part of w and x, as fast as stages are free."""
        (w_atom, w_tma, w_shared), (x_atom, x_tma, x_shared), (tile, rows) = of_w, of_x, tiles
        w_tiles = cute.local_tile(w_tma, (self.tile_m, self.block_k), (tile, None))
        x_tiles = cute.local_tile(x_tma, (self.tile_n, self.block_k), (rows, None))
        w_to, w_from = cpasync.tma_partition(
            w_atom, 0, cute.make_layout(1), cute.group_modes(w_shared, 0, 2), cute.group_modes(w_tiles, 0, 2)
        )
        x_to, x_from = cpasync.tma_partition(
            x_atom, beside, cute.make_layout(self.cluster_m), cute.group_modes(x_shared, 0, 2), cute.group_modes(x_tiles, 0, 2)
        )
        mask = 0
        if cutlass.const_expr(self.cluster_m > 1):
            rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
            mask = cutlass.Int16(((1 << self.cluster_m) - 1) << (rank - beside))
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        for k in cutlass.range(count, unroll=1):
            pipe.producer_acquire(state)
            barrier = pipe.producer_get_barrier(state)
            cute.copy(w_atom, w_from[(None, first + k)], w_to[(None, state.index)], tma_bar_ptr=barrier)
            cute.copy(x_atom, x_from[(None, first + k)], x_to[(None, state.index)], tma_bar_ptr=barrier, mcast_mask=mask)
            state.advance()
        if cutlass.const_expr(self.cluster_m > 1):
            pipe.producer_tail(state)  # no block ends before its neighbours have let go of its barriers

    @cute.jit  # type: ignore[untyped-decorator]
    def multiply(self, pipe: Any, mma: Any, w_shared: Any, x_shared: Any, thread: Any, count: Any) -> Any:
        """A warpgroup: its 64 rows of the tile, transposed, over the block's part of K."""
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        slices = mma.get_slice(cute.make_layout(self.groups, stride=WARPGROUP)(group))
        w_parts = mma.make_fragment_A(slices.partition_A(w_shared))
        x_parts = mma.make_fragment_B(slices.partition_B(x_shared))
        accumulated = cute.make_rmem_tensor(mma.partition_shape_C((self.tile_m, self.tile_n)), cutlass.Float32)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        reads = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        releases = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        accumulated.fill(0.0)
        warpgroup.fence()
        for k in cutlass.range(count, unroll=1):
            pipe.consumer_wait(reads)
            for block in cutlass.range_constexpr(cute.size(w_parts, mode=[2])):
                at = (None, None, block, reads.index)
                cute.gemm(mma, accumulated, w_parts[at], x_parts[at], accumulated)
            warpgroup.commit_group()
            reads.advance()
            if k > 0:
                warpgroup.wait_group(1)
                pipe.consumer_release(releases)
                releases.advance()
        warpgroup.wait_group(0)
        if count > 0:
            pipe.consumer_release(releases)
        return accumulated

    @cute.jit  # type: ignore[untyped-decorator]
    def send(self, accumulated: Any, sums: Any, arrived: Any, warp: Any, lane: Any, part: Any, beside: Any) -> None:
        """Each warp: its sums to the block that adds up its 16 rows. They lie there as [part, 16 rows, 8 columns, lane, 4]."""
        to = (warp // self.mine) * self.cluster_m + beside
        for eight in cutlass.range_constexpr(self.eights):
            place = (((part * self.mine + warp % self.mine) * self.eights + eight) * WARP + lane) * 4
            values = tuple(_bits(accumulated[4 * eight + i]) for i in range(4))
            cute.arch.store_async_dsmem((sums + place).align(16), values, arrived, to)

    @cute.jit  # type: ignore[untyped-decorator]
    def add_up(self, sums: Any, out: Any, warp: Any, lane: Any, tile: Any, rows: Any, part: Any) -> None:
        """All warps: the block's rows of w, 16 by 8 at a time; four results that lie side by side for each lane."""
        units = self.mine * self.eights
        column, quarter = lane // 4, lane % 4
        # where `send` puts the first of the quarter's rows: rows are 4 lanes apart there, halves of 8 rows 2 values
        source = (4 * (4 * (quarter % 2)) + column // 2) * 4 + 2 * (quarter // 2) + column % 2
        num_rows, num_columns = out.shape
        for turn in cutlass.range_constexpr((units + self.consumers - 1) // self.consumers):
            unit = turn * self.consumers + warp
            if unit < units:
                found = cute.make_rmem_tensor(4, cutlass.Float32)
                found.fill(0.0)
                for k in cutlass.range_constexpr(self.split_k):
                    values = cute.make_tensor(sums + (k * units + unit) * (4 * WARP), cute.make_layout(4 * WARP))
                    for i in cutlass.range_constexpr(4):
                        found[i] = found[i] + values[source + 16 * i]
                rounded = cute.make_rmem_tensor(4, out.element_type)
                rounded.store(found.load().to(out.element_type))
                row = rows * self.tile_n + (unit % self.eights) * 8 + column
                first = tile * self.tile_m + (part * self.mine + unit // self.eights) * 16 + quarter * 4
                if row < num_rows and first < num_columns:
                    target = cute.make_tensor((out.iterator + row * out.stride[0] + first).align(8), cute.make_layout(4))
                    cute.autovec_copy(rounded, target)


def _bits(value: Any) -> Any:
    """An fp32 number as the int32 that `store_async_dsmem` takes."""
    from cutlass._mlir.dialects import llvm

    return cutlass.Int32(llvm.bitcast(cutlass.Int32.mlir_type, cutlass.Float32(value).ir_value()))
