"""Quantizers: they write what `gemm` and `wgrad` read, with the numbers of `reference`, bit for bit.

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

from grouped_gemm.kernels.groups import groups_in_blocks, pick
from grouped_gemm.kernels.launch import on_device
from grouped_gemm.kernels.layouts import TOKEN_BLOCK
from grouped_gemm.recipes import Recipe

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def quantize_activations(x_MD: Tensor, offs: Tensor, recipe: Recipe, out: Operands) -> None:
    """Fills ``out``, from `layouts.activations`: what has no elements is not wanted.

    Blockwise, one read writes both layouts. Rowwise, a scale of the column layout needs its whole group first, so
    that ``x_MD`` is read once for the rows and twice for the columns.

    Args:
        x_MD: (M, D), contiguous D; bfloat16, float16 or float32.
        offs: (E,) int32, contiguous: the end row of each group. Any values are safe.
        recipe: rowwise or blockwise.
        out: data and scales by rows, data and scales by columns. Columns past the last group become 0, scales 1.
    """
    by_row, row_scale, by_column, column_scale = out
    (num_rows, features), num_groups = x_MD.shape, offs.shape[0]
    rows, columns = by_row.dim() == 2, by_column.dim() == 2
    rowwise = recipe.block is None
    fp8 = (by_row if rows else by_column).dtype
    constants = {"LIMIT": torch.finfo(fp8).max, "POWER_OF_TWO": recipe.power_of_two_scales}
    with on_device(x_MD):
        if rowwise and rows and num_rows:
            _quantize_rows[(triton.cdiv(num_rows, 8),)](
                x_MD, by_row, row_scale, num_rows, features, x_MD.stride(0), by_row.stride(0),
                **constants, BLOCK_M=8, BLOCK_D=1024, num_warps=8,
            )  # fmt: skip
        if not columns and (rowwise or not num_rows):
            return
        blocks = num_rows // TOKEN_BLOCK + num_groups + 1 if columns else triton.cdiv(num_rows, TOKEN_BLOCK)
        grid = (blocks * triton.cdiv(features, TOKEN_BLOCK),)
        e_padded = triton.next_power_of_2(num_groups + 1)
        amax = None
        if rowwise:
            amax = x_MD.new_zeros(num_groups, features, dtype=torch.int32)
            column_scale.fill_(1)
            _column_amax[grid](
                x_MD, offs, amax, num_rows, num_groups, features, x_MD.stride(0),
                E_PADDED=e_padded, BLOCK=TOKEN_BLOCK, num_warps=8,
            )  # fmt: skip
        _quantize_tiles[grid](
            x_MD, offs, by_row, row_scale, by_column, column_scale, amax,
            num_rows, num_groups, features, x_MD.stride(0),
            by_row.stride(0), by_column.stride(0), by_column.shape[-1],
            ROWS=rows and not rowwise, COLUMNS=columns, **constants,
            E_PADDED=e_padded, BLOCK=TOKEN_BLOCK, STEP=32, num_warps=8,
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
            _weight_amax[grid](w_ERC, line_amax, column_amax, *shape, BLOCK=128, num_warps=8)
        _quantize_weights[grid](
            w_ERC, straight, transposed, line_scale, column_scale, line_amax, column_amax, *shape,
            straight.stride(0), straight.stride(-2) if straight.dim() == 3 else 0,
            transposed.stride(0), transposed.stride(-2) if transposed.dim() == 3 else 0,
            *(line_scale.stride() if not rowwise else (0, 0, 0)),
            STRAIGHT=straight.dim() == 3, TRANSPOSED=transposed.dim() == 3, ROWWISE=rowwise,
            LIMIT=torch.finfo(fp8).max, POWER_OF_TWO=recipe.power_of_two_scales, BLOCK=128, num_warps=8,
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


@triton.jit(do_not_specialize=["M"])
def _quantize_rows(
    x, data, scales, M, D, x_stride, data_stride,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Whole rows; the second time they come from L2."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    sources = x + rows.to(tl.int64)[:, None] * x_stride + ds[None, :]
    targets = data + rows.to(tl.int64)[:, None] * data_stride + ds[None, :]
    largest = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
    for d in range(0, D, BLOCK_D):
        mask = (rows < M)[:, None] & (ds < D - d)[None, :]
        largest = tl.maximum(largest, _magnitude(tl.load(sources + d, mask=mask, other=0)))
    scale = _scale(tl.max(largest, 1), LIMIT, POWER_OF_TWO)
    tl.store(scales + rows, scale, mask=rows < M)
    inverse = _inverse(scale)[:, None]
    for d in range(0, D, BLOCK_D):
        mask = (rows < M)[:, None] & (ds < D - d)[None, :]
        values = tl.load(sources + d, mask=mask, other=0)
        tl.store(targets + d, _to_fp8(values, inverse, LIMIT, data.dtype.element_ty), mask=mask)


@triton.jit
def _block_rows(offs, block, M, E, E_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Group of a block, its first row, one past the last row of the group, the first block of the group."""
    starts, ends, first_blocks, last_blocks = groups_in_blocks(offs, M, E, BLOCK, E_PADDED)
    e = tl.sum((last_blocks <= block).to(tl.int32))
    first_block = pick(first_blocks, e)
    return e, pick(starts, e) + (block - first_block) * BLOCK, pick(ends, e), first_block


