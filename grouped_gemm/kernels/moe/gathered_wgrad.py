"""The K-grouped GEMM on Hopper with one operand whose rows are gathered while they are loaded: bf16 wgrads. In Gluon.

It is built like `gemm.k_grouped_hopper`, but four warps fill the ring: the operand in expert order through ragged
descriptors, the other one row by row with cp.async. Rows past the end of a group are zero in both.

Groups may differ much in size, and a tile takes as long as its group has rows. So a program asks for its next tile when
it has loaded the operands of its current one: a counter in global memory hands out tiles in their order. The producer
writes the number of a tile beside the operands of its first step. Which program computes a tile does not change its
bits.

M, T, E: routed rows, tokens, experts. P, Q: features of the first and the second operand.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from grouped_gemm.kernels.common.hopper import (
    TILES_IN_SHARED,
    HopperTile,
    accumulate,
    copy_rows,
    describe_ragged,
    describe_result,
    finish_accumulating,
    load,
    make_barriers,
    next_slot,
    tile_position,
)
from grouped_gemm.kernels.common.launch import cdiv, launch, num_processors, on_device
from grouped_gemm.kernels.gemm.k_grouped_hopper import finish_tile

# H100, triton 3.6.0, 2026-11-26.
TILE = HopperTile(2, 256, 64, 4, 224, 2)
_COPY_WARPS = gl.constexpr(4)  # warps that gather
_PRODUCER_REGISTERS = gl.constexpr(56)
_GATHERED = gl.constexpr(TILES_IN_SHARED[2])
_NUMBERS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
_ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # one value, for each thread of four warps


def wgrad(
    lhs: Tensor,
    rhs: Tensor,
    source: Tensor,
    gathers_lhs: bool,
    offs: Tensor,
    out_EPQ: Tensor,
    accumulate: bool = False,
) -> None:
    """out[e] = lhs.T @ rhs over the rows of expert e, where row m of one operand is that of token ``source[m]``.

    Args:
        lhs: (T, P) if ``gathers_lhs``, else (M, P); contiguous P; bfloat16 or float16.
        rhs: (M, Q) if ``gathers_lhs``, else (T, Q); contiguous Q; in the dtype of ``lhs``.
        source: (M,) int32, contiguous.
        gathers_lhs: which operand is gathered.
        offs: (E,) int32, contiguous: the end row of each expert. Any values are safe.
        out_EPQ: the result, (E, P, Q), contiguous.
        accumulate: whether to add to ``out_EPQ``, which is float32 then. An empty expert is neither read nor written.
    """
    num_rows, (num_groups, p, q) = source.shape[0], out_EPQ.shape
    if num_rows == 0:
        if not accumulate:
            out_EPQ.zero_()
        return
    gathered, in_order = (lhs, rhs) if gathers_lhs else (rhs, lhs)
    desc = describe_ragged(in_order, [TILE.block_k, TILE.block_n if gathers_lhs else 64])
    out_desc = None
    if out_EPQ.element_size() == 2:
        out_desc = describe_result(out_EPQ)
    tiles = num_groups * cdiv(p, 64 * TILE.consumers) * cdiv(q, TILE.block_n)
    with on_device(lhs):
        launch(
            _kernel, (min(tiles, num_processors(lhs.device)),),
            gathered, desc, out_desc, source.new_zeros(1), source, offs, out_EPQ, num_rows, num_groups, p, q,
            gathered.stride(0),
            constants={
                "GATHERS_LHS": gathers_lhs, "CONSUMERS": TILE.consumers, "BLOCK_N": TILE.block_n,
                "BLOCK_K": TILE.block_k, "STAGES": TILE.num_stages, "GROUP_M": TILE.group_m,
                "REGISTERS": TILE.registers, "ACCUMULATE": accumulate, "num_warps": 4,
            },
        )  # fmt: skip


@gluon.jit
def _seek_expert(offs, M, tile, tiles, e, start, end, first_tile):
    """Advances to the expert that has ``tile``, one of ``tiles`` for each.

    Returns:
        The expert, its first row, one past its last row, and its first tile.
    """
    while tile >= first_tile + tiles:
        first_tile += tiles
        start = end
        e += 1
        end = gl.maximum(start, gl.minimum(gl.load(offs + e), M))
    return e, start, end, first_tile


@gluon.jit
def _steps(start, end, BLOCK_K: gl.constexpr):
    """The steps of a tile. An expert without rows takes one step of zeros, since a tile's first step has its number."""
    return gl.maximum((end - start + BLOCK_K - 1) // BLOCK_K, 1)


@gluon.jit
def _produce(
    x, desc, lhs_bufs, rhs_bufs, tile_bufs, full, empty, next_tile, source, offs, M, E, P, Q, x_stride,
    GATHERS_LHS: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    FAR: gl.constexpr = 1 << 30  # see `describe_ragged`
    BYTES: gl.constexpr = (BLOCK_N if GATHERS_LHS else BLOCK_M) * BLOCK_K * 2
    # Eight threads copy 64 columns of a row.
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [_COPY_WARPS, 1], [1, 0])
    tiles_p = (P + BLOCK_M - 1) // BLOCK_M
    tiles_q = (Q + BLOCK_N - 1) // BLOCK_N
    tiles = tiles_p * tiles_q
    stride = x_stride // 8 * 8  # rows start at multiples of 16 bytes, which the compiler must know
    lines = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, ROW))
    WIDTH: gl.constexpr = 64 if GATHERS_LHS else BLOCK_N
    cs = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, ROW)), 0)
    zero = gl.to_tensor(0)
    e, start, end, first_tile = zero - 1, zero, zero, zero - tiles
    tile = gl.program_id(0)
    slot = 0
    phase = 1
    while tile < E * tiles:
        e, start, end, first_tile = _seek_expert(offs, M, tile, tiles, e, start, end, first_tile)
        tile_p, tile_q = tile_position(tile - first_tile, tiles_p, tiles_q, GROUP_M)
        p = tile_p * BLOCK_M
        q = tile_q * BLOCK_N
        next_rows = gl.load(source + start + lines, mask=start + lines < end, other=0)
        for step in range(_steps(start, end, BLOCK_K)):
            row = start + step * BLOCK_K
            is_row = gl.expand_dims(row + lines < end, 1)
            at = x + gl.expand_dims(next_rows.to(gl.int64) * stride, 1) + cs
            row += BLOCK_K
            next_rows = gl.load(source + row + lines, mask=row + lines < end, other=0)  # while these are copied
            mbarrier.wait(empty.index(slot), phase)
            if step == 0:
                _announce(tile_bufs.index(slot), tile)
            barrier = full.index(slot)
            mbarrier.expect(barrier, BYTES)
            token = FAR - (end - start) + step * BLOCK_K
            if GATHERS_LHS:
                load(desc, [FAR, end, token, q], barrier, rhs_bufs.index(slot))
                for i in gl.static_range(CONSUMERS):
                    mask = is_row & (cs < P - p - 64 * i)
                    copy_rows(at + (p + 64 * i), mask, lhs_bufs.index(slot * CONSUMERS + i))
            else:
                for i in gl.static_range(CONSUMERS):
                    load(desc, [FAR, end, token, p + 64 * i], barrier, lhs_bufs.index(slot * CONSUMERS + i))
                copy_rows(at + q, is_row & (cs < Q - q), rhs_bufs.index(slot))
            async_copy.mbarrier_arrive(barrier, increment_count=False)
            slot, phase = next_slot(slot, phase, STAGES)
        tile = gl.num_programs(0) + gl.atomic_add(next_tile, 1, sem="relaxed")
    mbarrier.wait(empty.index(slot), phase)
    _announce(tile_bufs.index(slot), tile)  # no tile of the GEMM: the end
    mbarrier.expect(full.index(slot), 0)
    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)


