"""The M-grouped GEMM on Hopper, warp-specialized, in Gluon. Most calls of `m_grouped` on Hopper run it.

It is about twice as fast as the portable kernel blockwise, and up to a third faster otherwise (docs/performance.md).

One warp, the producer, copies tiles of both operands into a ring in shared memory, and blockwise the scales of rows as
well. Two warpgroups, the consumers, multiply 64 rows of the tile each. Blockwise, a consumer multiplies 128 values of C
into separate registers, half of the columns at a time, then scales the result and adds it to its sum while the tensor
cores work for the other consumer. A finished tile is stored through shared memory while the next one begins. Groups are
found from ``offs``, as in `m_grouped`.

M, E: rows, groups. C: the contraction. N: columns of the result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.kernels.common.hopper import (
    STORED,
    HopperTile,
    accumulate,
    add_done_block,
    describe_scales,
    describe_tile,
    even_height,
    finish_accumulating,
    finish_block,
    load,
    make_barriers,
    next_slot,
    restart_block,
    start_block,
    store_tile,
    tile_position,
)
from grouped_gemm.kernels.common.launch import cdiv, launcher, num_processors

# H200, triton 3.6.0, 2026-11-21; blockwise: H100, 2026-11-27.
TILES = {
    "16 bit": HopperTile(2, 256, 64, 4, 232, 16),
    "rowwise": HopperTile(2, 256, 128, 4, 232, 8),
    "blockwise": HopperTile(2, 256, 128, 4, 240, 16),
}
# Measured likewise: the row classes in which this kernel is faster. Without scales and with 8 rows a group, it is 0.87
# to 1.2 times as fast as the portable one.
_ROWS = {
    "16 bit": (RowClass.SMALL, RowClass.LARGE),
    "rowwise": tuple(RowClass),
    "blockwise": tuple(RowClass),
}


def can_run(lhs_MC: Tensor, rhs_ECO: Tensor, out_dtype: torch.dtype, kind: str, rows: RowClass) -> bool:
    """Whether this kernel can run these operands, on Hopper and readable by TMA, and is faster than the portable one.

    The matrices must follow one another without gaps, and rows of the result must start at multiples of 16 bytes.
    Without contiguous C, C must be a multiple of block_k: otherwise the last step would read lines of the next matrix.
    """
    _, c, columns = rhs_ECO.shape
    c_contiguous = rhs_ECO.stride(1) == 1
    lines, stride = (columns, rhs_ECO.stride(2)) if c_contiguous else (c, rhs_ECO.stride(1))
    return (
        rows in _ROWS.get(kind, ())
        and (rhs_ECO.shape[0] == 1 or rhs_ECO.stride(0) == lines * stride)
        and columns * out_dtype.itemsize % 16 == 0
        and (c_contiguous or c % TILES[kind].block_k == 0)
    )


class Gemm:
    """How to launch the kernel for calls that differ only in M.

    Args:
        lhs_MC, rhs_ECO, out_dtype, kind: as in `can_run`, which is true of them.
    """

    def __init__(self, lhs_MC: Tensor, rhs_ECO: Tensor, out_dtype: torch.dtype, kind: str) -> None:
        tile = TILES[kind]
        self._num_groups, self._c, self._columns = num_groups, c, columns = rhs_ECO.shape
        c_contiguous = rhs_ECO.stride(1) == 1
        self._lhs_stride = lhs_MC.stride(0)
        self._lhs_box = [64, tile.block_k]
        self._rhs_stride = rhs_ECO.stride(2) if c_contiguous else rhs_ECO.stride(1)
        self._rhs_shape = [num_groups * columns, c] if c_contiguous else [num_groups * c, columns]
        self._rhs_box = [tile.block_n, tile.block_k] if c_contiguous else [tile.block_k, tile.block_n]
        self._is_blockwise = kind == "blockwise"
        self._stores_by_tma = out_dtype.itemsize == 2
        self._tile_rows = 64 * tile.consumers
        self._tile_columns = cdiv(columns, tile.block_n)
        self._processors = num_processors(lhs_MC.device)
        self._launch = launcher(
            _kernel,
            {
                "KIND": kind, "C_CONTIGUOUS": c_contiguous, "CONSUMERS": tile.consumers, "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k, "STAGES": tile.num_stages, "GROUP_M": tile.group_m,
                "REGISTERS": tile.registers, "num_warps": 4,
            },
        )  # fmt: skip

    def run(
        self,
        lhs_MC: Tensor,
        lhs_scale: Tensor | None,
        rhs_ECO: Tensor,
        rhs_scale: Tensor | None,
        bias_EO: Tensor | None,
        offs: Tensor,
        out_MO: Tensor,
    ) -> None:
        """Fills ``out_MO``. Arguments are those of `m_grouped.grouped_mm`."""
        num_rows, num_groups, c, columns = lhs_MC.shape[0], self._num_groups, self._c, self._columns
        lhs_desc = describe_tile(lhs_MC, [num_rows, c], self._lhs_stride, self._lhs_box)
        rhs_desc = describe_tile(rhs_ECO, self._rhs_shape, self._rhs_stride, self._rhs_box)
        scale_desc = out_desc = None
        strides: tuple[int, ...] = (0, 0, 0)
        if self._is_blockwise:
            assert lhs_scale is not None and rhs_scale is not None
            scale_desc = describe_scales(lhs_scale, 64)
            strides = rhs_scale.stride()
        if self._stores_by_tma:
            out_desc = describe_tile(out_MO, [num_rows, columns], columns, STORED)
        most_tiles = (cdiv(num_rows, self._tile_rows) + num_groups) * self._tile_columns
        self._launch(
            (min(most_tiles, self._processors),),
            lhs_desc, rhs_desc, scale_desc, out_desc, lhs_scale, rhs_scale, bias_EO,
            offs, out_MO, num_rows, num_groups, c, columns, *strides,
        )  # fmt: skip


@gluon.jit
def seek_tile(offs, M, E, columns, tile, e, start, end, first_tile, scale_row, BLOCK_M: gl.constexpr):
    """Advances to the group that has ``tile``. Rows past the last group count as group E, the last one.

    Returns:
        The group, its first row, one past its last row, its first tile, and where its scales begin.
    """
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M * columns
    while (e <= E) & (tile >= first_tile + tiles):
        first_tile += tiles
        scale_row += (end - start + 3) // 4 * 4
        start = end
        e += 1
        end = gl.load(offs + gl.minimum(e, E - 1))
        end = gl.where(e < E, gl.maximum(start, gl.minimum(end, M)), M)
        tiles = (end - start + BLOCK_M - 1) // BLOCK_M * columns
    return e, start, end, first_tile, scale_row


@gluon.jit
def _produce(
    lhs_desc, rhs_desc, scale_desc, lhs_bufs, rhs_bufs, scale_bufs, full, empty, offs, M, E, C, N,
    KIND: gl.constexpr, C_CONTIGUOUS: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    SCALES: gl.constexpr = KIND == "blockwise"
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * (lhs_desc.dtype.primitive_bitwidth // 8)
    columns = (N + BLOCK_N - 1) // BLOCK_N
    tile = gl.program_id(0)
    zero = gl.to_tensor(0)
    e, start, end, first_tile, scale_row = seek_tile(
        offs, M, E, columns, tile, zero - 1, zero, zero, zero, zero, BLOCK_M
    )
    slot = 0
    phase = 1
    while e < E:
        rows = (end - start + BLOCK_M - 1) // BLOCK_M
        tile_row, tile_column = tile_position(tile - first_tile, rows, columns, even_height(rows, GROUP_M))
        row = tile_row * BLOCK_M
        column = tile_column * BLOCK_N
        for c in range(0, C, BLOCK_K):
            mbarrier.wait(empty.index(slot), phase)
            barrier = full.index(slot)
            mbarrier.expect(barrier, BYTES + (BLOCK_M * 4 if SCALES else 0))
            if C_CONTIGUOUS:
                load(rhs_desc, [e * N + column, c], barrier, rhs_bufs.index(slot))
            else:
                load(rhs_desc, [e * C + c, column], barrier, rhs_bufs.index(slot))
            for i in gl.static_range(CONSUMERS):
                load(lhs_desc, [start + row + 64 * i, c], barrier, lhs_bufs.index(slot * CONSUMERS + i))
                if SCALES:
                    source = [c // BLOCK_K, scale_row + row + 64 * i]
                    load(scale_desc, source, barrier, scale_bufs.index(slot * CONSUMERS + i))
            slot, phase = next_slot(slot, phase, STAGES)
        tile += gl.num_programs(0)
        e, start, end, first_tile, scale_row = seek_tile(
            offs, M, E, columns, tile, e, start, end, first_tile, scale_row, BLOCK_M
        )


@gluon.jit
def _consume(
    which: gl.constexpr, lhs_bufs, rhs_bufs, scale_bufs, out_bufs, full, empty, out_desc,
    lhs_scale, rhs_scale, bias, offs, out, M, E, C, N, scale_stride_e, scale_stride_c, scale_stride_o,
    KIND: gl.constexpr, C_CONTIGUOUS: gl.constexpr, HAS_BIAS: gl.constexpr, TMA_STORE: gl.constexpr,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    PART: gl.constexpr = 128 if KIND == "blockwise" else BLOCK_N  # columns of a product
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PART, 256 // lhs_bufs.dtype.primitive_bitwidth]
    )
    columns = (N + BLOCK_N - 1) // BLOCK_N
    steps = (C + BLOCK_K - 1) // BLOCK_K
    tile = gl.program_id(0)
    zero = gl.to_tensor(0)
    e, start, end, first_tile, scale_row = seek_tile(
        offs, M, E, columns, tile, zero - 1, zero, zero, zero, zero, BLOCK_M
    )
    slot = 0
    phase = 0
    while e <= E:
        rows = (end - start + BLOCK_M - 1) // BLOCK_M
        tile_row, tile_column = tile_position(tile - first_tile, rows, columns, even_height(rows, GROUP_M))
        row = start + tile_row * BLOCK_M + which * 64
        column = tile_column * BLOCK_N
        acc = gl.zeros((64, PART), gl.float32, LAYOUT)
        right = acc  # blockwise, the sums of the right half
        if e < E:
            if row >= end:  # no row of this consumer is in the group: it only releases the slots
                for _ in range(steps):
                    mbarrier.wait(full.index(slot), phase)
                    mbarrier.arrive(empty.index(slot), count=1)
                    slot, phase = next_slot(slot, phase, STAGES)
            elif KIND == "blockwise":
                block_scales = rhs_scale + e.to(gl.int64) * scale_stride_e + column // 128 * scale_stride_o
                # A last tile without a right half multiplies by what follows; its scale must exist.
                to_right = gl.where(column + 128 < N, scale_stride_o, 0)
                next_scale = gl.load(block_scales)
                next_right = gl.load(block_scales + to_right)
                mbarrier.wait(full.index(slot), phase, pred=steps > 0)
                for step in range(steps):
                    lhs = lhs_bufs.index(slot * CONSUMERS + which)
                    rhs = rhs_bufs.index(slot)
                    block = start_block(lhs, rhs.slice(0, 128, dim=0).permute((1, 0)), LAYOUT)
                    # All else is done while products are computed: scales are loaded a step ahead, and the next slot
                    # is waited for here.
                    is_not_last = step + 1 < steps
                    block_scale = next_scale
                    right_scale = next_right
                    block_scales += gl.where(is_not_last, scale_stride_c, 0)
                    next_scale = gl.load(block_scales)
                    next_right = gl.load(block_scales + to_right)
                    # This slot is full. The wait keeps the compiler from loading scales in the middle of a product.
                    mbarrier.wait(full.index(slot), phase)
                    row_scale = scale_bufs.index(slot * CONSUMERS + which).permute((1, 0)).load(LAYOUT)
                    acc, block = add_done_block(acc, block, row_scale * block_scale)
                    block = restart_block(lhs, rhs.slice(128, 128, dim=0).permute((1, 0)), block, N < 0)
                    following, its_phase = next_slot(slot, phase, STAGES)
                    mbarrier.wait(full.index(following), its_phase, pred=is_not_last)
                    right = finish_block(right, block, row_scale * right_scale, empty, slot)
                    slot = following
                    phase = its_phase
            else:
                for step in range(steps):
                    mbarrier.wait(full.index(slot), phase)
                    rhs = rhs_bufs.index(slot).permute((1, 0)) if C_CONTIGUOUS else rhs_bufs.index(slot)
                    acc = accumulate(acc, lhs_bufs.index(slot * CONSUMERS + which), rhs, step, empty, slot, STAGES)
                    slot, phase = next_slot(slot, phase, STAGES)
                acc = finish_accumulating(acc, True, empty, slot, STAGES)
        if row < end:
            finish_tile(
                acc, out_bufs.index(which), out_desc, lhs_scale, rhs_scale, bias, out, row, end, e, column, E, N,
                KIND, HAS_BIAS, TMA_STORE,
            )  # fmt: skip
            if KIND == "blockwise":
                finish_tile(
                    right, out_bufs.index(which), out_desc, lhs_scale, rhs_scale, bias, out, row, end, e, column + 128,
                    E, N, KIND, HAS_BIAS, TMA_STORE,
                )  # fmt: skip
        tile += gl.num_programs(0)
        e, start, end, first_tile, scale_row = seek_tile(
            offs, M, E, columns, tile, e, start, end, first_tile, scale_row, BLOCK_M
        )
    if TMA_STORE:
        tma.store_wait(0)


@gluon.jit
def finish_tile(
    acc, buffer, out_desc, lhs_scale, rhs_scale, bias, out, row, end, e, column, E, N,
    KIND: gl.constexpr, HAS_BIAS: gl.constexpr, TMA_STORE: gl.constexpr,
):  # fmt: skip
    """Scales a finished tile, adds the bias and stores it: whole tiles through shared memory, others masked."""
    if acc.shape[1] == 256:  # in halves, which takes fewer registers
        halves = acc.reshape([64, 2, 128]).permute((0, 2, 1)).split()
        for i in gl.static_range(2):
            finish_tile(
                halves[i], buffer, out_desc, lhs_scale, rhs_scale, bias, out, row, end, e, column + 128 * i, E, N,
                KIND, HAS_BIAS, TMA_STORE,
            )  # fmt: skip
    else:
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, acc.type.layout))
        ns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, acc.type.layout))
        e64 = gl.minimum(e, E - 1).to(gl.int64)  # past the last group nothing is loaded: zeros must stay zeros
        if KIND == "rowwise":
            row_scales = gl.load(lhs_scale + rows, mask=(rows < end) & (e < E), other=0)
            column_scales = gl.load(rhs_scale + e64 * N + ns, mask=(ns < N) & (e < E), other=0)
            acc = acc * gl.expand_dims(row_scales, 1) * gl.expand_dims(column_scales, 0)
        if HAS_BIAS:
            biases = gl.load(bias + e64 * N + ns, mask=(ns < N) & (e < E), other=0)
            acc = acc + gl.expand_dims(biases.to(gl.float32), 0)
        values = acc.to(out.dtype.element_ty)
        if TMA_STORE and row + 64 <= end:
            store_tile(values, buffer, out_desc, [row, column])
        else:
            target = out + gl.expand_dims(rows.to(gl.int64), 1) * N + gl.expand_dims(ns, 0)
            gl.store(target, values, mask=gl.expand_dims(rows < end, 1) & gl.expand_dims(ns < N, 0))


# With strides of scales that are not specialized, forward and dgrad run one blockwise kernel. It has as many registers.
@gluon.jit(do_not_specialize=["M", "E", "scale_stride_e", "scale_stride_c", "scale_stride_o"])
def _kernel(
    lhs_desc, rhs_desc, scale_desc, out_desc, lhs_scale, rhs_scale, bias, offs, out, M, E, C, N,
    scale_stride_e, scale_stride_c, scale_stride_o,
    KIND: gl.constexpr, C_CONTIGUOUS: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    # Arguments of a warpgroup must be values: what does not exist has a placeholder, which nothing reads.
    HAS_BIAS: gl.constexpr = bias is not None
    TMA_STORE: gl.constexpr = out_desc is not None
    if lhs_scale is None:
        lhs_scale = offs
    if rhs_scale is None:
        rhs_scale = offs
    if bias is None:
        bias = offs
    if scale_desc is None:
        scale_desc = lhs_desc
    if out_desc is None:
        out_desc = lhs_desc
    lhs_bufs = gl.allocate_shared_memory(lhs_desc.dtype, [STAGES * CONSUMERS, 64, BLOCK_K], lhs_desc.layout)
    RHS_BOX: gl.constexpr = [STAGES, BLOCK_N, BLOCK_K] if C_CONTIGUOUS else [STAGES, BLOCK_K, BLOCK_N]
    rhs_bufs = gl.allocate_shared_memory(rhs_desc.dtype, RHS_BOX, rhs_desc.layout)
    scale_bufs = lhs_bufs
    if KIND == "blockwise":
        scale_bufs = gl.allocate_shared_memory(gl.float32, [STAGES * CONSUMERS, 1, 64], scale_desc.layout)
    out_bufs = lhs_bufs
    if TMA_STORE:
        out_bufs = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, 64, 128], out_desc.layout)
    full, empty = make_barriers(STAGES, CONSUMERS)
    PRODUCER_REGISTERS: gl.constexpr = 504 - CONSUMERS * REGISTERS
    gl.static_assert(CONSUMERS == 2)
    gl.warp_specialize([
        (_consume, (0, lhs_bufs, rhs_bufs, scale_bufs, out_bufs, full, empty, out_desc,
            lhs_scale, rhs_scale, bias, offs, out, M, E, C, N, scale_stride_e, scale_stride_c, scale_stride_o,
            KIND, C_CONTIGUOUS, HAS_BIAS, TMA_STORE, CONSUMERS, BLOCK_N, BLOCK_K, STAGES, GROUP_M)),
        (_consume, (1, lhs_bufs, rhs_bufs, scale_bufs, out_bufs, full, empty, out_desc,
            lhs_scale, rhs_scale, bias, offs, out, M, E, C, N, scale_stride_e, scale_stride_c, scale_stride_o,
            KIND, C_CONTIGUOUS, HAS_BIAS, TMA_STORE, CONSUMERS, BLOCK_N, BLOCK_K, STAGES, GROUP_M)),
        (_produce, (lhs_desc, rhs_desc, scale_desc, lhs_bufs, rhs_bufs, scale_bufs, full, empty, offs, M, E, C, N,
            KIND, C_CONTIGUOUS, CONSUMERS, BLOCK_N, BLOCK_K, STAGES, GROUP_M)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
