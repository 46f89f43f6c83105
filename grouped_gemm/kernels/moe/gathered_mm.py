"""M-grouped GEMMs of an MoE layer on Hopper, in Gluon: rows gathered while they are loaded, a gate at the end.

Row m of the first operand is ``x[source[m]]``. The kernel is built like `gemm.m_grouped_hopper`, but the producer's
warps copy rows of x with cp.async, 16 bytes at a time, straight into the swizzled tile. Consumers fence before they
multiply, because wgmma reads shared memory by another proxy than cp.async writes it.

A tile has 256 columns of the matrices. With a gate, they are 128 of gate and the same 128 of up, so that each thread
holds the gate and the up value of the same columns of h = act(gate) * up, and finishes h in registers. Blockwise, a
consumer multiplies 128 columns at a time into separate registers, scales the result and adds it to one of two sums; h
is quantized before it is stored.

M, T, E: routed rows, tokens, experts. C: the contraction. N: columns of the matrices. I: columns of h; N = 2 I.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from grouped_gemm.kernels.common.hopper import (
    STORED,
    HopperTile,
    accumulate,
    add_block,
    copy_rows,
    describe_tile,
    finish_accumulating,
    finish_block,
    load,
    make_barriers,
    next_slot,
    start_block,
    store,
    tile_position,
)
from grouped_gemm.kernels.common.launch import cdiv, launch, num_processors, on_device
from grouped_gemm.kernels.common.scaling import scale_of
from grouped_gemm.kernels.gemm.m_grouped_hopper import seek_tile

# H100, triton 3.6.0, 2026-11-26. A plain GEMM, one with a gate, and one that stages pre-activations as well.
TILES = {
    "16 bit": HopperTile(2, 256, 64, 4, 224, 8),
    "16 bit, gated": HopperTile(2, 256, 64, 3, 224, 8),
    "16 bit, gated, stored": HopperTile(2, 256, 64, 3, 224, 16),
    "blockwise": HopperTile(2, 256, 128, 4, 224, 8),
    "blockwise, gated": HopperTile(2, 256, 128, 4, 232, 8),
    "blockwise, gated, stored": HopperTile(2, 256, 128, 3, 232, 8),
}
COPY_WARPS = {"16 bit": 4, "blockwise": 2}  # warps that gather; 4 if offsets take 64 bits, as a thread then has fewer
_REGISTERS = gl.constexpr(504)  # of a thread of each of three warpgroups together: 65536 / 128, in multiples of 8


def gathered_mm(
    x_TC: Tensor, x_scale: Tensor | None, source: Tensor, w_ECN: Tensor, w_scale: Tensor | None, offs: Tensor,
    out_MN: Tensor,
) -> None:  # fmt: skip
    """out[m] = x[source[m]] @ w[e], e the expert of row m. Rows at and past ``offs[-1]`` are not written.

    Args:
        x_TC: (T, C), contiguous C; bfloat16, float16 or, with scales, fp8.
        x_scale: fp32 (T, ceil(C/128)), contiguous: one scale for 128 values of a row. None without scales.
        source: (M,) int32, contiguous.
        w_ECN: (E, C, N) in the dtype of ``x``, C or N contiguous; fp8: C contiguous.
        w_scale: fp32 (E, ceil(C/128), ceil(N/128)), matrices without gaps, in any order; None without scales.
        offs: (E,) int32, contiguous: the end row of each expert. Any values are safe.
        out_MN: (M, N), contiguous; bfloat16 or float16.
    """
    _launch(x_TC, x_scale, source, w_ECN, w_scale, offs, out_MN, None, None, None, None, False, False)


def gated_mm(
    x_TC: Tensor, x_scale: Tensor | None, source: Tensor, gate_up_ECN: Tensor, w_scale: Tensor | None, offs: Tensor,
    activation: str, interleaved: bool, h_MI: Tensor, h_scale: Tensor | None, pre_MN: Tensor | None,
    pre_scale: Tensor | None = None, power_of_two: bool = False,
) -> None:  # fmt: skip
    """h[m] = act(gate) * up, where gate and up are the halves of x[source[m]] @ gate_up[e].

    Other arguments are those of `gathered_mm`.

    Args:
        gate_up_ECN: (E, C, 2I): gate columns before up columns, or in alternation. With scales, I is a multiple of
            128, and columns do not alternate.
        activation: the name of a gated one.
        interleaved: whether gate and up columns alternate.
        h_MI: (M, I), contiguous; the result, fp8 with scales.
        h_scale: fp32 (I/128, S), contiguous: scales of h as `layouts.activations` has them; None without scales.
        pre_MN: (M, 2I), contiguous; the pre-activations in the order of ``gate_up``; None: not wanted.
        pre_scale: fp32 (M, 2I/128), contiguous: ``pre`` is fp8, one scale for 128 values of a row. None: it is not.
        power_of_two: whether scales of h and pre are rounded up to powers of two.
    """
    results = h_MI, h_scale, pre_MN, pre_scale
    _launch(x_TC, x_scale, source, gate_up_ECN, w_scale, offs, *results, activation, interleaved, power_of_two)


def _launch(
    x: Tensor, x_scale: Tensor | None, source: Tensor, w_ECN: Tensor, w_scale: Tensor | None, offs: Tensor,
    out: Tensor, out_scale: Tensor | None, pre: Tensor | None, pre_scale: Tensor | None, activation: str | None,
    interleaved: bool, power_of_two: bool,
) -> None:  # fmt: skip
    (num_rows, width), (num_groups, c, columns) = out.shape, w_ECN.shape
    if num_rows == 0:
        return
    kind = "16 bit" if x_scale is None else "blockwise"
    tile = TILES[kind + (", gated" if activation else "") + (", stored" if pre is not None else "")]
    c_contiguous = w_ECN.stride(1) == 1
    shape = [num_groups * columns, c] if c_contiguous else [num_groups * c, columns]
    stride = w_ECN.stride(2) if c_contiguous else w_ECN.stride(1)
    box = [tile.block_n // 2, tile.block_k] if c_contiguous else [tile.block_k, tile.block_n]
    pre_desc = None if pre is None else describe_tile(pre, [num_rows, columns], columns, STORED)
    most_tiles = (cdiv(num_rows, 64 * tile.consumers) + num_groups) * cdiv(columns, tile.block_n)
    is_far = x.shape[0] * x.stride(0) >= 2**31
    with on_device(x):
        launch(
            _kernel, (min(most_tiles, num_processors(x.device)),),
            x, describe_tile(w_ECN, shape, stride, box), describe_tile(out, [num_rows, width], width, STORED),
            pre_desc, x_scale, w_scale, out_scale, pre_scale, source, offs, out, pre, num_rows, num_groups, c, columns,
            x.stride(0), 0 if out_scale is None else out_scale.stride(0),
            *((0, 0) if w_scale is None else w_scale.stride()[1:]),
            constants={
                "KIND": kind, "ACTIVATION": activation, "INTERLEAVED": interleaved, "POWER_OF_TWO": power_of_two,
                "C_CONTIGUOUS": c_contiguous, "EVEN_C": c % tile.block_k == 0,
                "INT64": is_far, "CONSUMERS": tile.consumers,
                "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.num_stages, "GROUP_M": tile.group_m,
                "REGISTERS": tile.registers, "COPY_WARPS": 4 if is_far else COPY_WARPS[kind], "num_warps": 4,
            },
        )  # fmt: skip


@gluon.jit
def _rows_of(source, row, end, LAYOUT: gl.constexpr):
    """Where 64 rows from ``row`` on come from; past the group's end, where its last row comes from."""
    rows = row + gl.arange(0, 64, layout=LAYOUT)
    return gl.load(source + gl.minimum(rows, gl.maximum(end - 1, 0)))


