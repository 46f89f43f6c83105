"""Quantizers: they write what `gemm` and `wgrad` read, with the numbers of `reference`, bit for bit.

A program has a tile of 128 by 128 in registers, from one read, and writes each layout that is wanted. It holds the
tile as four, of every fourth row: what is contiguous along rows is packed into words of four rows before it crosses
between threads, since single bytes cross slowly, and wrongly in Triton 3.6.0 where one tile is stored both ways.

Magnitudes are compared as the integers that their bits are, an order in which NaN is above Inf and Inf above the rest:
so a NaN reaches the scale of its block, as it does in torch. Divisions are rounded correctly (``div_rn``).

M, E, K, N: rows, groups, in and out features. D: K or N. T: tokens in blocks of 128 that start anew with each group.
R, C: lines and columns of a weight matrix as it lies in memory, C contiguous.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.kernels.groups import groups_in_blocks
from grouped_gemm.kernels.launch import on_device
from grouped_gemm.kernels.layouts import SCALE_ALIGNMENT, TOKEN_BLOCK
from grouped_gemm.recipes import Recipe

Operands = tuple[Tensor, Tensor, Tensor, Tensor]

_MOST_IN_REGISTERS = 16384  # values of a row
_WARPS = 8


def quantize_activations(x_MD: Tensor, offs: Tensor, recipe: Recipe, out: Operands) -> None:
    """Fills ``out``, from `layouts.activations`: what has no elements is not wanted.

    One read, blockwise and for the rows alone. A rowwise scale of the column layout needs its whole group first:
    there, a first read finds the scales and a second one writes.

    Args:
        x_MD: (M, D), contiguous D; bfloat16, float16 or float32.
        offs: (E,) int32, contiguous: the end row of each group. Any values are safe.
        recipe: rowwise or blockwise.
        out: data and scales by rows, data and scales by columns. Rows past the last group are left as they are;
            their columns become 0, scales 1.
    """
    by_row, row_scale, by_column, column_scale = out
    (num_rows, features), num_groups = x_MD.shape, offs.shape[0]
    rows, columns = by_row.dim() == 2, by_column.dim() == 2
    rowwise = recipe.block is None
    fp8 = (by_row if rows else by_column).dtype
    constants = {"LIMIT": torch.finfo(fp8).max, "POWER_OF_TWO": recipe.power_of_two_scales}
    with on_device(x_MD):
        if rowwise and not columns:
            if num_rows:
                width = triton.next_power_of_2(features)
                whole = width <= _MOST_IN_REGISTERS
                width = max(width, 128) if whole else 4096
                height = max(1, 8192 // width)
                _quantize_rows[(triton.cdiv(num_rows, height),)](
                    x_MD, by_row, row_scale, num_rows, features, x_MD.stride(0), by_row.stride(0),
                    **constants, BLOCK_M=height, BLOCK_D=width, WHOLE=whole, num_warps=_WARPS,
                )  # fmt: skip
            return
        num_blocks = num_rows // TOKEN_BLOCK + num_groups
        blocks = offs.new_empty(num_blocks, 4)
        _find_blocks[(triton.cdiv(num_blocks, 32),)](
            offs, blocks, num_rows, num_groups, num_blocks * TOKEN_BLOCK,
            E_PADDED=triton.next_power_of_2(num_groups + 1), BLOCK=TOKEN_BLOCK, SCALE_ALIGNMENT=SCALE_ALIGNMENT,
            AT_ONCE=32,
        )  # fmt: skip
        grid = (num_blocks * triton.cdiv(features, TOKEN_BLOCK),)
        row_amax = column_amax = None
        if rowwise:
            column_amax = x_MD.new_zeros(num_groups, features, dtype=torch.int32)
            row_amax = x_MD.new_zeros(num_rows, dtype=torch.int32) if rows else None
            column_scale.fill_(1)
            _amax[grid](x_MD, blocks, row_amax, column_amax, features, x_MD.stride(0), BLOCK=TOKEN_BLOCK, num_warps=_WARPS)
        _quantize_tiles[grid](
            x_MD, blocks, by_row, row_scale, by_column, column_scale, row_amax, column_amax,
            num_groups, features, x_MD.stride(0),
            by_row.stride(0), row_scale.stride(0) if rows else 0, by_column.stride(0),
            ROWS=rows, COLUMNS=columns, ROWWISE=rowwise, **constants,
            SCALE_ALIGNMENT=SCALE_ALIGNMENT, BLOCK=TOKEN_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


def quantize_weights(b_EKN: Tensor, recipe: Recipe, out: Operands) -> None:
    """Fills ``out``, from `layouts.weights`: what has no elements is not wanted. Rowwise, ``b`` is read twice.

    Args:
        b_EKN: (E, K, N), K or N contiguous; bfloat16, float16 or float32.
        recipe: rowwise or blockwise.
        out: data for forward and for dgrad, then their scales.
    """
    forward, dgrad, forward_scale, dgrad_scale = out
    rowwise = recipe.block is None
    # Scales run along lines (straight) or across them (transposed), whichever of K and N the lines are.
    straight, transposed, line_scale, column_scale = forward, dgrad, forward_scale, dgrad_scale
    w_ERC = b_EKN.transpose(1, 2)
    if b_EKN.stride(1) != 1:
        straight, transposed, line_scale, column_scale = dgrad, forward, dgrad_scale, forward_scale
        w_ERC = b_EKN
    if not rowwise:
        line_scale = forward_scale.transpose(1, 2) if b_EKN.stride(1) == 1 else forward_scale  # (E, R, C) blocks
    num_groups, lines, columns = w_ERC.shape
    fp8 = forward.dtype if forward.dim() == 3 else dgrad.dtype
    shape = lines, columns, w_ERC.stride(0), w_ERC.stride(1)
    grid = (triton.cdiv(lines, 128) * triton.cdiv(columns, 128), num_groups)
    with on_device(b_EKN):
        line_amax = column_amax = None
        if rowwise:
            line_amax = b_EKN.new_zeros(num_groups, lines, dtype=torch.int32)
            column_amax = b_EKN.new_zeros(num_groups, columns, dtype=torch.int32)
            _weight_amax[grid](w_ERC, line_amax, column_amax, *shape, BLOCK=128, num_warps=_WARPS)
        _quantize_weights[grid](
            w_ERC, straight, transposed, line_scale, column_scale, line_amax, column_amax, *shape,
            straight.stride(0), straight.stride(-2) if straight.dim() == 3 else 0,
            transposed.stride(0), transposed.stride(-2) if transposed.dim() == 3 else 0,
            *(line_scale.stride() if not rowwise else (0, 0, 0)),
            STRAIGHT=straight.dim() == 3, TRANSPOSED=transposed.dim() == 3, ROWWISE=rowwise,
            LIMIT=torch.finfo(fp8).max, POWER_OF_TWO=recipe.power_of_two_scales, BLOCK=128, num_warps=_WARPS,
        )  # fmt: skip


@triton.jit
def _magnitude(x):
    """The bits of |x| in fp32 as integers, which are in the order of the values, NaN above all."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(magnitude, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`reference.scales` of the largest `_magnitude` of each block."""
    amax = magnitude.to(tl.float32, bitcast=True)
    amax = tl.maximum(amax, LIMIT * 2.0**-126, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.div_rn(amax, tl.full(amax.shape, LIMIT, tl.float32))
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, rounded, scale)
    return scale


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _to_fp8(x, inverse, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """`reference.to_fp8`; ``inverse`` broadcasts against ``x``."""
    scaled = x.to(tl.float32) * inverse
    return tl.clamp(scaled, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)


@triton.jit
def _load_quarter(source, stride, first, rows_left, ds, D, BLOCK: tl.constexpr):
    """Every fourth row of a tile from row ``first`` on: (BLOCK / 4, BLOCK), zero past ``rows_left`` and D."""
    rows = 4 * tl.arange(0, BLOCK // 4) + first
    mask = (rows < rows_left)[:, None] & (ds < D)[None, :]
    return tl.load(source + rows.to(tl.int64)[:, None] * stride + ds[None, :], mask=mask, other=0)


@triton.jit
def _store_quarter(target, stride, first, rows_left, ds, D, data, BLOCK: tl.constexpr):
    rows = 4 * tl.arange(0, BLOCK // 4) + first
    mask = (rows < rows_left)[:, None] & (ds < D)[None, :]
    tl.store(target + rows.to(tl.int64)[:, None] * stride + ds[None, :], data, mask=mask)


@triton.jit
def _byte(data, i: tl.constexpr):
    return data.to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * i)


@triton.jit
def _store_transposed(target, stride, rows_left, ds, D, d0, d1, d2, d3, BLOCK: tl.constexpr):
    """Stores four quarters with rows contiguous. Lines start at multiples of 4, and may be written up to the next."""
    words = tl.arange(0, BLOCK // 4)
    packed = _byte(d0, 0) | _byte(d1, 1) | _byte(d2, 2) | _byte(d3, 3)
    targets = target.to(tl.pointer_type(tl.uint32)) + ds.to(tl.int64)[None, :] * (stride // 4) + words[:, None]
    tl.store(targets, packed, mask=(4 * words < rows_left)[:, None] & (ds < D)[None, :])


@triton.jit
def _column_max(v0, v1, v2, v3):
    """The largest `_magnitude` of each column of a tile."""
    return tl.max(
        tl.maximum(tl.maximum(_magnitude(v0), _magnitude(v1)), tl.maximum(_magnitude(v2), _magnitude(v3))), 0
    )


@triton.jit(do_not_specialize=["M"])
def _quantize_rows(
    x, data, scales, M, D, x_stride, data_stride,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Whole rows, in registers where they fit; else the second time they come from L2."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    sources = x + rows.to(tl.int64)[:, None] * x_stride + ds[None, :]
    targets = data + rows.to(tl.int64)[:, None] * data_stride + ds[None, :]
    if WHOLE:
        mask = (rows < M)[:, None] & (ds < D)[None, :]
        values = tl.load(sources, mask=mask, other=0)
        scale = _scale(tl.max(_magnitude(values), 1), LIMIT, POWER_OF_TWO)
        tl.store(targets, _to_fp8(values, _inverse(scale)[:, None], LIMIT, data.dtype.element_ty), mask=mask)
    else:
        largest = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
        for d in range(0, D, BLOCK_D):
            mask = (rows < M)[:, None] & (ds < D - d)[None, :]
            largest = tl.maximum(largest, _magnitude(tl.load(sources + d, mask=mask, other=0)))
        scale = _scale(tl.max(largest, 1), LIMIT, POWER_OF_TWO)
        inverse = _inverse(scale)[:, None]
        for d in range(0, D, BLOCK_D):
            mask = (rows < M)[:, None] & (ds < D - d)[None, :]
            values = tl.load(sources + d, mask=mask, other=0)
            tl.store(targets + d, _to_fp8(values, inverse, LIMIT, data.dtype.element_ty), mask=mask)
    tl.store(scales + rows, scale, mask=rows < M)


@triton.jit(do_not_specialize=["M", "E", "T"])
def _find_blocks(
    offs, blocks, M, E, T,
    E_PADDED: tl.constexpr, BLOCK: tl.constexpr, SCALE_ALIGNMENT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Of each block of tokens: its group, E past the last one; its first row; rows from there to the end of its group,
    0 past the last one; where the scales of its rows begin. (T / BLOCK, 4)."""
    starts, ends, first_blocks, last_blocks = groups_in_blocks(offs, M, E, BLOCK, E_PADDED)
    padded = tl.cdiv(ends - starts, SCALE_ALIGNMENT) * SCALE_ALIGNMENT
    groups = tl.arange(0, E_PADDED)
    block = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    e = tl.minimum(tl.sum((last_blocks[None, :] <= block[:, None]).to(tl.int32), 1), E)
    is_own = groups[None, :] == e[:, None]
    below = (block - tl.sum(tl.where(is_own, first_blocks[None, :], 0), 1)) * BLOCK
    row = tl.sum(tl.where(is_own, starts[None, :], 0), 1) + below
    end = tl.sum(tl.where(is_own, ends[None, :], 0), 1)
    scale_row = tl.sum(tl.where(groups[None, :] < e[:, None], padded[None, :], 0), 1) + below
    target = blocks + 4 * block
    mask = block * BLOCK < T
    tl.store(target, e, mask=mask)
    tl.store(target + 1, row, mask=mask)
    tl.store(target + 2, tl.where(e < E, end - row, 0), mask=mask)
    tl.store(target + 3, scale_row, mask=mask)


@triton.jit
def _amax(x, blocks, row_amax, column_amax, D, x_stride, BLOCK: tl.constexpr):
    """The largest `_magnitude` of each column of each group (E, D), and of each row (M,) if wanted; zero before."""
    d_blocks = tl.cdiv(D, BLOCK)
    block = blocks + 4 * (tl.program_id(0) // d_blocks)
    ds = tl.program_id(0) % d_blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(block + 1)
    rows_left = tl.load(block + 2)
    if rows_left > 0:
        source = x + row.to(tl.int64) * x_stride
        v0 = _load_quarter(source, x_stride, 0, rows_left, ds, D, BLOCK)
        v1 = _load_quarter(source, x_stride, 1, rows_left, ds, D, BLOCK)
        v2 = _load_quarter(source, x_stride, 2, rows_left, ds, D, BLOCK)
        v3 = _load_quarter(source, x_stride, 3, rows_left, ds, D, BLOCK)
        columns = column_amax + tl.load(block).to(tl.int64) * D + ds
        tl.atomic_max(columns, _column_max(v0, v1, v2, v3), mask=ds < D, sem="relaxed")
        if row_amax is not None:
            _row_amax(row_amax + row, 0, rows_left, v0, BLOCK)
            _row_amax(row_amax + row, 1, rows_left, v1, BLOCK)
            _row_amax(row_amax + row, 2, rows_left, v2, BLOCK)
            _row_amax(row_amax + row, 3, rows_left, v3, BLOCK)


@triton.jit
def _row_amax(amax, first, rows_left, values, BLOCK: tl.constexpr):
    rows = 4 * tl.arange(0, BLOCK // 4) + first
    tl.atomic_max(amax + rows, tl.max(_magnitude(values), 1), mask=rows < rows_left, sem="relaxed")


@triton.jit
def _quantize_quarter(
    source, source_stride, target, stride, scales, amax, first, rows_left, scales_left, ds, D,
    ROWWISE: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Data and scales of every fourth row. Rowwise, scales are those of ``amax``, of whole rows."""
    rows = 4 * tl.arange(0, BLOCK // 4) + first
    values = _load_quarter(source, source_stride, first, rows_left, ds, D, BLOCK)
    if ROWWISE:
        scale = _scale(tl.load(amax + rows, mask=rows < rows_left, other=0), LIMIT, POWER_OF_TWO)
    else:
        scale = _scale(tl.max(_magnitude(values), 1), LIMIT, POWER_OF_TWO)
    data = _to_fp8(values, _inverse(scale)[:, None], LIMIT, target.dtype.element_ty)
    _store_quarter(target, stride, first, rows_left, ds, D, data, BLOCK)
    tl.store(scales + rows, scale, mask=rows < scales_left)


@triton.jit(do_not_specialize=["E"])
def _quantize_tiles(
    x, blocks, by_row, row_scales, by_column, column_scales, row_amax, column_amax,
    E, D, x_stride, row_stride, row_scale_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWWISE: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    SCALE_ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one group by BLOCK features: one read, and each layout that is wanted.

    Blockwise, the tile has its own scales; rowwise, they are those of `_amax`: (M,) of rows, (E, D) of columns.
    """
    d_blocks = tl.cdiv(D, BLOCK)
    block = tl.program_id(0) // d_blocks
    d_block = tl.program_id(0) % d_blocks
    ds = d_block * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(blocks + 4 * block)
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    if COLUMNS or rows_left > 0:  # past the last group, columns are zero
        source = x + row.to(tl.int64) * x_stride
        if COLUMNS:
            v0 = _load_quarter(source, x_stride, 0, rows_left, ds, D, BLOCK)
            v1 = _load_quarter(source, x_stride, 1, rows_left, ds, D, BLOCK)
            v2 = _load_quarter(source, x_stride, 2, rows_left, ds, D, BLOCK)
            v3 = _load_quarter(source, x_stride, 3, rows_left, ds, D, BLOCK)
            if ROWWISE:
                lines = tl.minimum(e, E - 1).to(tl.int64) * D + ds  # past the last group any scale will do
                scale = _scale(tl.load(column_amax + lines, mask=ds < D, other=0), LIMIT, POWER_OF_TWO)
                if rows_left > 0:  # each block of the group stores the same
                    tl.store(column_scales + lines, scale, mask=ds < D)
            else:
                scale = tl.where(rows_left > 0, _scale(_column_max(v0, v1, v2, v3), LIMIT, POWER_OF_TWO), 1.0)
                tl.store(column_scales + block.to(tl.int64) * D + ds, scale, mask=ds < D)
            inverse = _inverse(scale)[None, :]
            DTYPE: tl.constexpr = by_column.dtype.element_ty
            _store_transposed(
                by_column + block.to(tl.int64) * BLOCK, column_stride, BLOCK, ds, D,
                _to_fp8(v0, inverse, LIMIT, DTYPE), _to_fp8(v1, inverse, LIMIT, DTYPE),
                _to_fp8(v2, inverse, LIMIT, DTYPE), _to_fp8(v3, inverse, LIMIT, DTYPE), BLOCK,
            )  # fmt: skip
        if ROWS:
            target = by_row + row.to(tl.int64) * row_stride
            if ROWWISE:
                scales = row_scales + row
                scales_left = tl.where(d_block == 0, rows_left, 0)
                amax = row_amax + row
            else:
                scales = row_scales + d_block.to(tl.int64) * row_scale_stride + tl.load(blocks + 4 * block + 3)
                scales_left = tl.cdiv(rows_left, SCALE_ALIGNMENT) * SCALE_ALIGNMENT
                amax = row_scales
            for i in tl.static_range(4):  # loaded once more, from L1: so that few registers are in use at once
                _quantize_quarter(
                    source, x_stride, target, row_stride, scales, amax, i, rows_left, scales_left, ds, D,
                    ROWWISE, LIMIT, POWER_OF_TWO, BLOCK,
                )  # fmt: skip


@triton.jit
def _weight_amax(
    w, line_amax, column_amax, R, C, w_stride_e, w_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest `_magnitude` of each line (E, R) and each column (E, C) of each matrix; zero before."""
    c_blocks = tl.cdiv(C, BLOCK)
    e = tl.program_id(1).to(tl.int64)
    rs = tl.program_id(0) // c_blocks * BLOCK + tl.arange(0, BLOCK)
    cs = tl.program_id(0) % c_blocks * BLOCK + tl.arange(0, BLOCK)
    sources = w + e * w_stride_e + rs.to(tl.int64)[:, None] * w_stride + cs[None, :]
    magnitude = _magnitude(tl.load(sources, mask=(rs < R)[:, None] & (cs < C)[None, :], other=0))
    tl.atomic_max(line_amax + e * R + rs, tl.max(magnitude, 1), mask=rs < R, sem="relaxed")
    tl.atomic_max(column_amax + e * C + cs, tl.max(magnitude, 0), mask=cs < C, sem="relaxed")


@triton.jit
def _quantize_weights(
    w, straight, transposed, line_scales, column_scales, line_amax, column_amax,
    R, C, w_stride_e, w_stride, straight_stride_e, straight_stride, transposed_stride_e, transposed_stride,
    scale_stride_e, scale_stride_r, scale_stride_c,
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, ROWWISE: tl.constexpr,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A square tile of one matrix: one read, and each layout that is wanted.

    Blockwise, the tile has one scale, in ``line_scales``. Rowwise, scales are those of `_weight_amax`.
    """
    c_blocks = tl.cdiv(C, BLOCK)
    r_block = tl.program_id(0) // c_blocks
    c_block = tl.program_id(0) % c_blocks
    e = tl.program_id(1).to(tl.int64)
    cs = c_block * BLOCK + tl.arange(0, BLOCK)
    lines_left = R - r_block * BLOCK
    source = w + e * w_stride_e + r_block.to(tl.int64) * BLOCK * w_stride
    v0 = _load_quarter(source, w_stride, 0, lines_left, cs, C, BLOCK)
    v1 = _load_quarter(source, w_stride, 1, lines_left, cs, C, BLOCK)
    v2 = _load_quarter(source, w_stride, 2, lines_left, cs, C, BLOCK)
    v3 = _load_quarter(source, w_stride, 3, lines_left, cs, C, BLOCK)
    if not ROWWISE:
        scale = _scale(tl.max(_column_max(v0, v1, v2, v3), 0, keep_dims=True), LIMIT, POWER_OF_TWO)
        target = line_scales + e * scale_stride_e + r_block * scale_stride_r + c_block * scale_stride_c
        tl.store(target + tl.zeros((1,), tl.int32), scale)
        block_inverse = _inverse(scale)[:, None]
    DTYPE: tl.constexpr = straight.dtype.element_ty if STRAIGHT else transposed.dtype.element_ty
    if TRANSPOSED:
        if ROWWISE:
            scale = _scale(tl.load(column_amax + e * C + cs, mask=cs < C, other=0), LIMIT, POWER_OF_TWO)
            if r_block == 0:
                tl.store(column_scales + e * C + cs, scale, mask=cs < C)
            inverse = _inverse(scale)[None, :]
        else:
            inverse = block_inverse
        _store_transposed(
            transposed + e * transposed_stride_e + r_block * BLOCK, transposed_stride, lines_left, cs, C,
            _to_fp8(v0, inverse, LIMIT, DTYPE), _to_fp8(v1, inverse, LIMIT, DTYPE),
            _to_fp8(v2, inverse, LIMIT, DTYPE), _to_fp8(v3, inverse, LIMIT, DTYPE), BLOCK,
        )  # fmt: skip
    if STRAIGHT:
        target = straight + e * straight_stride_e + r_block.to(tl.int64) * BLOCK * straight_stride
        for i in tl.static_range(4):
            values = v0 if i == 0 else v1 if i == 1 else v2 if i == 2 else v3
            if ROWWISE:
                rs = 4 * tl.arange(0, BLOCK // 4) + i
                lines = e * R + r_block * BLOCK + rs
                scale = _scale(tl.load(line_amax + lines, mask=rs < lines_left, other=0), LIMIT, POWER_OF_TWO)
                if c_block == 0:
                    tl.store(line_scales + lines, scale, mask=rs < lines_left)
                inverse = _inverse(scale)[:, None]
            else:
                inverse = block_inverse
            data = _to_fp8(values, inverse, LIMIT, DTYPE)
            _store_quarter(target, straight_stride, i, lines_left, cs, C, data, BLOCK)