@gluon.jit
def _announce(buffer, tile):
    """Writes the number of a tile to shared memory, for `_announced`."""
    buffer.store(gl.full([1], 0, gl.int32, _ONE) + tile)


@gluon.jit
def _announced(buffer):
    return gl.max(buffer.load(_ONE), 0)


@gluon.jit
def _consume(
    which: gl.constexpr, lhs_bufs, rhs_bufs, tile_bufs, out_bufs, full, empty, out_desc, offs, out, M, E, P, Q,
    GATHERS_LHS: gl.constexpr, TMA_STORE: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    tiles_p = (P + BLOCK_M - 1) // BLOCK_M
    tiles_q = (Q + BLOCK_N - 1) // BLOCK_N
    tiles = tiles_p * tiles_q
    zero = gl.to_tensor(0)
    e, start, end, first_tile = zero - 1, zero, zero, zero - tiles
    slot = 0
    phase = 0
    mbarrier.wait(full.index(slot), phase)
    tile = _announced(tile_bufs.index(slot))
    while tile < E * tiles:
        e, start, end, first_tile = _seek_expert(offs, M, tile, tiles, e, start, end, first_tile)
        tile_p, tile_q = tile_position(tile - first_tile, tiles_p, tiles_q, GROUP_M)
        p = tile_p * BLOCK_M + which * 64
        q = tile_q * BLOCK_N
        acc = gl.zeros((64, BLOCK_N), gl.float32, LAYOUT)
        for step in range(_steps(start, end, BLOCK_K)):
            mbarrier.wait(full.index(slot), phase)
            fence_async_shared()
            lhs = lhs_bufs.index(slot * CONSUMERS + which)
            rhs = rhs_bufs.index(slot)
            if GATHERS_LHS:
                rhs = rhs.reshape([BLOCK_K, BLOCK_N])
            else:
                lhs = lhs.reshape([BLOCK_K, 64])
            acc = accumulate(acc, lhs.permute((1, 0)), rhs, step, empty, slot, STAGES)
            slot, phase = next_slot(slot, phase, STAGES)
        acc = finish_accumulating(acc, True, empty, slot, STAGES)
        if ACCUMULATE:
            p = gl.where(start < end, p, P)  # an expert without rows adds nothing
        if p < P:
            finish_tile(
                acc, out_bufs.index(which), out_desc, offs, offs, out, e, p, q, P, Q, "16 bit", TMA_STORE,
                ACCUMULATE,
            )  # fmt: skip
        mbarrier.wait(full.index(slot), phase)
        tile = _announced(tile_bufs.index(slot))
    if TMA_STORE:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "E"])
