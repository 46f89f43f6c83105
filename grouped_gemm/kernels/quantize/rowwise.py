"""Kernels that quantize with one scale per row, and in the column layout one per column of a group.

Rows alone are quantized row by row (`quantize_rows_alone`). The column layout's scales need the whole group: a first
kernel reads everything and finds the largest magnitudes (`find_amax`), a second one reads it again and writes both
layouts (`quantize_tiles`). Weights are quantized in the same two steps.

M, E, D: rows, groups, features. R, C: lines and columns of a weight matrix as it lies in memory, C contiguous.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from grouped_gemm.kernels.common.groups import tile_position
from grouped_gemm.kernels.common.scaling import inverse_of, magnitude, scale_of, to_fp8
from grouped_gemm.kernels.quantize.primitives import (
    load_quarter,
    quantize_rows,
    store_transposed,
    tile_of_program,
)


@triton.jit(do_not_specialize=["M"])
def quantize_rows_alone(
    x, data, scales, M, D, x_stride, data_stride,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Quantizes BLOCK_M whole rows. WHOLE: they fit into registers; otherwise they are read twice, then from L2."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    sources = x + rows.to(tl.int64)[:, None] * x_stride + ds[None, :]
    targets = data + rows.to(tl.int64)[:, None] * data_stride + ds[None, :]
    if WHOLE:
        mask = (rows < M)[:, None] & (ds < D)[None, :]
        values = tl.load(sources, mask=mask, other=0)
        scale = scale_of(tl.max(magnitude(values), 1), LIMIT, POWER_OF_TWO)
        tl.store(targets, to_fp8(values, inverse_of(scale)[:, None], LIMIT, data.dtype.element_ty, NVIDIA), mask=mask)
    else:
        largest = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
        for d in range(0, D, BLOCK_D):
            mask = (rows < M)[:, None] & (ds < D - d)[None, :]
            largest = tl.maximum(largest, magnitude(tl.load(sources + d, mask=mask, other=0)))
        scale = scale_of(tl.max(largest, 1), LIMIT, POWER_OF_TWO)
        inverse = inverse_of(scale)[:, None]
        for d in range(0, D, BLOCK_D):
            mask = (rows < M)[:, None] & (ds < D - d)[None, :]
            values = tl.load(sources + d, mask=mask, other=0)
            tl.store(targets + d, to_fp8(values, inverse, LIMIT, data.dtype.element_ty, NVIDIA), mask=mask)
    tl.store(scales + rows, scale, mask=rows < M)


@triton.jit
def find_amax(x, blocks, row_amax, column_amax, D, x_stride, BLOCK: tl.constexpr, GROUP_M: tl.constexpr):
    """Finds the largest magnitude of each column of each group, (E, D), and of each row, (M,), if that is wanted.

    Both outputs hold zeros at the start, since programs update them by atomics.
    """
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    if rows_left > 0:
        largest = tl.zeros((BLOCK // 4, BLOCK), tl.int32)
        for i in tl.static_range(4):
            values = load_quarter(x + row.to(tl.int64) * x_stride + d, x_stride, i, rows_left, D - d, BLOCK)
            magnitudes = magnitude(values)
            largest = tl.maximum(largest, magnitudes)
            if row_amax is not None:
                rows = 4 * tl.arange(0, BLOCK // 4) + i
                tl.atomic_max(row_amax + row + rows, tl.max(magnitudes, 1), mask=rows < rows_left, sem="relaxed")
        ds = d + tl.arange(0, BLOCK)
        columns = column_amax + tl.load(blocks + 4 * block).to(tl.int64) * D + ds
        tl.atomic_max(columns, tl.max(largest, 0), mask=ds < D, sem="relaxed")


@triton.jit(do_not_specialize=["E"])
def quantize_tiles(
    x, blocks, by_row, row_scales, by_column, column_scales, row_amax, column_amax,
    E, D, x_stride, row_stride,
    ROWS: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Writes the column layout of BLOCK rows of one group by BLOCK features, and their rows if they are wanted."""
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    ds = d + tl.arange(0, BLOCK)
    e = tl.load(blocks + 4 * block)
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    source = x + row.to(tl.int64) * x_stride + d
    if ROWS:  # noqa: SIM102 - decided by the compiler
        if rows_left > 0:
            quantize_rows(
                source, x_stride, by_row + row.to(tl.int64) * row_stride + d, row_stride,
                row_amax + row, row_scales + row, rows_left, tl.where(d_block == 0, rows_left, 0), D - d,
                LIMIT, POWER_OF_TWO, NVIDIA, BLOCK,
            )  # fmt: skip
    lines = tl.minimum(e, E - 1).to(tl.int64) * D + ds  # past the last group all values are zero: any scale will do
    scale = scale_of(tl.load(column_amax + lines, mask=ds < D, other=0), LIMIT, POWER_OF_TWO)
    if rows_left > 0:  # every block of the group stores the same scales
        tl.store(column_scales + lines, scale, mask=ds < D)
    store_transposed(
        source, x_stride, by_column + (block.to(tl.int64) * D + d) * BLOCK, BLOCK,
        inverse_of(scale), rows_left, BLOCK, D - d, LIMIT, by_column.dtype.element_ty, NVIDIA, BLOCK,
    )  # fmt: skip