@triton.jit(do_not_specialize=["M", "E"])
def _column_amax(x, offs, amax, M, E, D, x_stride, E_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest `_magnitude` of each column of each group: (E, D), zero before."""
    d_blocks = tl.cdiv(D, BLOCK)
    e, row, end, _ = _block_rows(offs, tl.program_id(0) // d_blocks, M, E, E_PADDED, BLOCK)
    if e < E:
        rows = row + tl.arange(0, BLOCK)
        ds = tl.program_id(0) % d_blocks * BLOCK + tl.arange(0, BLOCK)
        sources = x + rows.to(tl.int64)[:, None] * x_stride + ds[None, :]
        values = tl.load(sources, mask=(rows < end)[:, None] & (ds < D)[None, :], other=0)
        tl.atomic_max(amax + e.to(tl.int64) * D + ds, tl.max(_magnitude(values), 0), mask=ds < D, sem="relaxed")


@triton.jit(do_not_specialize=["M", "E"])
def _quantize_tiles(
    x, offs, by_row, row_scales, by_column, column_scales, column_amax,
    M, E, D, x_stride, row_stride, column_stride, T,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    E_PADDED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one group by BLOCK features: one read, and each layout that is wanted.

    It goes through them in steps, in few registers, so that many programs fit a multiprocessor and keep its memory
    busy. The column layout needs the whole block first: its second look is answered by the caches.

    ``column_amax``: (E, D) from `_column_amax`, for scales of whole groups; None: a block has its own scales.
    """
    d_blocks = tl.cdiv(D, BLOCK)
    block = tl.program_id(0) // d_blocks
    d_block = tl.program_id(0) % d_blocks
    if COLUMNS:
        e, row, end, first_block = _block_rows(offs, block, M, E, E_PADDED, BLOCK)
    else:
        row = block * BLOCK
        end = M
    ds = d_block * BLOCK + tl.arange(0, BLOCK)
    sources = x + tl.cast(row, tl.int64) * x_stride + ds[None, :]
    OWN_SCALES: tl.constexpr = column_amax is None
    if OWN_SCALES:
        largest = tl.zeros((STEP, BLOCK), tl.int32)
        for step in range(0, BLOCK, STEP):
            steps = step + tl.arange(0, STEP)
            mask = (row + steps < end)[:, None] & (ds < D)[None, :]
            values = tl.load(sources + steps.to(tl.int64)[:, None] * x_stride, mask=mask, other=0)
            magnitude = _magnitude(values)
            if ROWS:
                rows = row + steps
                scale = _scale(tl.max(magnitude, 1), LIMIT, POWER_OF_TWO)
                tl.store(row_scales + d_block.to(tl.int64) * M + rows, scale, mask=rows < end)
                data = _to_fp8(values, _inverse(scale)[:, None], LIMIT, by_row.dtype.element_ty)
                tl.store(by_row + rows.to(tl.int64)[:, None] * row_stride + ds[None, :], data, mask=mask)
            if COLUMNS:
                largest = tl.maximum(largest, magnitude)
    if COLUMNS:
        in_group = e < E
        if OWN_SCALES:
            scale = tl.where(in_group, _scale(tl.max(largest, 0), LIMIT, POWER_OF_TWO), 1.0)
            if block * BLOCK < T:
                tl.store(column_scales + block.to(tl.int64) * D + ds, scale, mask=ds < D)
        else:
            lines = tl.minimum(e, E - 1).to(tl.int64) * D + ds  # past the last group any scale will do: values are 0
            scale = _scale(tl.load(column_amax + lines, mask=ds < D, other=0), LIMIT, POWER_OF_TWO)
            if in_group & (block == first_block):
                tl.store(column_scales + lines, scale, mask=ds < D)
        inverse = _inverse(scale)[None, :]
        end = tl.where(in_group, end, row)  # zeros past the last group
        targets = by_column + ds.to(tl.int64)[None, :] * column_stride + block * BLOCK
        for step in range(0, BLOCK, STEP):
            steps = step + tl.arange(0, STEP)
            mask = (row + steps < end)[:, None] & (ds < D)[None, :]
            values = tl.load(sources + steps.to(tl.int64)[:, None] * x_stride, mask=mask, other=0)
            data = _to_fp8(values, inverse, LIMIT, by_column.dtype.element_ty)
            in_data = (block * BLOCK + steps < T)[:, None] & (ds < D)[None, :]
            tl.store(targets + steps[:, None], data, mask=in_data)


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
    rs = r_block * BLOCK + tl.arange(0, BLOCK)
    cs = c_block * BLOCK + tl.arange(0, BLOCK)
    mask = (rs < R)[:, None] & (cs < C)[None, :]
    values = tl.load(w + e * w_stride_e + rs.to(tl.int64)[:, None] * w_stride + cs[None, :], mask=mask, other=0)
    if not ROWWISE:
        scale = _scale(tl.max(tl.max(_magnitude(values), 1, keep_dims=True), 0, keep_dims=True), LIMIT, POWER_OF_TWO)
        target = line_scales + e * scale_stride_e + r_block * scale_stride_r + c_block * scale_stride_c
        tl.store(target + tl.zeros((1, 1), tl.int32), scale)
        inverse = _inverse(scale)
    if STRAIGHT:
        if ROWWISE:
            scale = _scale(tl.load(line_amax + e * R + rs, mask=rs < R, other=0), LIMIT, POWER_OF_TWO)
            if c_block == 0:
                tl.store(line_scales + e * R + rs, scale, mask=rs < R)
            inverse = _inverse(scale)[:, None]
        data = _to_fp8(values, inverse, LIMIT, straight.dtype.element_ty)
        targets = straight + e * straight_stride_e + rs.to(tl.int64)[:, None] * straight_stride + cs[None, :]
        tl.store(targets, data, mask=mask)
    if TRANSPOSED:
        if ROWWISE:
            scale = _scale(tl.load(column_amax + e * C + cs, mask=cs < C, other=0), LIMIT, POWER_OF_TWO)
            if r_block == 0:
                tl.store(column_scales + e * C + cs, scale, mask=cs < C)
            inverse = _inverse(scale)[None, :]
        data = _to_fp8(values, inverse, LIMIT, transposed.dtype.element_ty)
        targets = transposed + e * transposed_stride_e + cs.to(tl.int64)[None, :] * transposed_stride + rs[:, None]
        tl.store(targets, data, mask=mask)