def _kernel(
    x, desc, out_desc, next_tile, source, offs, out, M, E, P, Q, x_stride,
    GATHERS_LHS: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, REGISTERS: gl.constexpr, ACCUMULATE: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    TMA_STORE: gl.constexpr = out_desc is not None
    if out_desc is None:  # a placeholder: arguments of a warpgroup must be values
        out_desc = desc
    LHS_SLOTS: gl.constexpr = STAGES * CONSUMERS
    LHS: gl.constexpr = [LHS_SLOTS, BLOCK_K, 64] if GATHERS_LHS else [LHS_SLOTS, 1, 1, BLOCK_K, 64]
    RHS: gl.constexpr = [STAGES, 1, 1, BLOCK_K, BLOCK_N] if GATHERS_LHS else [STAGES, BLOCK_K, BLOCK_N]
    lhs_bufs = gl.allocate_shared_memory(desc.dtype, LHS, _GATHERED if GATHERS_LHS else desc.layout)
    rhs_bufs = gl.allocate_shared_memory(desc.dtype, RHS, desc.layout if GATHERS_LHS else _GATHERED)
    out_bufs = lhs_bufs
    if TMA_STORE:
        out_bufs = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, 1, 64, 128], out_desc.layout)
    tile_bufs = gl.allocate_shared_memory(gl.int32, [STAGES, 1], _NUMBERS)
    full, empty = make_barriers(STAGES, CONSUMERS, 32 * _COPY_WARPS)
    gl.static_assert(CONSUMERS == 2)
    gl.warp_specialize([
        (_consume, (0, lhs_bufs, rhs_bufs, tile_bufs, out_bufs, full, empty, out_desc, offs, out, M, E, P, Q,
            GATHERS_LHS, TMA_STORE, CONSUMERS, BLOCK_N, BLOCK_K, STAGES, GROUP_M, ACCUMULATE)),
        (_consume, (1, lhs_bufs, rhs_bufs, tile_bufs, out_bufs, full, empty, out_desc, offs, out, M, E, P, Q,
            GATHERS_LHS, TMA_STORE, CONSUMERS, BLOCK_N, BLOCK_K, STAGES, GROUP_M, ACCUMULATE)),
        (_produce, (x, desc, lhs_bufs, rhs_bufs, tile_bufs, full, empty, next_tile, source, offs, M, E, P, Q, x_stride,
            GATHERS_LHS, CONSUMERS, BLOCK_N, BLOCK_K, STAGES, GROUP_M)),
    ], [4, _COPY_WARPS], [REGISTERS, _PRODUCER_REGISTERS])  # fmt: skip
