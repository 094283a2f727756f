"""A GEMM of our own for up to 16 rows on SM90: x stays in registers, and rows of weights are read from end to end.

With few rows, a product is as fast as its weights are read, and DRAM reads long stretches faster than many short ones. Kernels
that take both operands from shared memory read 128 to 512 bytes of each row of weights at a time, for x needs room beside
them. Here it has none: the 16 warps of a block keep its fragments in registers, each of a part of K, and copy their parts of
the same eight rows of weights into rings of their own, together whole rows from end to end. Nobody waits for another warp but
where the sums of a tile are added up, in the order of the warps: results repeat to the bit. Blocks stay, one to a
multiprocessor, and load x once where it has no more of K than a block keeps.

It is only imported where it is compiled, with `compiler.environment` set.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import cute

from autokernel.cutedsl.config import STATIONARY_WARPS, CuteConfig

WARP = 32
WARPS = STATIONARY_WARPS
EIGHT = 8  # rows of weights that a warp's matrix instruction takes
ROWS = 16  # of x, that it takes
STEP = 32  # elements of K for which a lane reads 16 bytes of a row: two instructions
SUMS = ROWS * EIGHT
HALF_BANKS = 32  # elements: half of what all banks of shared memory hold
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, {1};"
_X, _W, _SUMS = "{{$r0}, {$r1}, {$r2}, {$r3}}", "{{$r4}, {$r5}}", "{{$r6}, {$r7}, {$r8}, {$r9}}"
_COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];"


class StationaryGemm:
    """out[M, N] = x[M, K] @ w[N, K]^T, all contiguous along their last dimension, x and w in 16 bits.

    Of the config, `tile_m` is rows of w whose sums a block holds at a time, `tile_k` how much of K it keeps of x, in equal
    parts for its warps.
    """

    def __init__(self, config: CuteConfig, num_units: int) -> None:
        self.groups, self.tile_k, self.slots = config.tile_m // EIGHT, config.tile_k, config.stationary_slots
        self.part = self.tile_k // WARPS  # of a warp, elements
        self.steps = self.part // STEP
        self.slot = config.stationary_slot  # elements
        self.joined = min(self.groups, 2)  # groups whose sums are added up at a time
        self.num_units = num_units

    @cute.jit  # type: ignore[untyped-decorator]
    def __call__(self, w: cute.Tensor, x: cute.Tensor, out: cute.Tensor, stream: Any) -> None:
        tiles = cute.ceil_div(out.shape[1], self.groups * EIGHT)
        self.text = _MMA.format("bf16" if w.element_type is cutlass.BFloat16 else "f16", ", ".join((_X, _W, _SUMS)))
        self.kernel(w, x, out).launch(
            grid=(cutlass.min(tiles, self.num_units), cute.ceil_div(out.shape[0], ROWS), 1),
            block=(WARPS * WARP, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel  # type: ignore[untyped-decorator]
    def kernel(self, w: cute.Tensor, x: cute.Tensor, out: cute.Tensor) -> None:
        thread, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(thread // WARP), thread % WARP
        memory = cutlass.utils.SmemAllocator()
        barriers = memory.allocate_array(cutlass.Int64, WARPS * self.slots)
        sums = memory.allocate_array(cutlass.Float32, WARPS * self.joined * SUMS, byte_alignment=128)
        rings = memory.allocate_array(w.element_type, WARPS * self.slots * self.slot, byte_alignment=128)
        mine = (barriers + warp * self.slots, rings + warp * (self.slots * self.slot))
        if lane == 0:
            for i in cutlass.range_constexpr(self.slots):
                cute.arch.mbarrier_init(mine[0] + i, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        self.multiply(w, x, out, mine, sums, (warp, lane))

    @cute.jit  # type: ignore[untyped-decorator]
    def multiply(self, w: cute.Tensor, x: cute.Tensor, out: cute.Tensor, of_ring: Any, sums: Any, place: Any) -> None:
        """Each warp: its part of K, of all of the block's tiles."""
        (barriers, ring), (warp, lane) = of_ring, place
        depth = x.shape[1]
        first, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        tiles, phases = cute.ceil_div(out.shape[1], self.groups * EIGHT), cute.ceil_div(depth, self.tile_k)
        # what is asked for next, `slots` ahead of what is multiplied
        next_tile, next_phase, next_group = first, cutlass.Int32(0), cutlass.Int32(0)
        for i in cutlass.range_constexpr(self.slots):
            self.ask(w, of_ring, i, (next_tile, next_phase, next_group), tiles, place)
            next_tile, next_phase, next_group = self.advance(next_tile, next_phase, next_group, blocks, phases)

        kept = cute.make_rmem_tensor((4, 2 * self.steps), cutlass.Int32)
        accumulated = cute.make_rmem_tensor((4, self.groups, 2), cutlass.Float32)  # two chains of instructions
        if phases == 1:
            self.keep(x, kept, 0, warp, lane)
        # the lane's 16 bytes of each step and slot, as words
        source = cute.recast_ptr((ring + (self.row_of(lane // 4) + (lane % 4) * EIGHT)).align(16), dtype=cutlass.Int32)
        shape, stride = (4, self.steps, self.slots), (1, STEP // 2, self.slot // 2)
        words = cute.make_tensor(source, cute.make_layout(shape, stride=stride))
        slot, parity = cutlass.Int32(0), cutlass.Int32(0)
        for tile in cutlass.range(first, tiles, blocks, unroll=1):
            accumulated.fill(0.0)
            for phase in cutlass.range(phases, unroll=1):
                if phases > 1:
                    self.keep(x, kept, phase, warp, lane)
                left = depth - phase * self.tile_k - warp * self.part  # of K, from the warp's part on
                for group in cutlass.range_constexpr(self.groups):
                    cute.arch.mbarrier_wait(barriers + slot, parity)
                    if left >= self.part:
                        self.eight_rows(words[(None, None, slot)], kept, accumulated, group, None)
                    else:
                        self.eight_rows(words[(None, None, slot)], kept, accumulated, group, left - (lane % 4) * EIGHT)
                    cute.arch.sync_warp()
                    self.ask(w, of_ring, slot, (next_tile, next_phase, next_group), tiles, place)
                    next_tile, next_phase, next_group = self.advance(next_tile, next_phase, next_group, blocks, phases)
                    slot = slot + 1
                    if slot == self.slots:
                        slot = cutlass.Int32(0)
                        parity = parity ^ 1
            for turn in cutlass.range_constexpr(self.groups // self.joined):
                self.join(accumulated, turn * self.joined, sums, out, tile, warp, lane)

    def row_of(self, row: Any) -> Any:
        """Where one of eight rows begins in a slot. Even and odd rows lie half of the banks apart: two of them are read at
        once."""
        return (row // 2 + (row % 2) * (EIGHT // 2)) * self.part + (row % 2) * HALF_BANKS

    @cute.jit  # type: ignore[untyped-decorator]
    def ask(self, w: cute.Tensor, of_ring: Any, slot: Any, what: Any, tiles: Any, place: Any) -> None:
        """A warp: its part of K of eight rows, if there are any. A lane for each row."""
        (barriers, ring), (tile, phase, group), (warp, lane) = of_ring, what, place
        num_columns, depth = w.shape
        if tile < tiles:
            row = (tile * self.groups + group) * EIGHT
            k = phase * self.tile_k + warp * self.part
            rows = cutlass.max(cutlass.min(num_columns - row, EIGHT), 0)
            size = cutlass.max(cutlass.min(depth - k, self.part), 0) * 2  # bytes
            if lane == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(barriers + slot, rows * size)
            cute.arch.sync_warp()
            if lane < rows and size > 0:
                weights = w.iterator + ((row + lane) * w.stride[0] + k)
                target = ring + (slot * self.slot + self.row_of(lane))
                operands = [target.toint(), weights.toint(), size, (barriers + slot).toint()]
                cute.arch.inline_ptx(_COPY, read_only_args=operands)

    @cute.jit  # type: ignore[untyped-decorator]
    def advance(self, tile: Any, phase: Any, group: Any, blocks: Any, phases: Any) -> tuple[Any, Any, Any]:
        """The next eight rows: groups change first, then parts of K, then tiles."""
        group = group + 1
        if group == self.groups:
            group = cutlass.Int32(0)
            phase = phase + 1
            if phase == phases:
                phase = cutlass.Int32(0)
                tile = tile + blocks
        return tile, phase, group

    @cute.jit  # type: ignore[untyped-decorator]
    def keep(self, x: cute.Tensor, kept: Any, phase: Any, warp: Any, lane: Any) -> None:
        """Load the warp's part of x: [4 registers of a row's 16 bytes, (rows 0 to 7, rows 8 to 15) of each step]."""
        num_rows, depth = x.shape
        _, rows, _ = cute.arch.block_idx()
        # the compiler keeps a row's 16 bytes in neighbouring registers, and would sort them anew for each instruction: what it
        # has computed it keeps where the instructions want it
        nothing = num_rows >> 31
        for step in cutlass.range_constexpr(self.steps):
            k = phase * self.tile_k + (warp * self.steps + step) * STEP + (lane % 4) * EIGHT
            for half in cutlass.range_constexpr(2):
                found = cute.make_rmem_tensor(4, cutlass.Int32)
                found.fill(0)
                row = rows * ROWS + half * EIGHT + lane // 4
                if row < num_rows and k < depth:
                    source = cute.recast_ptr((x.iterator + (row * x.stride[0] + k)).align(16), dtype=cutlass.Int32)
                    cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), found)
                for i in cutlass.range_constexpr(4):
                    kept[i, 2 * step + half] = found[i] ^ nothing

    @cute.jit  # type: ignore[untyped-decorator]
    def eight_rows(self, words: Any, kept: Any, accumulated: Any, group: Any, left: Any) -> None:
        """The warp's part of K of eight rows of weights. Both matrices' K is permuted alike within a step: of the 16 bytes
        that a lane reads of a row, the first half goes to the first instruction, the other one to the second.

        Args:
            left: of K from the lane's bytes on, where that is less than the part. Shared memory behind it may hold anything.
        """
        found = cute.make_rmem_tensor((4, self.steps), cutlass.Int32)
        for step in cutlass.range_constexpr(self.steps):
            if cutlass.const_expr(left is None):
                cute.autovec_copy(words[(None, step)], found[(None, step)])
            else:
                found[(None, step)].fill(0)
                if step * STEP < left:
                    cute.autovec_copy(words[(None, step)], found[(None, step)])
        for step in cutlass.range_constexpr(self.steps):
            for half in cutlass.range_constexpr(2):
                low, high = 2 * half, 2 * half + 1
                x_words = [kept[low, 2 * step], kept[low, 2 * step + 1], kept[high, 2 * step], kept[high, 2 * step + 1]]
                before = [accumulated[i, group, half] for i in range(4)]
                after = cute.arch.inline_ptx(
                    self.text,
                    write_only_types=[cutlass.Float32] * 4,
                    read_only_args=[*x_words, found[low, step], found[high, step], *before],
                )
                for i in cutlass.range_constexpr(4):
                    accumulated[i, group, half] = after[i]

    @cute.jit  # type: ignore[untyped-decorator]
    def join(self, accumulated: Any, first: Any, sums: Any, out: cute.Tensor, tile: Any, warp: Any, lane: Any) -> None:
        """All warps' sums of `joined` groups, added up in order. They lie as [warp, group, lane, 4]; two results a thread."""
        num_rows, num_columns = out.shape
        _, rows, _ = cute.arch.block_idx()
        size = self.joined * SUMS
        mine = cute.make_tensor(sums, cute.make_layout((4, WARP, self.joined, WARPS), stride=(1, 4, SUMS, size)))
        for group in cutlass.range_constexpr(self.joined):
            both = cute.make_rmem_tensor(4, cutlass.Float32)
            both.store(accumulated[(None, first + group, 0)].load() + accumulated[(None, first + group, 1)].load())
            cute.autovec_copy(both, mine[(None, lane, group, warp)])
        cute.arch.sync_threads()
        thread = warp * WARP + lane
        if thread < size // 2:
            pairs = cute.make_tensor(sums, cute.make_layout((2, size // 2, WARPS), stride=(1, 2, size)))
            found, part = cute.make_rmem_tensor(2, cutlass.Float32), cute.make_rmem_tensor(2, cutlass.Float32)
            found.fill(0.0)
            for k in cutlass.range_constexpr(WARPS):
                cute.autovec_copy(pairs[(None, thread, k)], part)
                for i in cutlass.range_constexpr(2):
                    found[i] = found[i] + part[i]
            rounded = cute.make_rmem_tensor(2, out.element_type)
            rounded.store(found.load().to(out.element_type))
            owner = (thread // 2) % WARP  # the lane that had them
            row = rows * ROWS + (thread % 2) * EIGHT + owner // 4
            pair = ((tile * self.groups + first + thread // (SUMS // 2)) * EIGHT) // 2 + owner % 4
            if row < num_rows and 2 * pair < num_columns:
                cute.autovec_copy(rounded, cute.local_tile(out, (1, 2), (row, pair))[(0, None)])
        cute.arch.sync_threads()