@triton.jit
def find_weight_amax(w, line_amax, column_amax, R, C, w_stride_e, w_stride, BLOCK: tl.constexpr):
    """Finds the largest magnitude of each line, (E, R), and of each column, (E, C), where they are wanted.

    Both outputs hold zeros at the start, since programs update them by atomics.
    """
    c_blocks = tl.cdiv(C, BLOCK)
    e = tl.program_id(1).to(tl.int64)
    rs = tl.program_id(0) // c_blocks * BLOCK + tl.arange(0, BLOCK)
    cs = tl.program_id(0) % c_blocks * BLOCK + tl.arange(0, BLOCK)
    sources = w + e * w_stride_e + rs.to(tl.int64)[:, None] * w_stride + cs[None, :]
    magnitudes = magnitude(tl.load(sources, mask=(rs < R)[:, None] & (cs < C)[None, :], other=0))
    if line_amax is not None:
        tl.atomic_max(line_amax + e * R + rs, tl.max(magnitudes, 1), mask=rs < R, sem="relaxed")
    if column_amax is not None:
        tl.atomic_max(column_amax + e * C + cs, tl.max(magnitudes, 0), mask=cs < C, sem="relaxed")


@triton.jit
def quantize_weight_tiles(
    w, straight, transposed, line_scales, column_scales, line_amax, column_amax,
    R, C, w_stride_e, w_stride, straight_stride_e, straight_stride, transposed_stride_e, transposed_stride,
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Writes a square tile of one matrix in each layout that is wanted, with the scales of its lines and columns."""
    r_block, c_block = tile_position(tl.program_id(0), tl.cdiv(R, BLOCK), tl.cdiv(C, BLOCK), GROUP_M)
    e = tl.program_id(1).to(tl.int64)
    r = r_block * BLOCK
    c = c_block * BLOCK
    source = w + e * w_stride_e + r.to(tl.int64) * w_stride + c
    if STRAIGHT:
        quantize_rows(
            source, w_stride, straight + e * straight_stride_e + r.to(tl.int64) * straight_stride + c, straight_stride,
            line_amax + e * R + r, line_scales + e * R + r, R - r, tl.where(c_block == 0, R - r, 0), C - c,
            LIMIT, POWER_OF_TWO, NVIDIA, BLOCK,
        )  # fmt: skip
    if TRANSPOSED:
        cs = c + tl.arange(0, BLOCK)
        scale = scale_of(tl.load(column_amax + e * C + cs, mask=cs < C, other=0), LIMIT, POWER_OF_TWO)
        if r_block == 0:
            tl.store(column_scales + e * C + cs, scale, mask=cs < C)
        target = transposed + e * transposed_stride_e + c.to(tl.int64) * transposed_stride + r
        store_transposed(
            source, w_stride, target, transposed_stride, inverse_of(scale), R - r, R - r, C - c,
            LIMIT, transposed.dtype.element_ty, NVIDIA, BLOCK,
        )  # fmt: skip