@gluon.jit
def _offsets_of(rows, stride, INT64: gl.constexpr):
    """Where rows of x begin, as a column; in 32 bits where they suffice, as registers are scarce."""
    if INT64:
        rows = rows.to(gl.int64)
    return gl.expand_dims(rows * stride, 1)


@gluon.jit
def _produce(
    w_desc, lhs_bufs, rhs_bufs, full, empty, x, source, offs, M, E, C, N, x_stride,
    GATED: gl.constexpr, INTERLEAVED: gl.constexpr, C_CONTIGUOUS: gl.constexpr, EVEN_C: gl.constexpr,
    INT64: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, COPY_WARPS: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    HALF: gl.constexpr = BLOCK_N // 2
    SIZE: gl.constexpr = w_desc.dtype.primitive_bitwidth // 8
    BYTES: gl.constexpr = BLOCK_N * BLOCK_K * SIZE
    # Eight threads copy the 128 bytes of a row.
    ROW: gl.constexpr = gl.BlockedLayout([1, 16 // SIZE], [4, 8], [COPY_WARPS, 1], [1, 0])
    columns = (N + BLOCK_N - 1) // BLOCK_N
    zero = gl.to_tensor(0)
    tile = gl.program_id(0)
    e, start, end, first_tile, _ = seek_tile(offs, M, E, columns, tile, zero - 1, zero, zero, zero, zero, BLOCK_M)
    slot = 0
    phase = 1
    stride = x_stride // 8 * 8  # rows start at multiples of 16 bytes, which the compiler must know
    while e < E:
        tile_row, tile_column = tile_position(
            tile - first_tile, (end - start + BLOCK_M - 1) // BLOCK_M, columns, GROUP_M
        )
        row = start + tile_row * BLOCK_M
        column = tile_column * BLOCK_N
        left = e * N + column
        right = left + HALF
        if GATED and not INTERLEAVED:
            left = e * N + tile_column * HALF
            right = left + N // 2
        cs = gl.expand_dims(gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, ROW)), 0)
        top_rows = _rows_of(source, row, end, gl.SliceLayout(1, ROW))
        bottom_rows = _rows_of(source, row + 64, end, gl.SliceLayout(1, ROW))
        top = _offsets_of(top_rows, stride, INT64) + cs
        bottom = _offsets_of(bottom_rows, stride, INT64) + cs
        for c in range(0, C, BLOCK_K):
            mbarrier.wait(empty.index(slot), phase)
            barrier = full.index(slot)
            mbarrier.expect(barrier, BYTES)
            rhs = rhs_bufs.index(slot)
            if C_CONTIGUOUS:
                load(w_desc, [left, c], barrier, rhs.slice(0, HALF, dim=0))
                load(w_desc, [right, c], barrier, rhs.slice(HALF, HALF, dim=0))
            else:
                load(w_desc, [e * C + c, column], barrier, rhs)
            mask = None
            if not EVEN_C:
                mask = cs < C - c
            copy_rows(x + (top + c), mask, lhs_bufs.index(slot * CONSUMERS))
            if row + 64 < end:  # else the second consumer has no rows
                copy_rows(x + (bottom + c), mask, lhs_bufs.index(slot * CONSUMERS + 1))
            async_copy.mbarrier_arrive(barrier, increment_count=False)  # each thread, once its copies are there
            slot, phase = next_slot(slot, phase, STAGES)
        tile += gl.num_programs(0)
        e, start, end, first_tile, _ = seek_tile(offs, M, E, columns, tile, e, start, end, first_tile, zero, BLOCK_M)


@gluon.jit
def _consume(
    which: gl.constexpr, lhs_bufs, rhs_bufs, out_bufs, pre_bufs, full, empty, out_desc, pre_desc, x_scale, w_scale,
    out_scale, pre_scale, source, offs, out, pre, M, E, C, N, row_scale_stride, scale_stride_c, scale_stride_n,
    KIND: gl.constexpr, ACTIVATION: gl.constexpr, HAS_PRE: gl.constexpr, SCALES_PRE: gl.constexpr,
    INTERLEAVED: gl.constexpr, POWER_OF_TWO: gl.constexpr, C_CONTIGUOUS: gl.constexpr,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    HALF: gl.constexpr = BLOCK_N // 2
    GATED: gl.constexpr = ACTIVATION is not None
    SCALES_H: gl.constexpr = GATED and KIND == "blockwise"
    columns = (N + BLOCK_N - 1) // BLOCK_N
    zero = gl.to_tensor(0)
    tile = gl.program_id(0)
    e, start, end, first_tile, scale_row = seek_tile(
        offs, M, E, columns, tile, zero - 1, zero, zero, zero, zero, BLOCK_M
    )
    steps = (C + BLOCK_K - 1) // BLOCK_K
    slot = 0
    phase = 0
    while e < E:
        tile_row, tile_column = tile_position(
            tile - first_tile, (end - start + BLOCK_M - 1) // BLOCK_M, columns, GROUP_M
        )
        row = start + tile_row * BLOCK_M + which * 64
        column = tile_column * BLOCK_N
        if row >= end:  # no row of this consumer is in the group: it only releases the slots
            for _ in range(steps):
                mbarrier.wait(full.index(slot), phase)
                mbarrier.arrive(empty.index(slot), count=1)
                slot, phase = next_slot(slot, phase, STAGES)
        else:
            if KIND == "blockwise":
                LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
                left = gl.zeros((64, HALF), gl.float32, LAYOUT)
                right = gl.zeros((64, HALF), gl.float32, LAYOUT)
                row_at = _rows_of(source, row, end, gl.SliceLayout(1, LAYOUT)) * steps
                left_column = column
                right_column = column + HALF
                if GATED:
                    left_column = column // 2
                    right_column = column // 2 + N // 2
                # A last tile without a right half multiplies by zeros; its scale must exist.
                right_column = gl.minimum(right_column, N - 1)
                scales_before = e * steps * ((N + 127) // 128)
                left_at = scales_before + left_column // 128 * scale_stride_n
                right_at = scales_before + right_column // 128 * scale_stride_n
                next_row_scale = gl.load(x_scale + row_at)  # a step ahead, so that nothing waits for them
                next_left = gl.load(w_scale + left_at)
                next_right = gl.load(w_scale + right_at)
                for step in range(steps):
                    row_scale = gl.expand_dims(next_row_scale, 1)
                    left_scale = next_left
                    right_scale = next_right
                    ahead = gl.minimum(step + 1, steps - 1)
                    next_row_scale = gl.load(x_scale + (row_at + ahead))
                    next_left = gl.load(w_scale + (left_at + ahead * scale_stride_c))
                    next_right = gl.load(w_scale + (right_at + ahead * scale_stride_c))
                    mbarrier.wait(full.index(slot), phase)
                    fence_async_shared()
                    lhs = lhs_bufs.index(slot * CONSUMERS + which)
                    rhs = rhs_bufs.index(slot)
                    block = start_block(lhs, rhs.slice(0, HALF, dim=0).permute((1, 0)), LAYOUT)
                    left = add_block(left, block, row_scale * left_scale)
                    block = start_block(lhs, rhs.slice(HALF, HALF, dim=0).permute((1, 0)), LAYOUT)
                    right = finish_block(right, block, row_scale * right_scale, empty, slot)
                    slot, phase = next_slot(slot, phase, STAGES)
            else:
                BOTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
                acc = gl.zeros((64, BLOCK_N), gl.float32, BOTH)
                for step in range(steps):
                    mbarrier.wait(full.index(slot), phase)
                    fence_async_shared()
                    rhs = rhs_bufs.index(slot).permute((1, 0)) if C_CONTIGUOUS else rhs_bufs.index(slot)
                    acc = accumulate(acc, lhs_bufs.index(slot * CONSUMERS + which), rhs, step, empty, slot, STAGES)
                    slot, phase = next_slot(slot, phase, STAGES)
                acc = finish_accumulating(acc, True, empty, slot, STAGES)
                left, right = acc.reshape([64, 2, HALF]).permute((0, 2, 1)).split()
            tma.store_wait(0)  # of the tile before
            if not GATED:
                buffer = out_bufs.index(which)
                _store(left, buffer, out_desc, out, row, end, column, N, N, True)
                tma.store_wait(0)
                _store(right, buffer, out_desc, out, row, end, column + HALF, N, N, True)
            else:
                inner = N // 2
                rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, left.type.layout))
                if HAS_PRE:
                    gate_buffer = pre_bufs.index(2 * which)
                    up_buffer = pre_bufs.index(2 * which + 1)
                    if INTERLEAVED:
                        _store(left, gate_buffer, pre_desc, pre, row, end, column, N, N, True)
                        _store(right, up_buffer, pre_desc, pre, row, end, column + HALF, N, N, True)
                    elif SCALES_PRE:
                        h = _activate(left, right, ACTIVATION).to(gl.bfloat16)  # first, as it takes fewer registers
                        at = rows * (N // 128) + tile_column
                        gate = _quantize(left, pre_scale + at, rows < end, POWER_OF_TWO)
                        _store(gate, gate_buffer, pre_desc, pre, row, end, column // 2, inner, N, True)
                        up = _quantize(right, pre_scale + (at + inner // 128), rows < end, POWER_OF_TWO)
                        _store(up, up_buffer, pre_desc, pre, row, end, inner + column // 2, N, N, True)
                    else:
                        fits = column // 2 + HALF <= inner  # else the box of gate would reach into up
                        _store(left, gate_buffer, pre_desc, pre, row, end, column // 2, inner, N, fits)
                        _store(right, up_buffer, pre_desc, pre, row, end, inner + column // 2, N, N, fits)
                if INTERLEAVED:
                    left, right = acc.reshape([64, HALF, 2]).split()
                if not SCALES_PRE:
                    h = _activate(left, right, ACTIVATION)
                if SCALES_H:
                    at = tile_column * row_scale_stride + scale_row - start + rows
                    h = _quantize(h, out_scale + at, rows < end, POWER_OF_TWO)
                if HAS_PRE and KIND == "16 bit":  # the buffer is that of gate
                    tma.store_wait(1)
                    _store(h, gate_buffer, out_desc, out, row, end, column // 2, inner, inner, True)
                else:
                    _store(h, out_bufs.index(which), out_desc, out, row, end, column // 2, inner, inner, True)
        tile += gl.num_programs(0)
        e, start, end, first_tile, scale_row = seek_tile(
            offs, M, E, columns, tile, e, start, end, first_tile, scale_row if SCALES_H else zero, BLOCK_M
        )
    tma.store_wait(0)


@gluon.jit
def _activate(gate, up, ACTIVATION: gl.constexpr):
    """act(gate) * up."""
    if ACTIVATION == "swiglu":
        value = gate * up / (1 + gl.exp(-gate))
    elif ACTIVATION == "swiglu_clamped":
        gate = gl.where(gate > 7.0, 7.0, gate)  # keeps NaN, as torch does
        up = gl.where(up > 7.0, 7.0, gl.where(up < -7.0, -7.0, up))
        value = gate * (up + 1) / (1 + gl.exp(-1.702 * gate))
    elif ACTIVATION == "geglu":
        value = 0.5 * gate * (1 + gl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "geglu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        value = gate * up / (1 + gl.exp(-2 * inner))  # (1 + tanh(x)) / 2 = 1 / (1 + exp(-2 x))
    else:
        gl.static_assert(ACTIVATION == "reglu")
        value = gl.where(gate < 0, 0.0, gate) * up
    return value


@gluon.jit
def _quantize(values, scales, is_row, POWER_OF_TWO: gl.constexpr):
    """Values (64, 128) over the scale of their row, which is stored; as if they were stored in bfloat16 before."""
    values = values.to(gl.bfloat16).to(gl.float32)
    scale = scale_of(gl.max(values.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1), 448.0, POWER_OF_TWO)
    gl.store(scales, scale, mask=is_row)
    return values * gl.expand_dims(1 / scale, 1)


@gluon.jit
def _store(values, buffer, desc, out, row, end, column, last_column, stride, fits):
    """Stores 64 by 128 values: whole tiles through shared memory, others masked. The ``buffer`` must be free."""
    values = values.to(out.dtype.element_ty)
    if fits & (row + 64 <= end):
        buffer.store(values)
        fence_async_shared()
        store(desc, [row, column], buffer)
    else:
        rows = gl.expand_dims(row + gl.arange(0, 64, layout=gl.SliceLayout(1, values.type.layout)), 1)
        columns = gl.expand_dims(column + gl.arange(0, 128, layout=gl.SliceLayout(0, values.type.layout)), 0)
        gl.store(out + rows.to(gl.int64) * stride + columns, values, mask=(rows < end) & (columns < last_column))


@gluon.jit(do_not_specialize=["M", "E", "row_scale_stride"])
def _kernel(
    x, w_desc, out_desc, pre_desc, x_scale, w_scale, out_scale, pre_scale, source, offs, out, pre, M, E, C, N,
    x_stride, row_scale_stride, scale_stride_c, scale_stride_n,
    KIND: gl.constexpr, ACTIVATION: gl.constexpr, INTERLEAVED: gl.constexpr, POWER_OF_TWO: gl.constexpr,
    C_CONTIGUOUS: gl.constexpr, EVEN_C: gl.constexpr, INT64: gl.constexpr, CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    REGISTERS: gl.constexpr, COPY_WARPS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    # Arguments of a warpgroup must be values: what does not exist has a placeholder, which nothing reads.
    HAS_PRE: gl.constexpr = pre is not None
    SCALES_PRE: gl.constexpr = pre_scale is not None
    GATED: gl.constexpr = ACTIVATION is not None
    if pre_desc is None:
        pre_desc = out_desc
    if pre is None:
        pre = out
    if x_scale is None:
        x_scale = offs
    if w_scale is None:
        w_scale = offs
    if out_scale is None:
        out_scale = offs
    if pre_scale is None:
        pre_scale = offs
    gl.static_assert(CONSUMERS == 2)
    lhs_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES * CONSUMERS, 64, BLOCK_K], w_desc.layout)
    RHS_BOX: gl.constexpr = [STAGES, BLOCK_N, BLOCK_K] if C_CONTIGUOUS else [STAGES, BLOCK_K, BLOCK_N]
    rhs_bufs = gl.allocate_shared_memory(w_desc.dtype, RHS_BOX, w_desc.layout)
    out_bufs = rhs_bufs
    if KIND == "blockwise" or not HAS_PRE:
        out_bufs = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, 64, 128], out_desc.layout)
    pre_bufs = out_bufs
    if HAS_PRE:
        pre_bufs = gl.allocate_shared_memory(pre_desc.dtype, [2 * CONSUMERS, 64, 128], pre_desc.layout)
    full, empty = make_barriers(STAGES, CONSUMERS, 32 * COPY_WARPS)
    gl.warp_specialize([
        (_consume, (0, lhs_bufs, rhs_bufs, out_bufs, pre_bufs, full, empty, out_desc, pre_desc, x_scale, w_scale,
            out_scale, pre_scale, source, offs, out, pre, M, E, C, N, row_scale_stride, scale_stride_c, scale_stride_n,
            KIND, ACTIVATION, HAS_PRE, SCALES_PRE, INTERLEAVED, POWER_OF_TWO, C_CONTIGUOUS, CONSUMERS, BLOCK_N,
            BLOCK_K, STAGES, GROUP_M)),
        (_consume, (1, lhs_bufs, rhs_bufs, out_bufs, pre_bufs, full, empty, out_desc, pre_desc, x_scale, w_scale,
            out_scale, pre_scale, source, offs, out, pre, M, E, C, N, row_scale_stride, scale_stride_c, scale_stride_n,
            KIND, ACTIVATION, HAS_PRE, SCALES_PRE, INTERLEAVED, POWER_OF_TWO, C_CONTIGUOUS, CONSUMERS, BLOCK_N,
            BLOCK_K, STAGES, GROUP_M)),
        (_produce, (w_desc, lhs_bufs, rhs_bufs, full, empty, x, source, offs, M, E, C, N, x_stride,
            GATED, INTERLEAVED, C_CONTIGUOUS, EVEN_C, INT64, CONSUMERS, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
            COPY_WARPS)),
    ], [4, COPY_WARPS], [REGISTERS, _REGISTERS - 2 * REGISTERS])  # fmt: skip
